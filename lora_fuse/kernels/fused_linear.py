"""``y = x W^T + bias + sum over pairs of weight * scaling * B[slot] (A[slot] x)`` in one launch, for few rows.

Programs of two roles share the grid. The first few compute the shrink ``h = A x`` and say so in a counter. The others
stream W; once on the way, when h has long been there and their next loads are under way, they look at the counter, read
h and their columns of B, and keep the LoRA part (fp32) until the end, where everything is rounded once.

A program waits only for programs of lower number, and those wait for nothing: it is enough that a device starts
programs in order, all of them need not fit at once. The last program to pass the wait sets the counter back to zero,
so a launch leaves the counters as it found them and graphs replay; two launches at the same time need counters of their
own. Sums run in a fixed order, without float atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.fused_linear_plan import COUNTERS, CUTS, Plan, plan
from lora_fuse.kernels.launch import Launch
from lora_fuse.kernels.routing import TILE_FIELDS
from lora_fuse.kernels.shrink import load_tile


@triton.jit
def _shrink_items(
    x,
    pool_a,
    h,
    rows,
    tiles,
    slot_rank,
    items,
    in_features,
    max_rank,
    num_pairs,
    x_stride,
    a_stride,
    shrinkers,
    CUT_LEN: tl.constexpr,
    NUM_CUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """This program's share of (tile, block of 16 ranks, cut): ``h[cut, pair, rank]``."""
    offs_p = tl.arange(0, 16)
    offs_k = tl.arange(0, BLOCK_K)
    rank_blocks = tl.cdiv(max_rank, 16)
    for item in range(tl.program_id(0), items, shrinkers):
        cut = item % NUM_CUTS
        slot, pairs, live, row = load_tile(item // (NUM_CUTS * rank_blocks), tiles, rows, FIELDS, 16)
        first_rank = item // NUM_CUTS % rank_blocks * 16
        if slot >= 0:
            rank = tl.minimum(tl.load(slot_rank + slot), max_rank) - first_rank
            if rank > 0:
                x_at = x + row[:, None] * x_stride + offs_k[None, :]
                a_row = slot.to(tl.int64) * max_rank + first_rank + offs_p
                a_at = pool_a + a_row[None, :] * a_stride + offs_k[:, None]
                acc = tl.zeros([16, 16], tl.float32)
                for k in range(cut * CUT_LEN, tl.minimum(cut * CUT_LEN + CUT_LEN, in_features), BLOCK_K):
                    inside = offs_k < in_features - k
                    x_block = tl.load(x_at + k, mask=live[:, None] & inside[None, :], other=0.0)
                    a_block = tl.load(a_at + k, mask=(offs_p < rank)[None, :] & inside[:, None], other=0.0)
                    acc = tl.dot(x_block, a_block, acc, input_precision="ieee")
                h_row = (cut * num_pairs + pairs).to(tl.int64) * max_rank + first_rank
                tl.store(h + h_row[:, None] + offs_p[None, :], acc, mask=live[:, None] & (offs_p < rank)[None, :])
    tl.debug_barrier()  # every thread's h, before one of them says that it is there


@triton.jit
def _lora_part(
    first_row,
    offs_n,
    in_columns,
    h,
    pool_b,
    rows,
    weights,
    segment_starts,
    row_starts,
    row_pairs,
    slot_rank,
    slot_scaling,
    num_rows,
    num_pairs,
    num_slots,
    max_rank,
    b_stride,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MIXES: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_CUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``sum over the row's pairs of weight * scaling * h B`` for rows from ``first_row`` on, one sum after the other.

    Each row reads its own adapter's B, so it never meets numbers of another's, and sums of fp32 products need no
    matrix instruction at this size.
    """
    offs_m = first_row + tl.arange(0, ROWS)
    inside = offs_m < num_rows
    offs_s = tl.arange(0, SLOTS)
    ends = tl.load(segment_starts + 1 + offs_s, mask=offs_s < num_slots, other=2147483647)
    if HAS_MIXES:
        begin = tl.load(row_starts + offs_m, mask=inside, other=0)
        count = tl.load(row_starts + offs_m + 1, mask=inside, other=0) - begin
    else:  # a row's pair is where rows names it
        offs_p = tl.arange(0, PAIRS)
        live = offs_p < tl.minimum(tl.load(segment_starts + num_slots), num_pairs)
        of = tl.load(rows + offs_p, mask=live, other=-1)
        begin = tl.max(tl.where(of[None, :] == offs_m[:, None], offs_p[None, :], -1), 1)
        count = (begin >= 0).to(tl.int32)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for i in range(tl.max(count, 0)):
        here = i < count
        if HAS_MIXES:
            pair = tl.load(row_pairs + begin + i, mask=here, other=0)
        else:
            pair = begin
        slot = tl.sum((ends[None, :] <= pair[:, None]).to(tl.int32), 1)
        slot = tl.where(here, slot, 0)
        rank = tl.minimum(tl.load(slot_rank + slot, mask=here, other=0), max_rank)
        scale = tl.load(slot_scaling + slot, mask=here, other=0.0)
        if HAS_WEIGHTS:
            scale *= tl.load(weights + pair, mask=here, other=0.0)
        b_at = pool_b + (slot.to(tl.int64) * max_rank)[:, None] * b_stride + offs_n[None, :]
        acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for r0 in range(0, tl.max(rank, 0), BLOCK_R):
            for r in tl.static_range(BLOCK_R):
                own = r0 + r < rank
                part = tl.zeros([ROWS], tl.float32)
                for cut in tl.static_range(NUM_CUTS):
                    at = h + (cut * num_pairs + pair).to(tl.int64) * max_rank + r0 + r
                    part += tl.load(at, mask=own, other=0.0, cache_modifier=".cg")  # other programs wrote it
                b = tl.load(b_at, mask=own[:, None] & in_columns[None, :], other=0.0)
                acc += part[:, None] * b.to(tl.float32)
                b_at += b_stride
        total += tl.where((rank > 0)[:, None], acc * scale[:, None], 0.0)
    return total


@triton.jit
def _store_plane(planes, block, plane, offs_m, offs_n, num_rows, out_features):
    at = planes + (plane * num_rows + offs_m).to(tl.int64)[:, None] * out_features + offs_n[None, :]
    tl.store(at, block, mask=(offs_m < num_rows)[:, None] & (offs_n < out_features)[None, :])


@triton.jit
def _load_plane(planes, plane, offs_m, offs_n, num_rows, out_features):
    at = planes + (plane * num_rows + offs_m).to(tl.int64)[:, None] * out_features + offs_n[None, :]
    live = (offs_m < num_rows)[:, None] & (offs_n < out_features)[None, :]
    return tl.load(at, mask=live, other=0.0, cache_modifier=".cg")  # other programs wrote it


@triton.jit
def _wait(counters, shrinkers, programs):
    """Until all of h is there. The last one to get through sets the counters back."""
    while tl.atomic_add(counters, 0, sem="acquire") != shrinkers:
        pass
    if tl.atomic_add(counters + 1, 1, sem="relaxed") == programs - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit(do_not_specialize=["shrinkers", "items", "num_rows", "num_pairs"])  # they change from batch to batch
def _fused_linear_kernel(
    y,  # [num_rows, out_features]
    x,  # [num_rows, in_features]
    weight,  # [out_features, in_features]
    bias,  # [out_features] or None
    h,  # [NUM_CUTS, num_pairs, max_rank] fp32
    planes,  # [NUM_CUTS + 1, rows, out_features] fp32, where programs share the reduced dimension
    counters,  # shrinkers that are done, programs that know it, and for each tile the programs that are done
    pool_a,
    pool_b,
    rows,
    weights,
    segment_starts,
    row_starts,
    row_pairs,
    tiles,
    slot_rank,
    slot_scaling,
    shrinkers,  # programs
    items,
    num_rows,
    num_pairs,
    num_slots,
    in_features,
    out_features,
    max_rank,
    y_stride,
    x_stride,
    w_stride,
    a_stride,
    b_stride,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MIXES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CUT_LEN: tl.constexpr,
    NUM_CUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    if tl.program_id(0) < shrinkers:
        _shrink_items(
            x, pool_a, h, rows, tiles, slot_rank, items, in_features, max_rank, num_pairs, x_stride, a_stride,
            shrinkers, CUT_LEN, NUM_CUTS, BLOCK_K, FIELDS,
        )  # fmt: skip
        tl.atomic_add(counters, 1, sem="release")
        return
    job = tl.program_id(0) - shrinkers
    split = job % SPLITS
    offs_n = job // SPLITS * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offs_n < out_features
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    w_at = weight + offs_n.to(tl.int64)[None, :] * w_stride + offs_k[:, None]  # [K, N]
    x_at = x + offs_m.to(tl.int64)[:, None] * x_stride + offs_k[None, :]  # [M, K]
    x1_at = x + (BLOCK_M + offs_m).to(tl.int64)[:, None] * x_stride + offs_k[None, :]
    STEPS: tl.constexpr = CUT_LEN // BLOCK_K  # of a cut
    MINE: tl.constexpr = STEPS * NUM_CUTS // SPLITS
    tl.static_assert(SPLITS > 1 or BLOCKS_M == 1)
    ROWS: tl.constexpr = BLOCK_M * BLOCKS_M // SPLITS  # whose LoRA part this program adds
    LORA_ROWS: tl.constexpr = ROWS if SPLITS == 1 else 16
    # in the last of this program's cuts; not all programs stop at the same time
    lora_step = MINE - STEPS + job % STEPS

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc1 = acc
    total = acc
    for step in range(MINE):
        k = (split * MINE + step) * BLOCK_K
        left = in_features - k
        w_block = tl.load(w_at + k, mask=(offs_k[:, None] < left) & in_columns[None, :], other=0.0)
        x_block = tl.load(x_at + k, mask=(offs_m[:, None] < num_rows) & (offs_k[None, :] < left), other=0.0)
        acc = tl.dot(x_block, w_block, acc, input_precision="ieee")
        if BLOCKS_M == 2:
            live = (BLOCK_M + offs_m[:, None] < num_rows) & (offs_k[None, :] < left)
            x1_block = tl.load(x1_at + k, mask=live, other=0.0)
            acc1 = tl.dot(x1_block, w_block, acc1, input_precision="ieee")
        if HAS_LORA:  # noqa: SIM102  one is decided when compiling
            if step == lora_step:
                _wait(counters, shrinkers, tl.num_programs(0) - shrinkers)
                for first in tl.range(0, ROWS, LORA_ROWS, num_stages=1):
                    first_row = split * ROWS + first
                    part = _lora_part(
                        first_row, offs_n, in_columns, h, pool_b, rows, weights, segment_starts, row_starts, row_pairs,
                        slot_rank, slot_scaling, num_rows, num_pairs, num_slots, max_rank, b_stride, HAS_WEIGHTS,
                        HAS_MIXES, LORA_ROWS, BLOCK_M * BLOCKS_M, SLOTS, NUM_CUTS, BLOCK_N, BLOCK_R,
                    )  # fmt: skip
                    if SPLITS > 1:
                        own = first_row + tl.arange(0, LORA_ROWS)
                        _store_plane(planes, part, NUM_CUTS, own, offs_n, num_rows, out_features)
                    else:
                        total += part
        if step % STEPS == STEPS - 1:
            if SPLITS == 1:
                total += acc
            else:
                cut = split * (NUM_CUTS // SPLITS) + step // STEPS
                _store_plane(planes, acc, cut, offs_m, offs_n, num_rows, out_features)
                if BLOCKS_M == 2:
                    _store_plane(planes, acc1, cut, BLOCK_M + offs_m, offs_n, num_rows, out_features)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            acc1 = acc
    if SPLITS > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + COUNTERS + job // SPLITS, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        tl.store(counters + COUNTERS + job // SPLITS, 0)
    if HAS_BIAS:
        bias_block = tl.load(bias + offs_n, mask=in_columns, other=0.0).to(tl.float32)
    for block in tl.static_range(BLOCKS_M):
        m = block * BLOCK_M + offs_m
        live = (m < num_rows)[:, None] & in_columns[None, :]
        if SPLITS > 1:
            result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for cut in tl.static_range(NUM_CUTS - 1):
                result += _load_plane(planes, cut, m, offs_n, num_rows, out_features)
            if HAS_LORA:  # before the last cut, as a program that has all of the cuts adds it
                result += _load_plane(planes, NUM_CUTS, m, offs_n, num_rows, out_features)
            result += _load_plane(planes, NUM_CUTS - 1, m, offs_n, num_rows, out_features)
        else:
            result = total
        if HAS_BIAS:
            result += bias_block[None, :]
        tl.store(y + m.to(tl.int64)[:, None] * y_stride + offs_n[None, :], result.to(y.dtype.element_ty), mask=live)


def num_counters(out_features: int) -> int:
    """int32 zeros that a launch needs, whatever its plan."""
    return COUNTERS + -(-out_features // 16)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: tuple[Tensor, Tensor, Tensor, Tensor],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    counters: Tensor,
    chosen: Plan | None = None,
) -> Launch:
    """The one launch of ``multi_lora_linear_``.

    Args:
        out: ``[num_rows, out_features]``, unit last stride; overwritten.
        x: ``[num_rows, in_features]``, unit last stride; dtype of ``out``, the weight, the bias and the pool.
        weight: ``[out_features, in_features]``, unit last stride.
        pool: ``(pool_a, pool_b, slot_rank, slot_scaling)``.
        routing: ``(rows, weights, segment_starts, row_starts, row_pairs)``.
        tiles: ``build_tiles(rows, segment_starts)``.
        counters: ``num_counters(out_features)`` int32 zeros, which are zeros again afterwards; not for two launches at
            the same time.
        chosen: in place of the shipped plan.
    """
    pool_a, pool_b, slot_rank, slot_scaling = pool
    rows, weights, segment_starts, row_starts, row_pairs = routing
    assert rows is not None
    (num_rows, in_features), (out_features, _) = x.shape, weight.shape
    num_pairs, num_slots = rows.shape[0], slot_rank.shape[0]
    max_rank = pool_a.shape[0] // num_slots
    dtype = str(x.dtype).removeprefix("torch.")
    made = chosen or plan(num_rows, in_features, out_features, max_rank, tiles.shape[0], dtype)
    items = tiles.shape[0] * CUTS * -(-max_rank // 16)
    h = torch.empty(CUTS, num_pairs, max_rank, dtype=torch.float32, device=x.device)
    planes = torch.empty(CUTS + 1, num_rows, out_features, dtype=torch.float32, device=x.device)
    if made.splits == 1:
        planes = h
    tensors = (pool_a, pool_b, rows, weights, segment_starts, row_starts, row_pairs, tiles, slot_rank, slot_scaling)
    sizes = (made.shrinkers, items, num_rows, num_pairs, num_slots, in_features, out_features, max_rank)
    strides = tuple(t.stride(0) for t in (out, x, weight, pool_a, pool_b))
    return Launch(
        _fused_linear_kernel,
        (made.shrinkers + -(-out_features // made.block_n) * made.splits,),
        (out, x, weight, bias, h, planes, counters, *tensors, *sizes, *strides),
        {
            "HAS_LORA": made.shrinkers > 0,
            "HAS_BIAS": bias is not None,
            "HAS_WEIGHTS": weights is not None,
            "HAS_MIXES": row_starts is not None,
            "SLOTS": triton.next_power_of_2(num_slots),
            "BLOCK_M": made.block_m,
            "BLOCKS_M": made.blocks_m,
            "BLOCK_N": made.block_n,
            "BLOCK_K": made.block_k,
            "CUT_LEN": made.cut_len,
            "NUM_CUTS": CUTS,
            "SPLITS": made.splits,
            "BLOCK_R": made.block_r,
            "FIELDS": TILE_FIELDS,
            "COUNTERS": COUNTERS,
        },
        made.num_warps,
        made.num_stages,
        255,  # two programs to a processor; left alone, ptxas spills to reach more
    )


def multi_lora_linear_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: tuple[Tensor, Tensor, Tensor, Tensor],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    counters: Tensor,
) -> None:
    """The op on tensors of one device; see ``launch``."""
    launch(out, x, weight, bias, pool, routing, tiles, counters).run()
