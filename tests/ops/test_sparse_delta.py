"""sparse_delta_linear on the CPU: closeness to fp64, and the properties that the docs promise."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import pytest
import torch
from cases import check_linear_in_the_weights, mixed_pairs, pairs_of, routing_of
from forks import NEEDS_FORK, QUIET, check_use_fork_use
from sparse_cases import make_case, make_sparse_pool

from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.sparse import SparseMatrix

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [  # in, out, density, slots
    pytest.param(1, 1, 1.0, 2, id="one-feature"),
    pytest.param(100, 37, 0.3, 4, id="odd-bitmap"),
    pytest.param(333, 130, 0.02, 3, id="odd-columns"),
    pytest.param(520, 65, 1.0, 1, id="everything-kept"),
    pytest.param(384, 70, 0.0005, 2, id="nearly-nothing"),
    pytest.param(70_001, 9, 0.004, 2, id="wide"),
    pytest.param(65_536, 8, 0.002, 2, id="65536-columns"),
]
ROWS = (0, 1, 2, 3, 6, 12, 70)  # each kind of group: gathers, 4, 8 and 16 lanes, several groups


@functools.cache  # shared by the instruction sets
def cases_of(in_features, out_features, density, slots, dtype, mixed):
    torch.manual_seed(in_features)
    filled = make_sparse_pool(slots, in_features, out_features, density, dtype)
    made = []
    for rows in ROWS if in_features < 10_000 else (2, 5):
        index = torch.randint(-1, slots, (rows,)) if rows > 2 else torch.zeros(rows, dtype=torch.long)
        pairs = mixed_pairs(rows, slots) if mixed else pairs_of(index)
        made.append(make_case(filled, rows, dtype, pairs, routing_of(pairs, rows, slots)))
    return made


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features", "density", "slots"), SHAPES)
@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_error_is_at_most_twice_torchs_own(isa, in_features, out_features, density, slots, mixed, dtype):
    for case in cases_of(in_features, out_features, density, slots, dtype, mixed):
        got = sparse_delta_linear(case.x, case.filled.pool, case.routing, out=case.out.clone())
        assert case.error(got) <= 2 * case.torch_error + FLOOR[dtype]


def test_long_sums_stay_accurate(isa):
    """Where every entry is kept, sums are as long as a dense layer's."""
    filled = make_sparse_pool(1, 4096, 16, 1.0, torch.float32, bias=False)
    pairs = pairs_of(torch.zeros(20, dtype=torch.long))
    case = make_case(filled, 20, torch.float32, pairs, routing_of(pairs, 20, 1))
    got = sparse_delta_linear(case.x, filled.pool, case.routing, out=case.out.clone())
    assert case.error(got) <= 2 * case.torch_error + FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cols", "gaps"), [(2000, torch.uint8), (200_000, torch.uint16)])
