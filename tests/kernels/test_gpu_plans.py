"""``override_plans`` on a device: the expand that starts while the shrink runs, and other widths."""

from __future__ import annotations

import pytest
import torch
from cases import make_pool, mixed_pairs, pairs_of, routing_of

import lora_fuse as lf
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.kernels.multi_lora import starts_ahead
from lora_fuse.ops import multi_lora as op

pytestmark = pytest.mark.gpu
RULES = {
    "ahead": [{"expand": {"ahead": True}}],
    "ahead and wide": [{"expand": {"ahead": True, "block_n": 128, "steps": 3}}],
    "one plane": [{"shrink": {"planes": 1}, "expand": {"block_n": 32, "num_warps": 8}}],
}


@pytest.fixture(autouse=True)
def shipped_again():
    yield
    lf.override_plans(None)


def moved(routing: Routing) -> Routing:
    return Routing(*(None if t is None else t.cuda() for t in routing.tensors), routing.num_rows)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize(("rows", "max_rank"), [(1, 16), (16, 16), (16, 100), (300, 64)])
def test_same_bits(rows, max_rank, mixed, dtype, rules):
    """Right after what makes x and y, many times, with the result used at once: whoever reads too early is seen."""
    pool = make_pool(5, max_rank, 4096, 1500, dtype, [max_rank, 0, 3, max_rank, 1]).cuda()
    pairs = mixed_pairs(rows, 5) if mixed else pairs_of(torch.arange(rows) % 6 - 1)
    routing = moved(routing_of(pairs, rows, 5))
    xs = torch.randn(20, rows, 4096, device="cuda").to(dtype)
    weight = (torch.randn(1500, 4096, device="cuda") / 64).to(dtype)
    results = []
    for given in (None, RULES[rules]):
        lf.override_plans(given)
        assert not op._READY
        made = []
        for x in xs:
            y = torch.nn.functional.linear(x * 0.5, weight)
            made.append(multi_lora(x * 0.5, pool, routing, out=y) * 2)
        results.append(torch.stack(made))
    assert torch.equal(*results)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("layers", [1, 7])
def test_in_graphs(layers):
    if not starts_ahead("cuda", torch.device("cuda")):
        pytest.skip("compute capability 9.0 is needed to start ahead")
    pool = make_pool(3, 16, 1024, 1024, torch.bfloat16).cuda()
    routing = moved(Routing.from_slots(torch.tensor([0, 2, -1, 1]), 3))
    weight = (torch.randn(1024, 1024, device="cuda") / 32).bfloat16()
    start = torch.randn(4, 1024, device="cuda").bfloat16()

    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(layers):
            x = multi_lora(x, pool, routing, out=torch.nn.functional.linear(x, weight)) * 0.5
        return x

    want = forward(start)
    lf.override_plans(RULES["ahead"])
    forward(start)
    x = start.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(x)
    for scale in (1.0, -1.0, 0.0, 1.0):
        x.copy_(start * scale)
        graph.replay()
        graph.replay()
        if scale == 1.0:
            assert torch.equal(y, want)
        if scale == 0.0:
            assert not y.any()
