"""The op ``lora_fuse::multi_lora``: schema, fake, CPU, other devices, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch  # before _cpu: the extension shares the OpenMP runtime that torch loads
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops._library import transformable as _transformable
from lora_fuse.ops.eager import kernel_views
from lora_fuse.ops.routed import (
    KERNEL_DTYPES,
    PoolTensors,
    RoutingTensors,
    check_shapes,
    check_values,
    check_vectors,
    rows_overlap,
    without_padding,
)

_POOL = "Tensor pool_a, Tensor pool_b, Tensor slot_rank, Tensor slot_scaling"
_ROUTING = "Tensor rows, Tensor? weights, Tensor segment_starts, Tensor? row_starts, Tensor? row_pairs"
_TILES = "Tensor? tiles=None"  # Routing.tiles: what CUDA kernels go by
LIBRARY.define(f"multi_lora(Tensor x, {_POOL}, {_ROUTING}, {_TILES}) -> Tensor")
LIBRARY.define(f"multi_lora_(Tensor(a!) out, Tensor x, {_POOL}, {_ROUTING}, {_TILES}) -> ()")
# pools: of each slice, the four tensors; starts: its first column in out
LIBRARY.define(
    f"multi_lora_slices_(Tensor(a!) out, Tensor x, Tensor[] pools, int[] starts, {_ROUTING}, {_TILES}) -> ()"
)


def _cpu_(out: Tensor, x: Tensor, *args: Any) -> None:
    pool, routing = args[:4], args[4:9]
    if len(args) > 9 and args[9] is not None and args[9].shape[0]:
        routing = without_padding(routing)
    out, x = kernel_views(out, x)
    threads = torch.get_num_threads()
    if _cpu.multi_lora(out, x, pool, routing, threads):
        return
    if x.dtype in KERNEL_DTYPES:  # no [rows, features] view of it exists
        _cpu.multi_lora(out, x.contiguous(), pool, routing, threads)
    else:
        _composite_(out, x, *args)


def _cpu_new(x: Tensor, *args: Any) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], args[1].shape[1]))
    _cpu_(out, x, *args)
    return out


_READY: dict[bytes, Any] = {}  # launches that were made before, see kernels.launch; all checks were passed then
_READY_SLICES: dict[bytes, Any] = {}
_cpu.set_ready_launches(_READY, _READY_SLICES)


def _cuda_(out: Tensor, x: Tensor, *args: Any) -> None:
    operands = (out, x, *args)
    if len(args) == 10 and not x.is_neg() and _cpu.launch_again(_READY, operands):
        return
    pool, routing, tiles = args[:4], args[4:9], args[9] if len(args) > 9 else None
    check_shapes(out, x, pool, routing, tiles)
    if not _launch(out, x, [(pool, 0)], routing, tiles, operands, _READY):
        _composite_(out, x, *args)


def _cuda_slices_(out: Tensor, x: Tensor, pools: list[Tensor], starts: list[int], *args: Any) -> None:
    operands = (out, x, *starts, *pools, *args)
    if len(args) == 6 and not x.is_neg() and _cpu.launch_again(_READY_SLICES, operands):
        return
    routing, tiles = args[:5], args[5] if len(args) > 5 else None
    slices = _slices(out, pools, starts)
    for part, pool in slices:
        check_shapes(part, x, pool, routing, tiles)
    placed = [(pool, start) for (_, pool), start in zip(slices, starts, strict=True)]
    if not _launch(out, x, placed, routing, tiles, operands, _READY_SLICES):
        _each_slice(_composite_, out, x, pools, starts, *args)


def _launch(
    out: Tensor,
    x: Tensor,
    slices: Sequence[tuple[PoolTensors, int]],
    routing: RoutingTensors,
    tiles: Tensor | None,
    operands: tuple[Tensor | int | None, ...],
    ready: dict[bytes, Any],
) -> bool:
    """Run the kernels for pools and the columns of ``out`` that they begin at; False if there are none for these."""
    dtypes = {x.dtype, *(t.dtype for pool, _ in slices for t in pool[:2])}
    if tiles is None or (tiles.shape[0] == 0) != (routing[0].shape[0] == 0) or len(dtypes) > 1:
        return False
    if x.dtype not in KERNEL_DTYPES or x.is_neg():
        return False
    for pool, _ in slices:
        for name, t in (("pool_a", pool[0]), ("pool_b", pool[1])):
            if t.stride(1) != 1 and t.shape[1] > 1:
                raise ValueError(f"{name}: strides {t.stride()}, accepted is unit stride in the last dimension")
    rows, features = x.shape[:-1].numel(), x.shape[-1]
    check_vectors(x, rows, routing, tiles, [pool[2:] for pool, _ in slices])
    try:
        y = out.view(rows, out.shape[-1])
    except RuntimeError:
        y = None
    if y is None or (y.stride(1) != 1 and y.shape[1] > 1) or rows_overlap(y):
        raise ValueError(
            f"out: shape {list(out.shape)}, strides {out.stride()}; accepted are unit stride in the last dimension and "
            "one stride between rows"
        )
    flat = x.reshape(rows, features)
    if flat.stride(1) != 1 and features > 1:
        flat = flat.contiguous()
    from lora_fuse.kernels.multi_lora import Slice, multi_lora_  # triton, only where there is a device for it

    multi_lora_(y, flat, [Slice(*pool, start) for pool, start in slices], routing, tiles, operands, ready)
    return True


def _slices(out: Tensor, pools: list[Tensor], starts: list[int]) -> list[tuple[Tensor, PoolTensors]]:
    """Each slice's columns of ``out``, and its pool."""
    if len(pools) != 4 * len(starts):
        raise ValueError(f"pools: {len(pools)} tensors for {len(starts)} slices, accepted are four for each")
    slices, end = [], 0
    for i, start in enumerate(starts):
        pool_a, pool_b, slot_rank, slot_scaling = pools[4 * i : 4 * i + 4]
        width = pool_b.shape[-1]
        if not end <= start <= out.shape[-1] - width:
            raise ValueError(
                f"starts: slice {i} has columns {start} to {start + width}, accepted are {end} to {out.shape[-1]}"
            )
        end = start + width
        slices.append((out[..., start:end], (pool_a, pool_b, slot_rank, slot_scaling)))
    return slices


