"""The op ``lora_fuse::sparse_delta``: schema, fake, CPU, CUDA, other devices, autograd.

A pool's slots are C++ objects, so the op knows its pool by a number: traces of it are good in this process only.
``transposed`` multiplies by ``U^T`` and ``bias`` says whether the slots' biases join in, which makes derivatives of any
order the same op.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch  # before _cpu: the extension shares the OpenMP runtime that torch loads
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops._library import transformable as _transformable
from lora_fuse.ops.eager import kernel_views
from lora_fuse.ops.routed import KERNEL_DTYPES, RoutingTensors, check_devices, check_vectors, without_padding

if TYPE_CHECKING:
    from lora_fuse.adapters.sparse_pool import SparsePool

_ROUTING = "Tensor rows, Tensor? weights, Tensor segment_starts, Tensor? row_starts, Tensor? row_pairs"
_TILES = "Tensor? tiles=None"  # Routing.tiles: what CUDA kernels go by
_POOL = "int pool, SymInt features, bool transposed, bool bias"  # features: of the result
LIBRARY.define(f"sparse_delta(Tensor x, {_POOL}, {_ROUTING}, {_TILES}) -> Tensor")
LIBRARY.define(f"sparse_delta_(Tensor(a!) out, Tensor x, {_POOL}, {_ROUTING}, {_TILES}) -> ()")

_POOLS: WeakValueDictionary[int, SparsePool] = WeakValueDictionary()
_NUMBERS = itertools.count()


def register_pool(pool: SparsePool) -> int:
    """The number by which the op will know ``pool``, for as long as it lives."""
    number = next(_NUMBERS)
    _POOLS[number] = pool
    return number


def _pool(number: int) -> SparsePool:
    pool = _POOLS.get(number)
    if pool is None:
        raise ValueError(f"pool: {number} is not a SparsePool of this process, or no longer alive")
    return pool


def _cpu_(out: Tensor, x: Tensor, number: int, features: int, transposed: bool, bias: bool, *args: Any) -> None:
    routing = _unpadded(args)
    slots = None if transposed or not bias else _pool(number).slots_as(x.dtype)
    if slots is not None:
        out, x = kernel_views(out, x)
        threads = torch.get_num_threads()
        for t in (x, x.contiguous()):  # the second where x has no [rows, features] view
            if _cpu.sparse_delta_linear(out, t, slots, routing, threads):
                return
    _composite_(out, x, number, features, transposed, bias, *routing)


def _cpu_new(x: Tensor, number: int, features: int, *args: Any) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], features))
    _cpu_(out, x, number, features, *args)
    return out


def _unpadded(args: tuple[Any, ...]) -> RoutingTensors:
    """The routing of an op's arguments; tiles on a device without kernels tell that it is padded."""
    routing: Any = args[:5]
    return without_padding(routing) if len(args) > 5 and args[5] is not None and args[5].shape[0] else routing


_READY: dict[bytes, Any] = {}  # launches that were made before, see kernels.launch


def _cuda_(out: Tensor, x: Tensor, number: int, features: int, transposed: bool, bias: bool, *args: Any) -> None:
    routing, tiles, pool = args[:5], args[5] if len(args) > 5 else None, _pool(number)
    table = None if transposed or not bias or x.dtype not in KERNEL_DTYPES else pool.table_as(x.dtype)
    if table is None or tiles is None or (tiles.shape[0] == 0) != (routing[0].shape[0] == 0) or x.is_neg():
        return _unread_(out, x, number, features, transposed, bias, *routing)
    _check_memory(out, x)
    operands = (out, x, table, *routing, tiles, pool.in_features, pool.out_features)  # the last two by their values
    if _cpu.launch_again(_READY, operands):
        return
    _check_kernel(out, x, pool, routing, tiles)
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, x.shape[-1])
    if flat.stride(1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    from lora_fuse.kernels.sparse_delta import sparse_delta_  # triton, only where there is a device for it

    sparse_delta_(out.view(rows, out.shape[-1]), flat, table, routing, tiles, operands, _READY)


def _cuda_new(x: Tensor, number: int, features: int, *args: Any) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], features))
    _cuda_(out, x, number, features, *args)
    return out


