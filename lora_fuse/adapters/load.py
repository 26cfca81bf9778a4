"""``load_adapter``: from whatever a user has to a ``LoraAdapter``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fuse.adapters._findings import Findings
from lora_fuse.adapters.diffusers import select_component
from lora_fuse.adapters.kohya import from_kohya, is_kohya
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.adapters.peft import from_peft
from lora_fuse.adapters.raw import check_tensor
from lora_fuse.adapters.save import peft_tensors
from lora_fuse.adapters.sources import Opened, open_mapping, open_model, open_path, plain_config

_FORMATS = ("auto", "peft", "kohya")


def load_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    *,
    config: Mapping[str, Any] | Any | None = None,
    format: Literal["auto", "peft", "kohya"] = "auto",
    model: nn.Module | None = None,
    component: str | None = None,
    adapter_name: str | None = None,
    revision: str | None = None,
    base_is_residual: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoraAdapter:
    """Read a LoRA adapter; nothing in it is left unread, and nothing unexpected is let pass.

    Args:
        source: one of

            - a directory that PEFT (or diffusers) saved, or one with such a directory for each adapter;
            - a ``.safetensors`` file: PEFT's, kohya's, or diffusers' with the config in its header;
            - an id on the Hugging Face hub, ``owner/name``, which needs the extra ``lora-fuse[hub]``;
            - a ``peft.PeftModel``, or any model that has PEFT adapters injected; its tensors are copied;
            - a state dict, with ``config=`` unless it is kohya's; its tensors are not copied.
        config: the adapter config, a dict or a ``peft.LoraConfig``; used instead of the one at the source.
        format: "auto" goes by the keys.
        model: the model that a kohya file is for; it alone can turn kohya's underscores back into dots.
        component: which part of a file for a pipeline, such as "transformer" or "unet" in diffusers' files, "lora_unet"
            or "lora_te1" in kohya's. The other parts are left out. A diffusers file without a config in its header is
            read by diffusers' rule: scaling 1 unless it holds alphas.
        adapter_name: which of several adapters: of a model (default: the active one), a directory or a state dict.
        revision: branch, tag or commit on the hub.
        base_is_residual: the adapter comes from an initialisation that changed the base weights (PiSSA, OLoRA, CorDA,
            LoRA-GA, LoftQ), and the model it will be used with has those changed weights.
        strict: raise for every tensor, name and config key that is not accounted for. False warns about those that can
            be left out, and leaves them out; missing or misshapen tensors, NaN and inf still raise.
        dtype: of all floating-point tensors; None keeps the file's.
        device: where the tensors go.
    Returns:
        The adapter. Module paths are the model's own.
    Raises:
        TypeError: ``source``, ``config`` or ``dtype`` is of a type not listed above.
        ValueError: everything else that is wrong with the source; up to ten offenders are named. Pickled weights, other
            methods than LoRA, and options that change the result and are not supported are refused by name.
    """
    if format not in _FORMATS:
        raise ValueError(f"format: expected one of {', '.join(_FORMATS)}, got {format!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if isinstance(source, nn.Module):
        opened = open_model(source, adapter_name)
    elif isinstance(source, Mapping):
        opened = open_mapping(source, adapter_name)
    elif isinstance(source, (str, os.PathLike)):
        opened = open_path(source, adapter_name, revision, device)
    else:
        raise TypeError(
            "source: expected a path, a hub id, a model with PEFT adapters or a state dict, got "
            f"{type(source).__name__}"
        )
    if config is not None:
        opened = replace(opened, config=_as_dict(config))
    if format == "kohya" or (format == "auto" and is_kohya(opened.tensors)):
        adapter = from_kohya(opened.tensors, opened.name, model=model, component=component, strict=strict)
    else:
        opened = select_component(opened, component)
        adapter = from_peft(
            opened.tensors,
            opened.config or {},
            opened.name,
            strict=strict,
            base_is_residual=base_is_residual,
            adapter_name=opened.adapter_name,
        )
    return _cast(_with_scalings(adapter, opened), dtype, device)


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, (str, os.PathLike)) or not (isinstance(config, Mapping) or hasattr(config, "to_dict")):
        raise TypeError(f"config: expected a dict or a peft.LoraConfig, got {type(config).__name__}")
    return plain_config(config if isinstance(config, Mapping) else config.to_dict())


def _with_scalings(adapter: LoraAdapter, opened: Opened) -> LoraAdapter:
    """In a live model the scaling may have been changed since the config was made; what it computes counts."""
    layers = {
        path: replace(layer, scaling=opened.scalings.get(path, layer.scaling)) for path, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers) if opened.scalings else adapter


def _cast(adapter: LoraAdapter, dtype: torch.dtype | None, device: torch.device | str) -> LoraAdapter:
    cast = adapter.to(dtype, device)
    if dtype is not None:
        findings = Findings(f"dtype: {adapter.source} does not fit into {dtype}")
        for key, tensor in peft_tensors(cast).items():
            check_tensor(key, tensor, findings, integer=True)
        findings.settle()
    return cast
