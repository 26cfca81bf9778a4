"""Public ops: documentation, argument checks, the eager fast path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_fuse._cpu import may_bypass as _may_bypass
from lora_fuse._cpu import multi_lora_eager as _multi_lora_eager
from lora_fuse._cpu import sparse_delta_linear_eager as _sparse_delta_linear_eager
from lora_fuse.ops import multi_lora as _op
from lora_fuse.ops import multi_lora_linear as _linear_op  # noqa: F401  registers
from lora_fuse.ops import sparse_delta as _sparse_op
from lora_fuse.ops.eager import autocasts, under_transform
from lora_fuse.ops.lowrank_svd import lowrank_svd
from lora_fuse.ops.lowrank_svds import lowrank_svds
from lora_fuse.ops.operands import Difference, Operator, Sum, SumOfProducts
from lora_fuse.ops.randomized_svd import randomized_svd
from lora_fuse.ops.svd import LowRankSVD
from lora_fuse.ops.topk import magnitude_prune, sparsify, topk_mask

__all__ = [
    "Difference",
    "LowRankSVD",
    "Operator",
    "Sum",
    "SumOfProducts",
    "lowrank_svd",
    "lowrank_svds",
    "magnitude_prune",
    "multi_lora",
    "multi_lora_linear",
    "multi_lora_slices",
    "randomized_svd",
    "sparse_delta_linear",
    "sparsify",
    "topk_mask",
]

_compiling = torch.compiler.is_compiling

if TYPE_CHECKING:
    from lora_fuse.adapters.pool import AdapterPool
    from lora_fuse.adapters.routing import Routing
    from lora_fuse.adapters.sparse_pool import SparsePool


def multi_lora(x: Tensor, pool: AdapterPool, routing: Routing, out: Tensor | None = None) -> Tensor:
    """Apply every row's adapters: ``out[row] += sum over the row's pairs of weight * scaling * B (A x[row])``.

    Sums run in fp32 and are rounded once, into ``out``. A row's result does not depend, bitwise, on the other rows,
    their order or the number of threads; one exception, bf16 with AMX tiles: the last bit may depend on whether the
    row's adapter has 16 rows or more in the batch and on whether any row has several pairs.
    Rows with no pair keep ``out`` bit for bit. Differentiable in ``x`` and ``routing.weights``, not in the pool.

    Args:
        x: ``[..., in_features]`` with ``routing.num_rows`` rows in all; fp32, bf16 or fp16, the pool's dtype
            (any floating dtype off the CPU kernels, by plain torch).
        pool: the layer's slots, ``AdapterPool``.
        routing: ``Routing`` with as many slots as the pool.
        out: ``[..., out_features]``, dtype of ``x``, added to in place (its version is bumped); unit stride in the last
            dimension and one stride between rows; may not share memory with ``x`` or the pool. Zeros if None.
    Returns:
        ``out``, or a new ``[..., out_features]``.
    Raises:
        ValueError: shapes or dtypes disagree, an index is out of range, or ``out`` is given where a gradient is needed
            or under a functorch transform or forward-mode AD.
    Source: S-LoRA, arXiv:2311.03285, and Punica, arXiv:2310.18547, for the shrink / expand formulation.
    """
    if not _compiling():
        y = out
        if y is None and _may_bypass(x, routing.weights):
            y = x.new_zeros((*x.shape[:-1], pool.out_features))
        if y is not None and (y.is_cuda or not routing.padded) and _multi_lora_eager(y, x, pool._buffers, routing):
            return y
    return _dispatch(x, pool, routing, out)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: AdapterPool,
    routing: Routing,
    counters: Tensor | None = None,
) -> Tensor:
    """A linear layer with every row's adapters: ``y = x W^T + bias + sum of weight * scaling * B (A x)``.

    On CUDA, for up to 64 rows in bf16 or fp16, one launch computes all of it, in fp32 with one rounding at the end; a
    row's result does not depend, bitwise, on the other rows, but need not have the bits of ``F.linear``. Elsewhere it
    is ``F.linear`` and ``multi_lora`` in turn. Experimental: the layers that ``attach`` makes do not use it.
    Differentiable in ``x``, ``weight``, ``bias`` and ``routing.weights``, not in the pool.

    Args:
        x: ``[..., in_features]`` with ``routing.num_rows`` rows in all.
        weight: ``[out_features, in_features]``, dtype of ``x``.
        bias: ``[out_features]`` or None.
        pool: the layer's slots, ``AdapterPool``.
        routing: ``Routing`` with as many slots as the pool.
        counters: int32 zeros on the device of ``x``, ``2 + ceil(out_features / 16)`` of them or more, which are zeros
            again afterwards. Calls on one stream can share them, calls that may run at the same time cannot: programs
            would wait for the wrong ones, perhaps for ever. None: made by the call, at the cost of a fill.
    Returns:
        ``[..., out_features]``.
    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    _check_call(x, routing, None)
    if under_transform():
        return linear(x, weight, bias) + multi_lora(x, pool, routing)
    pool_a, pool_b, slot_rank, slot_scaling = pool.tensors
    if autocasts(x) and x.dtype.is_floating_point and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, pool_a, pool_b = (t.to(dtype) for t in (x, weight, pool_a, pool_b))
        bias = None if bias is None else bias.to(dtype)
    lora = (pool_a, pool_b, slot_rank, slot_scaling, *routing.tensors, routing.tiles)
    return torch.ops.lora_fuse.multi_lora_linear(x, weight, bias, *lora, counters)  # type: ignore[no-any-return]


