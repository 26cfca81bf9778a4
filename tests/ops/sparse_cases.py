"""Sparse pools and their oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Call, Pairs
from torch import Tensor

from lora_fuse import reference
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.sparse import SparseMatrix


def make_delta(rows: int, cols: int, density: float, dtype: torch.dtype) -> Tensor:
    """About ``density`` entries, unevenly spread over the rows; every fifth row is empty, unless all are kept.

    Scaled so that products with random rows are around 1.
    """
    scale = (density * cols) ** -0.5
    if density == 1.0:
        return (torch.randn(rows, cols) * scale).to(dtype)
    share = density * 2 * torch.rand(rows, 1)
    share[::5] = 0.0
    keep = torch.rand(rows, cols) < share
    return (torch.randn(rows, cols) * scale * keep).to(dtype)


@dataclass(frozen=True)
class Filled:
    """A pool and what its slots hold."""

    pool: SparsePool
    deltas: list[Tensor]
    biases: list[Tensor | None]


def make_sparse_pool(
    slots: int, in_features: int, out_features: int, density: float, dtype: torch.dtype, bias: bool = True
) -> Filled:
    """Every second slot has a bias."""
    pool = SparsePool(slots, in_features, out_features, dtype)
    deltas, biases = [], []
    for slot in range(slots):
        delta = make_delta(out_features, in_features, density, dtype)
        own = torch.randn(out_features) if bias and slot % 2 else None
        pool.write(slot, SparseMatrix.from_mask(delta, delta != 0), own)
        deltas.append(delta)
        biases.append(own)
    return Filled(pool, deltas, biases)


@dataclass(frozen=True)
class SparseCase(Call):
    """A call of ``sparse_delta_linear``."""

    filled: Filled


def make_case(filled: Filled, rows: int, dtype: torch.dtype, pairs: Pairs, routing: Routing) -> SparseCase:
    pool = filled.pool
    x, out = torch.randn(rows, pool.in_features).to(dtype), torch.randn(rows, pool.out_features).to(dtype)
    want = reference.sparse_delta_linear(x, filled.deltas, filled.biases, pairs, out)
    plain = out.clone()  # the same formula in torch at x's dtype
    for row, slot, weight in pairs:
        bias = filled.biases[slot]
        plain[row] += (filled.deltas[slot] @ x[row] + (0.0 if bias is None else bias.to(dtype))) * weight
    torch_error = float((plain.double() - want).abs().max()) if rows else 0.0
    return SparseCase(x, out, routing, want, torch_error, filled)
