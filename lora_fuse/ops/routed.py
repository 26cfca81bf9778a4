"""What ops over a pool and a routing take, and how that is checked without reading a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PoolTensors = tuple[Tensor, Tensor, Tensor, Tensor]
RoutingTensors = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_padding(routing: RoutingTensors) -> RoutingTensors:
    """The pairs that are there, of a routing of fixed size (``Routing.padded``), which has tiles on every device.

    Tensors of a routing without padding come back as they are.
    """
    rows, weights, segment_starts, row_starts, row_pairs = routing
    live = int(segment_starts[-1]) if segment_starts.shape[0] else 0
    if not 0 <= live < rows.shape[0]:
        return routing
    cut = (None if t is None else t[:live] for t in (weights, row_pairs))
    weights, row_pairs = cut
    return rows[:live], weights, segment_starts, row_starts, row_pairs


def check_shapes(
    out: Tensor, x: Tensor, pool: PoolTensors, routing: RoutingTensors, tiles: Tensor | None = None
) -> None:
    """What can be checked without reading a tensor."""
    pool_a, pool_b, slot_rank, slot_scaling = pool
    num_slots = slot_rank.shape[0]
    if x.layout is not torch.strided:
        raise TypeError(f"x: expected a strided tensor, got layout {x.layout}")
    if not (x.dtype.is_floating_point or x.dtype.is_complex) or x.dtype != out.dtype:
        raise ValueError(f"x, out: dtypes {x.dtype} and {out.dtype}, accepted is one floating dtype for both")
    if pool_a.dim() != 2 or pool_b.dim() != 2 or pool_a.shape[0] != pool_b.shape[0]:
        shapes = f"{list(pool_a.shape)} and {list(pool_b.shape)}"
        raise ValueError(f"pool_a, pool_b: shapes {shapes}, accepted are two dimensions and the same number of rows")
    if num_slots == 0 or pool_a.shape[0] % num_slots or slot_scaling.shape != slot_rank.shape:
        raise ValueError(f"pool_a: {pool_a.shape[0]} rows, {num_slots} ranks and {slot_scaling.shape[0]} scalings")
    if x.shape[-1] != pool_a.shape[1] or out.shape[-1] != pool_b.shape[1]:
        sizes = f"{x.shape[-1]} and {out.shape[-1]}"
        raise ValueError(f"x, out: have {sizes} features, the pool has {pool_a.shape[1]} and {pool_b.shape[1]}")
    if x.shape[:-1].numel() != out.shape[:-1].numel():
        raise ValueError(f"x, out: shapes {list(x.shape)} and {list(out.shape)} have different numbers of rows")
    check_routing(routing, num_slots)
    check_devices(x, {"out": out, "pool_a": pool_a, "pool_b": pool_b, "routing": routing[0], "tiles": tiles})


def check_routing(routing: RoutingTensors, num_slots: int) -> None:
    """Shapes of a routing for pools of so many slots."""
    rows, weights, segment_starts, *_ = routing
    if rows.dim() != 1 or (weights is not None and weights.shape != rows.shape):
        raise ValueError("rows, weights: accepted is one entry for each pair")
    if segment_starts.shape != (num_slots + 1,):
        got = list(segment_starts.shape)
        raise ValueError(
            f"segment_starts: must be {num_slots + 1} numbers that rise from 0 to {rows.shape[0]}, the pairs; "
            f"got shape {got}"
        )


def check_vectors(
    x: Tensor,
    num_rows: int,
    routing: RoutingTensors,
    tiles: Tensor,
    of_slots: Sequence[tuple[Tensor, ...]] = (),
) -> None:
    """What kernels read without asking how it lies.

    Args:
        x: says which device it has to be.
        num_rows: of x.
        of_slots: ``(slot_rank, slot_scaling)`` of each pool.
    """
    rows, _, _, row_starts, row_pairs = routing
    names = ("rows", "weights", "segment_starts", "row_starts", "row_pairs")
    vectors: list[tuple[str, Tensor | None]] = [*zip(names, routing, strict=True), ("tiles", tiles)]
    vectors += [pair for slots in of_slots for pair in zip(("slot_rank", "slot_scaling"), slots, strict=True)]
    for name, t in vectors:
        if t is not None:
            if t.device != x.device:
                raise ValueError(f"{name}: is on {t.device}, x is on {x.device}; accepted is one device for all")
            if not t.is_contiguous():
                raise ValueError(f"{name}: strides {t.stride()}, accepted is a contiguous tensor")
    if row_starts is not None and (row_pairs is None or row_pairs.shape != rows.shape):
        raise ValueError("row_pairs: accepted is one entry for each pair")
    if row_starts is not None and row_starts.shape != (num_rows + 1,):
        raise ValueError(
            f"row_starts: {list(row_starts.shape)} entries, accepted are {num_rows + 1}, one more than rows"
        )


def check_devices(x: Tensor, others: Mapping[str, Tensor | None], name_of_x: str = "x") -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: is on {t.device}, {name_of_x} is on {x.device}; accepted is one device for all")


def check_values(num_pairs: int, max_rank: int, starts: list[int], ranks: list[int]) -> None:
    if not all(0 <= rank <= max_rank for rank in ranks):
        raise ValueError(f"slot_rank: got {ranks}, accepted are 0 to {max_rank}")
    if [starts[0], starts[-1]] != [0, num_pairs] or sorted(starts) != starts:
        raise ValueError(f"segment_starts: must be {len(starts)} numbers that rise from 0 to {num_pairs}, the pairs")


def rows_overlap(y: Tensor) -> bool:
    """Whether rows of ``y [rows, columns]`` lie in each other's memory, as those of an expanded tensor do."""
    return y.shape[0] > 1 and y.stride(0) < y.shape[1]
