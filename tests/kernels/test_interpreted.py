"""The Triton kernels in Triton's CPU interpreter (``make test-kernels``): fp32 and fp16, since it is wrong in bf16."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cases import check_a_mix_of_one, make_case, make_pool, mixed_pairs, pairs_of, routing_of

from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.kernels.configs import plan, tile_rows
from lora_fuse.kernels.multi_lora import Slice, launches, slice_launches
from lora_fuse.kernels.routing import build_tiles, sort_slots
from lora_fuse.ops.multi_lora import _cuda_ as op_for_cuda
from lora_fuse.ops.multi_lora import _cuda_slices_ as slices_for_cuda

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [  # rows, in, out, max_rank, slots
    pytest.param(1, 64, 48, 8, 3, id="one-row"),
    pytest.param(17, 300, 130, 16, 4, id="odd"),
    pytest.param(40, 1100, 70, 20, 5, id="two-cuts"),
    pytest.param(5, 64, 33, 1, 3, id="rank-1"),
    pytest.param(20, 130, 64, 100, 2, id="rank-100"),
    pytest.param(9, 7, 5, 3, 12, id="tiny"),
]


def run(out, x, pool, routing, backend="cuda", chosen=None):
    """As the op does on a GPU."""
    tiles = build_tiles(routing.rows, routing.segment_starts)
    for launch in launches(out, x, [Slice(*pool.tensors)], routing.tensors, tiles, backend, chosen):
        launch.run()
    return out


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "in_features", "out_features", "max_rank", "slots"), SHAPES)
def test_error_is_at_most_twice_torchs_own(rows, in_features, out_features, max_rank, slots, dtype, mixed):
    case = make_case(rows, in_features, out_features, max_rank, slots, dtype, mixed)
    for backend in ("cuda", "hip"):
        got = run(case.out.clone(), case.x, case.pool, case.routing, backend)
        assert case.error(got) <= 2 * case.torch_error + FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_32_rows(dtype):
    """More pairs than tiles of 16 are for, a few rows with several: right, and the bits of the first rows alone."""
    pool, x = make_pool(3, 5, 40, 33, dtype), torch.randn(1030, 40).to(dtype)
    pairs = [*pairs_of(torch.arange(1030) % 4 - 1), (0, 1, 0.5), (0, 2, 2.0), (7, 0, 0.25)]
    got = run(torch.zeros(1030, 33, dtype=dtype), x, pool, routing_of(pairs, 1030, 3))
    want = multi_lora(x.double(), copy.deepcopy(pool).double(), routing_of(pairs, 1030, 3))
    assert (got - want).abs().max() <= (2e-3 if dtype == torch.float16 else 1e-6) * want.abs().max()
    few = routing_of([pair for pair in pairs if pair[0] < 9], 9, 3)
    assert torch.equal(run(torch.zeros(9, 33, dtype=dtype), x[:9], pool, few), got[:9])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype):
    """Bitwise: alone, among any others, in any order; partial sums added up by the expand or by the shrink itself."""
    pool = make_pool(4, 12, 1300, 72, dtype, [12, 0, 5, 9])
    slots = torch.arange(41) % 5 - 1
    x, out = torch.randn(41, 1300).to(dtype), torch.randn(41, 72).to(dtype)
    want = run(out.clone(), x, pool, Routing.from_slots(slots, 4))
    for keep in (torch.randperm(41), torch.tensor([2]), torch.arange(0, 41, 3)):
        got = run(out[keep].clone(), x[keep], pool, Routing.from_slots(slots[keep], 4))
        assert torch.equal(got, want[keep])
    shipped = plan(1300, 72, 12, 41, 4, str(dtype).removeprefix("torch."), "cuda")
    assert shipped.shrink.planes == 2
    serial = replace(shipped, shrink=replace(shipped.shrink, planes=1))
    assert torch.equal(run(out.clone(), x, pool, Routing.from_slots(slots, 4), chosen=serial), want)
    wide = replace(serial, expand=replace(serial.expand, block_n=32))
    assert torch.equal(run(out.clone(), x, pool, Routing.from_slots(slots, 4), chosen=wide), want)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_have_the_bits_of_layers_alone(dtype, mixed):
    """Of other widths, with other ranks in the same slots, and one without a pool between them; one program's columns
    being one block of a slice or several."""
    widths, in_features, rows = (100, 30, 17, 70), 1100, 9
    ranks = ([20, 3, 0], None, [7, 20, 9], [0, 0, 11])
    pools = [r and make_pool(3, 20, in_features, w, dtype, r) for w, r in zip(widths, ranks, strict=True)]
    pairs = mixed_pairs(rows, 3) if mixed else pairs_of(torch.arange(rows) % 4 - 1)
    routing = routing_of(pairs, rows, 3)
    x, out = torch.randn(rows, in_features).to(dtype), torch.randn(rows, sum(widths)).to(dtype)
    want = torch.cat(
        [
            part if pool is None else run(part.clone(), x, pool, routing)
            for part, pool in zip(out.split(widths, 1), pools, strict=True)
        ],
        1,
    )
    starts = [0, 100, 130, 147]
    slices = [Slice(*pool.tensors, start) for pool, start in zip(pools, starts, strict=True) if pool is not None]
    tiles = build_tiles(routing.rows, routing.segment_starts)
    shipped = plan(in_features, 187, 20, len(pairs), 3, str(dtype).removeprefix("torch."), "cuda", 3)
    for expand in (shipped.expand, replace(shipped.expand, block_n=16, steps=2)):
        got = out.clone()
        for launch in launches(got, x, slices, routing.tensors, tiles, "cuda", replace(shipped, expand=expand)):
            launch.run()
        assert torch.equal(got, want)
    got = out.clone()
    four = [*slices, slices[0]]  # more than a launch takes
    for launch in slice_launches(got, x, four, routing.tensors, tiles, "cuda"):
        launch.run()
    twice = run(want[:, :100].clone(), x, pools[0], routing)
    assert torch.equal(got, torch.cat([twice, want[:, 100:]], 1))


def test_rows_without_an_adapter_keep_their_bits():
    pool = make_pool(3, 4, 40, 24, torch.float32, [4, 0, 2])
    x, out = torch.full((6, 40), torch.inf), torch.full((6, 24), -0.0)
    slots = torch.tensor([-1, 1, -1, 1, -1, -1])
    got = run(out.clone(), x, pool, Routing.from_slots(slots, 3))
    assert torch.equal(got.view(torch.int32), out.view(torch.int32))
    for rows in (0, 3):
        assert not run(torch.zeros(rows, 24), x[:rows], pool, Routing.from_slots(torch.full((rows,), -1), 3)).any()


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_ranks_beyond_the_pools_are_its_largest(mixed):
    """A tensor on a device is not read before the launch, so nothing can be raised; other slots' rows stay unread."""
    pool, case = make_pool(3, 6, 70, 40, torch.float32, [6] * 3), make_case(9, 70, 40, 6, 3, torch.float32, mixed)
    want = run(case.out.clone(), case.x, pool, case.routing)
    assert want.isfinite().all()
    pool.slot_rank.fill_(1000)
    assert torch.equal(run(case.out.clone(), case.x, pool, case.routing), want)


