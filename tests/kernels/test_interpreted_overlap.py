"""The shrink beside the base layer's product, in Triton's CPU interpreter: the same bits, and always a join."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from nn_models import Mlp, adapter, per_row
from packed_models import ENTRIES, PATHS, Block
from torch import nn

import lora_fuse as lf
from lora_fuse.adapters import slab as slabs
from lora_fuse.nn import capture, overlap
from lora_fuse.ops import multi_lora as op


class Side:
    """What is asked of a side stream, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextmanager
    def fork(self) -> Iterator[None]:
        self.log.append("fork")
        yield
        self.log.append("shrunk")

    def join(self) -> None:
        self.log.append("join")


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    """A stream that small layers take, on the CPU."""
    made = Side()
    monkeypatch.setattr(overlap, "side_of", lambda device: made)
    monkeypatch.setattr(overlap, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(slabs, "_has_kernels", lambda device: True)
    with capture.simulate("warm"), torch.no_grad():  # routings have tiles
        yield made


class Quantised(nn.Linear):
    """A base of a class of its own, which may keep what it returns."""

    log: list[str]
    kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append("base")
        if x.isnan().any():
            raise RuntimeError("no good")
        self.kept = nn.functional.linear(x, self.weight, self.bias)
        return self.kept


def test_same_bits_as_one_after_the_other(side):
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, ("up", "down", "out"), r, bias=n == "b") for n, r in (("a", 2), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, overlap=True)
    x = torch.randn(4, 24)
    for entries in (ENTRIES, "a"):
        with lf.use_adapters(model, entries):
            got = model.out(x)
            want = bare.out(x)
            routing = model.out.lora_serving.routing((4,), x.device, "out")
            op._cuda_(want, x, *model.out.lora_pool.tensors, *routing.tensors, routing.tiles)
            if entries == "a":
                assert torch.equal(got, want)
    assert side.log == ["fork", "shrunk", "join"] * 2
    plain = lf.attach(bare, adapters, num_slots=2)
    with lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
        torch.testing.assert_close(model(x), plain(x))
    assert side.log == ["fork", "shrunk", "join"] * 5


def test_wrapped_bases(side):
    """What the base returned stays what it was, and a base that raises leaves nothing open."""
    bare = nn.Sequential(Quantised(24, 40)).requires_grad_(False)
    bare[0].log = side.log
    adapters = {n: adapter(bare, ("0",), r) for n, r in (("a", 2), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, overlap=True)
    model[0].log = side.log
    x = torch.randn(2, 2, 24)
    with lf.use_adapters(model, ["a", "b"]):
        got = model(x)
        assert side.log == ["fork", "shrunk", "base", "join"]
        base = nn.functional.linear(x, bare[0].weight, bare[0].bias)
        assert torch.equal(model[0].kept, base)
        torch.testing.assert_close(got, per_row(bare, adapters, ["a", "b"], x))
        del side.log[:]
        with pytest.raises(RuntimeError, match="no good"):
            model(x.fill_(torch.nan))
        assert side.log == ["fork", "shrunk", "base", "join"]


@pytest.mark.parametrize("augment", [False, True])
def test_packs(augment, side):
    bare = Block().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, r) for n, r in (("a", 3), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters, pack=True, augment=augment, overlap=True)
    x = torch.randn(4, 24)
    with lf.use_adapters(model, ENTRIES):
        torch.testing.assert_close(model(x), per_row(bare, adapters, ENTRIES, x), rtol=1e-4, atol=1e-5)
    assert side.log == ["fork", "shrunk", "join"] * 2  # rows of 96 bytes: no A behind these weights


def test_where_it_does_not_pay_or_fit(side, monkeypatch):
    bare = Mlp().requires_grad_(False)
    adapters = {"a": adapter(bare, ("up", "down", "out"), 2)}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, overlap=True)
    x = torch.randn(2, 24)
    with lf.use_adapters(model, "a"):
        with torch.enable_grad():
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.double())
        monkeypatch.setattr(overlap, "LEAST_WEIGHT", 1000)
        assert side.log == []
        model(torch.zeros(0, 24))
        assert side.log == []
    off = lf.attach(bare, adapters, num_slots=2)
    monkeypatch.setattr(overlap, "LEAST_WEIGHT", 1)
    with lf.use_adapters(off, "a"):
        off(x)
    assert side.log == []
