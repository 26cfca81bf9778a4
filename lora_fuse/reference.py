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


def topk_mask(
    xs: list[Tensor], density: float, scope: str = "tensor", minus: list[Tensor] | None = None
) -> list[Tensor]:
    """The ``int(density * n)`` largest ``|x - minus|`` (fp32, or fp64 for fp64) by a stable sort; unchecked."""
    sizes = []
    for i, x in enumerate(xs):
        wide = torch.promote_types(x.dtype, torch.float32)
        sizes.append((x.to(wide) if minus is None else x.to(wide) - minus[i].to(wide)).abs().reshape(-1))
    if scope == "global":
        groups = [torch.cat(sizes)]
    elif scope == "tensor":
        groups = sizes
    else:
        cols = [x.numel() if x.dim() < 2 else x.shape[1:].numel() for x in xs]
        groups = [row for s, c in zip(sizes, cols, strict=True) for row in s.split(max(c, 1))]
    masks = []
    for size in groups:
        order = size.sort(descending=True, stable=True).indices[: int(density * size.numel())]
        masks.append(torch.zeros(size.shape, dtype=torch.bool).index_fill_(0, order, True))
    parts = torch.cat(masks).split([x.numel() for x in xs])
    return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]


def sparse_delta_linear(
    x: Tensor,
    deltas: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[tuple[int, int, float]],
    out: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``y[row] += weight * (U[slot] x[row] + bias[slot])`` for every (row, slot, weight), in ``dtype``.

    ``deltas``: dense ``[out_features, in_features]`` per slot, zeros where nothing is kept.
    """
    y = out.to(dtype)
    for row, slot, weight in pairs:
        h = deltas[slot].to(dtype) @ x[row].to(dtype)
        bias = biases[slot]
        y[row] += weight * (h if bias is None else h + bias.to(dtype))
    return y
