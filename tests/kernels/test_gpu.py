"""The CUDA side of multi_lora on a device (``make test-gpu``)."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from cases import make_case, make_pool, pairs_of, routing_of
from gpu_runs import capture, nothing_waits, warm_up
from nn_models import Mlp, adapter, per_row

import lora_fuse as lf
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.kernels import multi_lora as kernels
from lora_fuse.ops import multi_lora as op

pytestmark = pytest.mark.gpu
PATHS = ("up", "down", "out")

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]


def moved(routing: Routing) -> Routing:
    fields = (None if t is None else t.cuda() for t in routing.tensors)
    return Routing(*fields, routing.num_rows)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_rank", [1, 16, 100, 512])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 4096, 4096), (70, 1000, 333), (1300, 512, 640)])
def test_error_is_at_most_twice_torchs_own(rows, in_features, out_features, max_rank, dtype, mixed, monkeypatch):
    case = make_case(rows, in_features, out_features, max_rank, 6, dtype, mixed)
    ran = []
    real = kernels.multi_lora_
    op._READY.clear()  # what was launched before would be launched again without asking
    monkeypatch.setattr(kernels, "multi_lora_", lambda *args: (ran.append(1), real(*args)))
    pool = copy.deepcopy(case.pool).cuda()  # the case is other tests' too
    got = multi_lora(case.x.cuda(), pool, moved(case.routing), out=case.out.cuda())
    assert ran
    assert case.error(got.cpu()) <= 2 * case.torch_error + FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype):
    """Bitwise, from one row to batches that take wider tiles and other plans."""
    pool = make_pool(4, 12, 1300, 640, dtype, [12, 0, 5, 9]).cuda()
    slots = torch.arange(3001) % 5 - 1
    x, out = torch.randn(3001, 1300, device="cuda").to(dtype), torch.randn(3001, 640, device="cuda").to(dtype)
    want = multi_lora(x, pool, moved(Routing.from_slots(slots, 4)), out=out.clone())
    for keep in (torch.randperm(3001), torch.tensor([2]), torch.arange(0, 3001, 77), torch.arange(0, 3001, 3)):
        at = keep.cuda()
        got = multi_lora(x[at], pool, moved(Routing.from_slots(slots[keep], 4)), out=out[at])
        assert torch.equal(got, want[at])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_row_does_not_see_the_others(dtype):
    """Bitwise, from one row to batches with blocks twice as wide; and a mix of one adapter is the adapter."""
    pool = make_pool(4, 20, 1300, 4096, dtype, [20, 0, 5, 9]).cuda()
    x, out = torch.randn(900, 1300, device="cuda").to(dtype), torch.randn(900, 4096, device="cuda").to(dtype)
    mix = [(0, 0.3), (2, -1.0), (3, 0.7)]
    alone = routing_of([(0, *pair) for pair in mix], 1, 4)
    want = multi_lora(x[:1], pool, moved(alone), out=out[:1].clone())
    assert not torch.equal(want, out[:1])
    for rows in (3, 40, 900):
        others = [(row, row % 4, 1.0) for row in range(1, rows)]
        routing = routing_of([*[(0, *pair) for pair in mix], *others], rows, 4)
        got = multi_lora(x[:rows], pool, moved(routing), out=out[:rows].clone())
        assert torch.equal(got[:1], want)


def test_integers_are_exact():
    """Sums of small integers leave no room for a wrong operand, layout or instruction (triton issue 9433)."""
    pool = make_pool(2, 64, 512, 256, torch.bfloat16)
    pool.pool_a.copy_(torch.randint(-1, 2, pool.pool_a.shape))
    pool.pool_b.copy_(torch.randint(-2, 3, pool.pool_b.shape))
    pool.slot_scaling.fill_(1)
    x = torch.randint(-1, 2, (300, 512)).bfloat16()
    routing = routing_of(pairs_of(torch.randint(-1, 2, (300,))), 300, 2)
    want = multi_lora(x.double(), pool.double(), routing)
    got = multi_lora(x.cuda(), pool.to("cuda", torch.bfloat16), moved(routing))
    assert torch.equal(got.cpu(), want.bfloat16())


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("rows", [5, 1100])
def test_gradients(rows, mixed):
    """Of x and of the weights, against the CPU's in fp64; without anything being read back."""
    case = make_case(rows, 300, 200, 20, 4, torch.float32, mixed)
    routing, grad = case.routing.explicit(), torch.randn(rows, 200)
    want_x, want_weights = case.x.double().requires_grad_(), routing.weights.double().requires_grad_()
    want_routing = Routing(routing.rows, want_weights, *routing.tensors[2:], rows)
    wide = copy.deepcopy(case.pool).double()
    multi_lora(want_x, wide, want_routing).backward(grad.double())
    x, weights = case.x.cuda().requires_grad_(), routing.weights.cuda().requires_grad_()
    there = moved(routing)
    given = Routing(there.rows, weights, *there.tensors[2:], rows)
    pool = copy.deepcopy(case.pool).cuda()
    y, grad = multi_lora(x, pool, given), grad.cuda()
    with nothing_waits():
        y.backward(grad)
    for got, want in ((x.grad, want_x.grad), (weights.grad, want_weights.grad)):
        assert (got.cpu() - want).abs().max() <= 1e-4 * want.abs().max()


