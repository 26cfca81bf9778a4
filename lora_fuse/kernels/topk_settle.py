"""From a group's collected keys to its threshold, and to the place from which the threshold's equals are dropped."""

from __future__ import annotations

import triton
import triton.language as tl

from lora_fuse.kernels.topk_entries import (
    BUFFER,
    CUT,
    DTYPE,
    FAILED,
    FIRST_TILE,
    FOUND,
    GATHERED,
    GROUP,
    GROUP_STEP,
    GROUP_TILES,
    HIGH,
    INFINITY,
    KEEP,
    LEAST,
    LOW,
    MOST,
    NARROW,
    PICKED,
    RANK,
    ROOM,
    SETTLED,
    START,
    STATE_WIDTH,
    STATUS,
    SUB_HIGH,
    SUB_LOW,
    TILES,
    is_last,
    settled,
    tensor_of,
    tile_keys,
    tile_of,
)


@triton.jit
def group_of(table, within, tensors, TENSORS: tl.constexpr):
    """A group by its place in a table: its number, its (first) tensor and its row there."""
    group = within + tl.load(table + GROUP)
    tensor = tensor_of(table, group, tl.where(tl.load(table + GROUP_STEP) == 0, 1, tensors), GROUP, TENSORS)
    return group, tensor, group - tl.load(tensor + GROUP)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _pick_kernel(
    table,
    state,
    limits,
    found,
    picked,  # [groups of the batch, PICK]
    tensors,
    programs,  # of a group
    TENSORS: tl.constexpr,
    PICK: tl.constexpr,
    BLOCK: tl.constexpr,
    HIP: tl.constexpr,
):
    """From a bin to the threshold: the keys of the bin are taken out of those found, and one program picks."""
    program = tl.program_id(0) % programs
    within = tl.program_id(0) // programs  # the batch
    group, tensor, row = group_of(table, within, tensors, TENSORS)
    state += group * STATE_WIDTH
    limits += 2 * group
    if tl.load(state + STATUS) != NARROW:
        return
    found += tl.load(tensor + BUFFER) + row * tl.load(tensor + ROOM)
    picked += within * PICK
    low = tl.load(state + SUB_LOW).to(tl.int32)
    high = tl.load(state + SUB_HIGH).to(tl.int32)
    size = tl.load(state + FOUND)
    offs = tl.arange(0, BLOCK)
    for begin in range(program.to(tl.int64) * BLOCK, size, programs * BLOCK):
        live = offs < tl.minimum(size - begin, BLOCK).to(tl.int32)
        keys = tl.load(found + begin + offs, mask=live, other=-2).to(tl.int32)
        inside = (keys >= low) & (keys <= high)
        order = tl.cumsum(inside.to(tl.int32), 0)
        count = tl.max(order)
        if count > 0:
            place = tl.atomic_add(state + PICKED, count.to(tl.int64))
            fits = inside & (order <= tl.maximum(PICK - place, 0).to(tl.int32))
            tl.store(picked + (place - 1) + order, keys.to(picked.dtype.element_ty), mask=fits)
            tl.atomic_max(state + MOST, tl.max(tl.where(inside, keys - low + 1, 0)).to(tl.int64))
            tl.atomic_max(state + LEAST, tl.max(tl.where(inside, high - keys + 1, 0)).to(tl.int64))
    if is_last(state + GATHERED, programs, HIP):
        inside_bin = tl.load(state + PICKED, cache_modifier=".cg")
        bottom = high + 1 - tl.load(state + LEAST, cache_modifier=".cg").to(tl.int32)
        top = low - 1 + tl.load(state + MOST, cache_modifier=".cg").to(tl.int32)
        rank = tl.load(state + RANK)
        address = picked.to(tl.int64)  # a choice of pointers does not compile in Triton 3.6 on AMD
        count = inside_bin
        if inside_bin > PICK:
            address = found.to(tl.int64)
            count = size
            rank += _reaching(found, size, high + 1, BLOCK)
        keys_at = address.to(picked.dtype)
        low = bottom
        end = top
        while low < end:
            mid = low + ((end - low + 1) >> 1)
            enough = _reaching(keys_at, count, mid, BLOCK) >= rank
            low = tl.where(enough, mid, low)
            end = tl.where(enough, end, mid - 1)
        above = rank - tl.load(state + RANK)
        equal = inside_bin
        if bottom < top:
            above = _reaching(keys_at, count, low + 1, BLOCK)
            equal = _reaching(keys_at, count, low, BLOCK) - above
        settled(state, limits, low, rank - above, equal)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _cut_kernel(
    table,
    state,
    limits,
    found,
    places,
    counts,
    at_ends,
    equals,  # [tiles]
    tensors,
    programs,  # of a group
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,  # -1: several
    HAS_MINUS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    HIP: tl.constexpr,
):
    """From the threshold to the place behind the last of its equals that is kept."""
    program = tl.program_id(0) % programs
    group, tensor, row = group_of(table, tl.program_id(0) // programs, tensors, TENSORS)
    at_state = state + group * STATE_WIDTH
    limits += 2 * group
    status = tl.load(at_state + STATUS)
    first = tl.load(tensor + FIRST_TILE) + row * tl.load(tensor + TILES)
    tiles = tl.load(tensor + GROUP_TILES)
    rank = tl.load(at_state + RANK)
    threshold = tl.load(limits).to(tl.int32)
    own = found + tl.load(tensor + BUFFER) + row * tl.load(tensor + ROOM)
    ready = False
    if status == CUT:
        top: tl.constexpr = INFINITY >> KEY_SHIFT
        low = tl.load(at_state + LOW).to(tl.int32) - 1
        high = tl.load(at_state + HIGH).to(tl.int32) + top + 1
        _count_equals(own, first, tiles, program, programs, threshold, low, high, places, counts, at_ends, equals)
        ready = is_last(at_state + SETTLED, programs, HIP)
    elif (status == FAILED) & (program == 0):  # alone, by bisection over all entries
        rank = tl.load(tensor + KEEP)
        threshold = 0
        end = INFINITY >> KEY_SHIFT
        while threshold < end:
            mid = threshold + ((end - threshold + 1) >> 1)
            reached = rank * 0
            for t in range(tiles):
                keys = _any_tile(table, first + t, tensors, TENSORS, KIND, HAS_MINUS, KEY_SHIFT, TILE)
                reached += tl.sum((keys >= mid).to(tl.int32))
            threshold = tl.where(reached >= rank, mid, threshold)
            end = tl.where(reached >= rank, end, mid - 1)
        for t in range(tiles):
            keys = _any_tile(table, first + t, tensors, TENSORS, KIND, HAS_MINUS, KEY_SHIFT, TILE)
            tl.store(equals + first + t, tl.sum((keys == threshold).to(tl.int32)))
            rank -= tl.sum((keys > threshold).to(tl.int32))
        tl.store(limits, threshold)
        tl.debug_barrier()
        ready = True
    if ready:
        tile, before = _tile_of_rank(equals + first, tiles, rank)
        keys = _any_tile(table, first + tile, tensors, TENSORS, KIND, HAS_MINUS, KEY_SHIFT, TILE)
        order = tl.cumsum((keys == threshold).to(tl.int32), 0)
        tensor = tensor_of(table, first + tile, tensors, FIRST_TILE, TENSORS)
        _row, begin, _length = tile_of(tensor, first + tile - tl.load(tensor + FIRST_TILE), TILE)
        at = tl.sum((order < rank - before).to(tl.int32))
        tl.store(limits + 1, tl.load(tensor + START) + begin + at + 1)


@triton.jit
def _reaching(keys_at, size, key, BLOCK: tl.constexpr):
    """How many of ``size`` keys are at least ``key``."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, size, BLOCK):
        live = offs < tl.minimum(size - begin, BLOCK).to(tl.int32)
        keys = tl.load(keys_at + begin + offs, mask=live, other=-2, cache_modifier=".cg")
        total += (keys >= key).to(tl.int32)
    return tl.sum(total.to(tl.int64))


@triton.jit
def _count_equals(found, first, tiles, program, programs, threshold, low, high, places, counts, at_ends, equals):
    """The threshold's equals in each tile, 16 tiles at a time."""
    slots = tl.arange(0, 256)
    for begin in range(program.to(tl.int64) * 16, tiles, programs * 16):
        number = begin + tl.arange(0, 16)
        live = number < tiles
        number += first
        total = tl.load(at_ends + number, mask=live, other=0)
        if threshold == high:
            total = total & 0xFFFF
        elif threshold == low:
            total = total >> 16
        else:
            total = tl.zeros([16], tl.int32)
            place = tl.load(places + number, mask=live, other=0)
            count = tl.load(counts + number, mask=live, other=0)
            for at in range(0, tl.max(count), 256):
                own = (at + slots)[None, :] < count[:, None]
                keys = tl.load(found + (place[:, None] + (at + slots)[None, :]), mask=own, other=-2)
                total += tl.sum((keys == threshold).to(tl.int32), 1)
        tl.store(equals + number, total, mask=live)


@triton.jit
def _tile_of_rank(equals, tiles, rank):
    """In which tile the ``rank``-th equal lies, and how many lie before that tile."""
    offs = tl.arange(0, 1024)
    seen = rank * 0
    tile = rank * 0
    before = rank * 0
    for begin in range(0, tiles, 1024):
        own = tl.load(equals + begin + offs, mask=begin + offs < tiles, other=0, cache_modifier=".cg")
        ends = seen + tl.cumsum(own.to(tl.int64), 0)
        after = tl.max(ends)
        if (seen < rank) & (after >= rank):
            tile = begin + tl.sum((ends < rank).to(tl.int64))
            before = tl.maximum(seen, tl.max(tl.where(ends < rank, ends, 0)))
        seen = after
    return tile, before


@triton.jit
def _any_tile(
    table,
    number,
    tensors,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The keys of a tile by its number; KIND -1: whatever the dtype of its tensor."""
    tensor = tensor_of(table, number, tensors, FIRST_TILE, TENSORS)
    local = number - tl.load(tensor + FIRST_TILE)
    if KIND >= 0:
        keys = tile_keys(tensor, local, TILE, KIND, HAS_MINUS, False, KEY_SHIFT)
    else:
        kind = tl.load(tensor + DTYPE)
        if kind == 0:
            keys = tile_keys(tensor, local, TILE, 0, HAS_MINUS, False, KEY_SHIFT)
        elif kind == 1:
            keys = tile_keys(tensor, local, TILE, 1, HAS_MINUS, False, KEY_SHIFT)
        else:
            keys = tile_keys(tensor, local, TILE, 2, HAS_MINUS, False, KEY_SHIFT)
    return keys