def _check_memory(out: Tensor, x: Tensor) -> None:
    if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and out.numel() and x.numel():
        ends = [t.data_ptr() + t.element_size() * (1 + _last(t)) for t in (out, x)]
        if out.data_ptr() < ends[1] and x.data_ptr() < ends[0]:
            raise ValueError("x, out: share memory")


def _last(t: Tensor) -> int:
    """The offset of the last element."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _check_kernel(out: Tensor, x: Tensor, pool: SparsePool, routing: RoutingTensors, tiles: Tensor) -> None:
    """What the CPU's kernel refuses, in its words, as far as no tensor need be read for it."""
    rows, weights, segment_starts, row_starts, row_pairs = routing
    if x.layout is not torch.strided:
        raise TypeError(f"x: expected a strided tensor, got layout {x.layout}")
    try:
        strides = out.view(out.shape[:-1].numel(), out.shape[-1]).stride() if out.dim() else None
    except RuntimeError:
        strides = None
    if strides is None or (strides[1] != 1 and out.shape[-1] > 1):
        raise ValueError(
            f"out: expected unit stride in the last dimension and one stride between rows, got shape {list(out.shape)}"
        )
    if x.dtype != out.dtype:
        names = [str(t.dtype).removeprefix("torch.") for t in (x, out)]
        raise ValueError(f"x, out: dtypes {names[0]} and {names[1]}, accepted is one for both")
    for name, t, want in (("x", x, pool.in_features), ("out", out, pool.out_features)):
        if t.shape[-1] != want:
            raise ValueError(f"{name}: has {t.shape[-1]} features, the pool has {want}")
    num_rows, num_pairs = x.shape[:-1].numel(), rows.shape[0] if rows.dim() == 1 else 0
    if num_rows != out.shape[:-1].numel():
        raise ValueError(f"x, out: shapes {list(x.shape)} and {list(out.shape)} have different numbers of rows")
    _check_vector("rows", rows, torch.int32, num_pairs)
    _check_vector("segment_starts", segment_starts, torch.int32, pool.num_slots + 1)
    _check_vector("weights", weights, torch.float32, num_pairs)
    if (row_starts is None) != (row_pairs is None):
        raise ValueError("row_starts, row_pairs: give both or neither")
    _check_vector("row_starts", row_starts, torch.int32, num_rows + 1)
    _check_vector("row_pairs", row_pairs, torch.int32, num_pairs)
    check_devices(x, {"out": out, "pool": pool.anchor})
    check_vectors(x, num_rows, routing, tiles)


def _check_vector(name: str, t: Tensor | None, dtype: torch.dtype, length: int) -> None:
    if t is not None and (t.dtype != dtype or t.shape != (length,) or not t.is_contiguous()):
        kind = str(dtype).removeprefix("torch.")
        got = list(t.shape)
        raise ValueError(f"{name}: expected a contiguous {kind} tensor of shape [{length}], got shape {got}")


def _unread_(
    out: Tensor,
    x: Tensor,
    number: int,
    features: int,
    transposed: bool,
    bias: bool,
    rows: Tensor,
    weights: Tensor | None,
    segment_starts: Tensor,
    row_starts: Tensor | None,
    row_pairs: Tensor | None,
) -> None:
    """As ``_composite_``, without waiting for a device: every slot multiplies every row, rows take what is theirs."""
    pool = _pool(number)
    sizes = (pool.out_features, pool.in_features) if transposed else (pool.in_features, pool.out_features)
    _check_shapes(out, x, sizes, rows, weights)
    if segment_starts.shape != (pool.num_slots + 1,):
        raise ValueError(
            f"segment_starts: must be {pool.num_slots + 1} numbers that rise from 0 to {rows.shape[0]}, the pairs"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, x.shape[-1])
    num_rows = flat.shape[0]
    slots = torch.searchsorted(segment_starts[1:], torch.arange(rows.shape[0], device=x.device), right=True)
    at = torch.where(slots < pool.num_slots, rows.long(), num_rows), slots  # of padding: a row to throw away
    present = torch.zeros(num_rows + 1, pool.num_slots + 1, dtype=torch.bool, device=x.device)
    present[at] = True
    shares = present.to(dtype)
    if weights is not None:
        shares[at] = weights.to(dtype)
    total = torch.zeros(num_rows, sizes[1], dtype=dtype, device=x.device)
    touched = torch.zeros(num_rows, 1, dtype=torch.bool, device=x.device)
    for slot, packed in enumerate(pool.packed):
        if packed is None:
            continue
        delta = pool.dense(slot, x.dtype)
        part = torch.zeros_like(total)
        if delta is not None:
            part = flat.to(dtype) @ (delta if transposed else delta.t()).to(dtype)
        if bias and packed.bias is not None:
            part += packed.bias
        here = present[:num_rows, slot, None]
        total += torch.where(here, part * shares[:num_rows, slot, None], 0.0)
        touched |= here
    sums = (out.to(dtype) + total.view(out.shape)).to(out.dtype)
    out.copy_(torch.where(touched.view(*out.shape[:-1], 1), sums, out))  # rows without a pair keep their bits


