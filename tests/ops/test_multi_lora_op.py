"""The torch.library op around the kernel: registration, autograd, compile, export, the fast path stepping aside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import make_pool, routing_of
from fast_path import StepsAside
from refusals import RefusesRouting

from lora_fuse import _cpu
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora

OPS = torch.ops.lora_fuse
ROUTING = ("rows", "weights", "segment_starts", "row_starts", "row_pairs")
PAIRS = [(0, 1, 0.5), (0, 2, -1.0), (2, 0, 2.0), (3, 1, 1.0)]


def args_of(pool: AdapterPool, routing: Routing) -> tuple:
    return (*pool.tensors, *routing.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck(dtype, mixed):
    pool = make_pool(3, 4, 20, 12, dtype)
    pool.pool_a.nan_to_num_()
    pool.pool_b.nan_to_num_()
    routing = routing_of(PAIRS, 5, 3) if mixed else Routing.from_slots(torch.tensor([1, -1, 0, 2, 2]), 3)
    x = torch.randn(5, 20).to(dtype)
    torch.library.opcheck(OPS.multi_lora.default, (x, *args_of(pool, routing)))
    torch.library.opcheck(OPS.multi_lora_.default, (torch.zeros(5, 12, dtype=dtype), x, *args_of(pool, routing)))
    if dtype != torch.bfloat16:
        torch.library.opcheck(OPS.multi_lora.default, (x.requires_grad_(), *args_of(pool, routing)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(dtype):
    """d/dx and d/dweights against autograd through dense products; fp64 by gradcheck too."""
    pool = make_pool(3, 4, 10, 7, dtype, [4, 2, 0])
    x = torch.randn(5, 10, dtype=dtype, requires_grad=True)
    weights = torch.tensor([p[2] for p in PAIRS], requires_grad=True)
    rows, slots = torch.tensor([p[0] for p in PAIRS]), torch.tensor([p[1] for p in PAIRS])

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return multi_lora(x, pool, Routing.from_pairs(rows, slots, w, 5, 3))

    def dense(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(5, 7)
        for i, (row, slot, _) in enumerate(PAIRS):
            used = slice(slot * 4, slot * 4 + int(pool.slot_rank[slot]))
            delta = pool.pool_b[used].t() @ pool.pool_a[used] * pool.slot_scaling[slot]
            y = y.index_add(0, torch.tensor([row]), (w[i].to(dtype) * (delta @ x[row]))[None])
        return y

    cotangent = torch.randn(5, 7, dtype=dtype)
    got = torch.autograd.grad(ours(x, weights), (x, weights), cotangent)
    want = torch.autograd.grad(dense(x, weights), (x, weights), cotangent)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda t: ours(t, weights.detach()), (x,))


@pytest.mark.parametrize("needs", ["x", "weights"])
def test_out_with_a_gradient_is_refused(needs):
    pool = make_pool(3, 4, 10, 7, torch.float32)
    x = torch.randn(5, 10, requires_grad=needs == "x")
    weights = torch.tensor([p[2] for p in PAIRS], requires_grad=needs == "weights")
    rows, slots = torch.tensor([p[0] for p in PAIRS]), torch.tensor([p[1] for p in PAIRS])
    routing = Routing.from_pairs(rows, slots, weights, 5, 3)
    with pytest.raises(ValueError, match=r"out: cannot be given while .* requires grad"):
        multi_lora(x, pool, routing, out=torch.zeros(5, 7))
    with torch.no_grad():
        multi_lora(x, pool, routing, out=torch.zeros(5, 7))


def test_out_version_is_bumped():
    pool, out = make_pool(1, 2, 8, 8, torch.float32), torch.zeros(3, 8)
    before = out._version
    multi_lora(torch.randn(3, 8), pool, Routing.from_slots(torch.zeros(3, dtype=torch.long), 1), out=out)
    assert out._version > before
    w = torch.randn(3, 8, requires_grad=True)
    saved = w.detach().clone()
    product = (w * saved).sum()  # saves `saved`
    multi_lora(torch.randn(3, 8), pool, Routing.from_slots(torch.zeros(3, dtype=torch.long), 1), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():  # inference tensors have no version; the call works all the same
        multi_lora(
            torch.randn(3, 8), pool, Routing.from_slots(torch.zeros(3, dtype=torch.long), 1), out=torch.zeros(3, 8)
        )


def test_out_version_is_bumped_through_the_dispatcher():
    pool = make_pool(2, 3, 8, 5, torch.bfloat16)
    x, out = torch.ones(2, 8, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.bfloat16)
    routing, before = Routing.from_slots(torch.tensor([0, 1]), 2), out._version
    with torch.autocast("cpu", torch.bfloat16):
        multi_lora(x, pool, routing, out=out)
    assert out._version > before


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_without_breaks_at_changing_sizes(in_place):
    pool = make_pool(3, 4, 20, 12, torch.float32)
    pool.pool_a.nan_to_num_()
    pool.pool_b.nan_to_num_()

    def call(x, *args):
        if in_place:
            y = x.new_ones(x.shape[0], 12)
            OPS.multi_lora_(y, x.relu(), *args)
            return y * 2
        return OPS.multi_lora(x.relu(), *args) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (5, 9, 33):
        x = torch.randn(rows, 20)
        args = args_of(pool, Routing.from_slots(torch.arange(rows) % 4 - 1, 3))
        torch.testing.assert_close(compiled(x, *args), call(x, *args))


def test_compiled_public_function_and_export_record_the_op():
    pool = make_pool(2, 4, 20, 12, torch.float32)
    routing = Routing.from_slots(torch.tensor([0, 1, -1, 0]), 2)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return multi_lora(x, self.pool, routing)

    layer, x = Layer(), torch.randn(4, 20)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
        exported = torch.export.export(layer, (x,))
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert "lora_fuse.multi_lora.default" in names
    torch.testing.assert_close(exported.module()(x), layer(x))


class TestTheFastPathStepsAside(StepsAside):
    op = "multi_lora"

    def make_pool(self):
        pool = make_pool(2, 4, 20, 12, torch.float32)
        pool.pool_a.nan_to_num_()
        pool.pool_b.nan_to_num_()
        return pool


class TestBadInput(RefusesRouting):
    """Every index and shape is checked before any memory is touched; out stays as it was."""

    @pytest.fixture(autouse=True)
    def _setup(self):
        self.pool = make_pool(3, 4, 20, 12, torch.float32)
        self.x, self.out = torch.randn(5, 20), torch.randn(5, 12)
        self.routing = routing_of(PAIRS, 5, 3)
        self.before = self.out.clone()

    def refuse(self, match, **changes):
        parts = dict(
            zip(
                (
                    "x",
                    "pool_a",
                    "pool_b",
                    "slot_rank",
                    "slot_scaling",
                    "rows",
                    "weights",
                    "segment_starts",
                    "row_starts",
                    "row_pairs",
                ),
                (self.x, *args_of(self.pool, self.routing)),
                strict=True,
            )
        )
        out = changes.pop("out", self.out)
        with pytest.raises((ValueError, TypeError), match=match):
            OPS.multi_lora_(out, *(parts | changes).values())
        assert torch.equal(self.out, self.before)

    @pytest.mark.parametrize("value", [-1, 5, 2**30])
    def test_rank_beyond_the_pool(self, value):
        ranks = self.pool.slot_rank.clone()
        ranks[2] = value
        self.refuse(f"slot_rank: slot 2 has rank {value}, accepted are 0 to 4", slot_rank=ranks)

    @pytest.mark.parametrize("starts", [[0, 2, 2, 3, 4], [0, 2, 2, 3, 4, 9], [0, 3, 2, 3, 4, 4]], ids=str)
    def test_row_starts(self, starts):
        self.refuse("row_starts", row_starts=torch.tensor(starts, dtype=torch.int32))

    def test_dtypes(self):
        self.refuse("rows: expected a contiguous int32", rows=self.routing.rows.long())
        self.refuse("dtypes differ", pool_a=self.pool.pool_a.bfloat16())
        self.refuse("dtypes differ", out=self.out.double())

    def test_shapes(self):
        self.refuse("x: has 19 features, pool_a has 20", x=self.x[:, :19])
        self.refuse("out: has 11 features, pool_b has 12", out=self.out[:, :11])
        self.refuse("different numbers of rows", x=self.x[:4])
        self.refuse("no multiple of 3 slots", pool_a=self.pool.pool_a[:11], pool_b=self.pool.pool_b[:11])
        self.refuse("11 and 12 rows|rows", pool_a=self.pool.pool_a[:11])
        self.refuse("give both or neither", row_pairs=None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_rows_beside_the_routing(self, dtype):
        pool = make_pool(3, 4, 20, 12, dtype)
        for rows in (4, 6):
            with pytest.raises(ValueError, match=rf"x: shape \[{rows}, 20\] has {rows} rows, the routing is for 5"):
                multi_lora(torch.randn(rows, 20, dtype=dtype), pool, self.routing)

    def test_without_a_kernel(self):
        """Other dtypes run in plain torch, which refuses the same."""
        pool = [t.double() if t.dtype == torch.float32 else t for t in self.pool.tensors]
        fields, x = dict(zip(ROUTING, self.routing.tensors, strict=True)), self.x.double()

        def refuse(match, x=x, pool=pool, **changed):
            with pytest.raises(ValueError, match=match):
                OPS.multi_lora(x, *pool, *{**fields, **changed}.values())

        starts = fields["segment_starts"]
        for bad in (starts[:3], starts.flip(0), starts + 1):
            refuse("segment_starts: must be 4 numbers that rise from 0 to 4", segment_starts=bad)
        refuse("x, out: dtypes torch.int32", x=self.x.int())
        refuse("x, out: have 19 and 12 features", x=x[:, :19])
        refuse("11 rows, 3 ranks and 3 scalings", pool=[pool[0][:11], pool[1][:11], *pool[2:]])
        for bad in (-1, 5):
            ranks = torch.tensor([4, bad, 4], dtype=torch.int32)
            refuse("slot_rank: got .*, accepted are 0 to 4", pool=[*pool[:2], ranks, pool[3]])
        refuse("the same number of rows", pool=[pool[0][:9], *pool[1:]])
        refuse("rows, weights: accepted is one entry", weights=torch.ones(3))
        with pytest.raises(ValueError, match="different numbers of rows"):
            multi_lora(x, make_pool(3, 4, 20, 12, torch.float64), self.routing, out=torch.zeros(4, 12).double())

    def test_no_dimensions(self):
        one = Routing.from_slots(torch.tensor([1]), 3)
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match=r"x: expected \[..., in_features\]"):
                multi_lora(torch.tensor(1.0, dtype=dtype), self.pool, one)

    def test_layouts(self):
        for x in (self.x.to_sparse(), self.x.to_mkldnn()):
            with pytest.raises(TypeError, match="x: expected a strided tensor, got layout"):
                multi_lora(x, self.pool, self.routing)

    def test_number_of_rows_that_is_none(self):
        routing = replace(self.routing, num_rows=5.0)
        with pytest.raises(TypeError, match="integer"):
            _cpu.multi_lora_eager(torch.zeros(5, 12), self.x, self.pool._buffers, routing)

    def test_no_memory(self):
        """Tensors that claim elements and own none."""
        freed = torch.randn(5, 20)
        freed.untyped_storage().resize_(0)
        for x in (torch._efficientzerotensor((5, 20)), freed):
            with pytest.raises(ValueError, match="x: its storage is not allocated"):
                multi_lora(x, self.pool, self.routing)
        with pytest.raises(ValueError, match="out: its storage is not allocated"):
            multi_lora(self.x, self.pool, self.routing, out=torch._efficientzerotensor((5, 12)))

    def test_memory(self):
        self.refuse("out: expected unit stride", out=torch.zeros(12, 5).t())
        self.refuse("out: expected unit stride", out=torch.zeros(12).expand(5, 12))
        square = make_pool(3, 4, 12, 12, torch.float32)
        x = torch.randn(5, 12)
        with pytest.raises(ValueError, match="x, out: share memory"):
            multi_lora(x, square, self.routing, out=x)
        with pytest.raises(ValueError, match="out: shares memory with a pool"):
            multi_lora(x, square, self.routing, out=square.pool_b[:5])

    def test_routing_builders(self):
        with pytest.raises(ValueError, match=r"slots: row 2 asks for slot 3, accepted are -1 \(base\) to 2"):
            Routing.from_slots(torch.tensor([0, -1, 3]), 3)
        with pytest.raises(ValueError, match="slots: row 1 asks for slot -2"):
            Routing.from_slots(torch.tensor([0, -2]), 3)
        with pytest.raises(ValueError, match="rows: values must be in"):
            Routing.from_pairs(torch.tensor([5]), torch.tensor([0]), None, 5, 3)
        with pytest.raises(ValueError, match="one length"):
            Routing.from_pairs(torch.tensor([1, 2]), torch.tensor([0]), None, 5, 3)
