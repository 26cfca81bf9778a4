"""``out[row] += weight * (U[slot] x[row] + bias[slot])`` over a tile list, U sparse and laid out as ``RunDelta`` says.

Up to 8 rows of a slot gather what they need of x (sparse_gather.py); for more, tiles of U are made dense and go to
matrix instructions (sparse_expand.py).

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
from lora_fuse.kernels.sparse_expand import sparse_expand_kernel
from lora_fuse.kernels.sparse_gather import address, sparse_gather_kernel


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
        used = (address(table, slot, 0, FIELDS) != 0) | (address(table, slot, 4, FIELDS) != 0)
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
            sparse_gather_kernel,
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
                sparse_expand_kernel,
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
