"""Small models and adapters made in memory, and the plain formula that serving is held against."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fuse import LoraAdapter, use_adapters
from lora_fuse.adapters.lora import LoraLayer

PATHS = ("up", "down", "out")  # of ``Mlp``

INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # torch.jit's, inside inductor


class Mlp(nn.Module):
    """Three linear layers on ``[batch, ..., 24]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.tanh(self.up(x))))


class Kinds(nn.Module):
    """An embedding, a convolution and a linear layer, on ids ``[batch, length]`` below 13."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.out = nn.Embedding(13, 6), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.conv(self.embed(ids)[:, None]))


def linear_layer(module: Any, rank: int, scaling: float = 0.5, bias: bool = False) -> LoraLayer:
    """Random factors of a visible size for a Linear (or a Conv1D, whose weight lies the other way)."""
    shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    out_features, in_features = shape
    a = torch.randn(rank, in_features) / in_features**0.5
    b = torch.randn(out_features, rank) / rank**0.5
    return LoraLayer(a, b, scaling, lora_bias=torch.randn(out_features) if bias else None)


def embedding_layer(module: nn.Embedding, rank: int) -> LoraLayer:
    a, b = torch.randn(rank, module.num_embeddings), torch.randn(module.embedding_dim, rank)
    return LoraLayer(a, b, 0.4, kind="embedding")


def conv_layer(module: nn.Conv2d, rank: int) -> LoraLayer:
    a = torch.randn(rank, module.in_channels, *module.kernel_size) / 4
    return LoraLayer(a, torch.randn(module.out_channels, rank, 1, 1), 0.4, kind="conv2d")


def adapter(model: nn.Module, paths: Sequence[str], rank: int, **kwargs: Any) -> LoraAdapter:
    """An adapter on these Linear layers of a model."""
    return LoraAdapter({path: linear_layer(model.get_submodule(path), rank, **kwargs) for path in paths})


def kinds_adapter(model: Kinds) -> LoraAdapter:
    """An adapter on each layer of ``Kinds``, with a bias on the linear one."""
    out = linear_layer(model.out, 2, bias=True)
    return LoraAdapter({"embed": embedding_layer(model.embed, 2), "conv": conv_layer(model.conv, 3), "out": out})


def adapted_copy(model: nn.Module, adapters: Mapping[str, LoraAdapter], entry: Any) -> nn.Module:
    """The model with one entry's deltas added to its weights: what every row of that entry must compute."""
    merged = copy.deepcopy(model)
    pairs = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
    with torch.no_grad():
        for name, weight in pairs.items():
            for path, layer in adapters[name].layers.items():
                module: Any = merged.get_submodule(path)
                delta = layer.product()
                if type(module).__name__ == "Conv1D":
                    delta = delta.t()
                # A new parameter: one shared with another module (a tied lm_head) stays the other's.
                module.weight = nn.Parameter(
                    module.weight + weight * delta.to(module.weight.dtype), requires_grad=False
                )
                if layer.lora_bias is not None:
                    module.bias += weight * layer.scaling * layer.lora_bias
    return merged


def per_row(
    model: nn.Module, adapters: Mapping[str, LoraAdapter], entries: Sequence[Any], x: Tensor,
    run: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x),
) -> Tensor:  # fmt: skip
    """Every sample on its own, through a model that has its entry merged in."""
    with torch.no_grad():
        return torch.cat([run(adapted_copy(model, adapters, e), x[i : i + 1]) for i, e in enumerate(entries)])


def check_threads(
    bare: nn.Module, adapters: Mapping[str, LoraAdapter], model: nn.Module, x: Tensor, times: int
) -> None:
    """Threads that serve adapters ``a`` and ``b`` at once each get their own rows."""
    with torch.no_grad():
        wanted = {name: per_row(bare, adapters, [name], x) for name in ("a", "b")}
    wrong: list[float] = []

    def serve(name: str) -> None:
        with torch.no_grad(), use_adapters(model, name):
            for _ in range(times):
                error = float((model(x) - wanted[name]).abs().max())
                if not error < 1e-4:
                    wrong.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
