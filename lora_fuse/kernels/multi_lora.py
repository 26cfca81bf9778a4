"""``y[row] += weight * scaling * B[slot] (A[slot] x[row])`` over a tile list, in two launches.

The shrink goes over tiles of pairs, blocks of ranks and cuts of the reduced dimension; true ranks bound all work. Its
partial sums (fp32) are added up in a fixed order, by the shrink itself or by the expand. The expand owns each output
it touches, so there are no atomics: results are deterministic, and a row's bits do not depend on the others. Rows with
several pairs take a third launch, which adds up all of a row's pairs before it rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.configs import Expand, Plan, plan
from lora_fuse.kernels.launch import Launch, pitch, run
from lora_fuse.kernels.routing import TILE_FIELDS


@triton.jit
def _tile(tiles, rows, FIELDS: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's slot, pairs, which of them are there, and their rows."""
    at = tiles + tl.program_id(0) * FIELDS
    slot = tl.load(at)
    pairs = tl.load(at + 1) + tl.arange(0, BLOCK_M)
    live = tl.arange(0, BLOCK_M) < tl.load(at + 2)
    live = live & (slot >= 0)
    return slot, pairs, live, tl.load(rows + pairs, mask=live, other=0).to(tl.int64)


@triton.jit
def _shrink_kernel(
    x,  # [num_rows, in_features]
    pool_a,  # [num_slots * max_rank, in_features]
    h,  # [planes, num_pairs, max_rank] fp32, planes `plane_stride` apart
    rows,
    tiles,
    slot_rank,
    in_features,
    max_rank,
    plane_stride,
    x_stride,
    a_stride,
    SPLIT_LEN: tl.constexpr,
    SPLITS: tl.constexpr,  # cuts that this program adds up
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIELDS: tl.constexpr,
):
    if tl.load(tiles + tl.program_id(0) * FIELDS) < 0:
        return
    slot, pairs, live, row = _tile(tiles, rows, FIELDS, BLOCK_M)
    rank = tl.load(slot_rank + slot)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
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
    h_at = h + plane.to(tl.int64) * plane_stride + pairs[:, None].to(tl.int64) * max_rank + offs_r[None, :]
    tl.store(h_at, total, mask=live[:, None] & (offs_r[None, :] < rank))


@triton.jit
def _sum_planes(h_at, stride, mask, PLANES: tl.constexpr):
    """The shrink's partial sums in their order."""
    total = tl.load(h_at, mask=mask, other=0.0).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(h_at + plane * stride, mask=mask, other=0.0)
    return total


