"""A small model with every kind of layer that fuse writes to, and adapters for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer

SHAPES: dict[str, tuple[Any, ...]] = {
    "emb": ("embedding", 70, 24),
    "lin": ("linear", 40, 24),
    "block.bare": ("linear", 33, 40),
    "conv": ("conv2d", 16, 5, 3, 3),
    "gpt": ("linear", 36, 24),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Linear(40, 33, bias=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        self.emb, self.lin, self.block = nn.Embedding(70, 24), nn.Linear(24, 40), Block()
        self.conv = nn.Conv2d(5, 16, 3).to(memory_format=torch.channels_last)
        self.gpt = pytorch_utils.Conv1D(36, 24)  # stores [in, out]
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.emb(ids)))


def make_adapter(
    scale: float = 0.05, paths: Any = SHAPES, rank: int = 4, dtype: torch.dtype = torch.float32
) -> lf.LoraAdapter:
    layers = {}
    for i, path in enumerate(paths):
        kind, *shape = SHAPES[path]
        out, a_shape = (shape[1], (rank + i, shape[0])) if kind == "embedding" else (shape[0], (rank + i, *shape[1:]))
        b_shape = (out, rank + i, 1, 1) if kind == "conv2d" else (out, rank + i)
        a, b = torch.randn(a_shape, dtype=dtype), scale * torch.randn(b_shape, dtype=dtype)
        layers[path] = LoraLayer(a, b, 1.5 / (rank + i) ** 0.5, kind)
    return lf.LoraAdapter(layers)


def stored_delta(adapter: lf.LoraAdapter, path: str) -> Tensor:
    """The delta in fp64, laid out as the model stores the weight."""
    layer = adapter.layers[path]
    flat = layer.scaling * (layer.lora_b.double().flatten(1) @ layer.lora_a.double().flatten(1))
    return flat.T if path in ("emb", "gpt") else flat.reshape(layer.weight_shape)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(now[k].dtype == before[k].dtype and torch.equal(now[k], before[k]) for k in before)
