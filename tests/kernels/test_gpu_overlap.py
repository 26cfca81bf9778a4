"""The shrink on a side stream of a device (``make test-gpu``): the bits of the plain order, no wait of the host."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from gpu_runs import capture, nothing_waits, warm_up
from nn_models import adapter
from torch import nn

import lora_fuse as lf
from lora_fuse.nn import overlap

pytestmark = pytest.mark.gpu
ENTRIES = ["a", None, {"a": 0.5, "b": -1.5}, "b"]


class Wrapped(nn.Linear):
    """A base of a class of its own."""

    def forward(self, x):
        if self.fails:
            raise RuntimeError("no good")
        return super().forward(x)


Wrapped.fails = False


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 2048)

    def forward(self, x):
        return torch.tanh(self.gate_proj(x)) * self.up_proj(x)


@pytest.fixture
def forks(monkeypatch):
    """One entry per shrink on a side stream."""
    made = []
    real = overlap.SideStream.fork
    monkeypatch.setattr(overlap.SideStream, "fork", lambda self: (made.append(1), real(self))[1])
    return made


def models(kind):
    bare = {
        "plain": lambda: nn.Sequential(nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 2560)),
        "wrapped": lambda: nn.Sequential(Wrapped(2048, 2048), nn.Tanh(), Wrapped(2048, 2560)),
        "packed": Gated,
    }[kind]()
    bare = bare.requires_grad_(False).cuda().bfloat16()
    paths = ("gate_proj", "up_proj") if kind == "packed" else ("0", "2")
    adapters = {n: adapter(bare.cpu(), paths, r) for n, r in (("a", 16), ("b", 5))}
    pack = kind == "packed"
    plain = lf.attach(copy.deepcopy(bare.cuda()), adapters, pack=pack)
    return adapters, plain, lf.attach(bare, adapters, pack=pack, overlap=True)


KINDS = pytest.mark.parametrize("kind", ["plain", "wrapped", "packed"])


@KINDS
def test_eager_forwards(kind, forks):
    _, plain, model = models(kind)
    with torch.no_grad():
        for rows in (4, 64, 256, 4):
            x = torch.randn(4, rows // 4, 2048, device="cuda").bfloat16()
            with lf.use_adapters(plain, ENTRIES), lf.use_adapters(model, ENTRIES):
                want = plain(x)
                del forks[:]
                for _ in range(20):  # memory that was let go too early would be somebody else's by now
                    got = model(x.clone())
                    torch.empty(1 << 20, device="cuda").fill_(torch.nan)
                    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
                    if kind != "wrapped":  # whose rounding differs: the LoRA part is added before it
                        assert torch.equal(got, want)
                assert len(forks) == 20 * (1 if kind == "packed" else 2)
        with lf.use_adapters(model, ENTRIES):
            model(x)  # uploads the routing
            torch.cuda.synchronize()
            with nothing_waits():
                model(x)


@KINDS
def test_captured_forwards(kind, forks):
    """The fork and the join are in the graph, which follows selections and swaps."""
    adapters, plain, model = models(kind)
    x = torch.randn(4, 2048, device="cuda").bfloat16()
    warm_up(model, x)
    del forks[:]
    graph, y = capture(model, x)
    assert forks
    for entries in (ENTRIES, [None] * 4, ["b", "a", "a", {"a": 1.0, "b": 1.0}]):
        for m in (model, plain):
            lf.set_adapters(m, entries)
        for _ in range(3):
            graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, plain(x), rtol=2e-2, atol=2e-2)
        adapters["a"] = adapter(lf.detach(copy.deepcopy(plain)).cpu(), tuple(adapters["a"].layers), 9)
        for m in (model, plain):
            lf.swap_adapter(m, "a", adapters["a"])


def test_a_base_that_raises_is_joined(forks):
    _, plain, model = models("wrapped")
    x = torch.randn(4, 2048, device="cuda").bfloat16()
    with torch.no_grad(), lf.use_adapters(model, "a"), lf.use_adapters(plain, "a"):
        want = plain(x)
        model[2].fails = True
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no good"):
                model(x)
        model[2].fails = False
        torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2)
    assert len(forks) == 12


def test_threads_have_streams_of_their_own(forks):
    _, plain, model = models("plain")
    x = torch.randn(4, 2048, device="cuda").bfloat16()
    torch.cuda.synchronize()  # before it is read on other streams
    wrong, streams = [], set()

    def serve(name, want):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()), lf.use_adapters(model, name):
            for _ in range(30):
                if not torch.equal(model(x), want):
                    wrong.append(name)
            streams.add(overlap.side_of(x.device).stream.cuda_stream)
            torch.cuda.current_stream().synchronize()

    wanted = []
    with torch.no_grad():
        for name in ("a", "b"):
            with lf.use_adapters(plain, name), torch.cuda.stream(torch.cuda.Stream()):
                wanted.append((name, plain(x)))
    torch.cuda.synchronize()
    threads = [threading.Thread(target=serve, args=each) for each in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(streams) == 2
