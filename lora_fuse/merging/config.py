"""The PEFT config of an adapter that was computed, not trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_fuse.adapters.lora import LoraLayer

# The keys that say what the factors mean, as opposed to where they go and what rides along.
FACTOR_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def lora_config(
    layers: Mapping[str, LoraLayer], saved: Iterable[str], sources: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A PEFT config that describes ``layers`` exactly, whatever mixture of ranks and scalings they have.

    ``r`` is the largest rank, ``lora_alpha`` equals it, and a layer that differs gets entries of its own in
    ``rank_pattern`` and ``alpha_pattern``, anchored so that they match no other module.

    Args:
        layers: the result's layers.
        saved: paths of module copies.
        sources: configs of the adapters it was made from, for what does not concern the factors.
    """
    r = max((layer.rank for layer in layers.values()), default=1)
    rank_pattern, alpha_pattern = {}, {}
    for path, layer in layers.items():
        key = "^" + re.escape(path)
        alpha = layer.scaling * layer.rank
        if layer.rank != r:
            rank_pattern[key] = layer.rank
        if alpha != r:
            alpha_pattern[key] = int(alpha) if float(alpha).is_integer() else alpha
    return {
        "peft_type": "LORA",
        "task_type": _common("task_type", sources),
        "base_model_name_or_path": _first("base_model_name_or_path", sources),
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "lora_bias": any(layer.lora_bias is not None for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in sources),
        "lora_dropout": 0.0,
        # A named initialisation may have changed the base (PiSSA and others), so its name has to stay.
        "init_lora_weights": next((c["init_lora_weights"] for c in sources if _is_named_init(c)), True),
        "target_modules": sorted(layers),
        "modules_to_save": sorted(saved) or None,
    }


def _first(key: str, sources: Sequence[Mapping[str, Any]]) -> Any:
    return next((c[key] for c in sources if c.get(key)), None)


def _common(key: str, sources: Sequence[Mapping[str, Any]]) -> Any:
    values = [c.get(key) for c in sources]
    return values[0] if values and all(v == values[0] for v in values) else None


def _is_named_init(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("init_lora_weights"), str)
