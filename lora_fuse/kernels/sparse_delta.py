"""``out[row] += weight * (U[slot] x[row] + bias[slot])`` over a tile list, U sparse and laid out as ``RunDelta`` says.

Up to 8 rows of a slot: **gather**. A program takes 16 outputs and 256 entries of each at a time. Gaps are summed up to
columns, two rows of x at a time lie in shared memory as pairs, and an entry costs one shared load and two
multiply-adds. Take 4096 x 4096 at density 0.1 in bf16 and 4 tasks of 2 rows: 6.7 M entries, 51,000 for each of 132 SMs.
They are 20 MB, 6.7 us at 3 TB/s. Compiled for sm_90 a warp takes 292 instructions for 16 entries of each lane, so an SM
takes 9,000 cycles, 5.3 us; shared loads take 3.5 cycles, what random banks cost a warp, 3.3 us, beside the others.
Through L1 each line would cost a tag look-up, about 28 a load, and each row a load of its own.

More rows: **expand**. A thread takes a word of the bitmap, 32 columns of an output, and walks along the values; the
dense tile goes to matrix instructions. That is 12 instructions an *element* (counting the bits before each would take
longer: 16 a cycle), so 28 us for the batch above, but no more for up to 128 rows of each task.

A program owns the outputs it adds to: no atomics, deterministic. A row's bits do not depend on the other rows but for
one thing: which of the two ways is taken, so whether the row's slot has more than 8 rows in the batch. Rows with
several pairs go through fp32 memory, and one more launch adds up all of a row's pairs before it rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.adapters.sparse_runs import ALIGN, CHUNK, TABLE_FIELDS, WORD
from lora_fuse.kernels.launch import Launch, pitch, run
from lora_fuse.kernels.routing import TILE_FIELDS
from lora_fuse.kernels.sparse_delta_plan import MOST_GATHERED, Plan, plan


@triton.jit
def _address(table, slot, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(table + slot.to(tl.int64) * FIELDS + FIELD)


@triton.jit
def _pointer(address, TYPE: tl.constexpr):
    """What torch allocates is aligned; loads are only as wide as the compiler knows."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _starts(starts, runs, inside, ALIGN: tl.constexpr):
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
def _gather_kernel(
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
    values_at = _address(table, slot, 0, FIELDS)
    bias_at = _address(table, slot, 4, FIELDS)
    if (values_at == 0) & (bias_at == 0):
        return
    values = _pointer(values_at, x.dtype.element_ty)
    gaps = _pointer(_address(table, slot, 1, FIELDS), tl.uint8)
    starts = _pointer(_address(table, slot, 2, FIELDS), tl.int32)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < out_features
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, WIDTH)
    bias = tl.load(_pointer(bias_at, tl.float32) + offs_n, mask=inside & (bias_at != 0), other=0.0)
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
            begin = _starts(starts, offs_n * chunks + chunk, inside, ALIGN)
            end = _starts(starts, offs_n * chunks + chunk + 1, inside, ALIGN)
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


@triton.jit
def _popcount(word):
    """Set bits of 32; LLVM knows the pattern for the instruction."""
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _interleave(parts, COUNT: tl.constexpr):
    """``COUNT`` tensors and as many more into ``COUNT``, joined along a new last dimension."""
    joined = ()
    for i in tl.static_range(COUNT):
        joined += (tl.join(parts[i], parts[i + COUNT]),)  # type: ignore[assignment]
    return joined


@triton.jit
def _dense_tile(values, at, word, BLOCK_N: tl.constexpr):
    """``[N, 64]``: 64 columns of N outputs, of ``word [2 N]``, values of which begin at ``at [2 N]``.

    A thread has whole words, so that it finds its values by steps and nothing is counted.
    """
    at = values + at
    parts = ()
    for j in tl.static_range(32):
        bit = (word >> j) & 1
        parts += (tl.load(at, mask=bit != 0, other=0.0),)  # type: ignore[assignment]
        at += bit
    parts = _interleave(_interleave(parts, 16), 8)
    parts = _interleave(_interleave(_interleave(parts, 4), 2), 1)
    return tl.reshape(parts[0], [BLOCK_N, 64])


