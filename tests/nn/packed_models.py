"""A small model with siblings to pack, and adapters for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn_models import adapter
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.nn import packing
from lora_fuse.nn.packed import Pack

ENTRIES = ["a", None, {"a": 0.5, "b": -1.5}, "b"]
PATHS = ("q_proj", "v_proj", "gate_proj", "up_proj")
QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class Block(nn.Module):
    """Attention's and a gated MLP's products, of different widths; ``k_proj`` has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 24), nn.Linear(24, 8, bias=False), nn.Linear(24, 8)
        self.gate_proj, self.up_proj = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
        self.out = nn.Linear(40 + 40, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = x + q * torch.tanh(torch.cat([k, v, k + v], -1))
        return self.out(torch.cat([torch.tanh(self.gate_proj(x)) * self.up_proj(x), q, k, v], -1))


def block(dtype: torch.dtype = torch.float32, paths: tuple[str, ...] = PATHS) -> tuple[Block, dict[str, Any], Any]:
    bare = Block().requires_grad_(False).to(dtype)
    adapters = {name: adapter(bare, paths, rank) for name, rank in (("a", 3), ("b", 5))}
    return bare, adapters, lf.attach(copy.deepcopy(bare), adapters, pack=True)


def close(got: Tensor, want: Tensor) -> None:
    bound = 1e-5 if want.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def storages(model: nn.Module) -> dict[str, int]:
    return {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}


def fail_at_the_second_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on an attach binds one pack and raises ``MemoryError``, "no room", at the next."""
    real, calls = packing._bind, []

    def bind(pack: Pack, layers: Any) -> None:
        calls.append(pack)
        if len(calls) == 2:
            raise MemoryError("no room")
        real(pack, layers)

    monkeypatch.setattr(packing, "_bind", bind)