def slices_of(pools: Sequence[Any], sizes: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """``(pools, starts)`` as the op takes them, of ``AdapterPool`` or None for each slice, and its columns."""
    tensors: list[Tensor] = []
    starts, start = [], 0
    for pool, size in zip(pools, sizes, strict=True):
        if pool is not None:
            tensors += pool.tensors
            starts.append(start)
        start += size
    return tensors, starts


def slices_fresh_(out: Tensor, x: Tensor, pools: list[Tensor], starts: list[int], *args: Any) -> None:
    """The op ``multi_lora_slices_`` without torch's dispatcher: in plain inference, for an ``out`` that nobody has
    seen."""
    if x.is_cuda:
        _cuda_slices_(out, x, pools, starts, *args)
    else:
        _each_slice(_cpu_ if x.device.type == "cpu" else _composite_, out, x, pools, starts, *args)


def _each_slice(
    op: Callable[..., None], out: Tensor, x: Tensor, pools: list[Tensor], starts: list[int], *args: Any
) -> None:
    for part, pool in _slices(out, pools, starts):
        op(part, x, *pool, *args)


def _cuda_new(x: Tensor, *args: Any) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], args[1].shape[1]))
    _cuda_(out, x, *args)
    return out


def build_tiles(rows: Tensor, segment_starts: Tensor, out: Tensor | None = None) -> Tensor | None:
    """The tile list of a routing on a GPU, ``kernels.routing.build_tiles``; None where there is no Triton."""
    try:
        from lora_fuse.kernels import routing
    except ImportError:
        return None
    return routing.build_tiles(rows, segment_starts, out)


