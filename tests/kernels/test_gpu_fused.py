"""The linear layer and its LoRA part in one launch, on a device (``make test-gpu``)."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, make_pool, pairs_of, routing_of
from gpu_runs import nothing_waits
from torch.nn.functional import linear

from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora, multi_lora_linear
from lora_fuse.kernels import fused_linear as kernels
from lora_fuse.kernels.fused_linear import num_counters
from lora_fuse.kernels.fused_linear_plan import serves

pytestmark = pytest.mark.gpu

FLOOR = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [(1, 4096, 4096), (16, 4096, 4096), (20, 1008, 333), (32, 4096, 28672), (64, 14336, 4096), (50, 4096, 1024)]


@pytest.fixture
def launched(monkeypatch):
    """How often the one launch ran."""
    ran, real = [], kernels.multi_lora_linear_
    monkeypatch.setattr(kernels, "multi_lora_linear_", lambda *args: (ran.append(1), real(*args)))
    return ran


def moved(routing: Routing) -> Routing:
    fields = (None if t is None else t.cuda() for t in routing.tensors)
    return Routing(*fields, routing.num_rows)


def layer(in_features, out_features, dtype):
    weight = torch.randn(out_features, in_features, device="cuda") / in_features**0.5
    return weight.to(dtype), torch.randn(out_features, device="cuda").to(dtype)


def zeros(out_features):
    return torch.zeros(num_counters(out_features), dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_rank", [1, 16, 50])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
def test_error_is_at_most_twice_torchs_own(rows, in_features, out_features, max_rank, dtype, mixed, launched):
    if out_features == 28672 and (mixed or max_rank != 16):
        pytest.skip("the oracle takes long; the plan is that of the other case")
    case, counters = make_case(rows, in_features, out_features, max_rank, 6, dtype, mixed), zeros(out_features)
    weight, bias = layer(in_features, out_features, dtype)
    x = case.x.cuda()
    base = linear(x.double(), weight.double(), bias.double())
    want = base + (case.want - case.out.double()).cuda()
    torch_error = float((linear(x, weight, bias).double() - base).abs().max()) + case.torch_error
    got = multi_lora_linear(x, weight, bias, case.pool.cuda(), moved(case.routing), counters)
    case.pool.cpu()
    assert bool(launched) == serves(rows, in_features, out_features, max_rank, str(dtype).removeprefix("torch."))
    assert float((got.double() - want).abs().max()) <= 2 * torch_error + FLOOR[dtype]
    assert not counters.any()


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_integers_are_exact(rows, launched):
    """Sums of small integers leave no room for a wrong operand, layout or instruction (triton issue 9433)."""
    pool = make_pool(3, 16, 1024, 528, torch.bfloat16)
    pool.pool_a.copy_(torch.randint(-1, 2, pool.pool_a.shape))
    pool.pool_b.copy_(torch.randint(-2, 3, pool.pool_b.shape))
    pool.slot_scaling.fill_(1)
    x, weight = torch.randint(-1, 2, (rows, 1024)).bfloat16(), torch.randint(-2, 3, (528, 1024)).bfloat16()
    routing = routing_of(pairs_of(torch.randint(-1, 3, (rows,))), rows, 3)
    want = x.double() @ weight.double().t() + multi_lora(x.double(), pool.double(), routing)
    pool.to("cuda", torch.bfloat16)
    got = multi_lora_linear(x.cuda(), weight.cuda(), None, pool, moved(routing))
    assert launched
    assert torch.equal(got.cpu(), want.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_the_others(dtype, launched):
    """Bitwise: from one row to batches whose tiles are wider or shared by programs."""
    pool, (weight, bias) = make_pool(4, 12, 1296, 640, dtype, [12, 0, 5, 9]).cuda(), layer(1296, 640, dtype)
    slots, x = torch.arange(64) % 5 - 1, torch.randn(64, 1296, device="cuda").to(dtype)
    want = multi_lora_linear(x, weight, bias, pool, moved(Routing.from_slots(slots, 4)))
    for keep in (torch.randperm(64), torch.tensor([2]), torch.arange(0, 64, 5), torch.arange(0, 64, 2)):
        got = multi_lora_linear(x[keep.cuda()], weight, bias, pool, moved(Routing.from_slots(slots[keep], 4)))
        assert torch.equal(got, want[keep.cuda()])
    assert len(launched) == 5


@pytest.mark.parametrize("rows", [7, 30, 64])
def test_the_same_bits_every_time(rows):
    """Whoever comes first or last, 300 launches in a row with the same counters, layers of two sizes in turn."""
    counters, want = zeros(6144), {}
    routing = moved(Routing.from_slots(torch.arange(rows) % 9 - 1, 8))
    x = torch.randn(rows, 4096, device="cuda").bfloat16()
    sizes = (4096, 6144)
    layers = {n: (layer(4096, n, torch.bfloat16), make_pool(8, 16, 4096, n, torch.bfloat16).cuda()) for n in sizes}
    for i in range(300):
        (weight, bias), pool = layers[sizes[i % 2]]
        got = multi_lora_linear(x, weight, bias, pool, routing, counters)
        assert torch.equal(got, want.setdefault(i % 2, got))
    assert not counters.any()


@pytest.mark.parametrize("rows", [4, 64])
def test_graphs_replay_with_a_new_pool_and_new_rows(rows):
    pool, (weight, bias) = make_pool(3, 16, 512, 256, torch.bfloat16).cuda(), layer(512, 256, torch.bfloat16)
    routing, counters = moved(Routing.from_slots(torch.arange(rows) % 3, 3)), zeros(256)
    x = torch.randn(rows, 512, device="cuda").bfloat16()
    multi_lora_linear(x, weight, bias, pool, routing, counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            y = multi_lora_linear(x, weight, bias, pool, routing, counters)
    for seed in range(3):
        torch.manual_seed(seed)
        pool.write(2, torch.randn(7, 512), torch.randn(256, 7), 0.5)
        x.copy_(torch.randn(rows, 512))
        graph.replay()
        assert torch.equal(y, multi_lora_linear(x, weight, bias, pool, routing, counters))
        assert not counters.any()


def test_beside_a_device_that_is_busy():
    """Programs wait for others; another stream's work, which takes places from them, may only delay them."""
    pool, (weight, bias) = make_pool(8, 16, 4096, 4096, torch.bfloat16).cuda(), layer(4096, 4096, torch.bfloat16)
    routing, counters = moved(Routing.from_slots(torch.arange(16) % 8, 8)), zeros(4096)
    x, big = torch.randn(16, 4096, device="cuda").bfloat16(), torch.randn(8192, 8192, device="cuda").bfloat16()
    want, side = multi_lora_linear(x, weight, bias, pool, routing, counters), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(side):
            big @ big
        assert torch.equal(multi_lora_linear(x, weight, bias, pool, routing, counters), want)
    torch.cuda.synchronize()


def test_nothing_waits_for_the_host():
    pool, (weight, bias) = make_pool(3, 16, 512, 256, torch.bfloat16).cuda(), layer(512, 256, torch.bfloat16)
    routing, x = (
        moved(Routing.from_slots(torch.tensor([0, 2, -1, 1]), 3)),
        torch.randn(4, 512, device="cuda").bfloat16(),
    )
    multi_lora_linear(x, weight, bias, pool, routing)
    with nothing_waits():
        multi_lora_linear(x, weight, bias, pool, routing)
