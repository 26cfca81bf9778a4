"""Pools, routings and the oracle for the tests of multi_lora, and what holds of every routed op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def check_linear_in_the_weights(op: Callable[[Tensor, Any, Routing], Tensor], pool: Any) -> None:
    """Of three slots, ``[64] -> [64]`` in fp32: a row's sum is its slots' results, weighted."""
    x = torch.randn(5, 64)
    parts = [op(x, pool, routing_of([(r, s, 1.0) for r in range(5)], 5, 3)) for s in range(3)]
    weights = [0.7, -0.4, 0.0]
    mix = op(x, pool, routing_of([(r, s, w) for r in range(5) for s, w in enumerate(weights)], 5, 3))
    torch.testing.assert_close(mix, sum(w * p for w, p in zip(weights, parts, strict=True)), rtol=1e-5, atol=1e-5)


def check_a_mix_of_one(
    run: Callable[[Tensor, Tensor, Any, Routing], Tensor], pool: Any, in_features: int, out_features: int
) -> None:
    """Rows with one pair keep their bits where another row of the batch has several; fp16, three slots."""
    x, out = torch.randn(4, in_features).half(), torch.randn(4, out_features).half()
    singles = [(0, 1, 0.3), (1, 0, 1.0), (2, 2, -1.7)]
    alone = run(out.clone(), x, pool, routing_of(singles, 4, 3))
    beside = run(out.clone(), x, pool, routing_of([*singles, (3, 0, 0.5), (3, 1, 2.0)], 4, 3))
    assert torch.equal(alone[:3], beside[:3])
    assert torch.equal(alone[3], out[3])
    assert not torch.equal(beside[3], out[3])
