"""Adapters of every kind of layer, and their deltas written out densely in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer

SHAPES: dict[str, tuple[Any, ...]] = {
    "lin": ("linear", 40, 24),
    "wide": ("linear", 6, 50),
    "conv": ("conv2d", 16, 5, 3, 3),
    "emb": ("embedding", 64, 20),
}


def make_layer(
    path: str, rank: int, scaling: float, bias: bool = False, dtype: torch.dtype = torch.float32
) -> LoraLayer:
    kind, *shape = SHAPES[path]
    out, a_shape = (shape[1], (rank, shape[0])) if kind == "embedding" else (shape[0], (rank, *shape[1:]))
    b_shape = (out, rank, 1, 1) if kind == "conv2d" else (out, rank)
    lora_bias = torch.randn(out, dtype=dtype) if bias and kind != "embedding" else None
    return LoraLayer(torch.randn(a_shape, dtype=dtype), torch.randn(b_shape, dtype=dtype), scaling, kind, lora_bias)


def make_adapter(ranks: dict[str, int], alpha: float = 6.0, rslora: bool = False, bias: bool = False) -> lf.LoraAdapter:
    layers = {p: make_layer(p, r, alpha / (r**0.5 if rslora else r), bias) for p, r in ranks.items()}
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": alpha,
        "rank_pattern": {p: r for p, r in ranks.items() if r != 4},
        "use_rslora": rslora,
        "lora_bias": bias,
        "target_modules": list(ranks),
    }
    return lf.LoraAdapter(layers, config=config)


def dense(adapter: lf.LoraAdapter, path: str) -> Tensor:
    """The delta in fp64, written out by kind."""
    layer = adapter.layers[path]
    a, b = layer.lora_a.double(), layer.lora_b.double()
    if layer.kind == "conv2d":
        return layer.scaling * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    delta = layer.scaling * (b @ a)
    return delta.T if layer.kind == "embedding" else delta


def three_adapters(**kwargs: Any) -> list[lf.LoraAdapter]:
    """Different ranks per adapter and per layer; no layer but `lin` is in all of them."""
    return [
        make_adapter({"lin": 4, "wide": 4, "conv": 2}, **kwargs),
        make_adapter({"lin": 7, "emb": 3, "conv": 4}, alpha=3.0, **kwargs),
        make_adapter({"lin": 1, "wide": 5, "emb": 4}, alpha=16.0, **kwargs),
    ]
