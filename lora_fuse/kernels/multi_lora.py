"""``y[row] += weight * scaling * B[slot] (A[slot] x[row])`` over a tile list, in two launches.

The shrink goes over tiles of pairs, blocks of ranks and cuts of the reduced dimension; true ranks bound all work. Its
partial sums (fp32) are added up in a fixed order, by the shrink itself or by the expand. The expand owns each output
it touches, so there are no atomics: results are deterministic, and a row's bits do not depend on the others. A row with
several pairs has programs of its own there, which add up all of its pairs before they round once.

Layers that share x and routing, and whose outputs are columns of one y, are slices of the same two launches: a program
picks its slice's tensors by its id, and does what it would do for that layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lora_fuse.kernels.configs import PROCESSORS, SLICES, Expand, Plan, mix_steps
from lora_fuse.kernels.expand import expand_kernel
from lora_fuse.kernels.launch import Launch, pitch, run
from lora_fuse.kernels.plan_rules import plan_by_rules
from lora_fuse.kernels.routing import TILE_FIELDS
from lora_fuse.kernels.shrink import shrink_kernel


class Slice(NamedTuple):
    """One layer of several that share x: its pool, and where in y its output begins."""

    pool_a: Tensor
    pool_b: Tensor
    slot_rank: Tensor
    slot_scaling: Tensor
    start: int = 0


def launches(
    out: Tensor,
    x: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
    chosen: Plan | None = None,
) -> list[Launch]:
    """What ``multi_lora_`` launches, in order.

    Args:
        out: ``[num_rows, columns]``, unit last stride; each slice adds to its own columns.
        x: ``[num_rows, in_features]``, unit last stride; dtype of ``out`` and of the pools.
        slices: one to three, with pools of the same ranks, slots and row strides of A.
        routing: ``(rows, weights, segment_starts, row_starts, row_pairs)``.
        tiles: ``build_tiles(rows, segment_starts)``.
        backend: Triton's name of the device kind.
        chosen: in place of the shipped plan and of ``override_plans``.
    """
    rows = routing[0]
    assert rows is not None
    num_pairs, widths = rows.shape[0], [s.pool_b.shape[1] for s in slices]
    if num_pairs == 0 or x.shape[0] == 0 or sum(widths) == 0:
        return []
    made = chosen or plan_of(x, slices, num_pairs, backend)
    h = scratch(x, slices, num_pairs, made)
    first = replace(shrink_launch(h, x, slices, routing, tiles, backend, made), scratch=(h,))
    return [first, _expand(out, h, False, slices, routing, tiles, made.expand, made.shrink.planes, backend)]


def plan_of(x: Tensor, slices: Sequence[Slice], num_pairs: int, backend: str) -> Plan:
    """How a batch is launched now; ``override_plans`` may change it."""
    num_slots = slices[0].slot_rank.shape[0]
    max_rank, columns = slices[0].pool_a.shape[0] // num_slots, sum(s.pool_b.shape[1] for s in slices)
    sizes = x.shape[1], columns, max_rank, num_pairs, num_slots
    dtype = str(x.dtype).removeprefix("torch.")
    made = plan_by_rules(*sizes, dtype, backend, len(slices), x.shape[0], processors_of(x.device))
    if made.expand.ahead and not starts_ahead(backend, x.device):
        made = replace(made, expand=replace(made.expand, ahead=False))
    return made


def behind(launch: Launch) -> Launch:
    """The same, begun when what is before it has ended."""
    return replace(launch, ahead=False, constexprs={**launch.constexprs, "AHEAD": False}) if launch.ahead else launch


def processors_of(device: torch.device) -> int:
    """Of a CUDA device, or of the current one if it is another kind; of an H100 where there is none."""
    if not torch.cuda.is_available():
        return PROCESSORS
    return _processors(
        device.index if device.type == "cuda" and device.index is not None else torch.cuda.current_device()
    )


@cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def starts_ahead(backend: str, device: torch.device) -> bool:
    """Whether a launch can begin before its predecessor has ended. Args: a CUDA device, or any for the current one."""
    if backend != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None) >= (9, 0)


def scratch(x: Tensor, slices: Sequence[Slice], num_pairs: int, made: Plan) -> Tensor:
    """Memory for the shrink's result: ``[slices * planes, num_pairs * max_rank or a few more]`` fp32."""
    max_rank = slices[0].pool_a.shape[0] // slices[0].slot_rank.shape[0]
    # Planes start at multiples of 16 elements, whatever the number of pairs: nothing that Triton specialises on hangs
    # on the batch.
    plane = -(-num_pairs * max_rank // 16) * 16
    return torch.empty(len(slices) * made.shrink.planes, plane, dtype=torch.float32, device=x.device)


def shrink_launch(
    h: Tensor,
    x: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
    chosen: Plan | None = None,
) -> Launch:
    """The first launch, into ``scratch``; for the others see ``launches``."""
    rows = routing[0]
    assert rows is not None
    made = chosen or plan_of(x, slices, rows.shape[0], backend)
    shrink = made.shrink
    max_rank = slices[0].pool_a.shape[0] // slices[0].slot_rank.shape[0]
    return Launch(
        shrink_kernel,
        (tiles.shape[0], -(-max_rank // shrink.block_r) * len(slices), shrink.planes),
        (
            x,
            *_each([s.pool_a for s in slices]),
            *_each([s.slot_rank for s in slices]),
            h,
            rows,
            tiles,
            x.shape[1],
            max_rank,
            h.shape[1],
            pitch(x),
            slices[0].pool_a.stride(0),
        ),
        {
            "SLICES": len(slices),
            "SPLIT_LEN": shrink.split_len,
            "SPLITS": -(-x.shape[1] // shrink.split_len) // shrink.planes,
            "BLOCK_M": shrink.block_m,
            "BLOCK_R": shrink.block_r,
            "BLOCK_K": shrink.block_k,
            "FIELDS": TILE_FIELDS,
            "AHEAD": made.expand.ahead,
        },
        shrink.num_warps,
        shrink.num_stages,
        instruction=_instruction(backend),
    )


def slice_launches(
    out: Tensor, x: Tensor, slices: Sequence[Slice], routing: Sequence[Tensor | None], tiles: Tensor, backend: str
) -> list[Launch]:
    """``launches`` of any number of slices, as many together as fit."""
    alike: dict[tuple[int, int], list[Slice]] = {}
    for s in slices:
        alike.setdefault((s.pool_a.shape[0], s.pool_a.stride(0)), []).append(s)
    groups = [group[i : i + SLICES] for group in alike.values() for i in range(0, len(group), SLICES)]
    return [launch for group in groups for launch in launches(out, x, group, routing, tiles, backend)]


def expand_launches(
    out: Tensor,
    h: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    backend: str,
) -> list[Launch]:
    """What ``expand_`` launches.

    Args:
        h: ``[num_rows, slices * num_slots * max_rank]``, unit last stride, dtype of ``out``; both may be columns of one
            tensor.
        slices: with pools of the same ranks and slots; A is not read.
        out, routing, tiles, backend: as for ``launches``.
    """
    num_pairs, num_slots = routing[0].shape[0], slices[0].slot_rank.shape[0]  # type: ignore[union-attr]
    if num_pairs == 0 or out.shape[0] == 0:
        return []
    pool_rows, made = slices[0].pool_b.shape[0], []
    for i in range(0, len(slices), SLICES):
        some = slices[i : i + SLICES]
        width = sum(s.pool_b.shape[1] for s in some)
        sizes = 1, width, pool_rows // num_slots, num_pairs, num_slots
        dtype = str(out.dtype).removeprefix("torch.")
        made_of = plan_by_rules(*sizes, dtype, backend, len(some), out.shape[0], processors_of(out.device))
        expand = replace(made_of.expand, ahead=False)
        if expand.precision != "ieee":
            expand = replace(expand, precision="own")  # h is no finer than B: nothing to cut into parts
        if width:
            made.append(_expand(out, h[:, i * pool_rows :], True, some, routing, tiles, expand, 1, backend))
    return made


def _expand(
    out: Tensor,
    h: Tensor,
    by_row: bool,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    expand: Expand,
    planes: int,
    backend: str,
) -> Launch:
    """``out += weight * scaling * h B``, of pairs or of rows that have the shrink of every slot."""
    rows, weights, segment_starts, row_starts, row_pairs = routing
    num_rows, num_slots = out.shape[0], slices[0].slot_rank.shape[0]
    max_rank = slices[0].pool_b.shape[0] // num_slots
    widths = [s.pool_b.shape[1] for s in slices]
    tile_programs = tiles.shape[0] * sum(-(-width // (expand.block_n * expand.steps)) for width in widths)
    blocks = sum(-(-width // expand.block_n) for width in widths)
    steps = mix_steps(num_rows, blocks, processors_of(out.device))
    row_programs = 0 if row_starts is None else num_rows * -(-blocks // steps)
    return Launch(
        expand_kernel,
        (tile_programs + row_programs,),
        (
            out,
            h,
            *_each([s.pool_b for s in slices]),
            *_each([s.slot_rank for s in slices]),
            *_each([s.slot_scaling for s in slices]),
            *_each([s.start for s in slices]),
            *_each(widths),
            *_each([s.pool_b.stride(0) for s in slices]),
            rows,
            weights,
            None if row_starts is None else segment_starts,
            row_starts,
            row_pairs,
            tiles,
            tiles.shape[0],
            tile_programs,
            expand.steps,
            steps,
            num_rows,
            num_slots,
            max_rank,
            pitch(h),
            pitch(out),
        ),
        {
            "SLICES": len(slices),
            "BY_ROW": by_row,
            "PLANES": planes,
            "HAS_WEIGHTS": weights is not None,
            "HAS_MIXES": row_starts is not None,
            "ONE_BLOCK": max_rank <= expand.block_r,
            "BLOCK_M": expand.block_m,
            "BLOCK_R": expand.block_r,
            "BLOCK_N": expand.block_n,
            "SLOTS": triton.next_power_of_2(num_slots),
            "PRECISION": expand.precision,
            "FIELDS": TILE_FIELDS,
            "AHEAD": expand.ahead,
        },
        expand.num_warps,
        expand.num_stages,
        # Left alone, ptxas spills a register or two of the larger kernel to reach the next step of occupancy.
        128 if backend == "cuda" and row_starts is not None else None,
        instruction=_instruction(backend),
        ahead=expand.ahead,
    )


def _instruction(backend: str) -> int | None:
    """The same for tiles of 16 rows and of 32, of which Triton would give AMD's larger ones another: a row's bits."""
    return 16 if backend == "hip" else None


def _each(values: list[Any]) -> tuple[Any, ...]:
    """An argument for each slice that there can be."""
    return (*values, *[None] * (SLICES - len(values)))


def multi_lora_(
    out: Tensor,
    x: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    operands: Any,
    ready: Any,
) -> None:
    """The op on tensors of one device; see ``launches``, and ``launch.run`` for the last two."""
    run(slice_launches(out, x, slices, routing, tiles, backend_of_torch()), operands, ready)


def expand_(
    out: Tensor,
    h: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    operands: Any,
    ready: Any,
) -> None:
    """The op on tensors of one device; see ``expand_launches``, and ``launch.run`` for the last two."""
    run(expand_launches(out, h, slices, routing, tiles, backend_of_torch()), operands, ready)


def shrink_(
    h: Tensor,
    x: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    made: Plan,
    operands: Any,
    ready: Any,
) -> None:
    """The first launch of ``multi_lora_`` alone, by ``plan_of``; see ``launch.run`` for the last two."""
    run([shrink_launch(h, x, slices, routing, tiles, backend_of_torch(), made)], operands, ready)


def expand_pairs_(
    out: Tensor,
    h: Tensor,
    slices: Sequence[Slice],
    routing: Sequence[Tensor | None],
    tiles: Tensor,
    made: Plan,
    operands: Any,
    ready: Any,
) -> None:
    """The second launch of ``multi_lora_``, from what ``shrink_`` made by the same plan."""
    expand = _expand(out, h, False, slices, routing, tiles, made.expand, made.shrink.planes, backend_of_torch())
    run([behind(expand)], operands, ready)  # what it follows is a join of two streams


def backend_of_torch() -> str:
    return "hip" if torch.version.hip else "cuda"
