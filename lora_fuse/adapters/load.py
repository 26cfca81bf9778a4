"""``load_adapter``: from whatever a user has to a ``LoraAdapter``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora_fuse.adapters.files import CONFIG_NAME, WEIGHTS_NAME, read_json, read_safetensors
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.adapters.peft import from_peft


def load_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    format: Literal["auto", "peft", "kohya"] = "auto",
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    adapter_name: str | None = None,
    base_is_residual: bool = False,
) -> LoraAdapter:
    """Load a LoRA adapter."""
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("config: a state dict needs its adapter config, pass config={...}")
        tensors, where = dict(source), "<state dict>"
    else:
        path = Path(source)
        config = config if config is not None else read_json(path / CONFIG_NAME)
        tensors, _ = read_safetensors(path / WEIGHTS_NAME, device)
        where = str(path)
    adapter = from_peft(
        tensors, config, where, strict=strict, base_is_residual=base_is_residual, adapter_name=adapter_name
    )
    return adapter.to(dtype, device)
