"""Few rows of a slot by **gather**: a program takes 16 outputs and 256 entries of each at a time.

Gaps are summed up to columns, two rows of x at a time lie in shared memory as pairs, and an entry costs one shared load
and two multiply-adds. Take 4096 x 4096 at density 0.1 in bf16 and 4 tasks of 2 rows: 6.7 M entries, 51,000 for each of
132 SMs. They are 20 MB, 6.7 us at 3 TB/s. Compiled for sm_90 a warp takes 292 instructions for 16 entries of each lane,
so an SM takes 9,000 cycles, 5.3 us; shared loads take 3.5 cycles, what random banks cost a warp, 3.3 us, beside the
others. Through L1 each line would cost a tag look-up, about 28 a load, and each row a load of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def address(table, slot, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(table + slot.to(tl.int64) * FIELDS + FIELD)


@triton.jit
def pointer(address, TYPE: tl.constexpr):
    """What torch allocates is aligned; loads are only as wide as the compiler knows."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def run_starts(starts, runs, inside, ALIGN: tl.constexpr):
    """Where runs start, in entries; a slot has fewer than 2**31."""
    return tl.load(starts + runs, mask=inside, other=0) * ALIGN


@triton.jit
def _pair(a, b):
    """Two rows of x, column by column in one element."""
    if a.dtype == tl.float32:
        low = a.to(tl.uint32, bitcast=True).to(tl.uint64)
        return (b.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
    else:
        low = a.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | low


@triton.jit
def _parts(pairs, DTYPE: tl.constexpr):
    """The two rows of ``_pair``, in fp32."""
    if pairs.dtype == tl.uint64:
        a = pairs.to(tl.uint32).to(tl.float32, bitcast=True)
        b = (pairs >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        return a, b
    else:
        a = pairs.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        b = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        return a, b


@triton.jit
def _add_row(
    out,
    partial,
    row_starts,
    weights,
    total,  # [N], U x + bias
    pair,
    row,
    offs_n,
    out_features,
    out_stride,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MIXES: tl.constexpr,
):
    inside = offs_n < out_features
    if HAS_WEIGHTS:
        total *= tl.load(weights + pair)
    alone = True
    if HAS_MIXES:
        alone = tl.load(row_starts + row + 1) - tl.load(row_starts + row) == 1
    if alone:
        at = out + row * out_stride + offs_n
        prior = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (prior + total).to(out.dtype.element_ty), mask=inside)
    elif HAS_MIXES:
        wide = tl.zeros_like(offs_n).to(tl.int64) + pair
        tl.store(partial + wide * out_features + offs_n, total, mask=inside)


@triton.jit
def sparse_gather_kernel(
    out,  # [num_rows, out_features], added to
    x,  # [num_rows, in_features]
    partial,  # [num_pairs, out_features] fp32, of rows with several pairs
    table,  # SlotTable
    rows,
    weights,
    segment_starts,
    row_starts,
    tiles,
    in_features,
    out_features,
    chunks,
    x_stride,
    out_stride,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MIXES: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a chunk that are there, rounded up
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    slot = tl.load(tiles + tl.program_id(0) * TILE_FIELDS)
    if slot < 0:
        return
    segment = tl.load(segment_starts + slot)
    count = tl.load(segment_starts + slot + 1) - segment
    if count > MOST:
        return
    values_at = address(table, slot, 0, FIELDS)
    bias_at = address(table, slot, 4, FIELDS)
    if (values_at == 0) & (bias_at == 0):
        return
    values = pointer(values_at, x.dtype.element_ty)
    gaps = pointer(address(table, slot, 1, FIELDS), tl.uint8)
    starts = pointer(address(table, slot, 2, FIELDS), tl.int32)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < out_features
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, WIDTH)
    bias = tl.load(pointer(bias_at, tl.float32) + offs_n, mask=inside & (bias_at != 0), other=0.0)
    for at in range(segment, segment + count, 2):
        second = at + 1 < segment + count
        row_a = tl.load(rows + at).to(tl.int64)
        row_b = tl.load(rows + at + 1, mask=second, other=0).to(tl.int64)
        sum_a = tl.zeros([BLOCK_N], tl.float32)
        sum_b = tl.zeros([BLOCK_N], tl.float32)
        for chunk in range(tl.where(values_at != 0, chunks, 0)):
            here = chunk * CHUNK + offs_k
            a = tl.load(x + row_a * x_stride + here, mask=here < in_features, other=0.0)
            b = tl.load(x + row_b * x_stride + here, mask=(here < in_features) & second, other=0.0)
            pairs = _pair(a, b)  # [WIDTH]
            begin = run_starts(starts, offs_n * chunks + chunk, inside, ALIGN)
            end = run_starts(starts, offs_n * chunks + chunk + 1, inside, ALIGN)
            column = tl.zeros([BLOCK_N], tl.int32)
            for done in range(0, tl.max(end - begin), BLOCK_E):
                entries = begin[:, None] + (done + offs_e)[None, :]  # [N, E]
                live = entries < end[:, None]
                gap = tl.load(gaps + entries, mask=live, other=0).to(tl.int32)
                value = tl.load(values + entries, mask=live, other=0.0).to(tl.float32)
                columns = column[:, None] + tl.cumsum(gap, 1)
                column += tl.sum(gap, 1)
                got = tl.gather(pairs, tl.reshape(columns, [BLOCK_N * BLOCK_E]), 0)
                got = tl.where(value != 0, tl.reshape(got, [BLOCK_N, BLOCK_E]), 0)  # fillers may point at infinity
                x_a, x_b = _parts(got, x.dtype.element_ty)
                sum_a += tl.sum(value * x_a, 1)
                sum_b += tl.sum(value * x_b, 1)
        _add_row(
            out,
            partial,
            row_starts,
            weights,
            sum_a + bias,
            at,
            row_a,
            offs_n,
            out_features,
            out_stride,
            HAS_WEIGHTS,
            HAS_MIXES,
        )
        if second:
            _add_row(
                out,
                partial,
                row_starts,
                weights,
                sum_b + bias,
                at + 1,
                row_b,
                offs_n,
                out_features,
                out_stride,
                HAS_WEIGHTS,
                HAS_MIXES,
            )