def _composite_(
    out: Tensor,
    x: Tensor,
    number: int,
    features: int,
    transposed: bool,
    bias: bool,
    rows: Tensor,
    weights: Tensor | None,
    segment_starts: Tensor,
    row_starts: Tensor | None,
    row_pairs: Tensor | None,
    tiles: Tensor | None = None,
) -> None:
    """Plain torch, a dense matrix per slot in use: derivatives, and devices and dtypes that have no kernel."""
    pool, routing = _pool(number), (rows, weights, segment_starts, row_starts, row_pairs)
    rows, weights, segment_starts, *_ = _unpadded((*routing, tiles))
    starts = segment_starts.tolist()
    sizes = (pool.out_features, pool.in_features) if transposed else (pool.in_features, pool.out_features)
    _check(out, x, sizes, pool.num_slots, rows, weights, starts)
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, x.shape[-1])
    total = torch.zeros(flat.shape[0], sizes[1], dtype=dtype, device=x.device)
    for slot, packed in enumerate(pool.packed):
        index = rows[starts[slot] : starts[slot + 1]].long()
        if packed is None or index.shape[0] == 0:
            continue
        delta = pool.dense(slot, x.dtype)
        part = torch.zeros(index.shape[0], sizes[1], dtype=dtype, device=x.device)
        if delta is not None:
            delta = delta.to(dtype)
            part = flat[index].to(dtype) @ (delta if transposed else delta.t())
        if bias and packed.bias is not None:
            part += packed.bias
        if weights is not None:
            part *= weights[starts[slot] : starts[slot + 1], None]
        total.index_add_(0, index, part)
    touched = torch.zeros(flat.shape[0], dtype=torch.bool, device=x.device)
    touched[rows.long()] = True
    view = out.view(-1, sizes[1]) if out.is_contiguous() else None
    if view is not None:  # rows without a pair keep their bits
        view[touched] = (view[touched].to(dtype) + total[touched]).to(out.dtype)
    else:
        sums = (out.to(dtype) + total.view(out.shape)).to(out.dtype)
        out.copy_(torch.where(touched.view(*out.shape[:-1], 1), sums, out))


def _check(
    out: Tensor,
    x: Tensor,
    sizes: tuple[int, int],
    num_slots: int,
    rows: Tensor,
    weights: Tensor | None,
    starts: list[int],
) -> None:
    """What the kernel checks in C++, for those who have none; indexing checks the values of ``rows``."""
    _check_shapes(out, x, sizes, rows, weights)
    num_pairs = rows.shape[0]
    if len(starts) != num_slots + 1 or [starts[0], starts[-1]] != [0, num_pairs] or sorted(starts) != starts:
        raise ValueError(f"segment_starts: must be {num_slots + 1} numbers that rise from 0 to {num_pairs}, the pairs")
    num_rows = x.shape[:-1].numel()
    if num_pairs and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise ValueError(f"rows: values {int(rows.min())} to {int(rows.max())}, accepted are 0 to {num_rows - 1}")


