"""The CUDA side of multi_lora on a device (``make test-gpu``)."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, make_pool, pairs_of, routing_of

from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.kernels import multi_lora as kernels

pytestmark = pytest.mark.gpu

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]


def moved(routing: Routing) -> Routing:
    fields = (None if t is None else t.cuda() for t in routing.tensors)
    return Routing(*fields, routing.num_rows)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_rank", [1, 16, 100, 512])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 4096, 4096), (70, 1000, 333), (2000, 512, 640)])
def test_error_is_at_most_twice_torchs_own(rows, in_features, out_features, max_rank, dtype, mixed, monkeypatch):
    case = make_case(rows, in_features, out_features, max_rank, 6, dtype, mixed)
    ran = []
    real = kernels.multi_lora_
    monkeypatch.setattr(kernels, "multi_lora_", lambda *args: (ran.append(1), real(*args)))
    got = multi_lora(case.x.cuda(), case.pool.cuda(), moved(case.routing), out=case.out.cuda())
    case.pool.cpu()
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
