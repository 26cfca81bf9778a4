"""Selections written in compact form: the kept entries of each matrix row by row, with their columns or a bitmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.launch import Launch
from lora_fuse.kernels.topk import Selection, run_all
from lora_fuse.kernels.topk_entries import (
    BITMAP,
    COLUMNS,
    FIRST_PART,
    FIRST_PROGRAM,
    GROUP,
    HEIGHT,
    MINUS,
    ROW_STARTS,
    ROW_WIDTH,
    START,
    VALUES,
    X,
    address_of,
    entries,
    keys_of,
    rounded,
    tensor_of,
)
from lora_fuse.kernels.topk_plan import Plan, part_plan
from lora_fuse.kernels.topk_tables import Tables, classes, firsts


@triton.jit
def _part(
    table,
    limits,
    tensors,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's tensor, rows, first column, entries (as stored, and the difference), and which are kept."""
    tensor = tensor_of(table, tl.program_id(0), tensors, FIRST_PROGRAM, TENSORS)
    local = tl.program_id(0) - tl.load(tensor + FIRST_PROGRAM)
    width = tl.load(tensor + ROW_WIDTH)
    parts = (width + BLOCK - 1) // BLOCK  # of a row
    row = (local // parts) * R + tl.arange(0, R)
    begin = (local % parts) * BLOCK
    there = row < tl.load(tensor + HEIGHT)
    column = tl.arange(0, BLOCK)
    inside = there[:, None] & (column < width - begin)[None, :]
    offs = tl.arange(0, R)[:, None] * width.to(tl.int32) + column[None, :]  # R > 1: rows are short
    x = address_of(tensor, X, 0, (local // parts) * R * width + begin, KIND)
    minus = x
    if HAS_MINUS:
        minus = address_of(tensor, MINUS, 0, (local // parts) * R * width + begin, KIND)
    raw, bits = entries(x, minus, offs, inside, False, KIND, HAS_MINUS, False)
    keys = keys_of(bits, inside, KEY_SHIFT)
    group = tl.load(tensor + GROUP) + row * 0
    place = tl.load(tensor + START) + row * width + begin
    if BY_ROW:
        group += row
        place = row * 0 + begin
    threshold = tl.load(limits + 2 * group, mask=there, other=0).to(tl.int32)
    cut = tl.load(limits + 2 * group + 1, mask=there, other=0) - place
    cut = tl.minimum(tl.maximum(cut, 0), BLOCK).to(tl.int32)
    kept = (keys > threshold[:, None]) | ((keys == threshold[:, None]) & (column[None, :] < cut[:, None]))
    number = tl.load(tensor + FIRST_PART) + row * parts + local % parts
    return tensor, row, there, begin, number, raw, bits, kept & inside


@triton.jit(do_not_specialize=["tensors"])
def _count_parts_kernel(
    table,
    limits,
    counts,  # [parts]
    tensors,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many entries each part of a row keeps."""
    _tensor, _row, there, _begin, number, _raw, _bits, kept = _part(
        table, limits, tensors, TENSORS, KIND, HAS_MINUS, KEY_SHIFT, BY_ROW, R, BLOCK
    )
    tl.store(counts + number, tl.sum(kept.to(tl.int32), 1), mask=there)


@triton.jit(do_not_specialize=["tensors", "listed"])
def _write_parts_kernel(
    table,
    limits,
    ends,  # [parts] int64: entries kept up to each part's end, through the list
    flags,
    tensors,
    listed,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    OWN: tl.constexpr,  # x's entries, not the differences
    FORM: tl.constexpr,  # bytes of a column's number; 0: a bitmap
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values, positions and row starts; nothing if the list has NaN, whose counts cannot be trusted."""
    if tl.load(flags + listed) != 0:
        return
    tensor, row, there, begin, number, raw, bits, kept = _part(
        table, limits, tensors, TENSORS, KIND, HAS_MINUS, KEY_SHIFT, BY_ROW, R, BLOCK
    )
    first = tl.load(tensor + FIRST_PART)
    before = tl.load(ends + first - 1, mask=first > 0, other=0)  # the list's earlier matrices
    base = tl.load(ends + number - 1, mask=there & (number > 0), other=0) - before
    starts = tl.load(tensor + ROW_STARTS).to(tl.pointer_type(tl.int64))
    tl.store(starts + row, base, mask=there & (begin == 0))
    ending = there & (row == tl.load(tensor + HEIGHT) - 1) & (begin + BLOCK >= tl.load(tensor + ROW_WIDTH))
    tl.store(starts + row + 1, tl.load(ends + number, mask=ending, other=0) - before, mask=ending)

    place = base[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
    values = raw
    if HAS_MINUS and not OWN:
        values = rounded(bits, KIND)
    to = tl.load(tensor + VALUES)
    if KIND == 0:
        tl.store(to.to(tl.pointer_type(tl.int32)) + place, values, mask=kept)
    else:
        tl.store(to.to(tl.pointer_type(tl.int16)) + place, values, mask=kept)
    column = begin.to(tl.int32) + tl.arange(0, BLOCK)[None, :] + tl.zeros([R, BLOCK], tl.int32)
    if FORM == 2:
        to = tl.load(tensor + COLUMNS)
        tl.store(to.to(tl.pointer_type(tl.int16)) + place, column.to(tl.int16), mask=kept)
    elif FORM == 4:
        to = tl.load(tensor + COLUMNS)
        tl.store(to.to(tl.pointer_type(tl.int32)) + place, column, mask=kept)
    else:
        bit = 1 << (tl.arange(0, BLOCK) % 8)
        eights = tl.reshape(kept.to(tl.int32) * bit[None, :], [R, BLOCK // 8, 8])
        stride = ((tl.load(tensor + ROW_WIDTH) + 63) // 64) * 8  # bytes of a row
        at = begin // 8 + tl.arange(0, BLOCK // 8)
        bitmap = tl.load(tensor + BITMAP).to(tl.pointer_type(tl.int8))
        full = there[:, None] & (at < stride)[None, :]
        tl.store(bitmap + row[:, None] * stride + at[None, :], tl.sum(eights, 2).to(tl.int8), mask=full)


class Parts(NamedTuple):
    """What a sparse matrix is made of, on the device: ``SparseMatrix``'s fields."""

    values: Tensor
    row_starts: Tensor
    columns: Tensor | None
    bitmap: Tensor | None


class Compact:
    """The kept entries of a selection, counted; then written.

    Args:
        selection: of form ``limits``; its launches come before these.
        shapes: of each tensor as rows.
        scope: the selection's.
    """

    def __init__(self, selection: Selection, shapes: Sequence[tuple[int, int]], scope: str) -> None:
        self.selection, self.scope = selection, scope
        device = selection.limits.device
        numbers = []
        for item in selection.items:
            height, width = shapes[item.row["tensor"]]
            item.row |= {"height": height, "width": width}
            numbers.append(height * -(-width // part_plan(width).block))
        for item, first in zip(selection.items, firsts(numbers), strict=True):
            item.row["first_part"] = first
        self.counts = torch.empty(sum(numbers), dtype=torch.int32, device=device)
        self.last = [first + number - 1 for first, number in zip(firsts(numbers), numbers, strict=True)]
        self.ends: Tensor | None = None

    def _launches(
        self, kernel: Any, args: tuple[Any, ...], rest: tuple[Any, ...], further: Any, **own: Any
    ) -> list[Launch]:
        plan, waiting = Plan(), []
        tables = Tables(self.counts.device, plan)
        for part in classes(self.selection.items, plan.tensors, lambda i: (part_plan(i.row["width"]), further(i))):
            cut = part_plan(part[0].row["width"])
            programs = [-(-i.row["height"] // cut.rows) * -(-i.row["width"] // cut.block) for i in part]
            constants = {"HAS_MINUS": part[0].minus is not None, "KEY_SHIFT": self.selection.shift}
            constants |= {"BY_ROW": self.scope == "row", "R": cut.rows, "BLOCK": cut.block, "FORM": further(part[0])}
            waiting.append((tables.add(part, programs), constants | own))
        launches = tables.send()
        for table, constants in waiting:
            known = {name: v for name, v in (table.constants | constants).items() if name in kernel.arg_names}
            every = (tables[table], *args, table.count, *rest)
            launches.append(Launch(kernel, (table.programs,), every, known, 8, 1))
        return launches

    def counting(self) -> list[Launch]:
        return self._launches(_count_parts_kernel, (self.selection.limits, self.counts), (), lambda item: 0)

    def count(self) -> None:
        run_all(self.counting(), self.counts.device)
        self.ends = self.counts.cumsum(0, dtype=torch.int64)

    def kept(self) -> list[int]:
        """Of each tensor that is not empty; waits for the device."""
        assert self.ends is not None
        ends = self.ends[self.last].tolist()
        return [b - a for a, b in zip([0, *ends], ends, strict=False)]

    def write(self, parts: Sequence[Parts], own: bool) -> None:
        run_all(self.writing(parts, own), self.counts.device)

    def writing(self, parts: Sequence[Parts], own: bool) -> list[Launch]:
        """Fill in the matrix of each tensor that is not empty; ``own``: with x's entries, not the differences."""
        for item, made in zip(self.selection.items, parts, strict=True):
            item.row |= {name: 0 if t is None else t.data_ptr() for name, t in made._asdict().items()}
        form = {id(item): _form(made) for item, made in zip(self.selection.items, parts, strict=True)}
        flags = self.selection.flags
        args = (self.selection.limits, self.ends, flags)
        return self._launches(_write_parts_kernel, args, (flags.shape[0] - 1,), lambda item: form[id(item)], OWN=own)


def _form(made: Parts) -> int:
    return 0 if made.columns is None else made.columns.element_size()
