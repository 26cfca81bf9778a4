"""Entries of many weights exchanged for a fine-tune's own, and back bit for bit: one launch over all tensors.

A program takes a row of one weight; which one, and where everything lies, is looked up in tables on the device. Bits
are moved as integers, so nothing is rounded and NaNs keep their payload. What counts is memory: of the weight, every
32-byte sector with a kept entry is read and written, which at density 0.1 in bf16 are 4 of 5.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.launch import Launch, on_device


@triton.jit
def _move(weight, own, undo, mask, BACK: tl.constexpr):
    """``undo = weight; weight = own``, or ``weight = undo``."""
    if BACK:
        tl.store(weight, tl.load(undo, mask=mask), mask=mask)
    else:
        tl.store(undo, tl.load(weight, mask=mask), mask=mask)
        tl.store(weight, tl.load(own, mask=mask), mask=mask)


@triton.jit
def _exchange_kernel(
    entries,  # [num_entries, FIELDS] int64, see ops/exchange.py
    owners,  # [programs] int32, the entry of each
    arena,  # integers of the weights' size: what was overwritten, of all entries
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    entry = entries + tl.load(owners + tl.program_id(0)).to(tl.int64) * FIELDS
    weight = tl.load(entry).to(tl.pointer_type(arena.dtype.element_ty))
    own = tl.load(entry + 1).to(tl.pointer_type(arena.dtype.element_ty))
    starts_at, bitmap_at, columns_at = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    cols = tl.load(entry + 5)
    row = tl.program_id(0) - tl.load(entry + 6)
    undo = arena + tl.load(entry + 7)
    offs = tl.arange(0, BLOCK)
    if starts_at == 0:  # whole: a row is a piece of BLOCK elements, cols are all of them
        at = row * BLOCK + offs
        _move(weight + at, own + at, undo + at, at < cols, BACK)
    else:
        starts = starts_at.to(tl.pointer_type(tl.int64))
        begin, end = tl.load(starts + row), tl.load(starts + row + 1)
        weight += row * cols
        if bitmap_at != 0:
            bitmap = bitmap_at.to(tl.pointer_type(tl.uint8)) + row * ((cols + 63) // 64 * 8)
            for first in range(0, cols, BLOCK):
                column = first + offs
                byte = tl.load(bitmap + column // 8, mask=column < cols, other=0).to(tl.int32)
                kept = (byte >> (column % 8).to(tl.int32)) & 1
                at = begin + tl.cumsum(kept, 0) - 1
                _move(weight + column, own + at, undo + at, kept != 0, BACK)
                begin += tl.sum(kept, 0)
        else:
            for first in range(begin, end, BLOCK):
                at = first + offs
                live = at < end
                if cols <= 65536:
                    column = tl.load(columns_at.to(tl.pointer_type(tl.uint16)) + at, mask=live, other=0).to(tl.int64)
                else:
                    column = tl.load(columns_at.to(tl.pointer_type(tl.int32)) + at, mask=live, other=0).to(tl.int64)
                _move(weight + column, own + at, undo + at, live, BACK)


def launch(entries: Tensor, owners: Tensor, arena: Tensor, back: bool, block: int) -> Launch:
    """What ``exchange_`` launches. Args: as the kernel's; ``block``: elements of a piece of a whole tensor."""
    constexprs = {"BACK": back, "BLOCK": block, "FIELDS": entries.shape[1]}
    return Launch(_exchange_kernel, (owners.shape[0],), (entries, owners, arena), constexprs, 4, 1)


def exchange_(entries: Tensor, owners: Tensor, arena: Tensor, back: bool, block: int) -> None:
    """The op on tensors of one device."""
    with on_device(arena.device):
        launch(entries, owners, arena, back, block).run()
