"""A small model with every kind of layer, adapters of every make, and composition written out naively."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Tokens through an embedding, a convolution over the sequence as an image, two blocks, dropout and a head."""

    def __init__(self, conv: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 12)
        self.conv = conv or nn.Conv2d(2, 3, 3, padding=1)
        self.mix = nn.Linear(18, 12)
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.drop = nn.Dropout(0.3)
        self.classifier = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)  # [batch, 6, 12]
        image = self.conv(x.unflatten(-1, (2, 6)).transpose(1, 2))  # [batch, 3, 6, 6]
        x = x + self.mix(image.transpose(1, 2).flatten(2))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.drop(x).mean(1))


ALL = ("emb", "conv", "mix", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


def make_adapter(
    model: nn.Module, ranks: Mapping[str, int], alpha: float = 3.0, rslora: bool = False, bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> lf.LoraAdapter:  # fmt: skip
    """Random factors on these modules, large enough to matter."""
    layers = {}
    for path, rank in ranks.items():
        weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
        kind: Any = {nn.Embedding: "embedding", nn.Conv2d: "conv2d"}.get(type(model.get_submodule(path)), "linear")
        out, *rest = weight.shape[::-1] if kind == "embedding" else weight.shape
        a = torch.randn(rank, *rest, dtype=dtype) / weight[0].numel() ** 0.5
        b = torch.randn(out, rank, *[1] * (weight.dim() - 2), dtype=dtype) / rank**0.5
        lora_bias = torch.randn(out, dtype=dtype) if bias and kind != "embedding" else None
        layers[path] = LoraLayer(a, b, alpha / (rank**0.5 if rslora else rank), kind, lora_bias)
    return lf.LoraAdapter(layers, config={"peft_type": "LORA", "r": 4, "base_model_name_or_path": "net"})


def three_adapters(model: nn.Module, **kwargs: Any) -> dict[str, lf.LoraAdapter]:
    """Different ranks, scalings and modules; rsLoRA in one, biases in another."""
    return {
        "a": make_adapter(model, dict.fromkeys(ALL, 2), **kwargs),
        "b": make_adapter(model, {"emb": 3, "mix": 1, "blocks.0.up": 4, "blocks.1.up": 2}, 4.0, rslora=True, **kwargs),
        "c": make_adapter(model, {p: 1 + i % 3 for i, p in enumerate(ALL) if p != "mix"}, 2.0, bias=True, **kwargs),
    }


class Branches(nn.Module):
    """One module and its adapters as PEFT runs them: a branch each, two small products, added one after the other."""

    def __init__(self, base: Any, layers: Mapping[str, LoraLayer], weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.base, self.layers, self.weights = base, layers, weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name, layer in self.layers.items():
            if layer.kind == "embedding":
                part = F.embedding(x, layer.lora_a.t()) @ layer.lora_b.t()
            elif layer.kind == "conv2d":
                part = F.conv2d(self.base._conv_forward(x, layer.lora_a, None), layer.lora_b)
            else:
                part = F.linear(F.linear(x, layer.lora_a), layer.lora_b)
            if layer.lora_bias is not None:
                part = part + (layer.lora_bias[:, None, None] if layer.kind == "conv2d" else layer.lora_bias)
            y = y + self.weights[name] * layer.scaling * part
        return y


def branched(model: nn.Module, adapters: Mapping[str, lf.LoraAdapter], weights: Mapping[str, Any]) -> nn.Module:
    """A copy whose adapted modules are ``Branches``; ``weights`` path -> adapter -> weight (a tensor or a number)."""
    out = copy.deepcopy(model)
    for path in [p for p, _ in model.named_modules() if any(p in a.layers for a in adapters.values())]:
        parent, _, leaf = path.rpartition(".")
        layers = {n: a.layers[path] for n, a in adapters.items() if path in a.layers}
        setattr(out.get_submodule(parent), leaf, Branches(out.get_submodule(path), layers, weights[path]))
    return out


def batches(n: int = 3, rows: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(30, (rows, 6)), torch.randint(4, (rows,))) for _ in range(n)]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