def sort_slots(slots: Tensor, num_slots: int, flag: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """``(rows, segment_starts)`` of one slot per row on a GPU, with one wait for their number.

    With a ``flag`` there is no wait: a slot out of range raises it, and ``rows`` has an entry for every row, of which
    the first ``segment_starts[-1]`` are there. None where plain torch has to do it: there is no Triton, or a slot is
    out of range, which torch's way names.
    """
    try:
        from lora_fuse.kernels import routing
    except ImportError:
        return None
    narrow = slots.long().clamp(-2, num_slots).int()  # out of range stays out of range
    if flag is not None:
        return routing.sort_slots(narrow, num_slots, flag)
    flag = torch.zeros(1, dtype=torch.int32, device=slots.device)
    rows, starts = routing.sort_slots(narrow, num_slots, flag)
    num_pairs, wrong = torch.cat([starts[-1:], flag]).tolist()
    return None if wrong else (rows[:num_pairs], starts)


def _composite_(
    out: Tensor,
    x: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    slot_rank: Tensor,
    slot_scaling: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    segment_starts: Tensor,
    row_starts: Tensor | None,
    row_pairs: Tensor | None,
    tiles: Tensor | None = None,
) -> None:
    """Plain torch, a loop over slots: the path of devices and dtypes that have no kernel. fp32 sums, one rounding."""
    pool, routing = (pool_a, pool_b, slot_rank, slot_scaling), (rows, weights, segment_starts, row_starts, row_pairs)
    check_shapes(out, x, pool, routing)
    flat = x.reshape(-1, x.shape[-1])

    def shrink(index: Tensor, used: slice, dtype: torch.dtype) -> Tensor:
        return flat[index].to(dtype) @ pool_a[used].to(dtype).t()

    add_slots(out, shrink, pool[1:], routing, tiles is not None)


def add_slots(
    out: Tensor,
    shrink: Callable[[Tensor, slice, torch.dtype], Tensor],
    pool: tuple[Tensor, Tensor, Tensor],
    routing: RoutingTensors,
    padded: bool,
) -> None:
    """``out[row] += weight * scaling * h B`` in plain torch, slot by slot: fp32 sums, one rounding.

    Args:
        shrink: ``(rows [n], the slot's rows in the pool, dtype) -> h [n, rank]``.
        pool: ``(pool_b, slot_rank, slot_scaling)``.
        padded: whether the routing may have padding.
    """
    pool_b, slot_rank, slot_scaling = pool
    rows, weights, segment_starts, *_ = without_padding(routing) if padded else routing
    starts, ranks = segment_starts.tolist(), slot_rank.tolist()
    max_rank = pool_b.shape[0] // slot_rank.shape[0]
    check_values(rows.shape[0], max_rank, starts, ranks)
    dtype = torch.promote_types(out.dtype, torch.float32)
    total = torch.zeros(out.shape[:-1].numel(), pool_b.shape[1], dtype=dtype, device=out.device)
    for slot, rank in enumerate(ranks):
        pairs = slice(starts[slot], starts[slot + 1])
        if pairs.start == pairs.stop or rank == 0:
            continue
        used = slice(slot * max_rank, slot * max_rank + rank)
        index = rows[pairs].long()
        h = shrink(index, used, dtype) * slot_scaling[slot].to(dtype)  # [pairs, rank]
        if weights is not None:
            h = h * weights[pairs, None].to(dtype)
        total.index_add_(0, index, h @ pool_b[used].to(dtype))
    out.copy_((out.to(dtype) + total.view(out.shape)).to(out.dtype))


def _composite(x: Tensor, *args: Any) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], args[1].shape[1]))
    _composite_(out, x, *args)
    return out


def _fake(x: Tensor, pool_a: Tensor, pool_b: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], pool_b.shape[1]))


