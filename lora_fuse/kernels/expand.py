"""The second half of ``multi_lora``: ``y[row] += weight * scaling * B[slot] h[p]``, a program for each output.

h is cut into two parts that matrix instructions take, unless it comes in the dtype of B. A program keeps the h of its
rows and goes over several blocks of columns; a row with several pairs has programs of its own.

``AHEAD``: launched while the shrink runs (programmatic dependent launch, sm_90 and later). Everything but h was
complete before the shrink began, so a program loads its tile, B and y (of its first block, and not in fp32), and then
waits for the shrink to have ended.
Every program waits, also one with nothing to do: else the launch could end, and its successor begin, before the shrink.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_fuse.kernels.shrink import load_tile, of_slice

MIX_RANKS = tl.constexpr(16)  # that a row with several pairs takes at a time: few registers


@triton.jit
def _piece(at, columns, width_0, width_1, SLICES: tl.constexpr):
    """Which slice the ``at``-th piece of so many columns lies in, and which piece of that slice it is."""
    which = 0
    if SLICES > 1:
        pieces = (width_0 + columns - 1) // columns
        if at >= pieces:
            which = 1
            at -= pieces
    if SLICES > 2:
        pieces = (width_1 + columns - 1) // columns
        if (which == 1) & (at >= pieces):
            which = 2
            at -= pieces
    return which, at


@triton.jit
def _sum_planes(h_at, stride, mask, PLANES: tl.constexpr):
    """The shrink's partial sums in their order."""
    total = tl.load(h_at, mask=mask, other=0.0).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(h_at + plane * stride, mask=mask, other=0.0)
    return total


