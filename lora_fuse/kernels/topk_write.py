"""What a selection writes, from the threshold of each group and the place before which its equals are kept.

Rows that fit on chip are read once: their thresholds are found in registers, by bisection, and the result is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_fuse.kernels.topk_entries import (
    COLS,
    FIRST_PROGRAM,
    GROUP,
    GROUP_STEP,
    INFINITY,
    KEEP,
    MINUS,
    OUT,
    ROWS,
    START,
    TENSOR,
    X,
    address_of,
    entries,
    keys_of,
    pointer_of,
    rounded,
    tensor_of,
    tile_of,
)

NOTHING, MASK, DENSE = (tl.constexpr(i) for i in range(3))  # FORM


@triton.jit
def _put(
    out,
    offs,
    inside,
    full,
    keep,
    raw,
    bits,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The mask, or the entries that are kept, at an address."""
    if FORM == 1:
        values = keep.to(tl.int8)
    else:
        values = raw
        if HAS_MINUS:
            values = rounded(bits, KIND)
        values = tl.where(keep, values, 0)
    size: tl.constexpr = 1 if FORM == 1 else (4 if KIND == 0 else 2)
    at = pointer_of(out, size, ALIGNED) + offs
    if full:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=inside)


@triton.jit
def _out_address(tensor, row, begin, FORM: tl.constexpr, KIND: tl.constexpr):
    size: tl.constexpr = 1 if FORM == 1 else (4 if KIND == 0 else 2)
    return tl.load(tensor + OUT) + (row * tl.load(tensor + COLS) + begin) * size


@triton.jit(do_not_specialize=["tensors", "listed"])
def _write_kernel(
    table,
    limits,
    flags,
    tensors,
    listed,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of the result; nothing if the list has NaN."""
    clean = tl.load(flags + listed) == 0
    tensor = tensor_of(table, tl.program_id(0), tensors, FIRST_PROGRAM, TENSORS)
    row, begin, length = tile_of(tensor, tl.program_id(0) - tl.load(tensor + FIRST_PROGRAM), TILE)
    group = tl.load(tensor + GROUP) + row * tl.load(tensor + GROUP_STEP)
    threshold = tl.load(limits + 2 * group).to(tl.int32)
    cut = tl.load(limits + 2 * group + 1) - tl.load(tensor + START) - begin
    cut = tl.minimum(tl.maximum(cut, 0), TILE).to(tl.int32)
    offs = tl.arange(0, TILE)
    inside = offs < length
    x = address_of(tensor, X, row, begin, KIND)
    minus = x
    if HAS_MINUS:
        minus = address_of(tensor, MINUS, row, begin, KIND)
    raw, bits = entries(x, minus, offs, inside, length == TILE, KIND, HAS_MINUS, ALIGNED)
    keys = keys_of(bits, inside, KEY_SHIFT)
    keep = (keys > threshold) | ((keys == threshold) & (offs < cut))
    out = _out_address(tensor, row, begin, FORM, KIND)
    _put(out, offs, inside & clean, (length == TILE) & clean, keep, raw, bits, FORM, KIND, HAS_MINUS, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "listed"])
def _rows_kernel(
    table,
    limits,
    flags,
    tensors,
    listed,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    FORM: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R whole rows: thresholds by bisection of the keys, and the result, or (NOTHING) the thresholds.

    A row is through when a bound leaves exactly as many entries as are kept. Middles of values lead there in about
    log2 of the row's length; middles of keys end the search whatever the values.
    """
    clean = tl.load(flags + listed) == 0
    tensor = tensor_of(table, tl.program_id(0), tensors, FIRST_PROGRAM, TENSORS)
    row = (tl.program_id(0) - tl.load(tensor + FIRST_PROGRAM)) * R
    rows = tl.arange(0, R)
    cols = tl.load(tensor + COLS).to(tl.int32)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    column = tl.arange(0, BLOCK)
    inside = (row + rows < tl.load(tensor + ROWS))[:, None] & (column < cols)[None, :]
    offs = rows[:, None] * cols + column[None, :]
    x = address_of(tensor, X, row, 0, KIND)
    minus = x
    if HAS_MINUS:
        minus = address_of(tensor, MINUS, row, 0, KIND)
    raw, bits = entries(x, minus, offs, inside, False, KIND, HAS_MINUS, ALIGNED)
    keys = keys_of(bits, inside, KEY_SHIFT)
    top: tl.constexpr = INFINITY >> KEY_SHIFT
    most = tl.max(keys, 1)
    if tl.max(most) > top:
        tl.store(flags + tl.load(tensor + TENSOR), 1)
        tl.store(flags + listed, 1)
    keep = tl.load(tensor + KEEP).to(tl.int32)
    low = tl.zeros([R], tl.int32)
    high = tl.maximum(tl.minimum(most, top), 0)
    step = 0
    while tl.max(high - low) > 0:  # the largest key that `keep` entries reach lies in low..high
        mid = low + ((high - low + 1) >> 1)
        if step < 16:
            value = (low << KEY_SHIFT).to(tl.float32, bitcast=True) * 0.5
            value += (high << KEY_SHIFT).to(tl.float32, bitcast=True) * 0.5
            mid = tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> KEY_SHIFT, low + 1), high)
        step += 1
        reached = tl.sum((keys >= mid[:, None]).to(tl.int32), 1)
        low = tl.where(reached >= keep, mid, low)
        high = tl.where(reached > keep, high, tl.where(reached == keep, mid, mid - 1))
    equal = keys == low[:, None]
    above = keys > low[:, None]
    rank = keep - tl.sum(above.to(tl.int32), 1)
    equals = tl.sum(equal.to(tl.int32), 1)
    kept = above | equal
    if tl.max(equals - rank) > 0:
        order = tl.cumsum(equal.to(tl.int32), 1)
        kept = above | (equal & (order <= rank[:, None]))
    if FORM == 0:
        group = tl.load(tensor + GROUP) + row + rows
        there = row + rows < tl.load(tensor + ROWS)
        tl.store(limits + 2 * group, low.to(tl.int64), mask=there)
        cut = tl.max(tl.where(equal & kept, column[None, :] + 1, 0), 1)
        tl.store(limits + 2 * group + 1, cut.to(tl.int64), mask=there)
    else:
        out = _out_address(tensor, row, 0, FORM, KIND)
        _put(out, offs, inside & clean, False, kept, raw, bits, FORM, KIND, HAS_MINUS, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "listed"])
def _check_kernel(
    table,
    flags,
    tensors,
    listed,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Raise the flag of a tensor with NaN, for rows that are to be overwritten in one go."""
    tensor = tensor_of(table, tl.program_id(0), tensors, FIRST_PROGRAM, TENSORS)
    row = (tl.program_id(0) - tl.load(tensor + FIRST_PROGRAM)) * R
    cols = tl.load(tensor + COLS)
    length = (tl.minimum(tl.load(tensor + ROWS) - row, R) * cols).to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    x = address_of(tensor, X, row, 0, KIND)
    minus = x
    if HAS_MINUS:
        minus = address_of(tensor, MINUS, row, 0, KIND)
    offs = tl.arange(0, R * BLOCK)
    _, bits = entries(x, minus, offs, offs < length, False, KIND, HAS_MINUS, ALIGNED)
    if tl.max(keys_of(bits, offs < length, 0)) > INFINITY:
        tl.store(flags + tl.load(tensor + TENSOR), 1)
        tl.store(flags + listed, 1)
