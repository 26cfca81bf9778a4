"""The op ``lora_fuse::expand_``, the second half of ``multi_lora``: schema, fake, plain torch, CUDA. No autograd.

``out[row] += sum over the row's pairs of weight * scaling * h[row, slot's columns] B``, for an ``h`` that holds every
slot's shrink of every row: what a product with the weight brings along if the pool's A rows lie behind the weight's.
Layers that share their input are slices of it: each has columns of ``out``, and of ``h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops.multi_lora import add_slots
from lora_fuse.ops.routed import (
    KERNEL_DTYPES,
    RoutingTensors,
    check_devices,
    check_routing,
    check_vectors,
    rows_overlap,
)

_ROUTING = "Tensor rows, Tensor? weights, Tensor segment_starts, Tensor? row_starts, Tensor? row_pairs"
# pools: pool_b, slot_rank, slot_scaling of each slice; starts: its first column in out
LIBRARY.define(f"expand_(Tensor(a!) out, Tensor h, Tensor[] pools, int[] starts, {_ROUTING}, Tensor? tiles=None) -> ()")

Pool = tuple[Tensor, Tensor, Tensor]


def _slices(
    out: Tensor,
    h: Tensor,
    pools: Sequence[Tensor],
    starts: Sequence[int],
    routing: RoutingTensors,
    tiles: Tensor | None,
) -> list[tuple[Tensor, Tensor, Pool]]:
    """Of each slice: its columns of ``out`` and of ``h``, and its pool; checked as far as that takes no reading."""
    if not starts or len(pools) != 3 * len(starts):
        raise ValueError(f"pools: {len(pools)} tensors for {len(starts)} slices, accepted are three for each")
    num_slots, (num_rows, *_) = pools[1].shape[0], pools[0].shape
    slices, end = [], 0
    for i, start in enumerate(starts):
        pool_b, *_ = pool = tuple(pools[3 * i : 3 * i + 3])
        if h.dtype != out.dtype or h.dtype != pool_b.dtype or not h.dtype.is_floating_point:
            raise ValueError(
                f"h, out, pool_b: dtypes {h.dtype}, {out.dtype} and {pool_b.dtype}, accepted is one floating dtype"
            )
        shapes = [list(t.shape) for t in pool]
        fits = num_slots > 0 and num_rows % num_slots == 0 and shapes[1] == shapes[2] == [num_slots]
        if pool_b.dim() != 2 or pool_b.shape[0] != num_rows or not fits:
            raise ValueError(
                f"pools: slice {i} has shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, accepted are {num_rows} rows, "
                f"and {num_slots} ranks and scalings, of which the rows are a multiple"
            )
        if not end <= start <= out.shape[-1] - pool_b.shape[1]:
            raise ValueError(
                f"starts: slice {i} has columns {start} to {start + pool_b.shape[1]}, accepted are {end} to "
                f"{out.shape[-1]}"
            )
        end = start + pool_b.shape[1]
        slices.append((out[..., start:end], h[..., i * num_rows : (i + 1) * num_rows], pool))
        check_devices(h, {"out": out, "pool_b": pool_b, "routing": routing[0], "tiles": tiles}, "h")
    if h.shape[-1] != len(starts) * num_rows:
        raise ValueError(f"h: has {h.shape[-1]} columns, the pools have {len(starts) * num_rows} rows")
    if h.shape[:-1].numel() != out.shape[:-1].numel():
        raise ValueError(f"h, out: shapes {list(h.shape)} and {list(out.shape)} have different numbers of rows")
    check_routing(routing, num_slots)
    return slices  # type: ignore[return-value]


def _composite_(out: Tensor, h: Tensor, pools: list[Tensor], starts: list[int], *args: Any) -> None:
    routing, tiles = args[:5], args[5] if len(args) > 5 else None
    for part, own, pool in _slices(out, h, pools, starts, routing, tiles):  # type: ignore[arg-type]
        flat = own.reshape(-1, own.shape[-1])

        def shrunk(index: Tensor, used: slice, dtype: torch.dtype, flat: Tensor = flat) -> Tensor:
            return flat[index, used].to(dtype)

        add_slots(part, shrunk, pool, routing, tiles is not None)  # type: ignore[arg-type]


_READY: dict[bytes, Any] = {}  # see ops/multi_lora.py


def _cuda_(out: Tensor, h: Tensor, pools: list[Tensor], starts: list[int], *args: Any) -> None:
    operands = (out, h, *starts, *pools, *args)
    if len(args) == 6 and not (out.is_neg() or h.is_neg()) and _cpu.launch_again(_READY, operands):
        return
    routing, tiles = args[:5], args[5] if len(args) > 5 else None
    slices = _slices(out, h, pools, starts, routing, tiles)  # type: ignore[arg-type]
    if tiles is None or (tiles.shape[0] == 0) != (routing[0].shape[0] == 0) or h.dtype not in KERNEL_DTYPES:
        return _composite_(out, h, pools, starts, *args)
    for _, _, (pool_b, *_) in slices:
        if pool_b.stride(1) != 1 and pool_b.shape[1] > 1:
            raise ValueError(f"pool_b: strides {pool_b.stride()}, accepted is unit stride in the last dimension")
    check_vectors(h, h.shape[:-1].numel(), routing, tiles, [pool[1:] for *_, pool in slices])
    from lora_fuse.kernels.multi_lora import Slice, expand_  # triton, only where there is a device for it

    made = [Slice(pool[0], *pool, start) for (_, _, pool), start in zip(slices, starts, strict=True)]
    expand_(_rows_of("out", out, True), _rows_of("h", h), made, routing, tiles, operands, _READY)


def _rows_of(name: str, t: Tensor, written: bool = False) -> Tensor:
    """``[num_rows, columns]`` of the same memory."""
    try:
        flat = t.view(t.shape[:-1].numel(), t.shape[-1])
    except RuntimeError:
        flat = None
    strided = flat is not None and (flat.stride(1) == 1 or flat.shape[1] < 2)
    if flat is None or not strided or t.is_neg() or (written and rows_overlap(flat)):
        raise ValueError(
            f"{name}: shape {list(t.shape)}, strides {t.stride()}; accepted are unit stride in the last dimension and "
            "one stride between rows"
        )
    return flat


def expand_fresh_(out: Tensor, h: Tensor, *args: Any) -> None:
    """The op without torch's dispatcher: in plain inference, for an ``out`` that nobody has seen.

    Args:
        args: pools, starts, the routing's five tensors, tiles.
    """
    (_cuda_ if h.is_cuda else _composite_)(out, h, *args)


LIBRARY.impl("expand_", _cuda_, "CUDA")
LIBRARY.impl("expand_", _composite_, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::expand_", lambda *args: None, lib=LIBRARY)