def _check_shapes(out: Tensor, x: Tensor, sizes: tuple[int, int], rows: Tensor, weights: Tensor | None) -> None:
    if x.layout is not torch.strided:
        raise TypeError(f"x: expected a strided tensor, got layout {x.layout}")
    if not (x.dtype.is_floating_point or x.dtype.is_complex) or x.dtype != out.dtype:
        raise ValueError(f"x, out: dtypes {x.dtype} and {out.dtype}, accepted is one floating dtype for both")
    if (x.shape[-1], out.shape[-1]) != sizes:
        raise ValueError(
            f"x, out: have {x.shape[-1]} and {out.shape[-1]} features, the pool has {sizes[0]}, {sizes[1]}"
        )
    if x.shape[:-1].numel() != out.shape[:-1].numel():
        raise ValueError(f"x, out: shapes {list(x.shape)} and {list(out.shape)} have different numbers of rows")
    if rows.dim() != 1 or (weights is not None and weights.shape != rows.shape):
        raise ValueError("rows, weights: accepted is one entry for each pair")


def _composite(x: Tensor, number: int, features: int, *args: Any) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], features))
    _composite_(out, x, number, features, *args)
    return out


def _fake(x: Tensor, number: int, features: int, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


LIBRARY.impl("sparse_delta", _cpu_new, "CPU")
LIBRARY.impl("sparse_delta_", _cpu_, "CPU")
LIBRARY.impl("sparse_delta", _cuda_new, "CUDA")
LIBRARY.impl("sparse_delta_", _cuda_, "CUDA")
LIBRARY.impl("sparse_delta", _composite, "CompositeExplicitAutograd")
LIBRARY.impl("sparse_delta_", _composite_, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::sparse_delta", _fake, lib=LIBRARY)
torch.library.register_fake("lora_fuse::sparse_delta_", lambda *args: None, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
    x, ctx.pool, ctx.features, ctx.transposed, ctx.bias, *routing = inputs
    ctx.save_for_backward(x, *routing)
    return x, *routing


def _backward(ctx: Any, grad: Tensor, op: Callable[..., Tensor] | None = None) -> tuple[Any, ...]:
    op = op or torch.ops.lora_fuse.sparse_delta
    x, rows, weights, segment_starts, row_starts, row_pairs, tiles = ctx.saved_tensors
    grad_x = grad_weights = None
    if ctx.needs_input_grad[0]:
        routing = (rows, weights, segment_starts, row_starts, row_pairs, tiles)
        grad_x = op(grad, ctx.pool, x.shape[-1], not ctx.transposed, False, *routing)
    if weights is not None and ctx.needs_input_grad[6]:  # <the pair's own result, grad of its row>
        own = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        of_pairs = x.reshape(-1, x.shape[-1])[rows.long()]
        h = op(
            of_pairs, ctx.pool, grad.shape[-1], ctx.transposed, ctx.bias, own, None, segment_starts, None, None, tiles
        )
        grad_of_pairs = grad.reshape(-1, grad.shape[-1])[rows.long()]
        dtype = torch.promote_types(x.dtype, torch.float32)
        grad_weights = (h.to(dtype) * grad_of_pairs.to(dtype)).sum(-1).to(weights.dtype)
    return grad_x, None, None, None, None, None, grad_weights, None, None, None, None


torch.library.register_autograd("lora_fuse::sparse_delta", _backward, setup_context=_setup_context, lib=LIBRARY)


def _jvp(ctx: Any, x_tangent: Tensor | None, *tangents: Any) -> Tensor:  # affine in x, linear in the weights
    x, rows, weights, *rest = ctx.saved_tensors
    op, pool = torch.ops.lora_fuse.sparse_delta, (ctx.pool, ctx.features, ctx.transposed)
    parts = [] if x_tangent is None else [op(x_tangent, *pool, False, rows, weights, *rest)]
    if tangents[5] is not None:
        parts.append(op(x, *pool, ctx.bias, rows, tangents[5], *rest))
    return sum(parts[1:], parts[0])


transformable = _transformable(torch.ops.lora_fuse.sparse_delta, _setup_context, _backward, _jvp)