@triton.jit
def _parts(h, PRECISION: tl.constexpr):
    """h cut into what a matrix instruction takes as it is, and the rest: 16 bits or more of mantissa.

    "own": h has the dtype of B, and no rest.
    """
    if PRECISION == "bf16":
        high = h.to(tl.bfloat16)
        return high, (h - high.to(tl.float32)).to(tl.bfloat16)
    elif PRECISION == "tf32":
        high = (h.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return high, h - high
    else:
        return h, h


@triton.jit
def _dot_parts(high, low, b, acc, PRECISION: tl.constexpr):
    """``acc + (high + low) @ b``."""
    if PRECISION == "bf16":
        acc = tl.dot(high, b, acc)
        return tl.dot(low, b, acc)
    elif PRECISION == "tf32":
        wide = b.to(tl.float32)
        acc = tl.dot(high, wide, acc, input_precision="tf32")
        return tl.dot(low, wide, acc, input_precision="tf32")
    elif PRECISION == "own":
        return tl.dot(high.to(b.dtype), b, acc)
    else:
        return tl.dot(high, b.to(tl.float32), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tiles", "tile_programs", "steps", "mix_steps", "num_rows", "num_slots"])
def expand_kernel(
    y,  # [num_rows, columns], added to
    h,  # [slices, planes, num_pairs, max_rank] fp32; BY_ROW: [num_rows, slices * num_slots * max_rank] of any dtype
    pool_b_0,  # of each slice: [num_slots * max_rank, width]
    pool_b_1,
    pool_b_2,
    slot_rank_0,
    slot_rank_1,
    slot_rank_2,
    slot_scaling_0,
    slot_scaling_1,
    slot_scaling_2,
    start_0,  # its first column in y
    start_1,
    start_2,
    width_0,
    width_1,
    width_2,
    b_stride_0,
    b_stride_1,
    b_stride_2,
    rows,
    weights,
    segment_starts,
    row_starts,
    row_pairs,
    tiles,
    num_tiles,
    tile_programs,
    steps,  # blocks of columns that a program of a tile goes over
    mix_steps,  # and one of a row
    num_rows,
    num_slots,
    max_rank,
    h_stride,  # between planes; BY_ROW: between rows
    y_stride,
    SLICES: tl.constexpr,
    BY_ROW: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MIXES: tl.constexpr,  # a row may have several pairs
    ONE_BLOCK: tl.constexpr,  # max_rank <= BLOCK_R
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    FIELDS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    if HAS_MIXES:
        at = tl.program_id(0) - tile_programs
        if at >= 0:
            row = (at % num_rows).to(tl.int64)
            begin = tl.load(row_starts + row)
            end = tl.load(row_starts + row + 1)
            if AHEAD:
                tl.extra.cuda.gdc_wait()
            if end - begin < 2:
                return
            for step in range(mix_steps):
                which, block = _piece(at // num_rows * mix_steps + step, BLOCK_N, width_0, width_1, SLICES)
                inside = offs_n < of_slice(which, width_0, width_1, width_2, SLICES) - block * BLOCK_N
                y_at = y + row * y_stride + of_slice(which, start_0, start_1, start_2, SLICES) + block * BLOCK_N
                if BY_ROW:
                    h_of = h + row * h_stride + which * num_slots * max_rank
                else:
                    h_of = h + (which * PLANES).to(tl.int64) * h_stride
                total = _mix(
                    h_of,
                    of_slice(which, pool_b_0, pool_b_1, pool_b_2, SLICES) + block * BLOCK_N + offs_n,
                    of_slice(which, b_stride_0, b_stride_1, b_stride_2, SLICES),
                    inside,
                    of_slice(which, slot_rank_0, slot_rank_1, slot_rank_2, SLICES),
                    of_slice(which, slot_scaling_0, slot_scaling_1, slot_scaling_2, SLICES),
                    weights,
                    segment_starts,
                    row_pairs,
                    begin,
                    end,
                    num_slots,
                    max_rank,
                    h_stride,
                    BY_ROW,
                    PLANES,
                    HAS_WEIGHTS,
                    SLOTS,
                    BLOCK_M,
                    BLOCK_N,
                    PRECISION,
                )
                at_y = y_at + tl.zeros([BLOCK_M, 1], tl.int32) + offs_n[None, :]
                here = (tl.arange(0, BLOCK_M) == 0)[:, None] & inside[None, :]
                prior = tl.load(at_y, mask=here, other=0.0).to(tl.float32)
                tl.store(at_y, (prior + total).to(y.dtype.element_ty), mask=here)
            return
    tile = tl.program_id(0) % num_tiles
    if tl.load(tiles + tile * FIELDS) < 0:
        if AHEAD:
            tl.extra.cuda.gdc_wait()
        return
    which, piece = _piece(tl.program_id(0) // num_tiles, BLOCK_N * steps, width_0, width_1, SLICES)
    slot, pairs, live, row = load_tile(tile, tiles, rows, FIELDS, BLOCK_M)
    if HAS_MIXES:
        own = tl.load(row_starts + row + 1, mask=live, other=0) - tl.load(row_starts + row, mask=live, other=0)
        live = live & (own == 1)
    rank = tl.minimum(tl.load(of_slice(which, slot_rank_0, slot_rank_1, slot_rank_2, SLICES) + slot), max_rank)
    if rank == 0:
        if AHEAD:
            tl.extra.cuda.gdc_wait()
        return
    width = of_slice(which, width_0, width_1, width_2, SLICES)
    b_stride = of_slice(which, b_stride_0, b_stride_1, b_stride_2, SLICES)
    pool_b = of_slice(which, pool_b_0, pool_b_1, pool_b_2, SLICES)
    scaling = of_slice(which, slot_scaling_0, slot_scaling_1, slot_scaling_2, SLICES)
    scale = tl.load(scaling + slot) + tl.zeros([BLOCK_M], tl.float32)
    if HAS_WEIGHTS:
        scale *= tl.load(weights + pairs, mask=live, other=0.0)
    if BY_ROW:
        h_at = h + row[:, None] * h_stride + (which * num_slots + slot) * max_rank + offs_r[None, :]
    else:
        h_at = h + (which * PLANES).to(tl.int64) * h_stride + pairs[:, None].to(tl.int64) * max_rank + offs_r[None, :]
    y_at = y + row[:, None] * y_stride + (of_slice(which, start_0, start_1, start_2, SLICES) + offs_n)[None, :]
    b_at = pool_b + (slot.to(tl.int64) * max_rank + offs_r)[:, None] * b_stride + offs_n[None, :]
    first = piece * steps * BLOCK_N
    stop = tl.minimum(first + steps * BLOCK_N, width)
    # In fp32, whose products are no matrix instructions, there are no registers for a second one.
    EARLY: tl.constexpr = AHEAD and ONE_BLOCK and PRECISION != "ieee"
    if AHEAD:
        if EARLY:
            inside = offs_n < width - first
            prior = tl.load(y_at + first, mask=live[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_at + first, mask=(offs_r < rank)[:, None] & inside[None, :], other=0.0)
        tl.extra.cuda.gdc_wait()
    if ONE_BLOCK:
        # A mask by the rank, a number read from memory, would forbid wide loads. The shrink's blocks are zero there.
        sums = _sum_planes(h_at, h_stride, live[:, None] & (offs_r[None, :] < max_rank), PLANES)
        if BY_ROW:
            sums = tl.where(offs_r[None, :] < rank, sums, 0.0)
        high, low = _parts(sums, PRECISION)
    if EARLY:
        # Not carried into the loop: Triton looks at what a product's operand was loaded as for the order in which the
        # product's columns go to matrix instructions, and what a loop carries shows nothing of that.
        acc = _dot_parts(high, low, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        made = (prior.to(tl.float32) + acc * scale[:, None]).to(y.dtype.element_ty)
        tl.store(y_at + first, made, mask=live[:, None] & inside[None, :])
        first += BLOCK_N
    for n in range(first, stop, BLOCK_N):
        inside = offs_n < width - n
        prior = tl.load(y_at + n, mask=live[:, None] & inside[None, :], other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ONE_BLOCK:
            b = tl.load(b_at + n, mask=(offs_r < rank)[:, None] & inside[None, :], other=0.0)
            acc = _dot_parts(high, low, b, acc, PRECISION)
        else:
            b_from = b_at + n
            for r in range(0, rank, BLOCK_R):
                b = tl.load(b_from, mask=(offs_r < rank - r)[:, None] & inside[None, :], other=0.0)
                b_from += BLOCK_R * b_stride
                sums = _sum_planes(h_at + r, h_stride, live[:, None] & (offs_r[None, :] < max_rank - r), PLANES)
                if BY_ROW:
                    sums = tl.where(offs_r[None, :] < rank - r, sums, 0.0)
                high, low = _parts(sums, PRECISION)
                acc = _dot_parts(high, low, b, acc, PRECISION)
        made = (prior.to(tl.float32) + acc * scale[:, None]).to(y.dtype.element_ty)
        tl.store(y_at + n, made, mask=live[:, None] & inside[None, :])


@triton.jit
def _mix(
    h,  # of the slice; BY_ROW: and of the row
    b_columns,  # pool_b, at the block's columns
    b_stride,
    inside,
    slot_rank,
    slot_scaling,
    weights,
    segment_starts,
    row_pairs,
    begin,
    end,
    num_slots,
    max_rank,
    h_stride,
    BY_ROW: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[BLOCK_M, BLOCK_N]`` fp32, in its first row the sum over the pairs of a row that has several.

    The matrix instructions of tiles add up in their own order. A plain sum would take one that hangs on how many
    columns a thread has, so on the batch.
    """
    first = (tl.arange(0, BLOCK_M) == 0)[:, None]
    offs_r = tl.arange(0, MIX_RANKS)
    offs_s = tl.arange(0, SLOTS)
    ends = tl.load(segment_starts + 1 + offs_s, mask=offs_s < num_slots, other=2147483647)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(begin, end):
        pair = tl.load(row_pairs + at).to(tl.int64)
        slot = tl.sum((ends <= pair).to(tl.int32))
        rank = tl.minimum(tl.load(slot_rank + slot), max_rank)
        b_at = b_columns[None, :] + (slot.to(tl.int64) * max_rank + offs_r)[:, None] * b_stride
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r in range(0, rank, MIX_RANKS):
            b = tl.load(b_at, mask=(offs_r < rank - r)[:, None] & inside[None, :], other=0.0)
            h_at = h + (slot if BY_ROW else pair) * max_rank + r + tl.zeros([BLOCK_M, 1], tl.int32) + offs_r[None, :]
            sums = tl.zeros([BLOCK_M, MIX_RANKS], tl.float32)
            for plane in range(PLANES):
                mask = first & (offs_r < rank - r)[None, :]
                sums += tl.load(h_at + plane * h_stride, mask=mask, other=0.0).to(tl.float32)
            high, low = _parts(sums, PRECISION)
            acc = _dot_parts(high, low, b, acc, PRECISION)
            b_at += MIX_RANKS * b_stride
        scale = tl.load(slot_scaling + slot)
        if HAS_WEIGHTS:
            scale *= tl.load(weights + pair)
        total += acc * scale
    return total