def multi_lora_slices(
    x: Tensor, pools: Sequence[AdapterPool | None], sizes: Sequence[int], routing: Routing, out: Tensor
) -> Tensor:
    """``multi_lora`` of layers that share their input, as q, k and v do, whose outputs lie side by side in ``out``.

    On a GPU the slices share their launches. Each one's result is that of ``multi_lora``, bit for bit.

    Args:
        x: ``[..., in_features]``, as for ``multi_lora``.
        pools: of each slice; None: it has no slots, its columns are left alone.
        sizes: columns of each slice.
        routing: ``Routing`` with as many slots as the pools.
        out: ``[..., sum(sizes)]``, dtype of ``x``, added to in place, see ``multi_lora``.
    Returns:
        ``out``.
    Raises:
        ValueError: as ``multi_lora``; or ``pools`` and ``sizes`` differ in length.
    """
    if len(pools) != len(sizes):
        raise ValueError(f"pools, sizes: have {len(pools)} and {len(sizes)} entries, accepted is one for each slice")
    _check_call(x, routing, out)
    args = (*_op.slices_of(pools, sizes), *routing.tensors, routing.tiles)
    torch.ops.lora_fuse.multi_lora_slices_(out, x, *args)
    return _written(out)


def _refuse_rows(x: Tensor, routing: Routing) -> None:
    if x.dim() == 0:
        raise ValueError("x: expected [..., in_features], got a tensor without dimensions")
    rows = x.shape[:-1].numel()
    if rows != routing.num_rows:
        raise ValueError(f"x: shape {list(x.shape)} has {rows} rows, the routing is for {routing.num_rows}")


def _dispatch(x: Tensor, pool: AdapterPool, routing: Routing, out: Tensor | None) -> Tensor:
    """Through torch's dispatcher: autograd, transforms, modes, tracing, other devices and dtypes."""
    _check_call(x, routing, out)
    pool_a, pool_b, slot_rank, slot_scaling = pool.tensors
    if autocasts(x) and x.dtype.is_floating_point and x.dtype != torch.float64:  # as F.linear
        dtype = torch.get_autocast_dtype(x.device.type)
        x, pool_a, pool_b = x.to(dtype), pool_a.to(dtype), pool_b.to(dtype)
    args = (x, pool_a, pool_b, slot_rank, slot_scaling, *routing.tensors, routing.tiles)
    if out is None:
        return _op.transformable(*args) if under_transform() else torch.ops.lora_fuse.multi_lora(*args)
    torch.ops.lora_fuse.multi_lora_(out, *args)
    return _written(out)


def _written(out: Tensor) -> Tensor:
    """Let autograd know, which an op of a kernel's does not tell by itself."""
    if not _compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _check_call(x: Tensor, routing: Routing, out: Tensor | None) -> None:
    """What holds for every routed op that goes through the dispatcher."""
    if not _compiling():
        _refuse_rows(x, routing)
    if out is not None and under_transform():  # its tangent, its gradient or its batch would be lost
        raise ValueError("out: cannot be given under a functorch transform or forward-mode AD; leave it out")
    if out is not None and out.is_neg():
        raise ValueError("out: is a view whose memory holds the negative (of a conjugate's imaginary part)")
    if out is not None and torch.is_grad_enabled():
        for name, t in (("x", x), ("out", out), ("routing.weights", routing.weights)):
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"out: cannot be given while {name} requires grad; leave it out, or use torch.no_grad()"
                )


def sparse_delta_linear(x: Tensor, pool: SparsePool, routing: Routing, out: Tensor | None = None) -> Tensor:
    """Apply every row's sparse deltas: ``out[row] += sum over the row's pairs of weight * (U x[row] + bias)``.

    Sums run in fp32 and are rounded once, into ``out``. A row's result does not depend, bitwise, on the other rows,
    their order or the number of threads; one exception, on GPUs: the last bits may depend on whether the row's adapter
    has more than 8 rows in the batch. Rows with no pair keep ``out`` bit for bit. Differentiable in ``x`` and
    ``routing.weights``, not in the pool; derivatives run in plain torch.

    An infinity or NaN of ``x`` stays in its row. It meets the entries of its column only; on a GPU, where the adapter
    has more than 8 rows, every output.

    Args:
        x: ``[..., in_features]`` with ``routing.num_rows`` rows in all; fp32, bf16 or fp16, the pool's dtype
            (any floating dtype off the CPU kernels, by plain torch).
        pool: the layer's slots, ``SparsePool``: ``U [out_features, in_features]`` and ``bias`` per slot.
        routing: ``Routing`` with as many slots as the pool.
        out: ``[..., out_features]``, dtype of ``x``, added to in place (its version is bumped); unit stride in the last
            dimension and one stride between rows; may not share memory with ``x``. Zeros if None.
    Returns:
        ``out``, or a new ``[..., out_features]``.
    Raises:
        ValueError: shapes or dtypes disagree, an index is out of range, or ``out`` is given where a gradient is needed
            or under a functorch transform or forward-mode AD.
    Source: PERU-FFT, arXiv:2310.01886: a merged model and the largest entries of each task's residual.
    """
    if not _compiling():
        y, slots = out, pool.slots
        if y is None and slots is not None and _may_bypass(x, routing.weights):
            y = x.new_zeros((*x.shape[:-1], pool.out_features))
        if y is not None and slots is not None and _sparse_delta_linear_eager(y, x, slots, routing):
            return y
    _check_call(x, routing, out)
    if autocasts(x) and x.dtype.is_floating_point and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as F.linear; the pool follows
    elif x.dtype != pool.dtype:
        raise ValueError(f"x: dtype {x.dtype}, the pool holds {pool.dtype}")
    args = (x, pool.handle, pool.out_features, False, True, *routing.tensors, routing.tiles)
    if out is None:
        return _sparse_op.transformable(*args) if under_transform() else torch.ops.lora_fuse.sparse_delta(*args)
    torch.ops.lora_fuse.sparse_delta_(out, *args)
    return _written(out)
