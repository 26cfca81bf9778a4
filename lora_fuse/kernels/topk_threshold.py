"""Thresholds of the largest magnitudes, exactly, of many tensors at once, with one pass over their entries.

As on the CPU, a sample of each group gives a bracket that holds the threshold all but surely. The pass over all entries
counts what lies above, at and below it, and collects the few per cent of keys inside, with a histogram of them. The
last program of a group to finish takes the bin of the threshold from it; two small launches pick the threshold in the
bin and find from which place on its equals are dropped. Nothing goes back to the host. Counters are integers, so the
order in which programs finish does not show. A bracket that misses (5 standard deviations) makes one program search
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_fuse.kernels import topk_plan
from lora_fuse.kernels.topk_entries import (
    ABOVE,
    AT_HIGH,
    AT_LOW,
    BUFFER,
    COLS,
    COUNTED,
    DRAWN,
    ENTRIES,
    FAILED,
    FIRST_DRAW,
    FIRST_PROGRAM,
    FIRST_SAMPLE,
    FIRST_TILE,
    FOUND,
    GROUP,
    GROUP_SAMPLES,
    GROUP_STEP,
    GROUP_TILES,
    HIGH,
    INFINITY,
    KEEP,
    LOW,
    MINUS,
    NARROW,
    RANK,
    ROOM,
    SAMPLE_BASE,
    SAMPLES,
    STATE_WIDTH,
    STATUS,
    SUB_HIGH,
    SUB_LOW,
    TENSOR,
    TILES,
    X,
    address_of,
    barrier_of_stores,
    entries,
    is_last,
    keys_of,
    settled,
    tensor_of,
    tile_keys,
)

BINS = tl.constexpr(topk_plan.BINS)


@triton.jit(do_not_specialize=["tensors"])
def _sample_kernel(
    table,
    state,
    samples,
    tensors,
    margin,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    DRAW: tl.constexpr,
    SAMPLE: tl.constexpr,
    HIP: tl.constexpr,
):
    """An entry from each of equal stretches of a row; from all samples of a group, a bracket of its threshold."""
    tensor = tensor_of(table, tl.program_id(0), tensors, FIRST_DRAW, TENSORS)
    local = tl.program_id(0) - tl.load(tensor + FIRST_DRAW)
    count = tl.load(tensor + SAMPLES)
    draws = (count + DRAW - 1) // DRAW
    row = local // draws
    i = (local % draws) * DRAW + tl.arange(0, DRAW)
    live = i < count
    group = tl.load(tensor + GROUP) + row * tl.load(tensor + GROUP_STEP)
    cols = tl.load(tensor + COLS)
    begin = i * cols // count
    noise = _mixed((i + row * 40503).to(tl.uint32)).to(tl.int64)
    at = begin + ((noise * ((i + 1) * cols // count - begin)) >> 32)
    x = address_of(tensor, X, row, 0, KIND)
    minus = x
    if HAS_MINUS:
        minus = address_of(tensor, MINUS, row, 0, KIND)
    _, bits = entries(x, minus, at, live, False, KIND, HAS_MINUS, False)
    of_group = tl.load(tensor + GROUP_SAMPLES)
    own = samples + tl.load(tensor + SAMPLE_BASE) + row * of_group
    tl.store(
        own + tl.load(tensor + FIRST_SAMPLE) + i, keys_of(bits, live, KEY_SHIFT).to(samples.dtype.element_ty), mask=live
    )
    at_state = state + group * STATE_WIDTH
    counter = at_state + DRAWN
    barrier_of_stores(HIP)
    mine = tl.sum(live.to(tl.int64))
    if tl.atomic_add(counter, mine) + mine == of_group:
        offs = tl.arange(0, SAMPLE)
        keys = tl.load(own + offs, mask=offs < of_group, other=-2, cache_modifier=".cg").to(tl.int32)
        size = of_group.to(tl.float32)
        share = tl.load(tensor + KEEP).to(tl.float32) / tl.load(tensor + ENTRIES).to(tl.float32)
        error = margin * tl.sqrt(share * size * (1 - share)) + 2
        far = tl.ceil(share * size + error).to(tl.int32)
        near = tl.floor(share * size - error).to(tl.int32)
        top: tl.constexpr = INFINITY >> KEY_SHIFT
        slack = (of_group // 512).to(tl.int32)  # samples that may lie inside on either side beyond what they have to
        low, low_end, reach_low = 0, top, of_group.to(tl.int32)
        high, high_end, above_high = 0, top, 0
        # Until few enough are inside, or, where entries have the same few values, the ends are such values.
        while ((low < low_end) & (reach_low - far > slack)) | ((high < high_end) & (near - above_high > slack)):
            low_mid = low + ((low_end - low + 1) >> 1)
            high_mid = high + ((high_end - high + 1) >> 1)
            counts = tl.sum((keys >= low_mid).to(tl.int32) + ((keys >= high_mid).to(tl.int32) << 16))
            reached = counts & 0xFFFF
            low, low_end, reach_low = (
                tl.where(reached >= far, low_mid, low),
                tl.where(reached >= far, low_end, low_mid - 1),
                tl.where(reached >= far, reached, reach_low),
            )
            reached = counts >> 16
            high, high_end, above_high = (
                tl.where(reached >= near, high_mid, high),
                tl.where(reached >= near, high_end, high_mid - 1),
                tl.where(reached >= near, above_high, reached),
            )
        low = tl.where(far < of_group, low, -1)
        high = tl.where(near >= 1, high_end, top)
        tl.store(at_state + LOW, low + 1)
        tl.store(at_state + HIGH, high - top - 1)


@triton.jit
def _mixed(z):
    """The finaliser of MurmurHash3."""
    z = (z ^ (z >> 16)) * 0x85EBCA6B
    z = (z ^ (z >> 13)) * 0xC2B2AE35
    return z ^ (z >> 16)


@triton.jit(do_not_specialize=["tensors", "listed"])
def _count_kernel(
    table,
    state,
    limits,  # [groups, 2]: threshold, and the place of the group before which its equals are kept
    bins,  # [groups, BINS]
    found,  # collected keys
    places,  # [tiles]: where a tile's lie, counted from its group's
    counts,  # [tiles]
    at_ends,  # [tiles]: at_high + (at_low << 16)
    flags,  # [list + 1]
    tensors,
    listed,
    TENSORS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
    HIP: tl.constexpr,
):
    """The pass over all entries."""
    tensor = tensor_of(table, tl.program_id(0), tensors, FIRST_PROGRAM, TENSORS)
    local = tl.program_id(0) - tl.load(tensor + FIRST_PROGRAM)
    row = local // tl.load(tensor + TILES)
    group = tl.load(tensor + GROUP) + row * tl.load(tensor + GROUP_STEP)
    at_state = state + group * STATE_WIDTH
    top: tl.constexpr = INFINITY >> KEY_SHIFT
    low = tl.load(at_state + LOW).to(tl.int32) - 1
    high = tl.load(at_state + HIGH).to(tl.int32) + top + 1
    keep = tl.load(tensor + KEEP)
    size = tl.load(tensor + ENTRIES)
    if (keep == 0) | (keep == size):  # nothing to find but NaN
        low = top
        high = top
    keys = tile_keys(tensor, local, TILE, KIND, HAS_MINUS, ALIGNED, KEY_SHIFT)
    if tl.max(keys) > top:
        tl.store(flags + tl.load(tensor + TENSOR), 1)
        tl.store(flags + listed, 1)

    inside = (keys > low) & (keys < high)
    upper = tl.sum((keys > high).to(tl.int32) + ((keys == high).to(tl.int32) << 16))
    at_low = tl.sum(((keys == low) & (low < high)).to(tl.int32))
    order = tl.cumsum(inside.to(tl.int32), 0)
    count = tl.max(order)
    number = tl.load(tensor + FIRST_TILE) + local
    room = tl.load(tensor + ROOM)
    place = tl.atomic_add(at_state + FOUND, count.to(tl.int64))
    tl.store(places + number, place)
    tl.store(counts + number, count)
    tl.store(at_ends + number, (upper >> 16) + (at_low << 16))
    own = found + tl.load(tensor + BUFFER) + row * tl.load(tensor + GROUP_STEP) * room
    if place + count <= room:
        # Not contiguous at all, and the mask makes it single stores; but told so, the compiler leaves the keys in the
        # threads that loaded them, where it would send keys and pointers through shared memory to spread them out.
        to = tl.max_contiguous(tl.multiple_of(own + place + order - 1, 16), 16)
        tl.store(to, keys.to(found.dtype.element_ty), mask=inside)
    if (upper & 0xFFFF) > 0:
        tl.atomic_add(at_state + ABOVE, (upper & 0xFFFF).to(tl.int64))
    if (upper >> 16) > 0:
        tl.atomic_add(at_state + AT_HIGH, (upper >> 16).to(tl.int64))
    if at_low > 0:
        tl.atomic_add(at_state + AT_LOW, at_low.to(tl.int64))
    of_group = bins + group * BINS
    shift = _bin_shift(low, high)
    if place + count <= room:
        tl.debug_barrier()
        offs = tl.arange(0, ROUND)
        numbers = tl.arange(0, BINS)
        tally = tl.zeros([BINS], tl.int32)
        for at in range(0, count, ROUND):
            live = at + offs < count
            again = tl.load(own + place + at + offs, mask=live, other=0).to(tl.int32)
            tally += tl.histogram(tl.where(live, (high - 1 - again) >> shift, 0), BINS)
            tally -= tl.where(numbers == 0, ROUND - tl.minimum(count - at, ROUND), 0)
        tl.atomic_add(of_group + numbers, tally, mask=tally > 0)
    if is_last(at_state + COUNTED, tl.load(tensor + GROUP_TILES), HIP):
        _find_bin(at_state, limits + 2 * group, of_group, keep, size, room, low, high, shift)


@triton.jit
def _bin_shift(low, high):
    """So that the keys between ``low`` and ``high`` fill BINS at most, ``(high - 1 - key) >> shift`` each."""
    shift = 0
    while (high - low - 2) >> shift >= BINS:
        shift += 1
    return shift


@triton.jit
def _find_bin(state, limits, bins, keep, size, room, low, high, shift):
    """Where the threshold lies: at an end of the bracket, in a bin, or nowhere (the bracket missed it)."""
    above = tl.load(state + ABOVE, cache_modifier=".cg")
    at_high = tl.load(state + AT_HIGH, cache_modifier=".cg")
    between = tl.load(state + FOUND, cache_modifier=".cg")
    at_low = tl.load(state + AT_LOW, cache_modifier=".cg")
    rank = keep - above
    if keep == 0:
        settled(state, limits, 0x7FFFFFFF, 0, 0)
    elif keep == size:
        settled(state, limits, -1, 0, 0)
    elif rank <= 0:
        tl.store(state + STATUS, FAILED)
    elif rank <= at_high:
        settled(state, limits, high, rank, at_high)
    elif rank <= at_high + between:
        rank -= at_high
        if between > room:
            tl.store(state + STATUS, FAILED)
        else:
            counts = tl.load(bins + tl.arange(0, BINS), cache_modifier=".cg").to(tl.int64)
            before = tl.cumsum(counts, 0) < rank
            chosen = tl.sum(before.to(tl.int32))
            rank -= tl.sum(tl.where(before, counts, 0))
            sub_high = high - 1 - (chosen << shift)
            if shift == 0:
                settled(state, limits, sub_high, rank, tl.sum(tl.where(tl.arange(0, BINS) == chosen, counts, 0)))
            else:
                tl.store(state + RANK, rank)
                tl.store(state + SUB_HIGH, sub_high)
                tl.store(state + SUB_LOW, tl.maximum(low + 1, sub_high - ((1 << shift) - 1)))
                tl.store(state + STATUS, NARROW)
    elif rank <= at_high + between + at_low:
        settled(state, limits, low, rank - at_high - between, at_low)
    else:
        tl.store(state + STATUS, FAILED)
