"""PEFT's tensor keys: a flat state dict and a config to a ``LoraAdapter``, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_fuse.adapters._findings import Findings
from lora_fuse.adapters.config import LoraSettings, parse_settings
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.adapters.raw import RawLayer, build_layer, check_tensor

PREFIX = "base_model.model."
_WRAPPERS = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
# Embeddings that PEFT saves whole when the vocabulary was resized, without a word in the config.
_EMBEDDING_NAMES = frozenset(["embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"])

# role -> the end of its key; the adapter's name stands between in memory and in files written by torch.save
_NAME = r"(?:\.(?P<name>[^.]+))?"
_ROLES = {
    "lora_a": re.compile(rf"(?P<path>.+)\.lora_A{_NAME}\.weight"),
    "lora_b": re.compile(rf"(?P<path>.+)\.lora_B{_NAME}\.weight"),
    "lora_bias": re.compile(rf"(?P<path>.+)\.lora_B{_NAME}\.bias"),
    "embedding_a": re.compile(rf"(?P<path>.+)\.lora_embedding_A{_NAME}"),
    "embedding_b": re.compile(rf"(?P<path>.+)\.lora_embedding_B{_NAME}"),
    "magnitude": re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?P<name>(?!weight$)[^.]+))?(?:\.weight)?"),
    "token_rows": re.compile(rf"(?P<path>.+)\.token_adapter\.trainable_tokens_delta{_NAME}"),
    "saved": re.compile(r"(?P<path>.+)\.modules_to_save(?:\.(?P<name>[^.]+))?\.(?P<rest>.+)"),
}


def model_path(key: str) -> str:
    """A key without wrappers (``_orig_mod``, FSDP) and without PEFT's ``base_model.model.``."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix(PREFIX)


def _classify(key: str) -> tuple[str, str, str | None, str]:
    """``(role, module path, adapter name or None, parameter name)`` of a key; "plain" is the role of all but LoRA."""
    clean = model_path(key)
    for role, pattern in _ROLES.items():
        match = pattern.fullmatch(clean)
        if match:
            parts = match.groupdict()
            name = None if parts.get("name") == "weight" else parts.get("name")
            return role, parts["path"], name, parts.get("rest") or ""
    path, _, parameter = clean.rpartition(".")
    return "plain", path, None, parameter


def from_peft(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: str,
    *,
    strict: bool = True,
    base_is_residual: bool = False,
    adapter_name: str | None = None,
) -> LoraAdapter:
    """Read a PEFT state dict.

    Args:
        tensors: keys as PEFT writes them, or with the adapter's name, wrappers or no prefix; see ``model_path``.
        config: the adapter config.
        source: where both came from, for messages.
        strict, base_is_residual: see ``load_adapter``.
        adapter_name: which adapter, if the keys hold the names of several.
    Raises:
        ValueError: anything that is not understood or does not fit, with up to ten offenders.
    """
    settings = parse_settings(config, source, strict=strict, base_is_residual=base_is_residual)
    if not tensors:
        raise ValueError(f"{source}: there are no tensors")
    findings = Findings(source, strict)
    reader = _Reader(settings, findings)
    entries = [(key, *_classify(key), tensor) for key, tensor in tensors.items()]
    wanted = _adapter_name({name for _, _, _, name, _, _ in entries if name is not None}, adapter_name, source)
    for key, role, path, name, parameter, tensor in entries:
        if name is None or name == wanted:
            reader.take(key, role, path, parameter, tensor)
    findings.settle()
    adapter = reader.adapter(dict(config), source)
    findings.settle()
    return adapter


def _adapter_name(present: set[str], wanted: str | None, source: str) -> str | None:
    if wanted is not None and present and wanted not in present:
        raise ValueError(f"adapter_name: {source} has no adapter {wanted!r}, it has {sorted(present)}")
    if wanted is None and len(present) > 1:
        raise ValueError(f"adapter_name: {source} has several adapters, choose one of {sorted(present)}")
    return wanted or next(iter(present), None)


