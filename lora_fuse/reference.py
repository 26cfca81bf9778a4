"""One naive PyTorch function per op: the specification. For tests and benchmarks; nothing shipped imports it."""

from __future__ import annotations

import torch
from torch import Tensor


def multi_lora(
    x: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    slot_rank: Tensor,
    slot_scaling: Tensor,
    pairs: list[tuple[int, int, float]],
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``y[row] += weight * scaling[slot] * B[slot] (A[slot] x[row])`` for every (row, slot, weight), in ``dtype``."""
    num_slots = slot_rank.shape[0]
    max_rank = pool_a.shape[0] // max(num_slots, 1)
    y = torch.zeros(x.shape[0], pool_b.shape[1], dtype=dtype) if out is None else out.to(dtype)
    for row, slot, weight in pairs:
        rows = slice(slot * max_rank, slot * max_rank + int(slot_rank[slot]))
        h = pool_a[rows].to(dtype) @ x[row].to(dtype)  # [rank]
        y[row] += weight * float(slot_scaling[slot]) * (h @ pool_b[rows].to(dtype))
    return y
