"""Entries and their keys: what all kernels of a selection by magnitude read.

A key is the bit pattern of ``|x - minus|`` in fp32, as on the CPU, less low bits that are zero in all keys of a call.
Entries are loaded as integers, so that bf16 is exact in Triton's interpreter too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_fuse.kernels import topk_plan
from lora_fuse.kernels.topk_plan import FIELDS, STATE

# How an index into FIELDS or STATE is written inside a kernel.
FIELD = {name: tl.constexpr(i) for i, name in enumerate(FIELDS)}
X, MINUS, OUT, ROWS, COLS, TILES = (FIELD[n] for n in ("x", "minus", "out", "rows", "cols", "tiles"))
FIRST_TILE, GROUP, GROUP_STEP, START = (FIELD[n] for n in ("first_tile", "group", "group_step", "start"))
ENTRIES, KEEP, GROUP_TILES, BUFFER, ROOM = (FIELD[n] for n in ("entries", "keep", "group_tiles", "buffer", "room"))
SAMPLES, SAMPLE_BASE, FIRST_SAMPLE = (FIELD[n] for n in ("samples", "sample_base", "first_sample"))
GROUP_SAMPLES = FIELD["group_samples"]
DTYPE, TENSOR, FIRST_PROGRAM, FIRST_DRAW = (FIELD[n] for n in ("dtype", "tensor", "first_program", "first_draw"))
HEIGHT, ROW_WIDTH, FIRST_PART = (FIELD[n] for n in ("height", "width", "first_part"))
VALUES, ROW_STARTS, COLUMNS, BITMAP = (FIELD[n] for n in ("values", "row_starts", "columns", "bitmap"))
WIDTH = tl.constexpr(len(FIELDS))
STATE_WIDTH = tl.constexpr(len(STATE))
AT = {name: tl.constexpr(i) for i, name in enumerate(STATE)}
ABOVE, AT_HIGH, AT_LOW, FOUND = (AT[n] for n in ("above", "at_high", "at_low", "found"))
DRAWN, COUNTED, GATHERED, SETTLED = (AT[n] for n in ("drawn", "counted", "gathered", "settled"))
LOW, HIGH, RANK, STATUS = (AT[n] for n in ("low", "high", "rank", "status"))
SUB_LOW, SUB_HIGH, PICKED, MOST, LEAST = (AT[n] for n in ("sub_low", "sub_high", "picked", "most", "least"))
NARROW, CUT = tl.constexpr(topk_plan.NARROW), tl.constexpr(topk_plan.CUT)
FAILED, DONE = tl.constexpr(topk_plan.FAILED), tl.constexpr(topk_plan.DONE)
INFINITY = tl.constexpr(0x7F800000)
ALL = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def tensor_of(table, number, tensors, COLUMN: tl.constexpr, SIZE: tl.constexpr):
    """The table's row of the last tensor whose COLUMN, which rises, is at most ``number``."""
    offs = tl.arange(0, SIZE)
    firsts = tl.load(table + offs * WIDTH + COLUMN, mask=offs < tensors, other=0x7FFFFFFFFFFFFFFF)
    return table + (tl.sum((firsts <= number).to(tl.int32)) - 1) * WIDTH


@triton.jit
def pointer_of(address, BYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """To integers of so many bytes; ALIGNED: the address is a multiple of 16, which one from a table hides.

    Said where the pointer is made: of a function's argument it is forgotten, by Triton 3.6 on AMD of a tensor too.
    """
    if BYTES == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif BYTES == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def raw_entries(address, offs, mask, full, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries at an address; ``full``: all of them are there. A mask of any length would forbid wide loads."""
    at = pointer_of(address, 4 if DTYPE == 0 else 2, ALIGNED) + offs
    if ALIGNED and full:
        raw = tl.load(at)
    else:
        raw = tl.load(at, mask=mask, other=0)
    return raw


@triton.jit
def widened(raw, DTYPE: tl.constexpr):
    """The bits of an entry in fp32."""
    if DTYPE == 0:
        return raw
    elif DTYPE == 1:
        return raw.to(tl.int32) << 16
    else:
        return raw.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def rounded(bits, DTYPE: tl.constexpr):
    """The inverse of ``widened``, to the nearest, ties to even. No NaN."""
    if DTYPE == 0:
        return bits
    elif DTYPE == 1:
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def entries(
    x, minus, offs, mask, full, DTYPE: tl.constexpr, HAS_MINUS: tl.constexpr, ALIGNED: tl.constexpr
):  # addresses of the first of a run
    """``(x, x - minus)``: the entries as they are stored, and the bits of the difference in fp32."""
    raw = raw_entries(x, offs, mask, full, DTYPE, ALIGNED)
    bits = widened(raw, DTYPE)
    if HAS_MINUS:
        other = widened(raw_entries(minus, offs, mask, full, DTYPE, ALIGNED), DTYPE)
        bits = (bits.to(tl.float32, bitcast=True) - other.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return raw, bits


@triton.jit
def keys_of(bits, mask, KEY_SHIFT: tl.constexpr):
    """-2 where there is no entry: below all keys and all bounds."""
    return tl.where(mask, (bits & 0x7FFFFFFF) >> KEY_SHIFT, -2)


@triton.jit
def tile_of(tensor, local, TILE: tl.constexpr):
    """The ``local``-th tile of a tensor: row, first column, length."""
    tiles = tl.load(tensor + TILES)
    row = local // tiles
    begin = (local % tiles) * TILE
    return row, begin, tl.minimum(tl.load(tensor + COLS) - begin, TILE).to(tl.int32)


@triton.jit
def address_of(tensor, COLUMN: tl.constexpr, row, begin, DTYPE: tl.constexpr):
    """Of an entry of a row."""
    size: tl.constexpr = 4 if DTYPE == 0 else 2
    return tl.load(tensor + COLUMN) + (row * tl.load(tensor + COLS) + begin) * size


@triton.jit
def tile_keys(
    tensor,
    local,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
):
    """Keys of the ``local``-th tile of a tensor."""
    row, begin, length = tile_of(tensor, local, TILE)
    offs = tl.arange(0, TILE)
    x = address_of(tensor, X, row, begin, DTYPE)
    minus = x
    if HAS_MINUS:
        minus = address_of(tensor, MINUS, row, begin, DTYPE)
    _, bits = entries(x, minus, offs, offs < length, length == TILE, DTYPE, HAS_MINUS, ALIGNED)
    return keys_of(bits, offs < length, KEY_SHIFT)


@triton.jit
def barrier_of_stores(HIP: tl.constexpr):
    """A barrier after which one thread's atomic releases what all threads have stored.

    PTX's memory model says so of any barrier. AMD's waits for no store, nor does a release for those of other waves.
    """
    if HIP:  # gfx9, where this counter is that of stores too
        wait: tl.constexpr = "s_waitcnt vmcnt(0)"
        tl.inline_asm_elementwise(wait, "=v,0,~{memory}", [0], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def is_last(counter, programs, HIP: tl.constexpr):
    """Whether all others have come by; then what they wrote can be read (past the first cache)."""
    barrier_of_stores(HIP)
    return tl.atomic_add(counter, 1) == programs - 1


@triton.jit
def settled(state, limits, threshold, rank, equals):
    """The threshold is known; unless all of its equals are kept, the place of the last one is not."""
    tl.store(limits, threshold)
    tl.store(limits + 1, ALL)
    tl.store(state + RANK, rank)
    tl.store(state + STATUS, tl.where(rank == equals, DONE, CUT))
