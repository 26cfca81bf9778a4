"""Which parameters of a model an adapter writes to, and the reasons why it may not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_fuse.adapters.lora import LoraLayer

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_LISTED = 10


def require_modules(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The modules at ``paths``; ValueError listing those that the model lacks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(set(paths) - set(modules))
    if missing:
        listed = ", ".join(map(repr, missing[:_MAX_LISTED])) + (", ..." if len(missing) > _MAX_LISTED else "")
        raise ValueError(
            f"model: {type(model).__name__} has no module at {len(missing)} path(s) of the adapter: {listed}; is the "
            "adapter for another model, or the model wrapped in another one?"
        )
    return {path: modules[path] for path in paths}


def is_transposed(path: str, module: nn.Module, layer: LoraLayer) -> bool:
    """Whether the module stores its weight ``[in, out]``, after checking that the layer fits it.

    Raises:
        ValueError: a kind of module that cannot be fused into (quantised, parametrized, wrapped by PEFT, ...), or a
            weight of another shape.
    """
    kind = type(module).__name__
    if hasattr(module, "base_layer"):
        raise ValueError(f"layer {path!r}: {kind} already wraps its base layer (PEFT); fuse into the plain model")
    if isinstance(module, nn.Embedding):
        stored, transposed, fits = "embedding", True, layer.kind == "embedding"
    elif isinstance(module, nn.Conv2d):
        stored, transposed, fits = "conv2d", False, layer.kind == "conv2d"
    elif isinstance(module, nn.Linear):
        stored, transposed, fits = "linear", False, layer.kind == "linear"
    elif is_hf_conv1d(module):
        stored, transposed, fits = "linear", True, layer.kind == "linear"
    else:
        raise ValueError(
            f"layer {path!r}: cannot fuse into a {kind}; nn.Linear, nn.Conv2d, nn.Embedding and transformers' Conv1D "
            "hold a plain weight (serve a quantised layer with the adapter attached)"
        )
    if not fits:
        raise ValueError(f"layer {path!r}: the adapter has {layer.kind} factors, the model has a {kind} ({stored})")
    weight = writable(path, module, "weight")
    shape = layer.weight_shape[::-1] if is_hf_conv1d(module) else layer.weight_shape
    if tuple(weight.shape) != shape:
        groups = getattr(module, "groups", 1)
        hint = f" ({kind} has groups={groups}, which is not supported)" if groups != 1 else ""
        raise ValueError(
            f"layer {path!r}: the adapter is for a weight of shape {shape}, the model's {kind} has "
            f"{tuple(weight.shape)}{hint}"
        )
    return transposed


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D or something derived from it, known by name so that transformers need not be imported."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def writable(path: str, module: nn.Module, name: str) -> Tensor:
    """A parameter (or buffer) of a module that can be rewritten in place; ValueError says why not."""
    kind, full = type(module).__name__, f"{path}.{name}"
    if name in getattr(module, "parametrizations", {}):
        raise ValueError(f"{full}: {kind} computes it by a parametrization; remove that first")
    tensor = {**module._buffers, **module._parameters}.get(name)
    if tensor is None:
        raise ValueError(f"{full}: {kind} has no such parameter")
    counter = not tensor.is_floating_point() and name != "weight"  # BatchNorm's num_batches_tracked
    if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer) or not (counter or tensor.dtype in _WEIGHT_DTYPES):
        raise ValueError(
            f"{full}: {kind} holds it as {type(tensor).__name__} of {tensor.dtype}; only plain fp32, fp64, bf16 "
            "and fp16 weights can be fused into (serve a quantised layer with the adapter attached)"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{full}: is on the meta device, it has no data (offloaded?)")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{full}: was made in inference mode; call fuse and unfuse inside torch.inference_mode()")
    return tensor


def refuse_tied(model: nn.Module, written: Mapping[str, Tensor], allow_tied: bool) -> None:
    """ValueError if writing one parameter would change what another module reads.

    Args:
        model: scanned for every parameter.
        written: full parameter name -> tensor, as the adapter names them.
        allow_tied: accept that the other module changes along; one tensor written under two names is refused all the
            same, because the sum of both updates would be neither module's.
    """
    owners: dict[int, str] = {}
    for name, tensor in written.items():
        other = owners.setdefault(id(tensor), name)
        if other != name:
            raise ValueError(f"{other} and {name} are one tensor (shared or tied); the adapter updates it twice")
    if allow_tied:
        return
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for path, module in model.named_modules():  # each module once: a module reached by two paths is not a tie
        for name, param in module._parameters.items():
            if param is not None and param.device.type != "meta":
                full = f"{path}.{name}" if path else name
                by_storage.setdefault(param.untyped_storage().data_ptr(), []).append((full, param))
    for name, tensor in written.items():
        low, high = _span(tensor)
        readers = [
            full
            for full, param in by_storage.get(tensor.untyped_storage().data_ptr(), ())
            if (span := _span(param))[0] < high and low < span[1]
        ]
        if len(readers) > 1:
            others = ", ".join(full for full in readers if full != name) or name
            raise ValueError(
                f"{name}: shares its memory with {others} (tied), which would change too; untie them, or pass "
                "allow_tied=True if that is meant"
            )


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
