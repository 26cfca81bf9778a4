"""Packed siblings on a device: one shrink and one expand for all, with the bits of layers alone."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from cases import make_pool, mixed_pairs, pairs_of, routing_of
from gpu_runs import capture, nothing_waits, warm_up
from nn_models import adapter, per_row
from packed_models import ENTRIES, PATHS, Block, close
from triton import knobs

import lora_fuse as lf
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora, multi_lora_slices

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(512, 128, 128), (333, 70, 17), (640, 640), (256, 64, 64, 32)]


def moved(routing: Routing) -> Routing:
    return Routing(*(None if t is None else t.cuda() for t in routing.tensors), routing.num_rows)


@contextmanager
def watched():
    """Names of the kernels that run, in order."""
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    yield seen
    knobs.runtime.launch_enter_hook.remove(hook)


@pytest.fixture
def launched():
    with watched() as seen:
        yield seen


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("rows", "max_rank"), [(1, 16), (40, 16), (40, 64), (70, 100), (2000, 16)])
def test_bits_of_layers_alone(rows, max_rank, sizes, dtype, mixed):
    """With other ranks in each, and one without slots."""
    ranks = [[max_rank, 3, 0], None, [1, max_rank, max_rank // 2], [0, 0, 7]]
    pools = [
        of and make_pool(3, max_rank, 1300, size, dtype, of).cuda() for size, of in zip(sizes, ranks, strict=False)
    ]
    pairs = mixed_pairs(rows, 3) if mixed else pairs_of(torch.arange(rows) % 4 - 1)
    routing = moved(routing_of(pairs or [(0, 0, 1.0)], rows, 3))
    x, out = (torch.randn(rows, n, device="cuda").to(dtype) for n in (1300, sum(sizes)))
    want = out.clone()
    for part, pool in zip(want.split(sizes, 1), pools, strict=True):
        if pool is not None:
            multi_lora(x, pool, routing, out=part)
    with watched() as launched:
        got = out.clone()
        assert multi_lora_slices(x, pools, sizes, routing, got) is got
    assert torch.equal(got, want)
    assert launched == ["shrink_kernel", "expand_kernel"]
    assert torch.equal(multi_lora_slices(x, pools, sizes, routing, out.clone()), want)  # from what was kept


class TestAPackedModel:
    def setup_method(self):
        self.bare = Block().requires_grad_(False).cuda()
        self.adapters = {name: adapter(Block(), PATHS, rank) for name, rank in (("a", 3), ("b", 5))}
        self.model = lf.attach(copy.deepcopy(self.bare), self.adapters, pack=True)

    def want(self, entries, x):
        return per_row(self.bare, {n: a.to(device="cuda") for n, a in self.adapters.items()}, entries, x)

    def test_two_launches_a_pack(self, launched):
        x = torch.randn(4, 3, 24, device="cuda")
        with torch.no_grad():
            for entries in (ENTRIES, ["a"] * 4):
                lf.set_adapters(self.model, entries)
                del launched[:]
                close(self.model(x), self.want(entries, x))
                assert launched.count("shrink_kernel") == launched.count("expand_kernel") == 2

    def test_a_graph_follows_selections_and_swaps(self, launched):
        x = torch.randn(4, 3, 24, device="cuda")
        warm_up(self.model, x)
        del launched[:]
        graph, y = capture(self.model, x)
        assert launched == ["shrink_kernel", "expand_kernel"] * 2
        for entries in (ENTRIES, ["b"] * 4, [None] * 4, [{"a": 1.0, "b": 0.5}] * 4):
            lf.set_adapters(self.model, entries)
            graph.replay()
            close(y, self.want(entries, x))
        self.adapters["a"] = adapter(Block(), PATHS, 2)
        lf.swap_adapter(self.model, "a", self.adapters["a"])
        graph.replay()
        close(y, self.want([{"a": 1.0, "b": 0.5}] * 4, x))

    def test_no_host_sync(self):
        x = torch.randn(4, 3, 24, device="cuda")
        lf.set_adapters(self.model, ENTRIES)
        with torch.no_grad():
            self.model(x)
            with nothing_waits():
                self.model(x)