LIBRARY.impl("multi_lora", _cpu_new, "CPU")
LIBRARY.impl("multi_lora_", _cpu_, "CPU")
LIBRARY.impl("multi_lora", _cuda_new, "CUDA")
LIBRARY.impl("multi_lora_", _cuda_, "CUDA")
LIBRARY.impl("multi_lora_slices_", _cuda_slices_, "CUDA")
LIBRARY.impl("multi_lora_slices_", partial(_each_slice, _cpu_), "CPU")
LIBRARY.impl("multi_lora_slices_", partial(_each_slice, _composite_), "CompositeExplicitAutograd")
LIBRARY.impl("multi_lora", _composite, "CompositeExplicitAutograd")
LIBRARY.impl("multi_lora_", _composite_, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::multi_lora", _fake, lib=LIBRARY)
torch.library.register_fake("lora_fuse::multi_lora_", lambda *args: None, lib=LIBRARY)
torch.library.register_fake("lora_fuse::multi_lora_slices_", lambda *args: None, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
    ctx.save_for_backward(*inputs)
    return inputs


def _backward(ctx: Any, grad: Tensor, op: Callable[..., Tensor] | None = None) -> tuple[Any, ...]:
    x, pool_a, pool_b, slot_rank, slot_scaling, rows, weights, segment_starts, *rest = ctx.saved_tensors
    routing = (rows, weights, segment_starts, *rest)
    grad_x = grad_weights = None
    if ctx.needs_input_grad[0]:  # the same op with A and B in each other's places
        op = op or torch.ops.lora_fuse.multi_lora
        grad_x = op(grad, pool_b, pool_a, slot_rank, slot_scaling, *routing)
    if weights is not None and ctx.needs_input_grad[6]:
        grad_weights = _weights_grad(
            x.reshape(-1, x.shape[-1]),
            grad.reshape(-1, grad.shape[-1]),
            pool_a,
            pool_b,
            slot_rank,
            slot_scaling,
            rows,
            segment_starts,
        ).to(weights.dtype)
    return grad_x, None, None, None, None, None, grad_weights, None, None, None, None


def _weights_grad(
    x: Tensor,
    grad: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    slot_rank: Tensor,
    slot_scaling: Tensor,
    rows: Tensor,
    segment_starts: Tensor,
) -> Tensor:
    """``d/dw[p] = scaling * <A x, B^T grad>`` of the pair's row and slot; ``[num_pairs]``, no host sync."""
    num_slots = slot_rank.shape[0]
    max_rank = pool_a.shape[0] // max(num_slots, 1)
    pair = torch.arange(rows.shape[0], device=rows.device)
    slots = torch.searchsorted(segment_starts[1:].contiguous(), pair, right=True).clamp_max(num_slots - 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.to(dtype) @ pool_a.to(dtype).t()  # [rows, slots * max_rank]
    g = grad.to(dtype) @ pool_b.to(dtype).t()
    live = torch.arange(max_rank, device=rows.device)[None] < slot_rank[:, None]  # [slots, max_rank]
    dots = torch.where(live, (h * g).view(-1, num_slots, max_rank), 0.0).sum(-1) * slot_scaling  # [rows, slots]
    return dots[rows.long(), slots]


torch.library.register_autograd("lora_fuse::multi_lora", _backward, setup_context=_setup_context, lib=LIBRARY)


def _jvp(ctx: Any, x_tangent: Tensor | None, *tangents: Any) -> Tensor:  # linear in x and in the weights
    x, *pool_and_routing = ctx.saved_tensors
    parts = [] if x_tangent is None else [torch.ops.lora_fuse.multi_lora(x_tangent, *pool_and_routing)]
    if tangents[5] is not None:
        changed = [*pool_and_routing[:5], tangents[5], *pool_and_routing[6:]]
        parts.append(torch.ops.lora_fuse.multi_lora(x, *changed))
    return sum(parts[1:], parts[0])


transformable = _transformable(torch.ops.lora_fuse.multi_lora, _setup_context, _backward, _jvp)
