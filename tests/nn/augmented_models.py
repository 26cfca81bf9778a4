"""A model whose weights have room for A behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn_models import adapter
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.nn import packed

PATHS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down", "out")
# v_proj has room among its siblings only
AUGMENTED = ("q_proj", "v_proj", "gate_proj", "up_proj", "down")
SIZES = {"q_proj": 192, "k_proj": 32, "v_proj": 32, "gate_proj": 160, "up_proj": 160, "down": 128}


class Block(nn.Module):
    """Siblings, a layer without any, and one that is too narrow for its A."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 192), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)
        self.gate_proj, self.up_proj = nn.Linear(64, 160, bias=False), nn.Linear(64, 160, bias=False)
        self.down, self.out = nn.Linear(64, 128), nn.Linear(128, 24)

    def forward(self, x: Tensor) -> Tensor:
        attended = torch.tanh(self.q_proj(x)) * torch.cat([self.k_proj(x), self.v_proj(x)] * 3, -1)
        gated = torch.tanh(self.gate_proj(x)) * self.up_proj(x)
        return self.out(torch.tanh(self.down(x + attended[..., :64] + gated[..., 64:128])))


def block(pack: bool, dtype: torch.dtype = torch.float32, paths: tuple[str, ...] = PATHS) -> tuple[Any, Any, Any]:
    bare = Block().requires_grad_(False).to(dtype)
    adapters = {name: adapter(bare, paths, rank) for name, rank in (("a", 3), ("b", 5))}
    # three physical slots: as few rows of A as there can be
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, pack=pack, augment=True)
    return bare, adapters, model


def widths(pack: bool) -> list[tuple[int, ...]]:
    """Of the products of a forward."""
    if pack:
        return [(192, 32, 32), (160, 160), (128,)]
    return [(SIZES[leaf],) for leaf in AUGMENTED if leaf != "v_proj"]


BOTH = pytest.mark.parametrize("pack", [False, True], ids=["alone", "packed"])


def record_wide(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The widths of the layers that each product with A behind the weights is made for from now on, in order."""
    made: list[tuple[int, ...]] = []
    real = packed.linear_with_lora

    def record(x: Tensor, beside: Any, sizes: Any, *rest: Any) -> Any:
        made.append(tuple(sizes))
        return real(x, beside, sizes, *rest)

    monkeypatch.setattr(packed, "linear_with_lora", record)
    return made