def test_a_mix_of_one_is_the_adapter_itself():
    """Whether another row of the batch mixes or not."""
    check_a_mix_of_one(run, make_pool(3, 6, 200, 40, torch.float16), 200, 40)


def test_strided_activations_and_outputs():
    pool = make_pool(2, 4, 30, 20, torch.float32)
    routing = routing_of(pairs_of(torch.tensor([0, 1, 1, -1, 0])), 5, 2)
    x, out = torch.randn(5, 60), torch.randn(5, 50)
    want = run(out[:, :20].contiguous(), x[:, 10:40].contiguous(), pool, routing)
    run(out[:, :20], x[:, 10:40], pool, routing)
    assert torch.equal(out[:, :20], want)


class TestTheOp:
    """What runs for CUDA tensors: views and refusals before the launches."""

    def setup_method(self):
        self.pool = make_pool(3, 4, 24, 10, torch.float32)
        self.routing = routing_of(pairs_of(torch.tensor([0, 2, -1, 1, 1, 0])), 6, 3)
        self.tiles = build_tiles(self.routing.rows, self.routing.segment_starts)
        self.x = torch.randn(2, 3, 24)

    def call(self, out, x, routing=None, tiles=None):
        op_for_cuda(
            out, x, *self.pool.tensors, *(routing or self.routing).tensors, self.tiles if tiles is None else tiles
        )
        return out

    def test_any_activation_is_taken(self):
        want = multi_lora(self.x, self.pool, self.routing)
        wide, deep = torch.zeros(2, 3, 48), torch.zeros(24, 3, 2)
        wide[..., ::2], deep[:] = self.x, self.x.permute(2, 1, 0)
        for x in (self.x, wide[..., ::2], deep.permute(2, 1, 0), self.x.expand(2, 3, 24)):
            torch.testing.assert_close(self.call(torch.zeros(2, 3, 10), x), want)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
    def test_slices(self, dtype):
        """By the kernels, by plain torch, and by the CPU's op."""
        other, x = make_pool(3, 4, 24, 7, dtype), self.x.to(dtype)
        pools = [*self.pool.to(dtype).tensors, *other.tensors]
        out = torch.randn(2, 3, 20).to(dtype)
        want = out.clone()
        for pool, columns in ((self.pool, slice(0, 10)), (other, slice(12, 19))):
            want[..., columns] += multi_lora(x, pool, self.routing)
        by_hand = out.clone()
        slices_for_cuda(by_hand, x, pools, [0, 12], *self.routing.tensors, self.tiles)
        by_op = torch.ops.lora_fuse.multi_lora_slices_(out, x, pools, [0, 12], *self.routing.tensors)
        assert by_op is None
        tolerance = 2e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(by_hand, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)

    def test_bad_slices(self):
        out, pools = torch.zeros(2, 3, 20), [*self.pool.tensors]
        routing = (*self.routing.tensors, self.tiles)
        for match, given, starts in [
            ("pools: 5 tensors for 1 slices", [*pools, pools[0]], [0]),
            ("starts: slice 0 has columns 11 to 21, accepted are 0 to 20", pools, [11]),
            ("starts: slice 1 has columns 9 to 19, accepted are 10 to 20", pools * 2, [0, 9]),
            ("starts: slice 0 has columns -1", pools, [-1]),
        ]:
            for op in (slices_for_cuda, torch.ops.lora_fuse.multi_lora_slices_):
                with pytest.raises(ValueError, match=match):
                    op(out, self.x, given, starts, *routing)
        assert not out.any()

    def test_dtypes_without_a_kernel_take_plain_torch(self):
        self.pool.double()
        got = self.call(torch.zeros(2, 3, 10).double(), self.x.double())
        torch.testing.assert_close(got, multi_lora(self.x.double(), self.pool, self.routing))

    def test_lists_that_lie_otherwise(self):
        """Kernels read them without asking for strides: they would take others' numbers."""
        routing = routing_of([(row, slot, 0.3 + row) for row in range(6) for slot in range(3)], 6, 3)
        tiles = build_tiles(routing.rows, routing.segment_starts)
        given = [*self.pool.tensors, *routing.tensors, tiles]
        names = ["slot_rank", "slot_scaling", "rows", "weights", "segment_starts", "row_starts", "row_pairs", "tiles"]
        out = torch.zeros(2, 3, 10)
        for i, name in enumerate(names, 2):
            wide = torch.stack([given[i], given[i]], -1)[..., 0]
            with pytest.raises(ValueError, match=f"{name}: strides"):
                op_for_cuda(out, self.x, *given[:i], wide, *given[i + 1 :])
            with pytest.raises(ValueError, match="is on meta"):
                op_for_cuda(out, self.x, *given[:i], given[i].to("meta"), *given[i + 1 :])
        given[7] = routing.row_starts[:4]
        with pytest.raises(ValueError, match=r"row_starts: \[4\] entries, accepted are 7"):
            op_for_cuda(out, self.x, *given)
        assert not out.any()

    def test_bad_input(self):
        out = torch.zeros(2, 3, 10)
        other = Routing.from_slots(torch.zeros(6, dtype=torch.int32), 2)
        for match, given in [
            ("out: shape .* accepted are unit stride", (torch.zeros(2, 10, 3).transpose(1, 2), self.x)),
            ("out: shape .* one stride between rows", (torch.zeros(3, 2, 10).transpose(0, 1), self.x)),
            ("x, out: have 23 and 10 features", (out, self.x[..., :23])),
            ("out: shape .* one stride between rows", (torch.zeros(1, 1, 10).expand(2, 3, 10), self.x)),
            ("different numbers of rows", (out, self.x[:1])),
            ("dtypes", (out.half(), self.x)),
            ("on meta", (out, self.x, None, self.tiles.to("meta"))),
            ("segment_starts: must be 4 numbers", (out, self.x, other)),
        ]:
            with pytest.raises(ValueError, match=match):
                self.call(*given)
        self.pool.pool_b = self.pool.pool_b.t().contiguous().t()
        with pytest.raises(ValueError, match="pool_b: strides"):
            self.call(out, self.x)
        assert not out.any()


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 1500])
def test_sort_and_tiles(rows):
    """The routing that torch makes, and tiles that cover every pair once, in order."""
    num_slots = 5
    slots = torch.randint(-1, num_slots, (rows,), dtype=torch.int32)
    flag = torch.zeros(1, dtype=torch.int32)
    got, starts = sort_slots(slots, num_slots, flag)
    want = Routing.from_slots(slots, num_slots)
    assert torch.equal(starts, want.segment_starts)
    assert torch.equal(got[: want.num_pairs], want.rows)
    assert not flag.any()
    tiles = build_tiles(got, starts)
    used = tiles[tiles[:, 0] >= 0].tolist()
    assert (tiles[len(used) :, 0] == -1).all()
    covered = [(slot, pair) for slot, first, count, _ in used for pair in range(first, first + count)]
    assert covered == list(enumerate_pairs(want))
    assert all(0 < tile[2] <= tile_rows(rows) for tile in used)


