"""The sparse product's kernels in Triton's CPU interpreter: fp32 and fp16, since it is wrong in bf16."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import check_a_mix_of_one, mixed_pairs, pairs_of, routing_of
from sparse_cases import make_case, make_sparse_pool
from sparse_launches import as_on_a_gpu, run

from lora_fuse import _cpu
from lora_fuse.adapters import sparse_pool
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import PackedDelta, SparsePool
from lora_fuse.adapters.sparse_runs import RunDelta
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.kernels import sparse_delta as kernels
from lora_fuse.kernels.routing import build_tiles
from lora_fuse.ops import sparse_delta as ops
from lora_fuse.ops.sparse_delta import _composite_, _cuda_, _unread_
from lora_fuse.sparse import SparseMatrix

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [  # in, out, density, slots
    pytest.param(1, 1, 1.0, 2, id="one-feature"),
    pytest.param(70, 19, 0.3, 4, id="odd"),
    pytest.param(300, 17, 0.03, 3, id="three-chunks"),
    pytest.param(150, 9, 1.0, 1, id="everything-kept"),
    pytest.param(384, 9, 0.01, 2, id="fillers"),
]


@pytest.fixture(autouse=True)
def _runs(monkeypatch):
    as_on_a_gpu(monkeypatch)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features", "density", "slots"), SHAPES)
def test_error_is_at_most_twice_torchs_own(in_features, out_features, density, slots, dtype, mixed):
    """Slots with few rows, which are gathered, beside one with many, which is expanded."""
    filled = make_sparse_pool(slots, in_features, out_features, density, dtype)
    for rows in (3, 26):
        index = torch.where(torch.rand(rows) < 0.6, 0, torch.randint(-1, slots, (rows,)))
        pairs = mixed_pairs(rows, slots) if mixed else pairs_of(index)
        case = make_case(filled, rows, dtype, pairs, routing_of(pairs, rows, slots))
        got = run(case.out.clone(), case.x, filled.pool, case.routing)
        assert case.error(got) <= 2 * case.torch_error + FLOOR[dtype]


@pytest.mark.parametrize("most_gathered", [0, 100], ids=["expanded", "gathered"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype, most_gathered, monkeypatch):
    """Bitwise: alone, among any others, in any order, whichever way is taken."""
    monkeypatch.setattr(kernels, "MOST_GATHERED", most_gathered)
    pool = make_sparse_pool(3, 70, 20, 0.3, dtype).pool
    slots = torch.arange(13) % 4 - 1
    x, out = torch.randn(13, 70).to(dtype), torch.randn(13, 20).to(dtype)
    want = run(out.clone(), x, pool, Routing.from_slots(slots, 3))
    for keep in (torch.randperm(13), torch.arange(0, 13, 3)):
        assert torch.equal(run(out[keep].clone(), x[keep], pool, Routing.from_slots(slots[keep], 3)), want[keep])


@pytest.mark.parametrize("most_gathered", [0, 100], ids=["expanded", "gathered"])
def test_a_mix_of_one_is_the_delta_itself(most_gathered, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_GATHERED", most_gathered)
    check_a_mix_of_one(run, make_sparse_pool(3, 70, 40, 0.2, torch.float16).pool, 70, 40)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_rows_without_a_delta_keep_their_bits(mixed):
    """No pair, or pairs with empty slots alone; a slot with many rows among them."""
    pool = make_sparse_pool(3, 50, 40, 0.2, torch.float32).pool
    pool.clear(0), pool.clear(1)
    x, out = torch.randn(40, 50), torch.randn(40, 40)
    out[::5], out[1::5] = float("nan"), -0.0
    base = torch.arange(40) % 5 < 3
    pairs = [(r, 0 if r % 5 == 2 else 2, 1.0) for r in range(40) if r % 5 >= 2]
    if mixed:
        pairs += [(r, 1, 0.5) for r in (2, 4, 7)]
    got = run(out.clone(), x, pool, routing_of(pairs, 40, 3))
    assert torch.equal(got[base].view(torch.int32), out[base].view(torch.int32))
    assert not (got[~base] == out[~base]).all(1).any()
    nobody = Routing.from_slots(torch.full((3,), -1), 3)
    assert torch.equal(run(out[1:2].expand(3, -1).clone(), x[:3], pool, nobody), out[1:2].expand(3, -1))


@pytest.mark.parametrize("most_gathered", [0, 100], ids=["expanded", "gathered"])
def test_a_bias_alone_and_an_empty_matrix(most_gathered, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_GATHERED", most_gathered)
    pool = SparsePool(2, 30, 70, torch.float32)
    bias, nothing = torch.randn(70), torch.zeros(70, 30)
    pool.write(0, None, bias)
    pool.write(1, SparseMatrix.from_mask(nothing, nothing != 0), None)
    x, out = torch.randn(3, 30), torch.randn(3, 70)
    got = run(out.clone(), x, pool, Routing.from_slots(torch.tensor([0, 1, -1]), 2))
    assert torch.equal(got, out + torch.stack([bias, torch.zeros(70), torch.zeros(70)]))
    assert torch.equal(pool.dense(1, torch.float32), nothing)
    x.requires_grad_()
    sparse_delta_linear(x, pool, Routing.from_slots(torch.tensor([0, 1, -1]), 2)).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_far_apart(dtype, monkeypatch):
    """Gaps around the widest that a byte holds are bridged; what is skipped on the way is not read."""
    as_on_a_gpu(monkeypatch, chunk=2048)
    cols, places = 2000, torch.tensor([0, 255, 256, 511, 512, 767, 1022, 1999])
    delta = torch.zeros(16, cols, dtype=dtype)
    for row in range(1, 16):
        kept = places[places >= places[row % 8]] if row < 9 else places[torch.rand(8) < 0.5]
        delta[row, kept] = torch.randn(len(kept)).to(dtype)
    pool = SparsePool(1, cols, 16, dtype)
    pool.write(0, SparseMatrix.from_mask(delta, delta != 0))
    assert torch.equal(pool.dense(0, dtype), delta)
    for rows in (2, 9):
        x = torch.randn(rows, cols).to(dtype)
        want = x.double() @ delta.double().t()
        if rows <= 2:
            x[:, (delta == 0).all(0)] = torch.inf  # on columns that no entry has
        got = run(torch.zeros(rows, 16, dtype=dtype), x, pool, Routing.from_slots(torch.zeros(rows, dtype=int), 1))
        torch.testing.assert_close(got.double(), want, atol=0.02, rtol=0.02)


def test_any_activation_and_strided_outputs():
    pool = make_sparse_pool(2, 30, 20, 0.4, torch.float32).pool
    routing = Routing.from_slots(torch.arange(30) % 3 - 1, 2)
    x = torch.randn(2, 3, 5, 30)
    want = run(torch.zeros(30, 20), x.view(30, 30), pool, routing)
    wide = torch.zeros(30, 50)
    for given in (x, torch.stack([x, x], -1)[..., 0], x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert torch.equal(run(torch.zeros(2, 3, 5, 20), given, pool, routing).view(30, 20), want)
    run(wide[:, 10:30], x.view(30, 30), pool, routing)
    assert torch.equal(wide[:, 10:30], want)
    assert not wide[:, :10].any()
    assert not wide[:, 30:].any()


class TestPool:
    def setup_method(self):
        self.x, self.slots = torch.randn(6, 48), Routing.from_slots(torch.tensor([0, 1, -1, 1, 0, 1]), 2)

    @pytest.fixture(autouse=True)
    def _fill(self, _runs):
        self.filled = make_sparse_pool(2, 48, 70, 0.3, torch.float32)
        self.pool = self.filled.pool
        self.want = self.run(self.pool)

    def run(self, pool: SparsePool) -> torch.Tensor:
        return run(torch.zeros(6, 70, dtype=pool.dtype), self.x.to(pool.dtype), pool, self.slots)

    def test_swaps_are_seen_at_the_same_addresses(self):
        """What a captured graph reads is where it was, in every dtype that was asked for."""
        tables = [self.pool.table_as(dtype) for dtype in (torch.float32, torch.float16)]
        delta = torch.randn(70, 48)
        self.pool.write(0, SparseMatrix.from_mask(delta, delta.abs() > 1))
        assert [self.pool.table_as(d) for d in (torch.float32, torch.float16)] == tables
        got = self.run(self.pool)
        torch.testing.assert_close(got[0], delta.where(delta.abs() > 1, 0) @ self.x[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(got[1], self.want[1])
        half = torch.zeros(6, 70, dtype=torch.float16)
        run(half, self.x.half(), self.pool, self.slots)
        torch.testing.assert_close(half.float(), got, rtol=1e-2, atol=2e-2)
        self.pool.clear(0)
        assert not self.run(self.pool)[0].any()

    def test_copies_and_pickles(self):
        for other in (copy.deepcopy(self.pool), pickle.loads(pickle.dumps(self.pool))):
            assert torch.equal(self.run(other), self.want)
            other.clear(0)
            assert not torch.equal(self.run(other), self.want)
        assert torch.equal(self.run(self.pool), self.want)

    def test_a_cast_keeps_the_bias(self):
        cast = copy.deepcopy(self.pool).half()
        assert cast.packed[1].bias.dtype == torch.float32
        assert torch.equal(cast.dense(0, torch.float16), self.filled.deltas[0].half())
        torch.testing.assert_close(self.run(cast).float(), self.want, rtol=1e-2, atol=2e-2)

    def test_the_form_follows_the_device(self, monkeypatch):
        """Both ways, with nothing lost."""
        for there, form in ((False, PackedDelta), (True, RunDelta)):
            monkeypatch.setattr(sparse_pool, "by_runs", lambda device, there=there: there)
            self.pool.to("cpu")
            assert [type(p) for p in self.pool.packed] == [form, form]
            assert (self.pool.slots is None) == there
            for slot, delta in enumerate(self.filled.deltas):
                assert torch.equal(self.pool.dense(slot, torch.float32), delta)
            assert self.pool.packed[0].bias is None
            assert torch.equal(self.pool.packed[1].bias, self.filled.biases[1])
        assert torch.equal(self.run(self.pool), self.want)

    def test_a_matrix_out_of_range_is_refused(self):
        matrix = SparseMatrix(torch.ones(2), torch.tensor([0, 2] + [2] * 69), torch.tensor([3, 48]).short(), None, 48)
        with pytest.raises((ValueError, TypeError)):
            self.pool.write(0, matrix)
        assert torch.equal(self.run(self.pool), self.want)


class TestBadInput:
    """What is refused without reading a tensor is refused in the CPU's words, and ``out`` stays as it was."""

    ROUTING = ("rows", "weights", "segment_starts", "row_starts", "row_pairs")

    def test_as_on_the_cpu(self, monkeypatch):
        runs = make_sparse_pool(3, 20, 12, 0.4, torch.float32).pool
        monkeypatch.setattr(sparse_pool, "by_runs", lambda device: False)
        packed = copy.deepcopy(runs).to("cpu")
        routing = routing_of([(0, 1, 0.5), (0, 2, -1.0), (2, 0, 2.0), (3, 1, 1.0)], 5, 3)
        fields = dict(zip(self.ROUTING, routing.tensors, strict=True))
        x, out = torch.randn(5, 20), torch.randn(5, 12)
        before = out.clone()
        square = torch.randn(5, 40)
        bad: list[dict[str, Any]] = [
            {"x": x[:, :19]},
            {"out": out[:, :11]},
            {"x": x[:4]},
            {"row_pairs": None},
            {"rows": routing.rows.long()},
            {"rows": routing.rows[:, None]},
            {"weights": torch.ones(3)},
            {"row_starts": torch.zeros(5, dtype=torch.int32)},
            {"segment_starts": torch.zeros(3, dtype=torch.int32)},
            {"out": out.half()},
            {"out": torch.zeros(12, 5).t()},
            {"x": square[:, :20], "out": square[:, 10:22]},
        ]
        for changes in bad:
            args = {"out": out, "x": x, **fields, **changes}
            given = (args.pop("out"), args.pop("x"))
            rest = (runs.out_features, False, True, *args.values())
            with pytest.raises((ValueError, TypeError)) as of_cpu:
                torch.ops.lora_fuse.sparse_delta_(*given, packed.handle, *rest)
            tiles = build_tiles(routing.rows, routing.segment_starts)
            with pytest.raises((ValueError, TypeError)) as of_gpu:
                _cuda_(*given, runs.handle, *rest, tiles)
            assert (of_gpu.type, str(of_gpu.value)) == (of_cpu.type, str(of_cpu.value))
        wide = torch.zeros(len(tiles), 8, dtype=torch.int32)[:, ::2]
        given = (out, x, runs.handle, runs.out_features, False, True, *routing.tensors)
        for match, wrong in (("tiles: strides", wide), ("tiles: is on meta", tiles.to("meta"))):
            with pytest.raises(ValueError, match=match):
                _cuda_(*given, wrong)
        assert torch.equal(out, before)

    def test_launches_that_are_kept_are_for_pools_of_one_size(self, monkeypatch):
        """Tables of pools are alike; what was launched on one pool's must not go unchecked on a wider one's."""
        ready: dict[bytes, Any] = {}
        monkeypatch.setattr(ops, "_READY", ready)
        keep = lambda *args: ready.update({_cpu.operand_key(tuple(args[-2])): lambda addresses: True})  # noqa: E731
        monkeypatch.setattr(kernels, "sparse_delta_", keep)
        fitting, wider = (make_sparse_pool(2, size, 12, 0.4, torch.float32).pool for size in (20, 30))
        x, out, routing = torch.randn(3, 20), torch.zeros(3, 12), Routing.from_slots(torch.tensor([0, 1, 1]), 2)
        run(out, x, fitting, routing)
        assert len(ready) == 1
        run(out, x, fitting, routing)
        assert len(ready) == 1
        with pytest.raises(ValueError, match="x: has 20 features, the pool has 30"):
            run(out, x, wider, routing)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize(("transposed", "bias"), [(False, True), (True, False)])
def test_the_way_that_reads_nothing_back(transposed, bias, mixed):
    """What derivatives take on a GPU, with padding and without; rows without a pair keep their bits."""
    pool = make_sparse_pool(3, 20, 12, 0.4, torch.float64).pool
    pairs = mixed_pairs(7, 3) if mixed else pairs_of(torch.tensor([2, -1, 0, 0, -1, 1, 2]))
    routing = routing_of(pairs, 7, 3)
    sizes = (12, 20) if transposed else (20, 12)
    x, out = torch.randn(7, sizes[0]).double(), torch.randn(7, sizes[1]).double()
    out[1] = -0.0
    want, got, padded = out.clone(), out.clone(), out.clone()
    args = (pool.handle, sizes[1], transposed, bias)
    _composite_(want, x, *args, *routing.tensors)
    _unread_(got, x, *args, *routing.tensors)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    rows, weights, starts, *_ = routing.tensors
    more = torch.cat([rows, rows.new_zeros(4)]), torch.cat([weights, torch.full((4,), torch.nan)])
    _unread_(padded, x, *args, *more, starts, None, None)
    assert torch.equal(padded, got)
    if not mixed:
        assert got[1].signbit().all()