@triton.jit
def _dot_fp32(h, b, acc, PRECISION: tl.constexpr):
    """``acc + h @ b`` with h of 16 bits or more of mantissa, on matrix instructions of the dtype of b.

    h is cut into a high part that the instruction takes as it is, and what is left. "own": it has the dtype of b.
    """
    if PRECISION == "bf16":
        high = h.to(tl.bfloat16)
        acc = tl.dot(high, b, acc)
        return tl.dot((h - high.to(tl.float32)).to(tl.bfloat16), b, acc)
    elif PRECISION == "tf32":
        high = (h.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        wide = b.to(tl.float32)
        acc = tl.dot(high, wide, acc, input_precision="tf32")
        return tl.dot(h - high, wide, acc, input_precision="tf32")
    elif PRECISION == "own":
        return tl.dot(h.to(b.dtype), b, acc)
    else:
        return tl.dot(h, b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _expand_kernel(
    y,  # [num_rows, out_features], added to
    h,  # [planes, num_pairs, max_rank] fp32; BY_ROW: [num_rows, num_slots * max_rank] of any dtype
    pool_b,  # [num_slots * max_rank, out_features]
    rows,
    weights,
    row_starts,
    tiles,
    slot_rank,
    slot_scaling,
    out_features,
    max_rank,
    h_stride,  # between planes; BY_ROW: between rows
    y_stride,
    b_stride,
    BY_ROW: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MIXES: tl.constexpr,  # rows with several pairs are not for this kernel
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FIELDS: tl.constexpr,
):
    if tl.load(tiles + tl.program_id(0) * FIELDS) < 0:
        return
    slot, pairs, live, row = _tile(tiles, rows, FIELDS, BLOCK_M)
    if HAS_MIXES:
        own = tl.load(row_starts + row + 1, mask=live, other=0) - tl.load(row_starts + row, mask=live, other=0)
        live = live & (own == 1)
    rank = tl.load(slot_rank + slot)
    if rank == 0:
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < out_features
    y_at = y + row[:, None] * y_stride + offs_n[None, :]
    prior = tl.load(y_at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
    offs_r = tl.arange(0, BLOCK_R)
    if BY_ROW:
        h_at = h + row[:, None] * h_stride + slot * max_rank + offs_r[None, :]
    else:
        h_at = h + pairs[:, None].to(tl.int64) * max_rank + offs_r[None, :]
    b_at = pool_b + (slot.to(tl.int64) * max_rank + offs_r)[:, None] * b_stride + offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, rank, BLOCK_R):
        here = offs_r < rank - r
        b = tl.load(b_at, mask=here[:, None] & inside[None, :], other=0.0)
        partial = _sum_planes(h_at + r, h_stride, live[:, None] & here[None, :], PLANES)
        acc = _dot_fp32(partial, b, acc, PRECISION)
        b_at += BLOCK_R * b_stride
    scale = tl.load(slot_scaling + slot) + tl.zeros([BLOCK_M], tl.float32)
    if HAS_WEIGHTS:
        scale *= tl.load(weights + pairs, mask=live, other=0.0)
    tl.store(y_at, (prior + acc * scale[:, None]).to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def _mix_kernel(
    y,
    h,
    pool_b,
    weights,
    segment_starts,
    row_starts,
    row_pairs,
    slot_rank,
    slot_scaling,
    num_slots,
    out_features,
    max_rank,
    h_stride,  # between planes; BY_ROW: between rows
    y_stride,
    b_stride,
    BY_ROW: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A row with several pairs: all of them in fp32, then one rounding."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_starts + row)
    end = tl.load(row_starts + row + 1)
    if end - begin < 2:
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < out_features
    offs_r = tl.arange(0, BLOCK_R)
    offs_s = tl.arange(0, SLOTS)
    ends = tl.load(segment_starts + 1 + offs_s, mask=offs_s < num_slots, other=2147483647)
    total = tl.zeros([BLOCK_N], tl.float32)
    for at in range(begin, end):
        pair = tl.load(row_pairs + at).to(tl.int64)
        slot = tl.sum((ends <= pair).to(tl.int32))
        rank = tl.load(slot_rank + slot)
        if BY_ROW:
            h_at = h + row * h_stride + slot * max_rank
        else:
            h_at = h + pair * max_rank
        b_at = pool_b + (slot.to(tl.int64) * max_rank + offs_r)[:, None] * b_stride + offs_n[None, :]
        acc = tl.zeros([BLOCK_N], tl.float32)
        for r in range(0, rank, BLOCK_R):
            here = offs_r < rank - r
            b = tl.load(b_at, mask=here[:, None] & inside[None, :], other=0.0)
            partial = _sum_planes(h_at + r + offs_r, h_stride, here, PLANES)
            acc += tl.sum(partial[:, None] * b.to(tl.float32), 0)
            b_at += BLOCK_R * b_stride
        scale = tl.load(slot_scaling + slot)
        if HAS_WEIGHTS:
            scale *= tl.load(weights + pair)
        total += acc * scale
    y_at = y + row * y_stride + offs_n
    prior = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, (prior + total).to(y.dtype.element_ty), mask=inside)


def launches(
    out: Tensor,
    x: Tensor,
    pool: tuple[Tensor, Tensor, Tensor, Tensor],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
    chosen: Plan | None = None,
) -> list[Launch]:
    """What ``multi_lora_`` launches, in order.

    Args:
        out: ``[num_rows, out_features]``, unit last stride; added to.
        x: ``[num_rows, in_features]``, unit last stride; dtype of ``out`` and of the pool.
        pool: ``(pool_a, pool_b, slot_rank, slot_scaling)``.
        routing: ``(rows, weights, segment_starts, row_starts, row_pairs)``.
        tiles: ``build_tiles(segment_starts, num_pairs)``.
        backend: Triton's name of the device kind.
        chosen: in place of the shipped plan.
    """
    pool_a, _, slot_rank, _ = pool
    rows = routing[0]
    assert rows is not None
    num_pairs, num_slots = rows.shape[0], slot_rank.shape[0]
    if num_pairs == 0 or x.shape[0] == 0 or out.shape[1] == 0:
        return []
    max_rank = pool_a.shape[0] // num_slots
    sizes = x.shape[1], out.shape[1], max_rank, num_pairs, num_slots
    made = chosen or plan(*sizes, str(x.dtype).removeprefix("torch."), backend)
    shrink, expand = made.shrink, made.expand
    # Planes start at multiples of 16 elements, whatever the number of pairs: nothing that Triton specialises on hangs
    # on the batch.
    h = torch.empty(shrink.planes, -(-num_pairs * max_rank // 16) * 16, dtype=torch.float32, device=x.device)
    splits = -(-x.shape[1] // shrink.split_len)
    first = Launch(
        _shrink_kernel,
        (tiles.shape[0], -(-max_rank // shrink.block_r), shrink.planes),
        (x, pool_a, h, rows, tiles, slot_rank, x.shape[1], max_rank, h.stride(0), pitch(x), pool_a.stride(0)),
        {
            "SPLIT_LEN": shrink.split_len,
            "SPLITS": splits // shrink.planes,
            "BLOCK_M": shrink.block_m,
            "BLOCK_R": shrink.block_r,
            "BLOCK_K": shrink.block_k,
            "FIELDS": TILE_FIELDS,
        },
        shrink.num_warps,
        shrink.num_stages,
        scratch=(h,),
    )
    return [first, *_expands(out, h, False, pool, routing, tiles, backend, expand)]


def _expands(
    out: Tensor,
    h: Tensor,
    by_row: bool,
    pool: tuple[Tensor, ...],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
    expand: Expand,
) -> list[Launch]:
    """``out += weight * scaling * h B``, of pairs or of rows that have the shrink of every slot."""
    *_, pool_b, slot_rank, slot_scaling = pool
    rows, weights, segment_starts, row_starts, row_pairs = routing
    num_slots = slot_rank.shape[0]
    blocks = -(-out.shape[1] // expand.block_n)
    sizes_of = (out.shape[1], pool_b.shape[0] // num_slots, pitch(h), pitch(out), pool_b.stride(0))
    has = {"BY_ROW": by_row, "PLANES": 1 if by_row else h.shape[0], "HAS_WEIGHTS": weights is not None}
    first = Launch(
        _expand_kernel,
        (tiles.shape[0], blocks),
        (out, h, pool_b, rows, weights, row_starts, tiles, slot_rank, slot_scaling, *sizes_of),
        {
            **has,
            "HAS_MIXES": row_starts is not None,
            "BLOCK_M": expand.block_m,
            "BLOCK_R": expand.block_r,
            "BLOCK_N": expand.block_n,
            "PRECISION": expand.precision,
            "FIELDS": TILE_FIELDS,
        },
        expand.num_warps,
        expand.num_stages,
        expand.max_registers if backend == "cuda" else None,
    )
    made_launches = [first]
    if row_starts is not None:
        lists = (weights, segment_starts, row_starts, row_pairs)
        made_launches.append(
            Launch(
                _mix_kernel,
                (out.shape[0], blocks),
                (out, h, pool_b, *lists, slot_rank, slot_scaling, num_slots, *sizes_of),
                {
                    **has,
                    "SLOTS": triton.next_power_of_2(num_slots),
                    "BLOCK_R": expand.block_r,
                    "BLOCK_N": expand.block_n,
                },
                expand.num_warps,
                expand.num_stages,
                expand.max_registers if backend == "cuda" else None,
            )
        )
    return made_launches


def expand_launches(
    out: Tensor,
    h: Tensor,
    pool: tuple[Tensor, Tensor, Tensor],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
) -> list[Launch]:
    """What ``expand_`` launches: one, or two where rows have several pairs.

    Args:
        h: ``[num_rows, num_slots * max_rank]``, unit last stride, dtype of ``out``; both may be columns of one tensor.
        pool: ``(pool_b, slot_rank, slot_scaling)``.
        out, routing, tiles, backend: as for ``launches``.
    """
    pool_b, slot_rank, _ = pool
    num_pairs, num_slots = routing[0].shape[0], slot_rank.shape[0]  # type: ignore[union-attr]
    if num_pairs == 0 or out.shape[0] == 0 or out.shape[1] == 0:
        return []
    sizes = 1, out.shape[1], pool_b.shape[0] // num_slots, num_pairs, num_slots
    expand = plan(*sizes, str(out.dtype).removeprefix("torch."), backend).expand
    if expand.precision != "ieee":
        expand = replace(expand, precision="own")  # h is no finer than B: nothing to cut into parts
    return _expands(out, h, True, pool, routing, tiles, backend, expand)


def multi_lora_(
    out: Tensor, x: Tensor, pool: Any, routing: Sequence[Tensor | None], tiles: Tensor, operands: Any, ready: Any
) -> None:
    """The op on tensors of one device; see ``launches``, and ``launch.run`` for the last two."""
    run(launches(out, x, pool, routing, tiles, _backend()), operands, ready)


def expand_(
    out: Tensor, h: Tensor, pool: Any, routing: Sequence[Tensor | None], tiles: Tensor, operands: Any, ready: Any
) -> None:
    """The op on tensors of one device; see ``expand_launches``, and ``launch.run`` for the last two."""
    run(expand_launches(out, h, pool, routing, tiles, _backend()), operands, ready)


def _backend() -> str:
    return "hip" if torch.version.hip else "cuda"
