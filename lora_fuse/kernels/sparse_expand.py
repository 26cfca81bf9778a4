"""Many rows of a slot by **expand**: the dense tile goes to matrix instructions.

A thread takes a word of the bitmap, 32 columns of an output, and walks along the values. That is 12 instructions an
*element* (counting the bits before each would take longer: 16 a cycle), so 28 us for the batch of ``sparse_gather.py``,
but no more for up to 128 rows of each task.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_fuse.kernels.bits import popcount
from lora_fuse.kernels.sparse_gather import address, pointer, run_starts


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
def sparse_expand_kernel(
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
    values_at = address(table, slot, 0, FIELDS)
    bias_at = address(table, slot, 4, FIELDS)
    if (values_at == 0) & (bias_at == 0):
        return
    values = pointer(values_at, x.dtype.element_ty)
    starts = pointer(address(table, slot, 2, FIELDS), tl.int32)
    bitmap = pointer(address(table, slot, 3, FIELDS), tl.int64)
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
        begin = run_starts(starts, of_half * chunks + chunk, there, ALIGN)  # [2 N]
        word_0 = chunk * (CHUNK // WORD)
        for w in range(word_0, tl.minimum(word_0 + CHUNK // WORD, words)):
            word = tl.load(words_at + w, mask=there, other=0)
            low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
            second = offs_h % 2 == 1
            tile = _dense_tile(values, begin + tl.where(second, popcount(low), 0), tl.where(second, high, low), BLOCK_N)
            tile = tl.where(inside[:, None], tile, 0.0)  # is so already; Triton 3.6 cannot transpose a bare reshape
            begin += popcount(low) + popcount(high)
            left = in_features - w * WORD
            x_block = tl.load(x_at + w * WORD, mask=live[:, None] & (offs_k[None, :] < left), other=0.0)
            acc = tl.dot(x_block, tl.trans(tile), acc, input_precision="ieee")
    acc += tl.load(pointer(bias_at, tl.float32) + offs_n, mask=inside & (bias_at != 0), other=0.0)[None, :]
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
