"""A ``LoraAdapter`` to PEFT's two files."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_fuse.adapters._atomic import atomic_directory
from lora_fuse.adapters.config import LoraSettings, parse_settings
from lora_fuse.adapters.files import (
    CONFIG_NAME,
    DIFFUSERS_HEADER,
    DIFFUSERS_NAME,
    WEIGHTS_NAME,
    write_json,
    write_safetensors,
)
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.adapters.peft import PREFIX


def save_adapter(adapter: LoraAdapter, directory: str | os.PathLike[str], component: str | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; both appear or neither.

    With ``component``, write one file for a diffusers pipeline instead, ``pytorch_lora_weights.safetensors``.

    Tensors are written bit for bit. ``target_modules`` becomes the list of the layers' full paths. ``r``,
    ``lora_alpha`` and the two patterns stay as they were read if they still describe every layer, else they are
    written anew (``rank_and_alpha``).

    Args:
        adapter: what to write.
        directory: created if need be; other files in it stay.
        component: the adapted model's name in the pipeline, such as "transformer" or "unet"; None writes PEFT's files.
    Raises:
        ValueError: ``directory`` is a file, or PEFT's format cannot express the adapter: DoRA on some layers only, a
            ``lora_bias`` beside an adapted embedding, or no layers and nothing else.
    """
    config, tensors = peft_config(adapter), peft_tensors(adapter)
    with atomic_directory(directory, last=CONFIG_NAME if component is None else DIFFUSERS_NAME) as stage:
        if component is None:
            write_safetensors(stage / WEIGHTS_NAME, tensors)
            write_json(stage / CONFIG_NAME, config)
        else:
            header = json.dumps({f"{component}.{key}": value for key, value in config.items()})
            renamed = {f"{component}.{key.removeprefix(PREFIX)}": t for key, t in tensors.items()}
            write_safetensors(stage / DIFFUSERS_NAME, renamed, {DIFFUSERS_HEADER: header})


def peft_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    has_bias = any(layer.lora_bias is not None for layer in adapter.layers.values())
    for path, layer in adapter.layers.items():
        stem = f"{PREFIX}{path}."
        if layer.kind == "embedding":
            tensors[stem + "lora_embedding_A"], tensors[stem + "lora_embedding_B"] = layer.lora_a, layer.lora_b
        else:
            tensors[stem + "lora_A.weight"], tensors[stem + "lora_B.weight"] = layer.lora_a, layer.lora_b
        if has_bias:  # one flag in the config for all layers
            bias = layer.lora_bias
            tensors[stem + "lora_B.bias"] = layer.lora_b.new_zeros(layer.lora_b.shape[0]) if bias is None else bias
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.kind == "conv2d" else (-1,)
            tensors[stem + "lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    for path, saved in adapter.modules_to_save.items():
        tensors.update({f"{PREFIX}{path}.{name}": t for name, t in saved.items()})
    for path, bias in adapter.base_biases.items():
        tensors[f"{PREFIX}{path}.base_layer.bias" if path in adapter.layers else f"{PREFIX}{path}.bias"] = bias
    for path, (_, rows) in adapter.trainable_tokens.items():
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows
    for path, weight in adapter.base_weights.items():
        tensors[f"{PREFIX}{path}.base_layer.weight"] = weight
    return tensors


def peft_config(adapter: LoraAdapter) -> dict[str, Any]:
    """The adapter's config, with every key that depends on the layers written anew.

    Raises:
        ValueError: see ``save_adapter``.
    """
    layers = adapter.layers
    if not any(True for _ in adapter.tensors()):
        raise ValueError("adapter: holds no tensors, there is nothing to save")
    dora = {path for path, layer in layers.items() if layer.magnitude is not None}
    if dora and len(dora) < len(layers):
        raise ValueError(
            f"adapter: DoRA on {len(dora)} of {len(layers)} layers, PEFT's use_dora is one flag for all; without it is "
            f"{next(path for path in layers if path not in dora)!r}"
        )
    lora_bias = any(layer.lora_bias is not None for layer in layers.values())
    embedding = next((path for path, layer in layers.items() if layer.kind == "embedding"), None)
    if lora_bias and embedding is not None:
        raise ValueError(f"adapter: lora_bias with an adapted embedding ({embedding!r}), which PEFT does not accept")
    config = {
        "task_type": None,
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        **adapter.config,
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": sorted(layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": bool(dora),
        "lora_bias": lora_bias,
        "bias": _bias(adapter),
        "modules_to_save": sorted(adapter.modules_to_save) or None,
        "trainable_token_indices": {path: ids.tolist() for path, (ids, _) in sorted(adapter.trainable_tokens.items())}
        or None,
    }
    if not _describes(adapter.config, layers):
        config |= rank_and_alpha(layers)
    config.pop("runtime_config", None)  # PEFT warns about it in files
    return config


def _bias(adapter: LoraAdapter) -> str:
    if not adapter.base_biases:
        return "none"
    outside = any(path not in adapter.layers for path in adapter.base_biases)
    return "all" if outside or adapter.config.get("bias") == "all" else "lora_only"


def _describes(config: Mapping[str, Any], layers: Mapping[str, LoraLayer]) -> bool:
    """Whether the config as read still gives every layer its rank and, exactly, its scaling."""
    if "r" not in config or "lora_alpha" not in config:
        return False
    try:
        settings = parse_settings(config, "adapter.config", base_is_residual=True)
    except ValueError:
        return False
    return all(
        settings.rank(path) == layer.rank and settings.scaling(path, layer.rank) == layer.scaling
        for path, layer in layers.items()
    )


def rank_and_alpha(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """``r``, ``lora_alpha`` and the patterns that give every layer its rank and scaling.

    ``r`` is the largest rank, as servers that size their buffers by it expect, and ``lora_alpha`` makes the commonest
    scaling the default: one scaling throughout is then read rightly even by tools that know no patterns. Each layer
    that differs gets its alpha, ``scaling * rank``, under its full path.

    Raises:
        ValueError: a scaling is not finite.
    """
    for path, layer in layers.items():
        if not math.isfinite(layer.scaling):
            raise ValueError(f"{path}: scaling {layer.scaling} is not finite")
    if not layers:
        return {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    rank = max(layer.rank for layer in layers.values())
    commonest = Counter(layer.scaling for layer in layers.values()).most_common(1)[0][0]
    alpha = _alpha(commonest, rank)
    settings = LoraSettings(r=rank, lora_alpha=alpha)
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for path, layer in sorted(layers.items()):
        key = "^" + re.escape(path)  # this module, not one that ends the same
        if layer.rank != rank:
            patterns["rank_pattern"][key] = layer.rank
        if settings.scaling(path, layer.rank) != layer.scaling:
            patterns["alpha_pattern"][key] = _alpha(layer.scaling, layer.rank)
    return {"r": rank, "lora_alpha": alpha, "use_rslora": False, **patterns}


def _alpha(scaling: float, rank: int) -> float:
    """``scaling * rank``: where any alpha gives back the scaling exactly this one does, else it is off by one ulp."""
    alpha = scaling * rank
    return int(alpha) if alpha.is_integer() else alpha