class _Reader:
    """Sorts entries into the parts of a ``LoraAdapter`` and checks them against the settings."""

    def __init__(self, settings: LoraSettings, findings: Findings) -> None:
        self.settings, self.findings = settings, findings
        self.raw: dict[str, RawLayer] = {}
        self.plain: dict[str, tuple[str, Tensor]] = {}  # full parameter path -> (key, tensor)
        self.token_rows: dict[str, Tensor] = {}

    def take(self, key: str, role: str, path: str, parameter: str, tensor: Tensor) -> None:
        if not check_tensor(key, tensor, self.findings, integer=role in ("saved", "plain")):
            return
        tensor = tensor.detach()
        if role == "token_rows":
            if path in self.token_rows:
                self.findings.fatal.append(f"{key}: the rows of {path} are in the file twice")
            self.token_rows[path] = tensor
        elif role in ("saved", "plain"):
            full = f"{path}.{parameter}"
            if full in self.plain and not torch.equal(self.plain[full][1], tensor):
                self.findings.fatal.append(f"{key}: means the same tensor as {self.plain[full][0]}, with other values")
            self.plain[full] = (key, tensor)
        elif "base_layer" in path.split("."):
            self.findings.fatal.append(
                f"{key}: nested LoRA (on nn.MultiheadAttention or on bare parameters) is not supported"
            )
        else:
            try:
                self.raw.setdefault(path, RawLayer()).put(role, key, tensor)
            except ValueError as error:
                self.findings.fatal.append(str(error))

    def adapter(self, config: dict[str, Any], source: str) -> LoraAdapter:
        layers = {path: layer for path, raw in sorted(self.raw.items()) if (layer := self._layer(path, raw))}
        saved, biases, base_weights = self._plain(layers)
        tokens = dict(self._tokens())
        targets = self.settings.target_modules
        if layers and not isinstance(targets, str) and layers.keys() <= set(targets or ()):  # it lists whole paths
            lost = sorted(set(targets or ()) - layers.keys())
            if lost:
                self.findings.tolerable.append(f"target_modules: the file has no tensors for {', '.join(lost[:10])}")
        if not (layers or saved or biases or tokens) and not self.findings.fatal:
            self.findings.fatal.append(
                "no LoRA tensors among " + ", ".join(sorted(k for k, _ in self.plain.values())[:10])
            )
        return LoraAdapter(layers, saved, biases, tokens, config, source, base_weights)

    def _layer(self, path: str, raw: RawLayer) -> LoraLayer | None:
        say, settings = self.findings, self.settings
        if "lora_bias" in raw.tensors and not settings.lora_bias:
            say.tolerable.append(
                f"{raw.keys['lora_bias']}: the file has this bias, but lora_bias is false in the config (PEFT would "
                "drop it); set lora_bias to true if it belongs to the adapter"
            )
            raw.tensors.pop("lora_bias")
        elif settings.lora_bias and "lora_bias" not in raw.tensors:
            say.fatal.append(f"{path}: lora_bias is true in the config, but lora_B.bias is missing")
        if ("magnitude" in raw.tensors) != settings.use_dora:
            what = "is missing" if settings.use_dora else "is in the file"
            say.fatal.append(
                f"{path}: use_dora is {str(settings.use_dora).lower()} in the config, but lora_magnitude_vector {what}"
            )
        if not settings.targets(path):
            say.tolerable.append(
                f"{path}: has LoRA tensors, but target_modules does not name it (PEFT would drop them)"
            )
        a = raw.tensors.get("lora_a", raw.tensors.get("embedding_a"))
        rank = a.shape[0] if a is not None and a.dim() else 1
        layer = build_layer(path, raw, settings.scaling(path, rank), say)
        if layer is not None and settings.rank(path) != rank:
            say.fatal.append(f"{path}: the config gives rank {settings.rank(path)}, the tensors have rank {rank}")
        return layer

    def _plain(
        self, layers: Mapping[str, LoraLayer]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """Tensors that are whole parameters of the model: module copies, biases, embeddings saved along."""
        saved: dict[str, dict[str, Tensor]] = {}
        biases: dict[str, Tensor] = {}
        base_weights: dict[str, Tensor] = {}
        for full, (key, tensor) in sorted(self.plain.items()):
            path, _, parameter = full.rpartition(".")
            module = _saved_module(path, self.settings.modules_to_save)
            bare = path.removesuffix(".base_layer")
            if "original_module" in path.split(".") and parameter == "bias" and self.settings.bias == "all":
                continue  # the bias that a module copy stands in for; nothing reads it
            if module is not None:
                saved.setdefault(module, {})[full[len(module) + 1 :]] = tensor
            elif parameter == "bias" and (
                self.settings.bias == "all" or (self.settings.bias == "lora_only" and bare in layers)
            ):
                biases[bare] = tensor
            elif parameter == "weight" and bare != path and bare in layers:
                base_weights[bare] = tensor
            elif parameter == "weight" and path.rpartition(".")[2] in _EMBEDDING_NAMES:
                saved[path] = {parameter: tensor}
            else:
                self.findings.tolerable.append(f"{key}: unexpected tensor, shape {tuple(tensor.shape)}")
        names = self.settings.modules_to_save
        if names and not any(_saved_module(path, names) for path in saved):
            self.findings.tolerable.append(f"modules_to_save: the file has no tensors for any of {list(names)}")
        for path, bias in biases.items():
            if bias.dim() != 1 or (path in layers and bias.shape[0] != layers[path].lora_b.shape[0]):
                self.findings.fatal.append(f"{path}: bias of shape {tuple(bias.shape)} does not fit the module")
        for path, weight in base_weights.items():
            if tuple(weight.shape) != layers[path].weight_shape:
                self.findings.fatal.append(
                    f"{path}: base weight of shape {tuple(weight.shape)}, expected {layers[path].weight_shape}"
                )
        return saved, biases, base_weights

    def _tokens(self) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        indices = self.settings.trainable_token_indices
        for path, rows in sorted(self.token_rows.items()):
            ids = indices
            if isinstance(indices, Mapping):
                ids = next((v for k, v in indices.items() if path == k or path.endswith(f".{k}")), None)
            if ids is None or rows.dim() != 2 or len(ids) != rows.shape[0]:
                given = "none" if ids is None else len(ids)
                self.findings.fatal.append(
                    f"{path}: trainable_token_indices has {given} ids, the tensor has shape {tuple(rows.shape)}"
                )
                continue
            yield path, (torch.tensor(list(ids), dtype=torch.long, device=rows.device), rows)
        for name in indices if isinstance(indices, Mapping) else [""] if indices else []:
            if not any(path == name or path.endswith(f".{name}" if name else "") for path in self.token_rows):
                self.findings.tolerable.append(
                    f"trainable_token_indices: the file has no rows for {name or 'its tokens'}"
                )


def _saved_module(path: str, names: Any) -> str | None:
    """The module named by ``modules_to_save`` that ``path`` is, or lies in; PEFT compares the ends of paths."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        module = ".".join(parts[:count])
        if any(module.endswith(name) for name in names):
            return module
    return None