def test_graphs_replay_with_a_new_pool_and_new_rows():
    pool = make_pool(3, 16, 512, 256, torch.bfloat16).cuda()
    routing = moved(Routing.from_slots(torch.tensor([0, 2, 2, 1]), 3))
    x, y = torch.randn(4, 512, device="cuda").bfloat16(), torch.zeros(4, 256, device="cuda").bfloat16()
    multi_lora(x, pool, routing, out=y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.zero_()
        multi_lora(x, pool, routing, out=y)
    pool.write(2, torch.randn(7, 512), torch.randn(256, 7), 0.5)
    x.copy_(torch.randn(4, 512))
    graph.replay()
    assert torch.equal(y, multi_lora(x, pool, routing))


class TestCapturedModels:
    """A forward captured once follows everything that is selected, swapped, added or removed afterwards."""

    def setup_method(self):
        self.bare = Mlp().requires_grad_(False).cuda()
        self.adapters = {n: adapter(Mlp(), PATHS, r) for n, r in (("a", 2), ("b", 5), ("c", 3))}
        given = {n: self.adapters[n] for n in "ab"}
        self.model = lf.attach(copy.deepcopy(self.bare), given, num_slots=3, max_rank=6)

    def want(self, entries, x):
        moved_to = {n: a.to(device="cuda") for n, a in self.adapters.items()}
        return per_row(self.bare, moved_to, entries, x)

    def capture(self, x):
        warm_up(self.model, x)
        return capture(self.model, x)

    def check(self, graph, y, entries, x):
        graph.replay()
        torch.testing.assert_close(y, self.want(entries, x), rtol=1e-4, atol=1e-4)

    def test_selections_swaps_additions_and_removals(self):
        x = torch.randn(3, 24, device="cuda")
        graph, y = self.capture(x)
        for entries in (["a", None, "b"], [{"a": 0.3, "b": 0.7}, "b", None], ["b"] * 3, [None] * 3):
            lf.set_adapters(self.model, entries)
            self.check(graph, y, entries, x)
        lf.set_adapters(self.model, ["a", "b", None])
        for rank in (6, 1, 3):
            self.adapters["b"] = adapter(Mlp(), PATHS, rank)
            lf.swap_adapter(self.model, "b", self.adapters["b"])
            self.check(graph, y, ["a", "b", None], x)
        lf.add_adapter(self.model, "c", self.adapters["c"])
        lf.set_adapters(self.model, ["c", "a", "c"])
        self.check(graph, y, ["c", "a", "c"], x)
        lf.remove_adapter(self.model, "c")
        self.check(graph, y, [None, "a", None], x)
        with pytest.raises(ValueError, match="captured batch has 3"):
            lf.set_adapters(self.model, ["a"])

    def test_slots_on_the_device(self):
        x, slots = torch.randn(3, 24, device="cuda"), lf.adapter_slots(self.model)
        graph, y = self.capture(x)
        tokens = torch.tensor([slots["b"], 99, slots["a"]], dtype=torch.int32, device="cuda")
        with nothing_waits():
            lf.set_adapters(self.model, tokens)
            graph.replay()
            with torch.no_grad(), contextlib.suppress(ValueError):  # the device may or may not have got there
                self.model(x)
        with contextlib.suppress(ValueError):
            lf.check(self.model)
        lf.set_adapters(self.model, tokens)
        self.check(graph, y, ["b", None, "a"], x)
        with pytest.raises(ValueError, match=r"row 1 .* asked for slot 99"):
            lf.check(self.model)

    def test_no_warm_up(self):
        x = torch.randn(3, 24, device="cuda")
        self.capture(x)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="no buffers"), torch.no_grad(), torch.cuda.graph(graph):
            self.model(x[:2])

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's, inside inductor
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled(self, mode, fresh_dynamo):
        counters = torch._dynamo.utils.counters
        counters.clear()
        fast = torch.compile(self.model, fullgraph=True, mode=mode)
        x = torch.randn(3, 24, device="cuda")
        entries = [["a", None, "b"], ["a", "a", None], [{"a": 0.3, "b": 0.7}, "b", None], ["b"] * 3, [None] * 3]
        for selection in entries * 2:
            lf.set_adapters(self.model, selection)
            with torch.no_grad():
                torch.compiler.cudagraph_mark_step_begin()
                got = fast(x).clone()
            torch.testing.assert_close(got, self.want(selection, x), rtol=1e-4, atol=1e-4)
        self.adapters["b"] = adapter(Mlp(), PATHS, 6)
        lf.swap_adapter(self.model, "b", self.adapters["b"])
        lf.set_adapters(self.model, ["b", "a", "b"])
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            got = fast(x).clone()
        torch.testing.assert_close(got, self.want(["b", "a", "b"], x), rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["inductor"]["cudagraph_skips"]
        if mode == "reduce-overhead":
            assert self.model.up.lora_serving.default.fixed.captured
