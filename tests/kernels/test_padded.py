"""Routings of fixed size in Triton's CPU interpreter: padding is never read, and a replay follows what is rewritten."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import make_case, make_pool, routing_of
from nn_models import Mlp, adapter, per_row
from recorded import Graph

import lora_fuse as lf
from lora_fuse.adapters import slab as slabs
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.kernels.multi_lora import Slice, launches
from lora_fuse.kernels.routing import build_tiles, sort_slots
from lora_fuse.nn import capture
from lora_fuse.ops import multi_lora as op

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.float16)]


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch):
    monkeypatch.setattr(slabs, "_has_kernels", lambda device: True)


def run(out, x, pool, routing, tiles):
    for launch in launches(out, x, [Slice(*pool.tensors)], routing.tensors, tiles, "cuda"):
        launch.run()
    return out


def run_exact(out, x, pool, routing):
    return run(out, x, pool, routing, build_tiles(routing.rows, routing.segment_starts))


def poison(layout, slab):
    """Numbers that would be out of range, or NaN, wherever no pair is."""
    rows, weights, starts, _, row_pairs, tiles = layout.split(slab)
    live = int(starts[-1])
    rows[live:], weights[live:], row_pairs[live:] = 2**30, torch.nan, 2**30
    tiles[tiles[:, 0] < 0, 1:] = 2**30


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "slots"), [(1, 3), (17, 5), (20, 2)])
def test_the_same_bits_as_without_padding(rows, slots, dtype, mixed):
    """Whatever the capacity, and with a slab that held another routing before."""
    case = make_case(rows, 130, 40, 20, slots, dtype, mixed)
    want = run_exact(case.out.clone(), case.x, case.pool, case.routing)
    for max_pairs in (slots, slots + 3):
        layout = SlabLayout(rows, max_pairs, slots)
        slab = layout.empty(torch.device("cpu"))
        everything = [(row, slot, 0.5) for row in range(rows) for slot in range(slots)]
        base = [(0, 0, 1.0)][:0]
        for routing, expected in (
            (case.routing, want),
            (routing_of(everything, rows, slots), None),
            (case.routing, want),
            (routing_of(base, rows, slots), case.out),
        ):
            layout.write(slab, routing)
            poison(layout, slab)
            padded = layout.routing(slab)
            got = run(case.out.clone(), case.x, case.pool, padded, padded.tiles)
            if expected is None:
                expected = run_exact(case.out.clone(), case.x, case.pool, routing)
            assert torch.equal(got, expected)
            trimmed = padded.exact()
            for name in ("rows", "segment_starts", "row_pairs", "row_starts", "weights"):
                assert torch.equal(getattr(trimmed, name), getattr(routing.explicit(), name)), name


@pytest.mark.parametrize("rows", [1, 9, 100])
def test_slots_that_are_never_read_back(rows):
    """Sorted on the device, with some out of range: those are base rows, and the flag is up."""
    slots = torch.randint(-1, 4, (rows,), dtype=torch.int32)
    wrong = slots.clone()
    wrong[slots == 3], slots[slots == 3] = 7, -1
    flag = torch.zeros(1, dtype=torch.int32)
    sorted_rows, starts = sort_slots(wrong, 4, flag)
    assert bool(flag) == bool((wrong == 7).any())
    padded = Routing(sorted_rows, None, starts, None, None, rows, (), True)
    by_torch = Routing.from_slots(wrong, 4, flag=torch.zeros(1, dtype=torch.int32))
    want = Routing.from_slots(slots, 4).explicit()
    layout = SlabLayout(rows, 2, 4)
    pool = make_pool(4, 6, 40, 24, torch.float32)
    x, out = torch.randn(rows, 40), torch.randn(rows, 24)
    expected = run_exact(out.clone(), x, pool, want)
    for routing in (padded, by_torch):
        slab = layout.empty(torch.device("cpu"))
        layout.write(slab, routing)
        poison(layout, slab)
        captured = layout.routing(slab)
        for name in ("rows", "segment_starts", "row_starts", "row_pairs", "weights"):
            assert torch.equal(getattr(captured.exact(), name), getattr(want, name)), name
        assert torch.equal(run(out.clone(), x, pool, captured, captured.tiles), expected)
        tiles = build_tiles(
            routing.rows, routing.segment_starts
        )  # as an eager forward has it, with no mixes and no weights
        assert torch.equal(run(out.clone(), x, pool, routing, tiles), expected)


def test_tiles_of_a_slab_hold_every_selection():
    for rows, max_pairs, num_slots in ((1, 4, 9), (5, 1, 3), (64, 4, 9), (400, 3, 2)):
        layout = SlabLayout(rows, max_pairs, num_slots)
        slab = layout.empty(torch.device("cpu"))
        for per_slot in (1, rows):
            pairs = [(row, slot, 1.0) for slot in range(min(num_slots, max_pairs)) for row in range(per_slot)]
            routing = routing_of(pairs, rows, num_slots)
            layout.write(slab, routing)
            tiles = layout.split(slab)[5]
            used = tiles[tiles[:, 0] >= 0]
            assert int(used[:, 2].sum()) == routing.num_pairs
            assert (tiles[len(used) :, 0] == -1).all()


def test_a_replay_through_the_kernels_follows_the_selection():
    """A model captured and replayed with every LoRA part computed by the Triton kernels."""
    bare = Mlp().requires_grad_(False)
    adapters = {name: adapter(bare, ("up", "down", "out"), rank) for name, rank in (("a", 2), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2)
    x = torch.randn(3, 24)
    ran = []

    def by_kernels(*args):
        ran.append(args[-1])
        op._cuda_(*args)

    with torch.no_grad():
        with capture.simulate("warm"):
            model(x)
        graph = Graph(lambda: model(x), {torch.ops.lora_fuse.multi_lora_.default: by_kernels})
    for selection in (["a", None, "b"], [{"a": 0.3, "b": -0.7}, "b", None], [None] * 3, ["b"] * 3):
        lf.set_adapters(model, selection)
        torch.testing.assert_close(graph.replay(), per_row(bare, adapters, selection, x), rtol=1e-5, atol=1e-5)
    adapters["b"] = adapter(bare, ("up", "down", "out"), 3)
    lf.swap_adapter(model, "b", adapters["b"])
    torch.testing.assert_close(graph.replay(), per_row(bare, adapters, ["b"] * 3, x), rtol=1e-5, atol=1e-5)
    slots = lf.adapter_slots(model)
    with capture.simulate("gpu"):
        lf.set_adapters(model, torch.tensor([slots["b"], 77, slots["a"]], dtype=torch.int32))
        torch.testing.assert_close(graph.replay(), per_row(bare, adapters, ["b", None, "a"], x), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="row 1"):
            lf.check(model)
    assert len(ran) == 18
    assert all(tiles.shape == ran[0].shape for tiles in ran)
