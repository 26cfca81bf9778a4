"""The torch.library op around the sparse product: registration, autograd, the fast path stepping aside, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import routing_of
from fast_path import StepsAside
from refusals import RefusesRouting
from sparse_cases import make_sparse_pool

from lora_fuse import _cpu
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.functional import sparse_delta_linear

OPS = torch.ops.lora_fuse
PAIRS = [(0, 1, 0.5), (0, 2, -1.0), (2, 0, 2.0), (3, 1, 1.0)]
ROUTING = ("rows", "weights", "segment_starts", "row_starts", "row_pairs")


def args_of(pool: SparsePool, routing: Routing) -> tuple:
    return (pool.handle, pool.out_features, False, True, *routing.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck(dtype, mixed):
    pool = make_sparse_pool(3, 20, 12, 0.4, dtype).pool
    routing = routing_of(PAIRS, 5, 3) if mixed else Routing.from_slots(torch.tensor([1, -1, 0, 2, 2]), 3)
    x = torch.randn(5, 20).to(dtype)
    torch.library.opcheck(OPS.sparse_delta.default, (x, *args_of(pool, routing)))
    torch.library.opcheck(OPS.sparse_delta_.default, (torch.zeros(5, 12, dtype=dtype), x, *args_of(pool, routing)))
    if dtype != torch.bfloat16:
        torch.library.opcheck(OPS.sparse_delta.default, (x.requires_grad_(), *args_of(pool, routing)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(dtype):
    """d/dx and d/dweights against autograd through dense products; fp64 by gradcheck too, twice."""
    filled = make_sparse_pool(3, 10, 7, 0.4, dtype)
    x = torch.randn(5, 10, dtype=dtype, requires_grad=True)
    weights = torch.tensor([p[2] for p in PAIRS], requires_grad=True)
    rows, slots = torch.tensor([p[0] for p in PAIRS]), torch.tensor([p[1] for p in PAIRS])

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return sparse_delta_linear(x, filled.pool, Routing.from_pairs(rows, slots, w, 5, 3))

    def dense(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(5, 7)
        for i, (row, slot, _) in enumerate(PAIRS):
            bias = filled.biases[slot]
            h = filled.deltas[slot] @ x[row] + (0.0 if bias is None else bias.to(dtype))
            y = y.index_add(0, torch.tensor([row]), (w[i].to(dtype) * h)[None])
        return y

    cotangent = torch.randn(5, 7, dtype=dtype)
    got = torch.autograd.grad(ours(x, weights), (x, weights), cotangent)
    want = torch.autograd.grad(dense(x, weights), (x, weights), cotangent)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda t: ours(t, weights.detach()), (x,))
        assert torch.autograd.gradgradcheck(lambda t: ours(t, weights.detach()).square(), (x,))


@pytest.mark.parametrize("needs", ["x", "weights"])
def test_out_with_a_gradient_is_refused(needs):
    pool = make_sparse_pool(3, 10, 7, 0.4, torch.float32).pool
    x = torch.randn(5, 10, requires_grad=needs == "x")
    weights = torch.tensor([p[2] for p in PAIRS], requires_grad=needs == "weights")
    rows, slots = torch.tensor([p[0] for p in PAIRS]), torch.tensor([p[1] for p in PAIRS])
    routing = Routing.from_pairs(rows, slots, weights, 5, 3)
    with pytest.raises(ValueError, match=r"out: cannot be given while .* requires grad"):
        sparse_delta_linear(x, pool, routing, out=torch.zeros(5, 7))
    with torch.no_grad():
        sparse_delta_linear(x, pool, routing, out=torch.zeros(5, 7))


def test_out_version_is_bumped():
    pool, out = make_sparse_pool(1, 8, 8, 0.5, torch.float32).pool, torch.zeros(3, 8)
    routing = Routing.from_slots(torch.zeros(3, dtype=torch.long), 1)
    before = out._version
    sparse_delta_linear(torch.randn(3, 8), pool, routing, out=out)
    assert out._version > before
    with torch.inference_mode():
        sparse_delta_linear(torch.randn(3, 8), pool, routing, out=torch.zeros(3, 8))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_without_breaks_at_changing_sizes(in_place):
    pool = make_sparse_pool(3, 20, 12, 0.4, torch.float32).pool

    def call(x, *args):
        if in_place:
            y = x.new_ones(x.shape[0], 12)
            OPS.sparse_delta_(y, x.relu(), *args)
            return y * 2
        return OPS.sparse_delta(x.relu(), *args) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x = torch.randn(rows, 20)
        args = args_of(pool, Routing.from_slots(torch.arange(rows) % 4 - 1, 3))
        torch.testing.assert_close(compiled(x, *args), call(x, *args))


class TestTheFastPathStepsAside(StepsAside):
    op = "sparse_delta_linear"

    def make_pool(self):
        return make_sparse_pool(2, 20, 12, 0.5, torch.float32, bias=False).pool

    def test_autocast_reads_the_slots_as_they_are(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(self.call(self.x), self.call(self.x))
            self.pool.write(0, None)
            assert not self.call(self.x)[0].any()


class TestBadInput(RefusesRouting):
    """Every index and shape is checked before any memory is touched; out stays as it was."""

    @pytest.fixture(autouse=True)
    def _setup(self):
        self.pool = make_sparse_pool(3, 20, 12, 0.4, torch.float32).pool
        self.x, self.out = torch.randn(5, 20), torch.randn(5, 12)
        self.routing = routing_of(PAIRS, 5, 3)
        self.before = self.out.clone()

    def refuse(self, match, **changes):
        out, x = changes.pop("out", self.out), changes.pop("x", self.x)
        fields = dict(zip(ROUTING, self.routing.tensors, strict=True))
        with pytest.raises((ValueError, TypeError), match=match):
            OPS.sparse_delta_(out, x, *args_of(self.pool, self.routing)[:4], *(fields | changes).values())
        assert torch.equal(self.out, self.before)

    def test_shapes_and_dtypes(self):
        self.refuse("x: has 19 features, the pool has 20", x=self.x[:, :19])
        self.refuse("out: has 11 features, the pool has 12", out=self.out[:, :11])
        self.refuse("different numbers of rows", x=self.x[:4])
        self.refuse("give both or neither", row_pairs=None)
        self.refuse("rows: expected a contiguous int32", rows=self.routing.rows.long())
        self.refuse("x, out: dtypes", out=self.out.bfloat16())
        self.refuse("out: expected unit stride", out=torch.zeros(12, 5).t())
        with pytest.raises(ValueError, match=r"x: dtype torch\.float64, the pool holds torch\.float32"):
            sparse_delta_linear(self.x.double(), self.pool, self.routing)
        with pytest.raises(ValueError, match="x: dtype bfloat16, slot 0 of the pool holds float32"):
            sparse_delta_linear(self.x.bfloat16(), self.pool, self.routing)
        for rows in (4, 6):
            with pytest.raises(ValueError, match=rf"x: shape \[{rows}, 20\] has {rows} rows, the routing is for 5"):
                sparse_delta_linear(torch.randn(rows, 20), self.pool, self.routing)
        out, x = self.out.bfloat16(), self.x.bfloat16()
        with pytest.raises(ValueError, match="slot 0 of the pool holds float32"):
            _cpu.sparse_delta_linear(out, x, self.pool.slots, self.routing.tensors, 1)

    def test_no_dimensions(self):
        with pytest.raises(ValueError, match=r"x: expected \[..., in_features\]"):
            sparse_delta_linear(torch.tensor(1.0), self.pool, Routing.from_slots(torch.tensor([1]), 3))

    @pytest.mark.parametrize("out", [True, False], ids=["out", "new"])
    def test_layouts(self, out):
        for x in (self.x.to_sparse(), self.x.to_mkldnn()):
            with pytest.raises(TypeError, match="x: expected a strided tensor, got layout"):
                sparse_delta_linear(x, self.pool, self.routing, out=self.out if out else None)
        assert torch.equal(self.out, self.before)

    @pytest.mark.parametrize("number", [5.0, None, 2**70])
    def test_number_of_rows_that_is_none(self, number):
        routing = replace(self.routing, num_rows=number)
        with pytest.raises((TypeError, OverflowError), match="int"):
            _cpu.sparse_delta_linear_eager(self.out, self.x, self.pool.slots, routing)

    def test_a_pool_that_is_gone(self):
        args = list(args_of(self.pool, self.routing))
        args[0] = 10**9
        with pytest.raises(ValueError, match="pool: 1000000000 is not a SparsePool of this process"):
            OPS.sparse_delta(self.x, *args)

    def test_memory(self):
        square = make_sparse_pool(3, 12, 12, 0.4, torch.float32).pool
        x = torch.randn(5, 12)
        with pytest.raises(ValueError, match="x, out: share memory"):
            sparse_delta_linear(x, square, self.routing, out=x)
        freed = torch.randn(5, 20)
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="x: its storage is not allocated"):
            sparse_delta_linear(freed, self.pool, self.routing)

    def test_without_a_kernel(self):
        """Other dtypes run in plain torch, which refuses the same."""
        pool = make_sparse_pool(3, 20, 12, 0.4, torch.float64).pool
        fields, x = dict(zip(ROUTING, self.routing.tensors, strict=True)), self.x.double()

        def refuse(match, x=x, **changed):
            with pytest.raises(ValueError, match=match):
                OPS.sparse_delta(x, *args_of(pool, self.routing)[:4], *{**fields, **changed}.values())

        starts = fields["segment_starts"]
        for bad in (starts[:3], starts.flip(0), starts + 1):
            refuse("segment_starts: must be 4 numbers that rise from 0 to 4", segment_starts=bad)
        refuse("x, out: dtypes torch.int32", x=self.x.int())
        refuse("x, out: have 19 and 12 features", x=x[:, :19])
        refuse("rows, weights: accepted is one entry", weights=torch.ones(3))
        refuse("rows: values", rows=fields["rows"] + 5)


def test_without_a_kernel_rows_keep_their_bits():
    pool = make_sparse_pool(2, 20, 12, 0.4, torch.float64).pool
    out = torch.full((4, 12), -0.0, dtype=torch.float64)
    got = sparse_delta_linear(
        torch.randn(4, 20).double(), pool, Routing.from_slots(torch.tensor([0, -1, 1, -1]), 2), out=out
    )
    assert got[1::2].signbit().all()
    assert got[::2].any()
