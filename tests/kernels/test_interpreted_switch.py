"""``switch_task`` by the exchange kernel, in Triton's CPU interpreter: weights on the CPU stand in for a GPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_models import fine_tuned, materialised, model_of, sparse_adapter
from torch import nn

import lora_fuse as lf
from lora_fuse.adapters.sparse_adapter import same_bits
from lora_fuse.kernels import exchange as kernels
from lora_fuse.nn import switch
from lora_fuse.ops import exchange
from lora_fuse.ops.exchange import Entry, Exchange
from lora_fuse.sparse import SparseMatrix


@pytest.fixture
def ran(monkeypatch) -> list[bool]:
    """Every launch, and whether it was back."""
    calls: list[bool] = []
    real = kernels.exchange_
    monkeypatch.setattr(switch, "takes", exchange._fit)
    monkeypatch.setattr(exchange, "PIECE", 64)
    monkeypatch.setattr(kernels, "exchange_", lambda *args: (calls.append(args[3]), real(*args)))
    return calls


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert [name for name in ours if not same_bits(ours[name], theirs[name])] == []


def prepared(kind: str):
    bare, x = model_of(kind)
    adapters = {f"t{i}": sparse_adapter(bare, fine_tuned(bare, i)) for i in range(2)}
    return lf.attach(copy.deepcopy(bare), adapters), bare, x, adapters


@pytest.mark.parametrize("kind", ["tokens", "images"])
@torch.no_grad()
def test_the_fine_tune_and_back_bit_for_bit(kind, ran):
    """In one launch each way, for all tensors; tables are made once for each task."""
    model, bare, x, adapters = prepared(kind)
    made, first = [], {}
    steps = ("t0", "t1", None, "t1") if kind == "images" else ("t0", None)
    for name in steps:
        ran.clear()
        lf.switch_task(model, name)
        own = bare if name is None else materialised(bare, adapters[name])
        assert_same(model, own)
        assert torch.equal(model(x), own(x))
        made.append(list(ran))
        known = dict(model.lora_attachment.exchanges.of)
        assert all(known[a] is first.setdefault(a, known[a]) for a in known)
    assert made == ([[False], [True, False], [True], [False]] if kind == "images" else [[False], [True]])


def test_weights_see_the_write(ran):
    model, _, x, _ = prepared("tokens")
    loss = model(x).sum()
    lf.switch_task(model, "t0")
    assert ran
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fails", [0, 1])
def test_a_failure_leaves_the_model_as_it_was(fails, ran, monkeypatch):
    """While the one task is undone, or the other written."""
    model, bare, _, adapters = prepared("images")
    lf.switch_task(model, "t1")
    real = kernels.exchange_

    def failing(*args):
        if len(ran) == before + fails:
            raise MemoryError
        real(*args)

    with monkeypatch.context() as patch:
        before = len(ran)
        patch.setattr(kernels, "exchange_", failing)
        with pytest.raises(MemoryError):
            lf.switch_task(model, "t0")
    assert_same(model, materialised(bare, adapters["t1"]))
    lf.switch_task(model, "t0")
    assert_same(model, materialised(bare, adapters["t0"]))
    lf.switch_task(model, None)
    assert_same(model, bare)


def test_weights_that_moved_changed_or_were_copied(ran):
    model, bare, _, adapters = prepared("images")
    lf.switch_task(model, "t0")
    twin = copy.deepcopy(model)
    lf.switch_task(twin, "t1")
    assert_same(twin, materialised(bare, adapters["t1"]))
    assert_same(model, materialised(bare, adapters["t0"]))
    for module in model.modules():  # the same values elsewhere
        for p in module._parameters.values():
            if p is not None:
                p.data = p.data.clone()
    lf.switch_task(model, None)
    assert_same(model, bare)
    lf.switch_task(model, "t0")
    model.bfloat16()
    tuned = [materialised(bare, adapters[name]).bfloat16() for name in ("t0", "t1")]
    assert_same(model, tuned[0])
    lf.switch_task(model, None)
    assert_same(model, bare.bfloat16())
    lf.switch_task(model, "t1")
    assert_same(model, tuned[1])


@pytest.mark.parametrize("cols", [70, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_any_bits_by_any_form(dtype, cols, ran):
    """Columns, bitmaps and whole tensors, of several rows and pieces; empty rows; sizes of element side by side."""
    bits = torch.uint8 if dtype == torch.uint8 else {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    entries, want, weights = [], [], []
    for density in (0.02, 0.5, None, 1.0):
        weight = torch.randint(0, 120, (9, cols)).to(bits).view(dtype)
        weight.view(bits)[2, :9] = -1 if bits != torch.uint8 else 255  # of NaNs, the payload too
        mask = torch.rand(9, cols) < (density or 1.0)
        mask[4] &= density is None
        matrix = None if density is None else SparseMatrix.from_mask(weight, mask)
        count = weight.shape if density is None else (int(mask.sum()),)
        own = torch.randint(0, 120, count).to(bits).view(dtype)
        expected = weight.clone()
        expected.view(bits)[mask if density else ...] = own.view(bits)
        entries.append(Entry(matrix, weight, own))
        want.append(expected)
        weights.append(weight)
    before = [w.clone() for w in weights]
    made = Exchange(entries)
    room = made.make_room()
    made.write(weights, room)
    assert all(same_bits(w, e) for w, e in zip(weights, want, strict=True))
    assert not made.undo(weights, [t.clone() for t in room])
    assert made.undo(weights, room)
    assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))
    assert ran == [False, True]
    assert all(w._version >= 2 for w in weights)
