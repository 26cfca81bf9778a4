"""Routings built from samples equal those built from rows, however the batch axis lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fuse.adapters.routing import Routing
from lora_fuse.nn.leases import SlotAllocator
from lora_fuse.nn.selection import Published, Snapshot, parse_selection

FIELDS = ("rows", "weights", "segment_starts", "row_starts", "row_pairs")


def same(a: Routing, b: Routing) -> bool:
    pairs = [(getattr(a, f), getattr(b, f)) for f in FIELDS]
    return a.num_rows == b.num_rows and all(
        x is y is None or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in pairs
    )


def published(names: str) -> tuple[SlotAllocator, Published]:
    allocator = SlotAllocator(5)
    return allocator, Published({name: allocator.acquire(0) for name in names}, {})


SELECTIONS: dict[str, list[Any]] = {
    "one-each": ["c", None, "a", "a", "b"],
    "mixes": [{"a": 0.5, "c": 2.0}, "b", None, {"b": 1.0, "a": 1.0}, {"c": 0.0}],
    "base": [None, {}, None],
    "one": ["b"],
    "empty": [],
}


@pytest.mark.parametrize("expand", [1, 3])
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
@pytest.mark.parametrize("inner", [(), (4,), (1, 2)], ids=str)
@pytest.mark.parametrize("entries", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_against_rows(entries: list[Any], inner: tuple[int, ...], batch_dim: int, expand: int) -> None:
    _, view = published("abc")
    snapshot = Snapshot(parse_selection(entries, view, 5), view, 5, expand, batch_dim)
    lead = (*(3, 2)[:batch_dim], len(entries) * expand, *inner)
    got = snapshot.routing(lead, torch.device("cpu"), None, "layer")
    assert (got is None) == snapshot.base
    explicit = snapshot.explicit_routing(lead, torch.device("cpu"), None, "layer")
    index = torch.arange(len(entries)).repeat_interleave(expand)
    sample = index.view(*(1,) * batch_dim, -1, *(1,) * len(inner)).expand(lead).reshape(-1).tolist()
    triples = []
    for row, i in enumerate(sample):
        entry = entries[i]
        pairs = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
        triples += [(row, view.leases[name].index, weight) for name, weight in pairs.items()]
    rows, slots = (torch.tensor([t[k] for t in triples], dtype=torch.long) for k in (0, 1))
    plain = all(t[2] == 1.0 for t in triples)
    weights = None if plain else torch.tensor([t[2] for t in triples])
    want = Routing.from_pairs(rows, slots, weights, len(sample), 5)
    assert same(got or explicit, want if got else want.explicit())
    assert snapshot.base == (not triples)
    full = (got or explicit).explicit()
    assert same(full, explicit)
    assert all(getattr(full, f) is not None for f in FIELDS)
    assert full.explicit() is full
    order = [(int(r), s) for r, s in zip(full.rows, full.pair_slots().tolist(), strict=True)]
    by_row = [order[p] for p in full.row_pairs.tolist()]  # type: ignore[union-attr]
    assert by_row == sorted(order)
    assert full.row_starts.diff().tolist() == [sample_rows(order, r) for r in range(len(sample))]  # type: ignore[union-attr]


def sample_rows(order: list[tuple[int, int]], row: int) -> int:
    return sum(r == row for r, _ in order)


def test_routings_are_shared_and_the_cache_is_bounded() -> None:
    _, view = published("a")
    snapshot = Snapshot(parse_selection(["a", None], view, 5), view, 5)
    cpu = torch.device("cpu")
    assert snapshot.routing((2, 3), cpu, None, "x") is snapshot.routing((2, 3), cpu, None, "y")
    for length in range(500):
        snapshot.routing((2, length), cpu, length, "x")
    assert len(snapshot.caches) <= 64
    for length in range(500):
        snapshot.routing((2, length), cpu, None, "x")
    assert len(snapshot.cache(None)) <= 64


def test_slots_come_back_when_their_leases_die() -> None:
    allocator = SlotAllocator(2)
    first, second = allocator.acquire(0), allocator.acquire(0)
    assert {first.index, second.index} == {0, 1}
    with pytest.raises(RuntimeError, match="no slot became free"):
        allocator.acquire(0.01)
    index, serial = first.index, first.serial
    del first
    again = allocator.acquire(0)
    assert again.index == index
    assert again.serial != serial
    restored = SlotAllocator(3, taken=[1])  # as a copied model starts
    others = [restored.acquire(0), restored.acquire(0)]
    assert sorted(lease.index for lease in others) == [0, 2]
    assert restored.initial[1].index == 1


def test_from_samples_of_nothing() -> None:
    empty = Routing.from_samples([()], [0] * 4, (1, 2), 3)
    assert (empty.num_rows, empty.num_pairs, empty.num_slots) == (8, 0, 3)


@pytest.mark.parametrize(
    ("entries", "which", "message"),
    [
        ([((3, 1.0),)], [0], "slot 3 is out of range"),
        ([((-1, 1.0),)], [0], "slot -1 is out of range"),
        ([((1, 1.0), (1, 2.0))], [0], "slot 1 twice"),
    ],
)
def test_from_samples_checks_slots(entries: Any, which: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing.from_samples(entries, which, (1, 1), 3)


def test_from_samples_checks_which() -> None:
    for which in (1, -1):
        with pytest.raises(ValueError, match=f"which: .*{which}"):
            Routing.from_samples([((0, 1.0),)], [which], (1, 1), 3)


@pytest.mark.parametrize("lead", [(-1, 1), (-1, -1), (2**31, 1), (2**33, 2**31), (2**40, 0)], ids=str)
def test_from_samples_checks_sizes(lead: tuple[int, int]) -> None:
    for entry in ((), ((0, 1.0),)):
        with pytest.raises(ValueError, match=r"^lead: "):
            Routing.from_samples([entry], [0], lead, 3)


@pytest.mark.parametrize("pair", [(0.5, 1.0), ("a", 1.0), (0, "a")], ids=str)
def test_from_samples_checks_types(pair: Any) -> None:
    with pytest.raises(TypeError, match=r"entries: a .* is a"):
        Routing.from_samples([(pair,)], [0], (1, 1), 3)
