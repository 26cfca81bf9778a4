"""``expand_``: the second half of multi_lora, from every slot's shrink of every row, in plain torch."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, make_pool, routing_of
from torch import Tensor

import lora_fuse.ops.expand  # noqa: F401  # registers the op
from lora_fuse.adapters.routing import Routing

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
expand_ = torch.ops.lora_fuse.expand_


def beside(case, fill: float = float("nan")) -> tuple[Tensor, Tensor, float]:
    """``(out, h)``, columns of one tensor, as a product with weight and A behind each other makes them, and the error
    of torch's own way from there."""
    h = case.x @ torch.nan_to_num(case.pool.pool_a).t()
    live = torch.arange(case.pool.max_rank)[None] < case.pool.slot_rank[:, None]
    h[:, ~live.flatten()] = fill  # what an earlier tenant left there
    wide, plain = torch.cat([case.out, h], 1), case.out.clone()
    slots = case.routing.pair_slots().tolist()
    weights = [1.0] * len(slots) if case.routing.weights is None else case.routing.weights.tolist()
    for row, slot, weight in zip(case.routing.rows.tolist(), slots, weights, strict=True):
        used = slice(slot * case.pool.max_rank, slot * case.pool.max_rank + int(case.pool.slot_rank[slot]))
        plain[row] += h[row, used] @ case.pool.pool_b[used] * (weight * float(case.pool.slot_scaling[slot]))
    error = max(case.error(plain), case.torch_error)
    return wide[:, : case.out.shape[1]], wide[:, case.out.shape[1] :], error


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "max_rank", "slots"), [(1, 8, 3), (17, 16, 4), (63, 1, 3), (40, 20, 5)])
def test_error_is_at_most_twice_torchs_own(rows, max_rank, slots, dtype, mixed):
    case = make_case(rows, 300, 130, max_rank, slots, dtype, mixed)
    out, h, torch_error = beside(case)
    expand_(out, h, case.pool.tensors[1:], [0], *case.routing.tensors)
    assert case.error(out) <= 2 * torch_error + FLOOR[dtype]


def test_three_dimensions_and_padding():
    case = make_case(6, 30, 20, 4, 3, torch.float32, False)
    out, h = (t.unflatten(0, (2, 3)) for t in beside(case)[:2])
    rows = torch.cat([case.routing.rows, torch.full((4,), 2**30, dtype=torch.int32)])
    tensors = (rows, None, *case.routing.tensors[2:])
    expand_(out, h, case.pool.tensors[1:], [0], *tensors, torch.full((1, 4), -1, dtype=torch.int32))
    assert case.error(out.flatten(0, 1)) <= 2 * case.torch_error + 1e-6


def test_slices():
    """Each as alone, in its own columns of out and of h."""
    one, other = (make_case(7, 30, width, 4, 3, torch.float32, True) for width in (20, 12))
    (y1, h1), (y2, h2) = beside(one)[:2], beside(other)[:2]
    out = torch.cat([y1, torch.ones(7, 3), y2, torch.zeros(7, 2)], 1)
    pools = [*one.pool.tensors[1:], *other.pool.tensors[1:]]
    expand_(out, torch.cat([h1, h2], 1), pools, [0, 23], *one.routing.tensors)
    expand_(y1, h1, one.pool.tensors[1:], [0], *one.routing.tensors)
    expand_(y2, h2, other.pool.tensors[1:], [0], *one.routing.tensors)
    assert torch.equal(out, torch.cat([y1, torch.ones(7, 3), y2, torch.zeros(7, 2)], 1))


def test_opcheck():
    pool = make_pool(3, 4, 30, 20, torch.float32)
    routing = routing_of([(0, 1, 0.5), (0, 2, 1.0), (1, 0, 1.0)], 3, 3)
    given = (torch.randn(3, 20), torch.randn(3, 12), pool.tensors[1:], [0], *routing.tensors)
    torch.library.opcheck(expand_.default, given)


def test_bad_input():
    pool, wide = make_pool(3, 4, 30, 20, torch.float32), make_pool(3, 5, 30, 20, torch.float32)
    routing, other = (Routing.from_slots(torch.tensor([0, 2, -1]), slots) for slots in (3, 4))
    out, h = torch.zeros(3, 20), torch.zeros(3, 12)
    own = pool.tensors[1:]
    for match, (y, given, pools, starts, route) in [
        ("h, out, pool_b: dtypes", (out, h.half(), own, [0], routing)),
        ("h: has 11 columns, the pools have 12 rows", (out, h[:, 1:], own, [0], routing)),
        ("h, out: shapes .* different numbers of rows", (out, h[1:], own, [0], routing)),
        ("segment_starts: must be 4 numbers", (out, h, own, [0], other)),
        ("pools: 3 tensors for 2 slices", (out, h, own, [0, 0], routing)),
        ("pools: 0 tensors for 0 slices", (out, h, [], [], routing)),
        (r"pools: slice 0 has shapes \[12, 20\], \[3\] and \[2\]", (out, h, [*own[:2], own[2][1:]], [0], routing)),
        (r"pools: slice 1 has shapes \[15, 20\]", (out.repeat(1, 2), h, [*own, *wide.tensors[1:]], [0, 20], routing)),
        ("starts: slice 0 has columns 1 to 21, accepted are 0 to 20", (out, h, own, [1], routing)),
        ("starts: slice 1 has columns 10 to 30, acc", (out.repeat(1, 2), h, own * 2, [0, 10], routing)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            expand_(y, given, pools, starts, *route.tensors)
    assert not out.any()