def enumerate_pairs(routing: Routing) -> list[tuple[int, int]]:
    return [(int(slot), pair) for pair, slot in enumerate(routing.pair_slots())]


@pytest.mark.parametrize("wrong", [5, 100, -2, -(2**31)])
def test_a_slot_out_of_range_raises_the_flag_and_has_no_adapter(wrong):
    slots, flag = torch.tensor([0, wrong, 4, 0], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows, starts = sort_slots(slots, 5, flag)
    assert flag.item() == 1
    assert starts.tolist() == [0, 2, 2, 2, 2, 3]
    assert rows[:3].tolist() == [0, 3, 2]


def test_tiles_tell_rows_that_follow_each_other():
    """Rows of one adapter, rows that each have their own, and rows with gaps: 1 and 2 pairs can have no other gap than
    before and between them; a row that stands twice is no successor."""
    for rows, starts, firsts in [
        (torch.arange(40), [0, 40], [0, 16, 32]),
        (torch.tensor([3, 0, 2]), [0, 1, 2, 3], [3, 0, 2]),
        (torch.tensor([4, 5, 7, 0, 1, 2, 3]), [0, 3, 7], [-1, 0]),
        (torch.tensor([2, 2, 4]), [0, 3], [-1]),
    ]:
        tiles = build_tiles(rows.int(), torch.tensor(starts, dtype=torch.int32))
        assert tiles[tiles[:, 0] >= 0, 3].tolist() == firsts


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_looked_up_have_the_same_bits(dtype):
    """One adapter for all rows, and one for each row, against the same rows in tiles that say nothing of theirs."""
    pool, x, out = make_pool(20, 12, 300, 72, dtype), torch.randn(20, 300).to(dtype), torch.randn(20, 72).to(dtype)
    for slots in (torch.zeros(20, dtype=torch.int32), torch.arange(20).flip(0), torch.tensor([-1, 4] * 10)):
        routing = Routing.from_slots(slots, 20)
        tiles = build_tiles(routing.rows, routing.segment_starts)
        wrong = torch.full_like(routing.rows, -(2**20))
        results = []
        for first, rows in ((tiles[:, 3], wrong if (slots[0] >= 0) else routing.rows), (-1, routing.rows)):
            given, got = tiles.clone(), out.clone()
            given[:, 3] = first
            tensors = (rows, *routing.tensors[1:])
            for launch in launches(got, x, [Slice(*pool.tensors)], tensors, given, "cuda"):
                launch.run()
            results.append(got)
        assert torch.equal(*results)
        assert not torch.equal(results[0], out)
