"""diffusers' files: PEFT tensors of a whole pipeline, a prefix per model, the configs in the safetensors header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_fuse.adapters.files import CONFIG_NAME, DIFFUSERS_HEADER
from lora_fuse.adapters.sources import Opened

_OLD_LAYOUTS = (
    ".lora_linear_layer.",
    "_lora.down.weight",
    "_lora.up.weight",
    ".lora.down.",
    ".lora.up.",
)


def select_component(opened: Opened, component: str | None) -> Opened:
    """One model's tensors, without its prefix, and its config; what is no pipeline's file passes through.

    Args:
        opened: tensors, perhaps of several models, and the header.
        component: which model; None if there is only one.
    Raises:
        ValueError: there is no config, the component is missing or has to be chosen, or the layout is one of diffusers'
            old ones.
    """
    old = next((key for key in opened.tensors if any(mark in key for mark in _OLD_LAYOUTS)), None)
    if old is not None:
        raise ValueError(
            f"{opened.name}: {old} is in a layout that diffusers gave up; load the file with it and save it again"
        )
    configs = _configs(opened)
    present = sorted({key.partition(".")[0] for key in opened.tensors})
    if component is None:
        if opened.config is not None or "" in configs:
            return replace(opened, config=opened.config or configs[""])
        if not configs:
            raise ValueError(
                f"{opened.name}: {CONFIG_NAME} is missing, so r and lora_alpha are not known; pass config={{...}}, or "
                "component= if this is a file for a diffusers pipeline"
            )
        if len(present) > 1:
            raise ValueError(f"component: {opened.name} has several, choose one of {present}")
        component = present[0]
    stem = component + "."
    mine = {key.removeprefix(stem): t for key, t in opened.tensors.items() if key.startswith(stem)}
    if not mine:
        raise ValueError(f"component: {opened.name} has no tensors of {component!r}, it has {present}")
    config = opened.config or configs.get(component)
    if config is None:
        mine, config = _inferred(mine)
    return replace(opened, tensors=mine, config=config, name=f"{opened.name}:{component}")


def _configs(opened: Opened) -> dict[str, dict[str, Any]]:
    """Component -> config, from the header; the component is "" if the header holds a single model's config."""
    text = opened.header.get(DIFFUSERS_HEADER)
    if text is None:
        return {}
    try:
        flat = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{opened.name}: {DIFFUSERS_HEADER} in the header is not valid JSON: {error}") from error
    if not isinstance(flat, Mapping):
        raise ValueError(f"{opened.name}: {DIFFUSERS_HEADER} in the header is not a JSON object")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {"peft_type": "LORA"})[name] = value
    return configs


def _inferred(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """diffusers' rule for files without a config: ranks from the tensors, alpha from ``.alpha`` or else the rank."""
    alphas = {key.removesuffix(".alpha"): t for key, t in tensors.items() if key.endswith(".alpha")}
    bad = next((path for path, t in alphas.items() if t.numel() != 1), None)
    if bad is not None:
        raise ValueError(f"{bad}.alpha: expected a single number, got shape {tuple(alphas[bad].shape)}")
    ends = re.compile(r"(.+)\.lora_A\.weight")
    ranks = {match[1]: int(t.shape[0]) for key, t in tensors.items() if (match := ends.fullmatch(key))}
    config = {
        "peft_type": "LORA",
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(path)}": float(alphas.get(path, rank)) for path, rank in ranks.items()},
        "use_dora": any(key.endswith(".lora_magnitude_vector") for key in tensors),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in tensors),
    }
    return {key: t for key, t in tensors.items() if not (key.endswith(".alpha") and key[:-6] in ranks)}, config
