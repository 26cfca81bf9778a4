"""The CUDA side of sparse_delta_linear on a device (``make test-gpu``)."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import mixed_pairs, pairs_of, routing_of
from gpu_runs import capture, nothing_waits, warm_up
from nn_models import Mlp
from sparse_cases import make_case, make_sparse_pool
from sparse_models import fine_tuned, materialised, model_of, sparse_adapter
from test_gpu import moved

import lora_fuse as lf
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_adapter import same_bits
from lora_fuse.adapters.sparse_pool import PackedDelta, SparsePool
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.kernels import exchange
from lora_fuse.kernels import sparse_delta as kernels
from lora_fuse.sparse import SparseMatrix

pytestmark = pytest.mark.gpu

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [  # in, out, density, slots
    pytest.param(1, 1, 1.0, 2, id="one-feature"),
    pytest.param(333, 130, 0.02, 3, id="odd"),
    pytest.param(4096, 1030, 0.1, 4, id="usual"),
    pytest.param(520, 65, 1.0, 1, id="everything-kept"),
    pytest.param(9000, 70, 0.003, 2, id="three-chunks"),
]


def delta_on(pool: SparsePool, slot: int, density: float) -> torch.Tensor:
    delta = torch.randn(pool.out_features, pool.in_features).to(pool.dtype)
    delta[torch.rand(delta.shape) >= density] = 0
    pool.write(slot, SparseMatrix.from_mask(delta, delta != 0))
    return delta


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features", "density", "slots"), SHAPES)
def test_error_is_at_most_twice_torchs_own(in_features, out_features, density, slots, mixed, dtype, monkeypatch):
    filled = make_sparse_pool(slots, in_features, out_features, density, dtype)
    ran = []
    real = kernels.sparse_delta_
    monkeypatch.setattr(kernels, "sparse_delta_", lambda *args: (ran.append(1), real(*args)))
    for rows in (1, 8, 70, 300):
        pairs = mixed_pairs(rows, slots) if mixed else pairs_of(torch.randint(-1, slots, (rows,)))
        case = make_case(filled, rows, dtype, pairs, routing_of(pairs, rows, slots))
        out, x, routing = case.out.cuda(), case.x.cuda(), moved(case.routing)
        got = sparse_delta_linear(x, filled.pool.cuda(), routing, out=out.clone())
        assert case.error(got.cpu()) <= 2 * case.torch_error + FLOOR[dtype]
        for _ in range(2):  # launched again without Triton's launcher
            assert torch.equal(sparse_delta_linear(x, filled.pool, routing, out=out.clone()), got)
        filled.pool.cpu()
    assert ran


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype):
    """Bitwise, as long as its slot has at most 8 rows in both batches, or more in both."""
    pool = make_sparse_pool(3, 1300, 650, 0.1, dtype).pool.cuda()
    slots = torch.arange(2001) % 4 - 1
    x, out = torch.randn(2001, 1300, device="cuda").to(dtype), torch.randn(2001, 650, device="cuda").to(dtype)

    def run(keep: torch.Tensor) -> torch.Tensor:
        at = keep.cuda()
        return sparse_delta_linear(x[at], pool, moved(Routing.from_slots(slots[keep], 3)), out=out[at])

    many = run(torch.arange(2001))
    for keep in (torch.randperm(2001), torch.arange(37), torch.arange(0, 2001, 3), torch.arange(300)):
        assert torch.equal(run(keep), many[keep.cuda()])
    few = run(torch.arange(30))
    for keep in (torch.randperm(30), torch.tensor([2]), torch.arange(0, 30, 7), torch.tensor([5, 1, 9])):
        assert torch.equal(run(keep), few[keep.cuda()])


def test_integers_are_exact():
    """Sums of small integers leave no room for a wrong operand, layout or instruction: both ways agree with fp64."""
    pool = SparsePool(2, 4160, 520, torch.bfloat16)
    deltas = []
    for slot in range(2):
        delta = torch.randint(-2, 3, (520, 4160)).bfloat16() * (torch.rand(520, 4160) < 0.02)
        pool.write(slot, SparseMatrix.from_mask(delta, delta != 0))
        deltas.append(delta.double())
    pool.cuda()
    for rows in (7, 40, 600):
        x = torch.randint(-1, 2, (rows, 4160)).bfloat16()
        slots = torch.randint(0, 2, (rows,))
        want = torch.stack([deltas[s] @ row for s, row in zip(slots.tolist(), x.double(), strict=True)])
        got = sparse_delta_linear(x.cuda(), pool, moved(Routing.from_slots(slots, 2)))
        assert torch.equal(got.cpu(), want.bfloat16())


def test_rows_without_a_delta_keep_their_bits():
    pool = make_sparse_pool(3, 50, 60, 0.2, torch.bfloat16).pool.cuda()
    pool.clear(0)
    out = torch.randn(40, 60, device="cuda").bfloat16()
    out[::5], out[1::5] = float("nan"), -0.0
    base = torch.arange(40) % 5 < 3
    for extra in ([], [(4, 0, 0.5), (7, 0, 1.0)]):
        pairs = [(r, 0 if r % 5 == 2 else 1, 1.0) for r in range(40) if r % 5 >= 2 and r != 7] + extra
        x, routing = torch.randn(40, 50, device="cuda").bfloat16(), moved(routing_of(pairs, 40, 3))
        got = sparse_delta_linear(x, pool, routing, out=out.clone()).view(torch.int16)
        assert torch.equal(got[base.cuda()], out.view(torch.int16)[base.cuda()])


def test_no_wait_and_the_same_bits_every_time():
    pool = make_sparse_pool(3, 512, 300, 0.1, torch.bfloat16).pool.cuda()
    routing = moved(routing_of(mixed_pairs(50, 3), 50, 3))
    x = torch.randn(50, 512, device="cuda").bfloat16()
    want = sparse_delta_linear(x, pool, routing)
    with nothing_waits():
        got = [sparse_delta_linear(x, pool, routing) for _ in range(5)]
        leaf = x.clone().requires_grad_()
        sparse_delta_linear(leaf, pool, routing).sum().backward()
    assert all(torch.equal(y, want) for y in got)
    dense = [pool.dense(slot, torch.float32) for slot in range(3)]
    grad = torch.zeros_like(leaf, dtype=torch.float32)
    ones = torch.ones(300, device="cuda")
    weights, pair_slots = routing.weights.tolist(), routing.pair_slots().tolist()
    for row, slot, weight in zip(routing.rows.tolist(), pair_slots, weights, strict=True):
        grad[row] += weight * (ones @ dense[slot])
    torch.testing.assert_close(leaf.grad.float(), grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rows", [4, 30])
def test_graphs_replay_with_a_swapped_slot_and_new_rows(rows):
    pool = SparsePool(3, 512, 256, torch.bfloat16, torch.device("cuda"))
    for slot in range(2):
        delta_on(pool, slot, 0.1)
    routing = moved(Routing.from_slots(torch.arange(rows) % 3, 3))
    x, y = torch.randn(rows, 512, device="cuda").bfloat16(), torch.zeros(rows, 256, device="cuda").bfloat16()
    sparse_delta_linear(x, pool, routing, out=y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.zero_()
        sparse_delta_linear(x, pool, routing, out=y)
    for density in (0.3, 0.01, 0.1):  # each lies elsewhere, and is of another size
        delta = delta_on(pool, 2, density)
        pool.clear(0)
        x.copy_(torch.randn(rows, 512))
        graph.replay()
        assert torch.equal(y, sparse_delta_linear(x, pool, routing))
        torch.testing.assert_close(y[2].float().cpu(), delta.float() @ x[2].float().cpu(), rtol=0.02, atol=0.2)
        assert not y[0].any()


def test_there_and_back():
    filled = make_sparse_pool(2, 700, 130, 0.05, torch.float16)
    pool = filled.pool.cuda()
    twin = copy.deepcopy(pool)
    for other in (pool, twin):
        assert all(t.is_cuda for p in other.packed for t in p.tensors if t is not None)
        for slot, delta in enumerate(filled.deltas):
            assert torch.equal(other.dense(slot, torch.float16).cpu(), delta)
    pool.cpu()
    assert all(isinstance(p, PackedDelta) for p in pool.packed)
    assert torch.equal(pool.dense(1, torch.float16), filled.deltas[1])
    x, slots = torch.randn(5, 700).half(), torch.tensor([0, 1, 1, -1, 0])
    on_cpu = sparse_delta_linear(x, pool, Routing.from_slots(slots, 2))
    got = sparse_delta_linear(x.cuda(), twin, moved(Routing.from_slots(slots, 2)))
    torch.testing.assert_close(got.cpu(), on_cpu, rtol=2e-3, atol=2e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = sparse_delta_linear(x.cuda().float(), copy.deepcopy(twin).float(), moved(Routing.from_slots(slots, 2)))
    torch.testing.assert_close(low.float().cpu(), on_cpu.float(), rtol=0.05, atol=0.05)


def test_bad_input_is_refused_before_anything_runs():
    pool = make_sparse_pool(3, 20, 12, 0.4, torch.float32).pool.cuda()
    routing = moved(Routing.from_slots(torch.tensor([0, 1, -1, 2, 2]), 3))
    x, out = torch.randn(5, 20, device="cuda"), torch.randn(5, 12, device="cuda")
    before = out.clone()
    sparse_delta_linear(x, pool, routing, out=out.clone())
    for match, given in [
        ("x: has 19 features, the pool has 20", (x[:, :19], out)),
        ("out: has 11 features, the pool has 12", (x, out[:, :11])),
        ("out: expected unit stride", (x, torch.zeros(12, 5, device="cuda").t())),
        ("x, out: dtypes float32 and bfloat16, accepted is one for both", (x, out.bfloat16())),
        ("the pool holds torch.float32", (x.double(), out.double())),
        ("rows, the routing is for 5", (x[:4], out[:4])),
    ]:
        with pytest.raises(ValueError, match=match):
            sparse_delta_linear(given[0], pool, routing, out=given[1])
    assert torch.equal(out, before)


@pytest.mark.parametrize("kind", ["tokens", "images"])
@torch.no_grad()
def test_models(kind, monkeypatch):
    """Layers take the kernels, in eager and in compiled code."""
    model, x = model_of(kind)
    bare = copy.deepcopy(model).cuda()
    adapters = {f"t{i}": sparse_adapter(model, fine_tuned(model, i)) for i in range(2)}
    model, x = lf.attach(model, adapters).cuda(), x.cuda()
    ran = []
    real = kernels.sparse_delta_
    monkeypatch.setattr(kernels, "sparse_delta_", lambda *args: (ran.append(1), real(*args)))
    entries = ["t0", None, "t1", None, None, "t0", "t1"]
    want = torch.stack([(bare if n is None else materialised(bare, adapters[n]))(x)[i] for i, n in enumerate(entries)])
    with lf.use_adapters(model, entries):
        got = model(x)
        assert ran
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(got[1], bare(x)[1])
        fast = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_selection_on_the_device_is_not_waited_for():
    bare = Mlp().requires_grad_(False)
    adapters = {f"t{i}": sparse_adapter(bare, fine_tuned(bare, i)) for i in range(2)}
    model, x = lf.attach(copy.deepcopy(bare), adapters).cuda(), torch.randn(3, 24, device="cuda")
    places, entries = lf.adapter_slots(model), ["t1", None, "t0"]
    tokens = torch.tensor([-1 if n is None else places[n] for n in entries], dtype=torch.int32, device="cuda")
    with lf.use_adapters(model, tokens):
        got = model(x)
        with nothing_waits():
            again = model(x)
    want = [(bare if n is None else materialised(bare, adapters[n])).cuda()(x)[i] for i, n in enumerate(entries)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-4)
    assert torch.equal(again, got)


class TestSwitchTask:
    @pytest.fixture(autouse=True)
    def _attach(self, monkeypatch):
        self.bare, self.x = model_of("tokens")
        self.adapters = {f"t{i}": sparse_adapter(self.bare, fine_tuned(self.bare, i)) for i in range(2)}
        self.model = lf.attach(copy.deepcopy(self.bare), self.adapters).cuda()
        self.ran: list[bool] = []
        real = exchange.exchange_
        monkeypatch.setattr(exchange, "exchange_", lambda *args: (self.ran.append(args[3]), real(*args)))

    def check(self, name):
        own = self.bare if name is None else materialised(self.bare, self.adapters[name])
        ours, theirs = self.model.state_dict(), own.state_dict()
        assert [n for n in ours if not same_bits(ours[n].cpu(), theirs[n])] == []

    def test_the_fine_tune_and_back_bit_for_bit(self):
        for name in ("t0", "t1", "t1", None, "t1", "t0", None):
            lf.switch_task(self.model, name)
            self.check(name)
        assert self.ran == [False, True, False, True, False, True, False, True]

    def test_known_tasks_wait_for_nothing(self):
        for name in ("t0", "t1", None):
            lf.switch_task(self.model, name)
        with nothing_waits():
            for name in ("t0", "t1", None, "t1"):
                lf.switch_task(self.model, name)
        self.check("t1")

    def test_moved_while_switched(self):
        lf.switch_task(self.model, "t0")
        self.model.cpu()
        self.check("t0")
        self.model.cuda()
        lf.switch_task(self.model, "t1")
        self.check("t1")
        lf.switch_task(self.model, None)
        self.check(None)

    def test_captured_forwards_see_it(self):
        """Weights are written where they lie, so a graph's replays run the fine-tune."""
        x = self.x.cuda()
        lf.switch_task(self.model, None)
        warm_up(self.model, x)
        graph, y = capture(self.model, x)
        for name in ("t0", "t1", None):
            lf.switch_task(self.model, name)
            graph.replay()
            assert torch.equal(y, self.model(x))
