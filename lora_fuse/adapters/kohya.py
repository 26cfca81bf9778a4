"""kohya's flat files: ``lora_unet_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora_fuse.adapters._findings import Findings
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.adapters.raw import RawLayer, build_layer, check_tensor

# the end of a key -> role
_ROLES = {
    ".lora_down.weight": "lora_a",
    ".lora_up.weight": "lora_b",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
}
# parts of keys that are not plain LoRA -> what they are
_LYCORIS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "Tucker (CP) decomposition",
    "diff": "full differences",
    "diff_b": "full differences",
    "w_norm": "trained norms",
    "b_norm": "trained norms",
    "on_input": "IA3",
    "a1": "GLoRA",
    "scalar": "a trained scalar",
}
_COMPONENT = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lora_prior|lycoris)_")


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether the keys are kohya's or LyCORIS's rather than PEFT's."""
    keys = list(keys)
    if any(".lora_A." in key or ".lora_embedding_A" in key for key in keys):
        return False
    return any(key.endswith((".lora_down.weight", ".lora_up.weight")) or _lycoris(key) for key in keys)


def _lycoris(key: str) -> str | None:
    """What LyCORIS calls the tensor, by the last part of its key, or the one in front of "weight"."""
    part = key.removesuffix(".weight").rpartition(".")[2]
    for mark, name in _LYCORIS.items():
        if part == mark or (mark.endswith("_") and part.startswith(mark)):
            return name
    return None


def from_kohya(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    model: nn.Module | None,
    component: str | None = None,
    strict: bool = True,
) -> LoraAdapter:
    """Read a kohya state dict; delta = alpha / rank * lora_up @ lora_down, and alpha is the rank where it is missing.

    Args:
        tensors: the file's tensors. ``dora_scale`` is read as DoRA's magnitude where it has one value per output.
        source: where they came from, for messages.
        model: the model that the adapter is for. It turns underscores back into dots, and its weights' shapes are
            checked. Not needed if all names have dots.
        component: which part of a file that holds several, such as "lora_unet" or "te1"; the others are left out.
        strict: False warns about names that the model does not have, and leaves them out.
    Raises:
        ValueError: LyCORIS keys, names that the model lacks or has twice, shapes that do not fit, NaN or inf.
    """
    findings = Findings(source, strict)
    raw: dict[str, RawLayer] = defaultdict(RawLayer)
    for key, tensor in tensors.items():
        role, name = next(((r, key.removesuffix(end)) for end, r in _ROLES.items() if key.endswith(end)), (None, key))
        lycoris = _lycoris(key)
        if role == "alpha" and isinstance(tensor, Tensor):
            tensor = tensor.float()  # the trainer writes an int where it was given one
        if lycoris is not None:
            findings.fatal.append(f"{key}: LyCORIS {lycoris} is not supported, only plain LoRA is")
        elif role is None:
            findings.tolerable.append(f"{key}: unexpected tensor")
        elif check_tensor(key, tensor, findings):
            raw[name].put(role, key, tensor.detach())
    findings.settle()
    chosen = _choose(raw, component, source)
    paths = _paths(chosen, model, findings)
    layers = {}
    for name, path in paths.items():
        layer = _layer(path, raw[name], model, findings)
        if layer is not None:
            layers[path] = layer
    findings.settle()
    if not layers:
        raise ValueError(f"{source}: there are no LoRA tensors")
    return LoraAdapter(dict(sorted(layers.items())), config={"peft_type": "LORA"}, source=source)


def _choose(names: Iterable[str], component: str | None, source: str) -> dict[str, str]:
    """The names of one component -> the names without its prefix."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if component is not None and "." in name:  # not kohya's own prefixes
            found = component if name.startswith(f"{component}.") else ""
        else:
            match = _COMPONENT.match(name)
            found = match[1] if match else ""
        parts[found][name] = name[len(found) + 1 :] if found else name
    if component is None and len(parts) == 1:
        return next(iter(parts.values()))
    wanted = next((part for part in parts if component is not None and part in (component, f"lora_{component}")), None)
    if wanted is None:
        have = ", ".join(repr(part) for part in sorted(parts))
        asked = "the file has several" if component is None else f"the file has no {component!r}"
        raise ValueError(f"component: {source}: {asked}, choose one of {have}")
    return parts[wanted]


def _paths(chosen: Mapping[str, str], model: nn.Module | None, findings: Findings) -> dict[str, str]:
    """Name in the file -> module path."""
    flat = {name: short for name, short in chosen.items() if "." not in short}
    if flat and model is None:
        raise ValueError(
            f"model: {findings.source} names modules with underscores (such as {next(iter(flat))!r}), which cannot be "
            "turned into module paths without the model; pass model="
        )
    table: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules() if model is not None else ():
        if isinstance(getattr(module, "weight", None), Tensor):
            table[path.replace(".", "_")].append(path)
    paths = {name: short for name, short in chosen.items() if "." in short}
    for name, short in flat.items():
        found = table.get(short, [])
        if len(found) == 1:
            paths[name] = found[0]
        elif found:
            findings.fatal.append(f"{name}: may mean any of {', '.join(found)}")
        else:
            findings.tolerable.append(f"{name}: the model has no such module")
    return paths


def _layer(path: str, raw: RawLayer, model: nn.Module | None, findings: Findings) -> LoraLayer | None:
    a, b = raw.tensors.get("lora_a"), raw.tensors.get("lora_b")
    weight = None if model is None else _weight(model, path)
    if a is not None and b is not None and weight is not None:
        if weight.dim() == 2 and a.dim() == 4 and a.shape[2:] == b.shape[2:] == (1, 1):  # trained as a 1x1 convolution
            raw.tensors |= {"lora_a": a.flatten(1), "lora_b": b.flatten(1)}
        elif weight.dim() == 4 and a.dim() == b.dim() == 2:
            raw.tensors |= {"lora_a": a[:, :, None, None], "lora_b": b[:, :, None, None]}
    alpha, magnitude = raw.tensors.pop("alpha", None), raw.tensors.get("magnitude")
    if alpha is not None and alpha.numel() != 1:
        findings.fatal.append(f"{raw.keys['alpha']}: expected a single number, got shape {tuple(alpha.shape)}")
        return None
    if magnitude is not None and b is not None and magnitude.shape[0] != b.shape[0]:
        findings.fatal.append(
            f"{raw.keys['magnitude']}: expected one value per output, ({b.shape[0]}, 1), got {tuple(magnitude.shape)}; "
            "DoRA along the inputs is not supported"
        )
        return None
    rank = a.shape[0] if a is not None else 1
    layer = build_layer(path, raw, 1.0 if alpha is None else float(alpha) / rank, findings)
    if layer is not None and weight is not None and tuple(weight.shape) != layer.weight_shape:
        findings.fatal.append(
            f"{path}: made for a weight of {layer.weight_shape}, the model's is {tuple(weight.shape)}"
        )
        return None
    return layer


def _weight(model: nn.Module, path: str) -> Tensor | None:
    """The module's weight in ``[out, in]`` order; None if there is none, or it is packed."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    return weight.t() if type(module).__name__ == "Conv1D" else weight
