"""The tables that the kernels of a selection read: what each tensor is, and how it is cut up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.launch import Launch, compile_all
from lora_fuse.kernels.topk_plan import DTYPES, FIELDS, Plan, share


@triton.jit(do_not_specialize=[f"a{i}" for i in range(len(FIELDS))])
def _fill_kernel(
    row,
    a0: tl.int64,
    a1: tl.int64,
    a2: tl.int64,
    a3: tl.int64,
    a4: tl.int64,
    a5: tl.int64,
    a6: tl.int64,
    a7: tl.int64,
    a8: tl.int64,
    a9: tl.int64,
    a10: tl.int64,
    a11: tl.int64,
    a12: tl.int64,
    a13: tl.int64,
    a14: tl.int64,
    a15: tl.int64,
    a16: tl.int64,
    a17: tl.int64,
    a18: tl.int64,
    a19: tl.int64,
    a20: tl.int64,
    a21: tl.int64,
    a22: tl.int64,
    a23: tl.int64,
    a24: tl.int64,
    a25: tl.int64,
    a26: tl.int64,
    a27: tl.int64,
    a28: tl.int64,
    a29: tl.int64,
):
    tl.store(row + 0, a0)
    tl.store(row + 1, a1)
    tl.store(row + 2, a2)
    tl.store(row + 3, a3)
    tl.store(row + 4, a4)
    tl.store(row + 5, a5)
    tl.store(row + 6, a6)
    tl.store(row + 7, a7)
    tl.store(row + 8, a8)
    tl.store(row + 9, a9)
    tl.store(row + 10, a10)
    tl.store(row + 11, a11)
    tl.store(row + 12, a12)
    tl.store(row + 13, a13)
    tl.store(row + 14, a14)
    tl.store(row + 15, a15)
    tl.store(row + 16, a16)
    tl.store(row + 17, a17)
    tl.store(row + 18, a18)
    tl.store(row + 19, a19)
    tl.store(row + 20, a20)
    tl.store(row + 21, a21)
    tl.store(row + 22, a22)
    tl.store(row + 23, a23)
    tl.store(row + 24, a24)
    tl.store(row + 25, a25)
    tl.store(row + 26, a26)
    tl.store(row + 27, a27)
    tl.store(row + 28, a28)
    tl.store(row + 29, a29)


@dataclass
class Item:
    """A tensor that is not empty, and its row of a table."""

    x: Tensor
    minus: Tensor | None
    out: Tensor | None
    on_chip: bool
    row: dict[str, int]

    @property
    def dtype(self) -> str:
        return str(self.x.dtype).removeprefix("torch.")

    @property
    def aligned(self) -> bool:
        """Whether all rows begin at multiples of 16 bytes, and, where rows are read whole, also end there."""
        addresses = all(self.row[name] % 16 == 0 for name in ("x", "minus", "out"))
        return addresses and (self.row["cols"] % 16 == 0 or (self.row["rows"] == 1 and not self.on_chip))

    def by_rows(self, most: int) -> list[Item]:
        """Itself as runs of at most so many rows, each of which has a threshold of its own."""
        runs, (rows, cols, tiles) = [], (self.row[name] for name in ("rows", "cols", "tiles"))
        for first in range(0, rows, most):
            own = self.row | {"rows": min(most, rows - first)}
            own |= {"group": own["group"] + first, "first_tile": own["first_tile"] + first * tiles}
            for name, t in (("x", self.x), ("minus", self.minus)):
                own[name] += 0 if t is None else first * cols * t.element_size()
            runs.append(replace(self, row=own))
        return runs


def items_of(
    xs: Sequence[Tensor],
    minus: Sequence[Tensor] | None,
    shapes: Sequence[tuple[int, int]],
    scope: str,
    ks: Sequence[int],
    outs: Sequence[Tensor] | None,
    plan: Plan,
) -> list[Item]:
    """The tensors that are not empty, in their order. Groups whose threshold is found on chip are numbered last."""
    items = []
    for i, x in enumerate(xs):
        if x.numel() == 0:
            continue
        rows, cols = shapes[i] if scope == "row" else (1, x.numel())
        subtracted, out = None if minus is None else minus[i], None if outs is None else outs[i]
        tiles = -(-cols // plan.tile)
        row = {
            "x": x.data_ptr(),
            "minus": 0 if subtracted is None else subtracted.data_ptr(),
            "out": 0 if out is None else out.data_ptr(),
            "rows": rows,
            "cols": cols,
            "tiles": tiles,
            "group_tiles": tiles,
            "group_step": 1,
            "entries": cols,
            "keep": ks[0] if scope == "global" else ks[i],
            "samples": plan.sampled(cols),
            "room": plan.room(cols),
            "dtype": DTYPES.index(str(x.dtype).removeprefix("torch.")),
            "tensor": i,
        }
        items.append(Item(x, subtracted, out, scope != "global" and cols <= plan.row, row))
    if scope == "global":
        _share_one_group(items, plan)
    long = [item for item in items if not item.on_chip]
    for item, first in zip(long, firsts([i.row["rows"] * i.row["tiles"] for i in long]), strict=True):
        item.row["first_tile"] = first
    if scope != "global":
        ordered = [*long, *(item for item in items if item.on_chip)]
        for item, first in zip(ordered, firsts([i.row["rows"] for i in ordered]), strict=True):
            item.row["group"] = first
        for item in items:
            item.row["group_samples"] = item.row["samples"]
    return items


def _share_one_group(items: list[Item], plan: Plan) -> None:
    sizes = [item.row["cols"] for item in items]
    entries, tiles = sum(sizes), sum(item.row["tiles"] for item in items)
    samples = share(plan.sampled(entries), sizes)
    for item, start, own, first in zip(items, firsts(sizes), samples, firsts(samples), strict=True):
        item.row |= {"group_step": 0, "start": start, "entries": entries, "group_tiles": tiles, "samples": own}
        item.row |= {"first_sample": first, "group_samples": sum(samples), "room": plan.room(entries)}


def firsts(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]


def classes(items: Sequence[Item], most: int, further: Callable[[Item], Hashable] = lambda _: None) -> list[list[Item]]:
    """Items that one launch can serve, in their order; ``most`` at once."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault((item.dtype, item.aligned, further(item)), []).append(item)
    return [alike[i : i + most] for alike in found.values() for i in range(0, len(alike), most)]


