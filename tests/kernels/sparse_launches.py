"""Pools of runs on the CPU, and the sparse kernels on them: what the interpreter's tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_fuse.adapters import sparse_pool, sparse_runs
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.kernels import sparse_delta as kernels
from lora_fuse.kernels.routing import build_tiles
from lora_fuse.kernels.sparse_delta_plan import Expand, Gather, Plan
from lora_fuse.ops.sparse_delta import _cuda_

SMALL = Plan(Gather(16, 64, 4, 128), Expand(16, 16, 4, 1))  # the interpreter is slow


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, chunk: int = 128, most_gathered: int = 8) -> None:
    """Pools made from here on hold runs wherever they are, cut every ``chunk`` columns."""
    monkeypatch.setattr(sparse_pool, "by_runs", lambda device: device.type != "meta")
    monkeypatch.setattr(kernels, "plan", lambda *args: SMALL)
    monkeypatch.setattr(kernels, "MOST_GATHERED", most_gathered)
    for module in (sparse_runs, kernels):
        monkeypatch.setattr(module, "CHUNK", chunk)


def run(out: Tensor, x: Tensor, pool: SparsePool, routing: Routing) -> Tensor:
    """As the op does on a GPU."""
    tiles = build_tiles(routing.rows, routing.segment_starts)
    _cuda_(out, x, pool.handle, pool.out_features, False, True, *routing.tensors, tiles)
    return out


def of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