def test_entries_far_apart(isa, dtype, cols, gaps):
    """Gaps around the widest that a byte or two hold are bridged; what is skipped on the way is not read."""
    step = torch.iinfo(gaps).max
    places = torch.tensor([0, step, step + 1, 2 * step + 1, 3 * step + 1]) % cols
    places = torch.cat([places.unique(), torch.tensor([cols - 1])]).unique()
    delta = torch.zeros(40, cols, dtype=dtype)
    for row in range(1, 40):
        kept = places[places >= places[row % len(places)]] if row < 20 else places[torch.rand(len(places)) < 0.5]
        delta[row, kept] = torch.randn(len(kept)).to(dtype)
    if gaps == torch.uint8:
        delta[:, ::7] = torch.randn(40, len(range(0, cols, 7))).to(dtype)  # so many that bytes are the smaller form
        delta[3] = 0
        delta[3, -1] = 1
    pool = SparsePool(1, cols, 40, dtype)
    pool.write(0, SparseMatrix.from_mask(delta, delta != 0))
    assert pool.packed[0].gaps.dtype == gaps
    assert torch.equal(pool.dense(0, dtype), delta)
    unkept = (delta == 0).all(0)
    for rows in (1, 2, 3, 4, 7, 20):
        x = torch.randn(rows, cols).to(dtype)
        want = x.double() @ delta.double().t()
        x[:, unkept] = torch.inf  # on columns that no entry has
        got = sparse_delta_linear(x, pool, Routing.from_slots(torch.zeros(rows, dtype=torch.long), 1))
        torch.testing.assert_close(got.double(), want, atol=0.05 if dtype == torch.bfloat16 else 0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_a_row_does_not_see_the_others(isa, dtype, density):
    """Bitwise: alone, with any number of others, in any order, on one thread or several."""
    slots, rows = 3, 120
    pool = make_sparse_pool(slots, 300, 200, density, dtype).pool
    index = torch.arange(rows) % (slots + 1) - 1
    x, out = torch.randn(rows, 300).to(dtype), torch.randn(rows, 200).to(dtype)
    before = torch.get_num_threads()

    def run(keep: torch.Tensor, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return sparse_delta_linear(x[keep], pool, Routing.from_slots(index[keep], slots), out=out[keep].clone())

    every = torch.arange(rows)
    want = run(every, 2)
    for threads in (1, 3, 8):
        assert torch.equal(want, run(every, threads))
    order = torch.randperm(rows)
    assert torch.equal(want[order], run(order, 2))
    of_one = (index == 1).nonzero()[:, 0]
    for count in (1, 2, 3, 4, 5, 8, 9, 15, 17):
        assert torch.equal(want[of_one[:count]], run(of_one[:count], 2)), count
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mix_of_one_is_the_delta_itself(isa, dtype):
    """A row with one pair gives the same bits, weighted or not, whether another row of the batch is mixed or not."""
    pool = make_sparse_pool(3, 200, 72, 0.2, dtype).pool
    x, out = torch.randn(4, 200).to(dtype), torch.randn(4, 72).to(dtype)
    singles = [(0, 1, 0.3), (1, 0, 1.0), (2, 2, -1.7)]
    alone = sparse_delta_linear(x, pool, routing_of(singles, 4, 3), out=out.clone())
    beside = sparse_delta_linear(x, pool, routing_of([*singles, (3, 0, 0.5), (3, 1, 2.0)], 4, 3), out=out.clone())
    assert torch.equal(alone[:3], beside[:3])
    assert torch.equal(alone[3], out[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_rows_without_a_delta_keep_their_bits(isa, dtype, mixed):
    pool = make_sparse_pool(2, 50, 60, 0.2, dtype).pool
    pool.clear(0)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    x, out = torch.randn(40, 50).to(dtype), torch.randn(40, 60).to(dtype)
    out[::5], out[1::5] = float("nan"), -0.0
    base = torch.arange(40) % 5 < 3  # no pair, no pair, a pair with the empty slot
    pairs = [(r, 0 if r % 5 == 2 else 1, 1.0) for r in range(40) if r % 5 >= 2]
    if mixed:
        pairs.append((4, 0, 0.5))
    got = sparse_delta_linear(x, pool, routing_of(pairs, 40, 2), out=out.clone())
    assert torch.equal(got[base].view(bits), out[base].view(bits))
    assert not torch.equal(got[~base], out[~base])


def test_a_bias_alone_and_an_empty_matrix(isa):
    pool = SparsePool(2, 30, 70, torch.float32)
    bias, nothing = torch.randn(70), torch.zeros(70, 30)
    pool.write(0, None, bias)
    pool.write(1, SparseMatrix.from_mask(nothing, nothing != 0), None)
    x, out = torch.randn(3, 30), torch.randn(3, 70)
    got = sparse_delta_linear(x, pool, Routing.from_slots(torch.tensor([0, 1, -1]), 2), out=out.clone())
    assert torch.equal(got, out + torch.stack([bias, torch.zeros(70), torch.zeros(70)]))


def test_linear_in_the_weights(isa):
    check_linear_in_the_weights(sparse_delta_linear, make_sparse_pool(3, 64, 64, 0.3, torch.float32).pool)


LAYOUTS = {
    "strided rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_of_x(isa, layout, dtype):
    pool = make_sparse_pool(2, 70, 50, 0.2, dtype).pool
    x = layout(torch.randn(33, 70).to(dtype))
    routing = Routing.from_slots(torch.arange(33) % 3 - 1, 2)
    assert torch.equal(sparse_delta_linear(x, pool, routing), sparse_delta_linear(x.contiguous(), pool, routing))


def test_leading_dimensions_and_strided_out(isa):
    pool = make_sparse_pool(2, 24, 40, 0.4, torch.float32).pool
    x, routing = torch.randn(2, 3, 5, 24), Routing.from_slots(torch.arange(30) % 3 - 1, 2)
    want = sparse_delta_linear(x.view(30, 24), pool, routing)
    assert torch.equal(sparse_delta_linear(x, pool, routing), want.view(2, 3, 5, 40))
    wide = torch.zeros(30, 100)
    sparse_delta_linear(x.view(30, 24), pool, routing, out=wide[:, 30:70])
    assert torch.equal(wide[:, 30:70], want)
    assert not wide[:, :30].any()
    assert not wide[:, 70:].any()


def test_special_values(isa):
    """inf and NaN meet the kept entries of their column only, and stay in their row; fp16 overflows to inf."""
    delta = torch.zeros(80, 16)
    delta[::2, 2] = 1.0
    delta[:, 5] = 1.0
    pool = SparsePool(1, 16, 80, torch.float32)
    pool.write(0, SparseMatrix.from_mask(delta, delta != 0))
    for rows in (1, 20):
        x = torch.ones(rows, 16)
        x[0, 2] = float("inf")
        got = sparse_delta_linear(x, pool, Routing.from_slots(torch.zeros(rows, dtype=torch.long), 1))
        assert torch.equal(got[0], torch.where(delta[:, 2] > 0, float("inf"), 1.0))
        assert got[1:].isfinite().all()
    half = SparsePool(1, 4, 3, torch.float16)
    half.write(0, SparseMatrix.from_mask(torch.full((3, 4), 4e4), torch.ones(3, 4, dtype=torch.bool)))
    got = sparse_delta_linear(torch.ones(1, 4).half(), half, Routing.from_slots(torch.tensor([0]), 1))
    assert got.isinf().all()


class TestPool:
    @pytest.fixture(autouse=True)
    def _setup(self):
        self.filled = make_sparse_pool(2, 48, 70, 0.3, torch.float32)
        self.pool = self.filled.pool
        self.x, self.routing = torch.randn(6, 48), Routing.from_slots(torch.tensor([0, 1, -1, 1, 0, 1]), 2)
        self.want = sparse_delta_linear(self.x, self.pool, self.routing)

    def run(self, pool):
        return sparse_delta_linear(self.x, pool, self.routing)

    def test_copies_and_pickles(self):
        for other in (copy.deepcopy(self.pool), pickle.loads(pickle.dumps(self.pool))):
            assert torch.equal(self.run(other), self.want)
            other.clear(0)
            assert not torch.equal(self.run(other), self.want)
            assert other.handle != self.pool.handle
        assert torch.equal(self.run(self.pool), self.want)

    def test_state_dict_is_empty(self):
        assert not self.pool.state_dict()
        assert not list(self.pool.parameters())

    def test_to_dtype_casts_entries_and_keeps_the_bias(self):
        bias = self.filled.biases[1]
        cast = copy.deepcopy(self.pool).to(torch.bfloat16)
        assert cast.dtype == torch.bfloat16
        assert torch.equal(cast.packed[1].bias, bias)
        assert torch.equal(cast.dense(0, torch.bfloat16), self.filled.deltas[0].bfloat16())
        assert torch.equal(cast.dense(1, torch.float32), self.filled.deltas[1].bfloat16().float())
        got = sparse_delta_linear(self.x.bfloat16(), cast, self.routing)
        torch.testing.assert_close(got.float(), self.want, rtol=0.05, atol=0.2)

    def test_fp64_keeps_its_bias(self):
        pool = SparsePool(2, 48, 70, torch.float64)
        delta, bias = self.filled.deltas[0].double(), torch.randn(70, dtype=torch.float64)
        pool.write(0, SparseMatrix.from_mask(delta, delta != 0), bias)
        got = sparse_delta_linear(self.x.double(), pool, self.routing)
        torch.testing.assert_close(got[0], delta @ self.x[0].double() + bias, rtol=1e-14, atol=1e-14)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = sparse_delta_linear(self.x, pool, self.routing)
        torch.testing.assert_close(low.double(), got, rtol=0.05, atol=0.2)

    def test_dense_is_what_was_written(self):
        for slot, delta in enumerate(self.filled.deltas):
            assert torch.equal(self.pool.dense(slot, torch.float32), delta)

    def test_a_write_replaces_the_slot_and_copies(self):
        matrix = SparseMatrix.from_mask(torch.ones(70, 48), torch.rand(70, 48) < 0.1)
        kept = copy.deepcopy(matrix)
        running = self.pool.slots  # what a forward that runs has taken
        self.pool.write(0, matrix)
        matrix.values.zero_()
        assert torch.equal(self.pool.dense(0, torch.float32), kept.to_dense())
        assert self.pool.packed[0].bias is None
        assert torch.equal(self.run(self.pool)[1], self.want[1])
        self.pool.slots = running
        assert torch.equal(self.run(self.pool), self.want)

    def test_written_in_inference_mode(self):
        pool = SparsePool(2, 48, 70, torch.float32)
        with torch.inference_mode():
            for slot, (delta, bias) in enumerate(zip(self.filled.deltas, self.filled.biases, strict=True)):
                pool.write(slot, SparseMatrix.from_mask(delta, delta != 0), bias)
        x = self.x.clone().requires_grad_()
        got = sparse_delta_linear(x, pool, self.routing)
        assert torch.equal(got, self.want)
        got.sum().backward()
        assert x.grad is not None

    def test_bad_input(self):
        matrix = SparseMatrix.from_mask(torch.ones(70, 48), torch.rand(70, 48) < 0.1)
        refused = [
            (lambda: self.pool.write(2, matrix), "slot: 2 is out of range, this pool has slots 0 to 1"),
            (lambda: self.pool.clear(-1), "slot: -1 is out of range"),
            (
                lambda: self.pool.write(0, SparseMatrix.from_mask(torch.ones(48, 70), torch.ones(48, 70) > 0)),
                "matrix: expected",
            ),
            (lambda: self.pool.write(0, matrix, torch.ones(48)), r"bias: expected shape \(70,\)"),
            (lambda: SparsePool(0, 4, 4, torch.float32), "num_slots: got 0"),
            (lambda: SparsePool(1, 4, 4, torch.int32), "dtype: got torch.int32"),
        ]
        columns = matrix.columns if matrix.columns is not None else matrix.column_index().to(torch.uint16)
        plain = SparseMatrix(matrix.values, matrix.row_starts, columns, None, 48)
        for field, value in [("columns", 48), ("columns", 65535), ("row_starts", -1), ("row_starts", 1 << 40)]:
            bad = copy.deepcopy(plain)
            getattr(bad, field)[3] = value
            refused.append((lambda bad=bad: self.pool.write(0, bad), field))
        short = SparseMatrix(matrix.values[:-1], matrix.row_starts, columns, None, 48)
        refused.append((lambda: self.pool.write(0, short), "row_starts end at"))
        for call, match in refused:
            with pytest.raises(ValueError, match=match):
                call()
        assert torch.equal(self.run(self.pool), self.want)

    def test_slot_object_checks_what_the_kernel_follows(self):
        from lora_fuse import _cpu

        p = self.pool.packed[0]
        parts = {"values": p.values, "gaps": p.gaps, "starts": p.starts, "order": p.order}

        def make(**changed):
            return _cpu.SparseSlot(48, 70, *(parts | changed).values(), None)

        make()
        for name, place, value in [
            ("gaps", 5, 49),
            ("starts", 0, 1),
            ("starts", 2, 1 << 50),
            ("starts", 2, -1),
            ("order", 0, 65),
            ("order", 0, 255),
            ("order", 0, int(p.order[1])),
        ]:
            bad = parts[name].clone()
            bad[place] = value
            with pytest.raises(ValueError, match=name):
                make(**{name: bad})
        with pytest.raises(ValueError, match="gaps: expected a contiguous"):
            make(gaps=p.gaps[:-8])
        for sizes in [(2**62, 70), (48, 2**63 - 1), (-1, 70)]:
            with pytest.raises(ValueError, match="in_features, out_features: out of range"):
                _cpu.SparseSlot(*sizes, None, None, None, None, None)

    def test_packing_stays_in_its_memory(self):
        delta = self.filled.deltas[0]
        matrix, p = SparseMatrix.from_mask(delta, delta != 0), self.pool.packed[0]
        values, gaps = torch.empty_like(p.values), torch.empty_like(p.gaps)
        matrix.positions().pack(matrix.values, p.starts, p.order, values, gaps)
        assert torch.equal(values, p.values)
        assert torch.equal(gaps, p.gaps)
        for place, value in [
            (0, -1),
            (1, 1 << 40),
            (1, -(1 << 63)),
            (2, -5),
            (-1, 1 << 62),
            (-1, int(p.starts[-1]) - 1),
        ]:
            starts = p.starts.clone()
            starts[place] = value
            with pytest.raises(ValueError, match="starts"):
                matrix.positions().pack(matrix.values, starts, p.order, values, gaps)
        with pytest.raises(ValueError, match="starts: does not end at the number of steps"):
            matrix.positions().pack(matrix.values, p.starts, p.order, values[:-16], gaps[:-16])


@pytest.mark.usefixtures("two_threads")
@NEEDS_FORK
@QUIET
def test_use_fork_use():
    pool = make_sparse_pool(4, 512, 512, 0.1, torch.float32).pool
    x, routing = torch.randn(64, 512), Routing.from_slots(torch.arange(64) % 4, 4)
    check_use_fork_use(lambda out: sparse_delta_linear(x, pool, routing, out))


@pytest.mark.usefixtures("two_threads")
def test_other_slots_are_written_while_forwards_run():
    pool = make_sparse_pool(4, 256, 256, 0.1, torch.float32).pool
    spare = SparseMatrix.from_mask(torch.ones(256, 256), torch.rand(256, 256) < 0.1)
    x, routing = torch.randn(64, 256), Routing.from_slots(torch.arange(64) % 3, 4)
    want, wrong, stop = sparse_delta_linear(x, pool, routing), [], threading.Event()

    def work() -> None:
        for _ in range(30):
            if not torch.equal(sparse_delta_linear(x, pool, routing), want):
                wrong.append(1)
        stop.set()

    readers = [threading.Thread(target=work) for _ in range(3)]
    for t in readers:
        t.start()
    while not stop.is_set():
        pool.write(3, spare)
        pool.clear(3)
    for t in readers:
        t.join(60)
    assert not any(t.is_alive() for t in readers)
    assert not wrong