@triton.jit
def _expand_kernel(
    out,
    x,
    partial,
    table,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    slot = tl.load(tiles + tl.program_id(0) * TILE_FIELDS)
    if slot < 0:
        return
    segment = tl.load(segment_starts + slot)
    stop = tl.load(segment_starts + slot + 1)
    first = tl.load(tiles + tl.program_id(0) * TILE_FIELDS + 1)
    if (stop - segment <= MOST) | ((first - segment) % BLOCK_M != 0):  # one program for BLOCK_M rows' worth of tiles
        return
    values_at = _address(table, slot, 0, FIELDS)
    bias_at = _address(table, slot, 4, FIELDS)
    if (values_at == 0) & (bias_at == 0):
        return
    values = _pointer(values_at, x.dtype.element_ty)
    starts = _pointer(_address(table, slot, 2, FIELDS), tl.int32)
    bitmap = _pointer(_address(table, slot, 3, FIELDS), tl.int64)
    pairs = first + tl.arange(0, BLOCK_M)
    live = pairs < stop
    row = tl.load(rows + pairs, mask=live, other=0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < out_features
    offs_k = tl.arange(0, WORD)
    words = (in_features + WORD - 1) // WORD
    offs_h = tl.arange(0, 2 * BLOCK_N)  # halves of words: the first of an output, the second, ...
    of_half = tl.program_id(1) * BLOCK_N + offs_h // 2
    there = of_half < out_features
    words_at = bitmap + of_half.to(tl.int64) * words
    x_at = x + row[:, None] * x_stride + offs_k[None, :]  # [M, WORD]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in range(tl.where(values_at != 0, chunks, 0)):
        begin = _starts(starts, of_half * chunks + chunk, there, ALIGN)  # [2 N]
        word_0 = chunk * (CHUNK // WORD)
        for w in range(word_0, tl.minimum(word_0 + CHUNK // WORD, words)):
            word = tl.load(words_at + w, mask=there, other=0)
            low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
            second = offs_h % 2 == 1
            tile = _dense_tile(
                values, begin + tl.where(second, _popcount(low), 0), tl.where(second, high, low), BLOCK_N
            )
            tile = tl.where(inside[:, None], tile, 0.0)  # is so already; Triton 3.6 cannot transpose a bare reshape
            begin += _popcount(low) + _popcount(high)
            left = in_features - w * WORD
            x_block = tl.load(x_at + w * WORD, mask=live[:, None] & (offs_k[None, :] < left), other=0.0)
            acc = tl.dot(x_block, tl.trans(tile), acc, input_precision="ieee")
    acc += tl.load(_pointer(bias_at, tl.float32) + offs_n, mask=inside & (bias_at != 0), other=0.0)[None, :]
    if HAS_WEIGHTS:
        acc *= tl.load(weights + pairs, mask=live, other=0.0)[:, None]
    alone = live
    if HAS_MIXES:
        own = tl.load(row_starts + row + 1, mask=live, other=0) - tl.load(row_starts + row, mask=live, other=0)
        alone = live & (own == 1)
        partial_at = partial + pairs.to(tl.int64)[:, None] * out_features + offs_n[None, :]
        tl.store(partial_at, acc, mask=(live & (own != 1))[:, None] & inside[None, :])
    out_at = out + row[:, None] * out_stride + offs_n[None, :]
    prior = tl.load(out_at, mask=alone[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(out_at, (prior + acc).to(out.dtype.element_ty), mask=alone[:, None] & inside[None, :])


@triton.jit
def _mix_kernel(
    out,
    partial,
    table,
    segment_starts,
    row_starts,
    row_pairs,
    num_slots,
    out_features,
    out_stride,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """A row with several pairs: all of them in fp32, then one rounding."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_starts + row)
    end = tl.load(row_starts + row + 1)
    if end - begin < 2:
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < out_features
    offs_s = tl.arange(0, SLOTS)
    ends = tl.load(segment_starts + 1 + offs_s, mask=offs_s < num_slots, other=2147483647)
    total = tl.zeros([BLOCK_N], tl.float32)
    some = 0
    for at in range(begin, end):
        pair = tl.load(row_pairs + at)
        slot = tl.sum((ends <= pair).to(tl.int32))
        used = (_address(table, slot, 0, FIELDS) != 0) | (_address(table, slot, 4, FIELDS) != 0)
        total += tl.load(partial + pair.to(tl.int64) * out_features + offs_n, mask=inside & used, other=0.0)
        some += used.to(tl.int32)
    at = out + row * out_stride + offs_n
    inside = inside & (some > 0)
    prior = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (prior + total).to(out.dtype.element_ty), mask=inside)


def launches(
    out: Tensor,
    x: Tensor,
    table: Tensor,
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
    chosen: Plan | None = None,
) -> list[Launch]:
    """What ``sparse_delta_`` launches, in order.

    Args:
        out: ``[num_rows, out_features]``, unit last stride; added to.
        x: ``[num_rows, in_features]``, unit last stride; dtype of ``out`` and of the table's values.
        table: ``SlotTable.tensor``.
        routing: ``(rows, weights, segment_starts, row_starts, row_pairs)``.
        tiles: ``build_tiles(rows, segment_starts)``.
        backend: Triton's name of the device kind.
        chosen: in place of the shipped plan.
    """
    rows, weights, segment_starts, row_starts, row_pairs = routing
    assert rows is not None
    num_pairs, (num_rows, in_features), out_features = rows.shape[0], x.shape, out.shape[1]
    if num_pairs == 0 or num_rows == 0 or out_features == 0:
        return []
    made = chosen or plan(out_features, num_pairs, str(x.dtype).removeprefix("torch."), backend)
    partial = None
    if row_starts is not None:
        partial = torch.empty(num_pairs, out_features, dtype=torch.float32, device=x.device)
    lists = (out, x, partial, table, rows, weights, segment_starts, row_starts, tiles)
    sizes = (in_features, out_features, -(-in_features // CHUNK), pitch(x), pitch(out))
    shared = {
        "HAS_WEIGHTS": weights is not None,
        "HAS_MIXES": row_starts is not None,
        "MOST": MOST_GATHERED,
        "CHUNK": CHUNK,
        "ALIGN": ALIGN,
        "FIELDS": TABLE_FIELDS,
        "TILE_FIELDS": TILE_FIELDS,
    }
    gather, expand = made.gather, made.expand
    width = min(CHUNK, max(16, triton.next_power_of_2(in_features)))
    made_launches = [
        Launch(
            _gather_kernel,
            (tiles.shape[0], -(-out_features // gather.block_n)),
            (*lists, *sizes),
            shared | {"BLOCK_N": gather.block_n, "BLOCK_E": gather.block_e, "WIDTH": width},
            gather.num_warps,
            1,
            gather.max_registers if backend == "cuda" else None,
        )
    ]
    if num_pairs > MOST_GATHERED:  # else no slot can have more rows
        made_launches.append(
            Launch(
                _expand_kernel,
                (tiles.shape[0], -(-out_features // expand.block_n)),
                (*lists, *sizes),
                shared | {"BLOCK_M": expand.block_m, "BLOCK_N": expand.block_n, "WORD": WORD},
                expand.num_warps,
                expand.num_stages,
                expand.max_registers if backend == "cuda" else None,
            )
        )
    if row_starts is not None:
        block_n = 256
        made_launches.append(
            Launch(
                _mix_kernel,
                (num_rows, -(-out_features // block_n)),
                (
                    *(out, partial, table, segment_starts, row_starts, row_pairs),
                    *(table.shape[0], out_features, pitch(out)),
                ),
                {"SLOTS": triton.next_power_of_2(table.shape[0]), "BLOCK_N": block_n, "FIELDS": TABLE_FIELDS},
                4,
                1,
                scratch=() if partial is None else (partial,),
            )
        )
    return made_launches


def sparse_delta_(
    out: Tensor, x: Tensor, table: Tensor, routing: Sequence[Tensor | None], tiles: Tensor, operands: Any, ready: Any
) -> None:
    """The op on tensors of one device; see ``launches``, and ``launch.run`` for the last two."""
    run(launches(out, x, table, routing, tiles, "hip" if torch.version.hip else "cuda"), operands, ready)
