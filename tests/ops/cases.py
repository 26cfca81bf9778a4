"""Pools, routings and the oracle for the tests of multi_lora."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fuse import reference
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing

Pairs = list[tuple[int, int, float]]


def make_pool(
    num_slots: int,
    max_rank: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    ranks: list[int] | None = None,
) -> AdapterPool:
    """Random adapters; rows beyond a slot's own rank hold NaN, which must never be read."""
    pool = AdapterPool(num_slots, max_rank, in_features, out_features, dtype)
    pool.pool_a.fill_(float("nan"))
    pool.pool_b.fill_(float("nan"))
    for slot in range(num_slots):
        rank = max_rank if ranks is None else ranks[slot]
        a = torch.randn(rank, in_features) / in_features**0.5
        pool.write(slot, a, torch.randn(out_features, rank) / max(rank, 1) ** 0.5, 0.5 + 0.25 * slot)
    return pool


def pairs_of(slots: Tensor) -> Pairs:
    return [(row, int(slot), 1.0) for row, slot in enumerate(slots) if slot >= 0]


def mixed_pairs(num_rows: int, num_slots: int) -> Pairs:
    """About half of all (row, slot), with weights of both signs."""
    keep = torch.rand(num_rows, num_slots) < 0.5
    return [(int(r), int(s), float(torch.randn(()))) for r, s in keep.nonzero()]


def routing_of(pairs: Pairs, num_rows: int, num_slots: int) -> Routing:
    rows, slots, weights = ([p[i] for p in pairs] for i in range(3))
    return Routing.from_pairs(
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(slots, dtype=torch.long),
        torch.tensor(weights),
        num_rows,
        num_slots,
    )


@dataclass(frozen=True)
class Call:
    """A call's inputs and its two yardsticks: the fp64 result, and torch's own largest error at x's dtype."""

    x: Tensor
    out: Tensor
    routing: Routing
    want: Tensor  # fp64
    torch_error: float

    def error(self, got: Tensor) -> float:
        return float((got.double() - self.want).abs().max()) if got.numel() else 0.0


@dataclass(frozen=True)
class Case(Call):
    """A call of ``multi_lora``."""

    pool: AdapterPool


@functools.cache  # shared by the instruction sets
def make_case(
    rows: int, in_features: int, out_features: int, max_rank: int, slots: int, dtype: torch.dtype, mixed: bool
) -> Case:
    torch.manual_seed(rows + max_rank)
    pool = make_pool(
        slots, max_rank, in_features, out_features, dtype, [max(0, max_rank - 3 * s) for s in range(slots)]
    )
    x, out = torch.randn(rows, in_features).to(dtype), torch.randn(rows, out_features).to(dtype)
    pairs = mixed_pairs(rows, slots) if mixed else pairs_of(torch.randint(-1, slots, (rows,)))
    want = reference.multi_lora(x, *pool.tensors, pairs, out=out)
    plain = out.clone()  # the same formula in torch at x's dtype, scatter-add by scatter-add
    for row, slot, weight in pairs:
        used = slice(slot * max_rank, slot * max_rank + int(pool.slot_rank[slot]))
        plain[row] += (x[row] @ pool.pool_a[used].t()) @ pool.pool_b[used] * (weight * float(pool.slot_scaling[slot]))
    torch_error = float((plain.double() - want).abs().max()) if rows else 0.0
    return Case(x, out, routing_of(pairs, rows, slots), want, torch_error, pool)
