"""The first half of ``multi_lora``: ``h[p] = A[slot] x[row]`` over tiles of pairs, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_slice(which, first, second, third, SLICES: tl.constexpr):
    """What slice ``which`` has of an argument that each has."""
    if SLICES > 1:  # noqa: SIM102  # known when compiling, unlike the slice: nobody looks at what is not there
        if which == 1:
            first = second
    if SLICES > 2:  # noqa: SIM102
        if which == 2:
            first = third
    return first


@triton.jit
def load_tile(tile, tiles, rows, FIELDS: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's slot, pairs, which of them are there, and their rows."""
    at = tiles + tile * FIELDS
    slot = tl.load(at)
    offs = tl.arange(0, BLOCK_M)
    pairs = tl.load(at + 1) + offs
    live = (offs < tl.load(at + 2)) & (slot >= 0)
    first = tl.load(at + 3)
    looked_up = tl.load(rows + pairs, mask=live & (first < 0), other=0)
    row = tl.where(first < 0, looked_up, first + offs)
    return slot, pairs, live, tl.where(live, row, 0).to(tl.int64)


@triton.jit
def shrink_kernel(
    x,  # [num_rows, in_features]
    pool_a_0,  # [num_slots * max_rank, in_features]; of each slice
    pool_a_1,
    pool_a_2,
    slot_rank_0,
    slot_rank_1,
    slot_rank_2,
    h,  # [slices, planes, num_pairs, max_rank] fp32
    rows,
    tiles,
    in_features,
    max_rank,
    plane_stride,
    x_stride,
    a_stride,
    SLICES: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    SPLITS: tl.constexpr,  # cuts that this program adds up
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIELDS: tl.constexpr,
    AHEAD: tl.constexpr,  # the expand may start while this runs, and waits itself
):
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    if tl.load(tiles + tl.program_id(0) * FIELDS) < 0:
        return
    which = tl.program_id(1) % SLICES
    first_r = tl.program_id(1) // SLICES * BLOCK_R
    pool_a = of_slice(which, pool_a_0, pool_a_1, pool_a_2, SLICES)
    slot, pairs, live, row = load_tile(tl.program_id(0), tiles, rows, FIELDS, BLOCK_M)
    rank = tl.load(of_slice(which, slot_rank_0, slot_rank_1, slot_rank_2, SLICES) + slot)
    rank = tl.minimum(rank, max_rank)  # whatever the tensor says, no other slot is read
    if first_r >= rank:
        return
    offs_r = first_r + tl.arange(0, BLOCK_R)
    plane = tl.program_id(2)
    offs_k = tl.arange(0, BLOCK_K)
    x_at = x + row[:, None] * x_stride + offs_k[None, :]  # [M, K]
    a_at = pool_a + (slot.to(tl.int64) * max_rank + offs_r)[None, :] * a_stride + offs_k[:, None]  # [K, R]
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for split in range(plane * SPLITS, plane * SPLITS + SPLITS):
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for k in range(split * SPLIT_LEN, tl.minimum(split * SPLIT_LEN + SPLIT_LEN, in_features), BLOCK_K):
            left = in_features - k
            x_block = tl.load(x_at + k, mask=live[:, None] & (offs_k[None, :] < left), other=0.0)
            a_block = tl.load(a_at + k, mask=(offs_r[None, :] < rank) & (offs_k[:, None] < left), other=0.0)
            acc = tl.dot(x_block, a_block, acc, input_precision="ieee")
        total += acc
    # Zeros from the rank on: a mask by max_rank is one that wide stores, and the expand's wide loads, can have.
    h_at = h + (which * tl.num_programs(2) + plane).to(tl.int64) * plane_stride
    h_at += pairs[:, None].to(tl.int64) * max_rank + offs_r[None, :]
    tl.store(h_at, total, mask=live[:, None] & (offs_r[None, :] < max_rank))