@dataclass(frozen=True)
class Table:
    """Rows ``begin:begin + count`` of ``Tables``, for launches of ``programs`` programs.

    Args:
        draws: programs of a launch that samples.
        kind: index of the dtype, -1 if there are several.
    """

    begin: int
    count: int
    programs: int
    draws: int
    kind: int
    aligned: bool

    @property
    def constants(self) -> dict[str, Any]:
        return {"TENSORS": 1 << (self.count - 1).bit_length(), "KIND": self.kind, "ALIGNED": self.aligned}


class Tables:
    """All tables of a call, in one tensor on the device."""

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.device, self.plan = device, plan
        self.numbers: list[list[int]] = []
        self.known: dict[tuple[tuple[int, ...], ...], Table] = {}
        self.tensor: Tensor | None = None

    def add(self, items: Sequence[Item], programs: Sequence[int]) -> Table:
        """A table of items that have so many programs each."""
        draws = [i.row["rows"] * -(-i.row["samples"] // self.plan.draw) for i in items]
        numbers = []
        for item, program, draw in zip(items, firsts(programs), firsts(draws), strict=True):
            row = item.row | {"first_program": program, "first_draw": draw}
            numbers.append([row.get(field, 0) for field in FIELDS])
        key = tuple(map(tuple, numbers))
        if key not in self.known:
            kinds = {item.row["dtype"] for item in items}
            kind = kinds.pop() if len(kinds) == 1 else -1
            aligned = all(item.aligned for item in items)
            self.known[key] = Table(len(self.numbers), len(items), sum(programs), sum(draws), kind, aligned)
            self.numbers += numbers
        return self.known[key]

    def send(self) -> list[Launch]:
        """Have the tables on the device: by one copy, without waiting, or by the launches returned.

        While a graph is captured it is launches: their arguments are the graph's own, where a copy would read the
        host's memory again in every replay.
        """
        if not self.numbers:
            return []
        size = len(self.numbers), len(FIELDS)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.tensor = torch.empty(size, dtype=torch.int64, device=self.device)
            return fills(self.tensor, self.numbers)
        if self.device.type == "cuda":
            _load_fills(self.device)
        host = torch.tensor(self.numbers, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self.tensor = host.to(self.device, non_blocking=True)
        return []

    def __getitem__(self, table: Table) -> Tensor:
        assert self.tensor is not None
        return self.tensor[table.begin : table.begin + table.count]


@cache
def _load_fills(device: torch.device) -> None:
    """Captures launch this kernel, warm-ups do not; and a capture cannot load one."""
    compile_all(fills(torch.empty(2, len(FIELDS), dtype=torch.int64, device=device), [[0] * len(FIELDS)] * 2), device)


def fills(tensor: Tensor, numbers: Sequence[Sequence[int]]) -> list[Launch]:
    """Launches that write a table, a row each."""
    return [Launch(_fill_kernel, (1,), (tensor[i], *row), {}, 1, 1) for i, row in enumerate(numbers)]
