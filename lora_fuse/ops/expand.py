"""The op ``lora_fuse::expand_``, the second half of ``multi_lora``: schema, fake, plain torch, CUDA. No autograd.

``out[row] += sum over the row's pairs of weight * scaling * h[row, slot's columns] B``, for an ``h`` that holds every
slot's shrink of every row: what a product with the weight brings along if the pool's A rows lie behind the weight's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops.multi_lora import KERNEL_DTYPES, RoutingTensors, add_slots, check_devices, check_routing

_ROUTING = "Tensor rows, Tensor? weights, Tensor segment_starts, Tensor? row_starts, Tensor? row_pairs"
LIBRARY.define(
    "expand_(Tensor(a!) out, Tensor h, Tensor pool_b, Tensor slot_rank, Tensor slot_scaling, "
    f"{_ROUTING}, Tensor? tiles=None) -> ()"
)


def _check(
    out: Tensor, h: Tensor, pool: tuple[Tensor, Tensor, Tensor], routing: RoutingTensors, tiles: Tensor | None
) -> None:
    """What can be checked without reading a tensor."""
    pool_b, slot_rank, slot_scaling = pool
    num_slots = slot_rank.shape[0]
    if h.dtype != out.dtype or h.dtype != pool_b.dtype or not h.dtype.is_floating_point:
        raise ValueError(
            f"h, out, pool_b: dtypes {h.dtype}, {out.dtype} and {pool_b.dtype}, accepted is one floating dtype for all"
        )
    if pool_b.dim() != 2 or num_slots == 0 or pool_b.shape[0] % num_slots or slot_scaling.shape != slot_rank.shape:
        shapes = f"{list(pool_b.shape)}, {list(slot_rank.shape)} and {list(slot_scaling.shape)}"
        raise ValueError(f"pool_b, slot_rank, slot_scaling: shapes {shapes}, accepted are equally many rows a slot")
    if h.shape[-1] != pool_b.shape[0] or out.shape[-1] != pool_b.shape[1]:
        sizes = f"{h.shape[-1]} and {out.shape[-1]}"
        raise ValueError(f"h, out: have {sizes} columns, the pool has {pool_b.shape[0]} and {pool_b.shape[1]}")
    if h.shape[:-1].numel() != out.shape[:-1].numel():
        raise ValueError(f"h, out: shapes {list(h.shape)} and {list(out.shape)} have different numbers of rows")
    check_routing(routing, num_slots)
    check_devices(h, {"out": out, "pool_b": pool_b, "routing": routing[0], "tiles": tiles}, "h")


def _split(args: tuple[Any, ...]) -> tuple[Any, Any, Tensor | None]:
    return args[:3], args[3:8], args[8] if len(args) > 8 else None


def _composite_(out: Tensor, h: Tensor, *args: Any) -> None:
    pool, routing, tiles = _split(args)
    _check(out, h, pool, routing, tiles)
    flat = h.reshape(-1, h.shape[-1])
    add_slots(out, lambda index, used, dtype: flat[index, used].to(dtype), pool, routing, tiles is not None)


_READY: dict[bytes, Any] = {}  # see ops/multi_lora.py


def _cuda_(out: Tensor, h: Tensor, *args: Any) -> None:
    operands = (out, h, *args)
    if len(args) == 9 and not (out.is_neg() or h.is_neg()) and _cpu.launch_again(_READY, operands):
        return
    pool, routing, tiles = _split(args)
    _check(out, h, pool, routing, tiles)
    if tiles is None or (tiles.shape[0] == 0) != (routing[0].shape[0] == 0) or h.dtype not in KERNEL_DTYPES:
        return _composite_(out, h, *args)
    if pool[0].stride(1) != 1 and pool[0].shape[1] > 1:
        raise ValueError(f"pool_b: strides {pool[0].stride()}, accepted is unit stride in the last dimension")
    from lora_fuse.kernels.multi_lora import expand_  # triton, only where there is a device for it

    expand_(_rows_of("out", out), _rows_of("h", h), pool, routing, tiles, operands, _READY)


def _rows_of(name: str, t: Tensor) -> Tensor:
    """``[num_rows, columns]`` of the same memory."""
    try:
        flat = t.view(t.shape[:-1].numel(), t.shape[-1])
    except RuntimeError:
        flat = None
    if flat is None or t.is_neg() or (flat.stride(1) != 1 and flat.shape[1] > 1):
        raise ValueError(
            f"{name}: shape {list(t.shape)}, strides {t.stride()}; accepted are unit stride in the last dimension and "
            "one stride between rows"
        )
    return flat


def expand_fresh_(out: Tensor, h: Tensor, *args: Any) -> None:
    """The op without torch's dispatcher: in plain inference, for an ``out`` that nobody has seen.

    Args:
        args: pool_b, slot_rank, slot_scaling, the routing's five tensors, tiles.
    """
    (_cuda_ if h.is_cuda else _composite_)(out, h, *args)


LIBRARY.impl("expand_", _cuda_, "CUDA")
LIBRARY.impl("expand_", _composite_, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::expand_", lambda *args: None, lib=LIBRARY)
