"""The expand that reads h beside y, in Triton's CPU interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, make_pool, mixed_pairs, pairs_of, routing_of
from test_expand_op import FLOOR, beside

from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.kernels.multi_lora import Slice, expand_launches
from lora_fuse.kernels.routing import build_tiles
from lora_fuse.ops.expand import _cuda_ as op_for_cuda

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.float16)]


def run(out, h, pool, routing, backend="cuda"):
    tiles = build_tiles(routing.rows, routing.segment_starts)
    made = expand_launches(out, h, [Slice(*pool.tensors)], routing.tensors, tiles, backend)
    for launch in made:
        launch.run()
    return made


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "out_features", "max_rank", "slots"), [(1, 48, 8, 3), (17, 130, 16, 4), (20, 70, 20, 5), (9, 33, 100, 2)]
)
def test_error_is_at_most_twice_torchs_own(rows, out_features, max_rank, slots, dtype, mixed):
    case = make_case(rows, 300, out_features, max_rank, slots, dtype, mixed)
    for backend in ("cuda", "hip"):
        out, h, torch_error = beside(case)
        before = h.clone()
        made = run(out, h, case.pool, case.routing, backend)
        assert len(made) == (case.routing.num_pairs > 0)
        assert case.error(out) <= 2 * torch_error + FLOOR[dtype]
        assert torch.equal(h.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype):
    """Bitwise, given its h, in batches of several tiles, of fixed size and among mixes; base rows keep their bits."""
    pool = make_pool(4, 12, 64, 72, dtype, [12, 0, 5, 9])
    slots = torch.arange(41) % 5 - 1
    wide = torch.randn(41, 72 + 48).to(dtype)
    want = wide.clone()
    run(want[:, :72], want[:, 72:], pool, Routing.from_slots(slots, 4))
    for keep in (torch.randperm(41), torch.tensor([2]), torch.arange(0, 41, 3)):
        got = wide[keep]
        run(got[:, :72], got[:, 72:], pool, Routing.from_slots(slots[keep], 4))
        assert torch.equal(got, want[keep])
    for row in (0, 1, 2):  # slot -1, slot 0, a slot of rank 0
        assert torch.equal(wide[row], want[row]) == (row != 1)
    mixed, pairs = wide.clone(), pairs_of(slots)
    run(mixed[:, :72], mixed[:, 72:], pool, routing_of([*pairs, (0, 0, 0.5), (0, 3, 2.0)], 41, 4))
    assert torch.equal(mixed[1:], want[1:])
    layout = SlabLayout(41, 3, 4)
    slab = layout.empty(torch.device("cpu"))
    layout.write(slab, routing_of(pairs, 41, 4))
    padded, got = layout.routing(slab), wide.clone()
    tiles = layout.split(slab)[5]
    build_tiles(padded.rows, padded.segment_starts, tiles)
    for launch in expand_launches(got[:, :72], got[:, 72:], [Slice(*pool.tensors)], padded.tensors, tiles, "cuda"):
        launch.run()
    assert torch.equal(got, want)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_slices_have_the_bits_of_layers_alone(mixed):
    """Four, of which a launch takes three, with other widths and ranks, one column apart."""
    widths, rows = (100, 30, 17, 40), 9
    ranks = ([20, 3, 0], [7, 20, 9], [0, 0, 11], [1, 2, 3])
    pools = [make_pool(3, 20, 8, w, torch.float16, r) for w, r in zip(widths, ranks, strict=True)]
    routing = routing_of(mixed_pairs(rows, 3) if mixed else pairs_of(torch.arange(rows) % 4 - 1), rows, 3)
    wide = torch.randn(rows, sum(widths) + 4 + 4 * 60).half()
    starts = [sum(widths[:i]) + i for i in range(4)]
    want, h = wide.clone(), wide[:, sum(widths) + 4 :]
    for i, (pool, start) in enumerate(zip(pools, starts, strict=True)):
        run(want[:, start : start + widths[i]], h[:, 60 * i : 60 * (i + 1)], pool, routing)
    tiles = build_tiles(routing.rows, routing.segment_starts)
    tensors = [t for pool in pools for t in pool.tensors[1:]]
    op_for_cuda(wide, h, tensors, starts, *routing.tensors, tiles)
    assert torch.equal(wide, want)


def test_the_op():
    case = make_case(6, 30, 20, 4, 3, torch.float32, True)
    tiles = build_tiles(case.routing.rows, case.routing.segment_starts)
    out, h, _ = beside(case)
    args = (list(case.pool.tensors[1:]), [0], *case.routing.tensors, tiles)
    op_for_cuda(out.unflatten(0, (2, 3)), h.unflatten(0, (2, 3)), *args)
    assert case.error(out) <= 2 * case.torch_error + 1e-6
    before = out.clone()
    for match, given in [
        ("out: shape .* unit stride", (torch.zeros(20, 6).t(), h)),
        ("h: shape .* one stride between rows", (out.unflatten(0, (2, 3)), h.unflatten(0, (3, 2)).transpose(0, 1))),
        ("out: shape .* one stride between rows", (torch.zeros(1, 20).expand(6, 20), h)),
        ("h: has 11 columns", (out, h[:, 1:])),
    ]:
        with pytest.raises(ValueError, match=match):
            op_for_cuda(*given, *args)
    with pytest.raises(ValueError, match="tiles: is on meta, h is on cpu"):
        op_for_cuda(out, h, *args[:-1], tiles.to("meta"))
    with pytest.raises(ValueError, match="pool_b: strides"):
        op_for_cuda(out, h, [case.pool.pool_b.t().contiguous().t(), *args[0][1:]], *args[1:])
    assert torch.equal(out, before)
    empty = make_case(0, 30, 20, 4, 3, torch.float32, False)
    none = Routing.from_slots(torch.full((6,), -1), 3)
    run(out, h, case.pool, none)
    run(*beside(empty)[:2], empty.pool, empty.routing)
    assert torch.equal(out, before)
