"""Exact selection by magnitude: masks, pruned tensors and compact sparse matrices.

The ops ``lora_fuse::topk_mask`` and ``lora_fuse::magnitude_prune`` are there for tracing and autograd; plain eager
calls, and lists, go to ``Call`` directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops.eager import under_transform
from lora_fuse.ops.topk_call import Call, Scope, masked
from lora_fuse.sparse import SparseMatrix

_compiling = torch.compiler.is_compiling
_T = TypeVar("_T")


@overload
def topk_mask(x: Tensor, density: float, scope: Scope = ..., *, minus: Tensor | None = ...) -> Tensor: ...
@overload
def topk_mask(
    x: Sequence[Tensor], density: float, scope: Scope = ..., *, minus: Sequence[Tensor] | None = ...
) -> list[Tensor]: ...
def topk_mask(x: Any, density: float, scope: Scope = "tensor", *, minus: Any = None) -> Any:
    """Mark the largest magnitudes: ``mask = |x - minus| among the k largest``, ``k = int(density * n)``.

    ``n`` counts a tensor's entries (``tensor``), a row's (``row``) or the whole list's (``global``). ``int(density *
    n)`` is Python's own, so ``int(0.29 * 100)`` is 28, as in PEFT and mergekit. Exactly ``k`` entries are kept:
    magnitudes are compared in fp32 (fp64 for fp64), ties go to the lowest index (``global``: first in the list, then
    lowest index), -0 and 0 are equal and inf is the largest. The mask is one exact set, whatever the number of threads,
    the instruction set or the device. Inputs are never changed; the difference is formed on the fly.

    On a GPU the call waits for the device once, at its end, to tell whether there was NaN. While a CUDA graph is
    captured it does not, and a replay cannot raise: on NaN its results mean nothing, and ``out`` stays as it was.

    Args:
        x: a floating-point tensor (fp32, bf16, fp16, fp64) of any shape and strides, or a list of them. fp64 and
            devices other than CPUs and GPUs go by plain torch.
        density: fraction to keep, ``0 < density <= 1``.
        scope: what shares a threshold: each ``tensor``, each ``row`` (``x`` seen as ``[shape[0], rest]``; a 1-d tensor
            is one row), or the whole list (``global``).
        minus: None, or a tensor for each of ``x``, of its shape and device.
    Returns:
        bool, the shape of ``x``; a list of them for a list.
    Raises:
        ValueError: NaN in ``x - minus`` (inf - inf too), naming the tensor; shapes disagree; a density or scope that is
            not accepted.
    Source: magnitude pruning of task vectors as in TIES, arXiv:2306.01708, and PERU, arXiv:2310.01886.
    """
    call = Call(x, minus, density, scope)
    if call.single and call.traced:
        return torch.ops.lora_fuse.topk_mask(x, density, scope, minus)
    return call.give_back(_eager(call.masks))


@overload
def magnitude_prune(
    x: Tensor, density: float, scope: Scope = ..., minus: Tensor | None = ..., out: Tensor | None = ...
) -> Tensor: ...
@overload
def magnitude_prune(
    x: Sequence[Tensor],
    density: float,
    scope: Scope = ...,
    minus: Sequence[Tensor] | None = ...,
    out: Sequence[Tensor] | None = ...,
) -> list[Tensor]: ...
def magnitude_prune(x: Any, density: float, scope: Scope = "tensor", minus: Any = None, out: Any = None) -> Any:
    """Zero all but the largest magnitudes: ``y = x - minus where topk_mask(x, density, scope, minus=minus), else 0``.

    The difference is rounded once, to the dtype of ``x``. Differentiable in ``x`` and ``minus`` (the mask is taken as
    constant).

    Args:
        x, density, scope, minus: as in ``topk_mask``.
        out: None, or a tensor for each of ``x``, of its shape, dtype and device, that is overwritten; may be ``x`` or
            ``minus`` itself, but share memory with nothing else that is read or written.
    Returns:
        ``out``, or new contiguous tensors; a list for a list.
    Raises:
        ValueError: as ``topk_mask``; ``out`` does not fit, or a gradient is needed. ``out`` is unchanged then.
    """
    call = Call(x, minus, density, scope)
    outs = None if out is None else call.like(out, "out", dtype_too=True)
    if (
        call.needs_grad
        or under_transform()
        or (outs and torch.is_grad_enabled() and any(t.requires_grad for t in outs))
    ):
        if outs is not None:
            raise ValueError("out: cannot be given where a gradient is needed or under a transform; leave it out")
        masks = (
            [topk_mask(x, density, scope, minus=minus)] if call.single else topk_mask(x, density, scope, minus=minus)
        )
        return call.give_back([masked(*args) for args in zip(masks, call.xs, call.subtracted(), strict=True)])
    if call.single and call.traced:
        if outs is None:
            return torch.ops.lora_fuse.magnitude_prune(x, density, scope, minus)
        torch.ops.lora_fuse.magnitude_prune_(out, x, density, scope, minus)
        return out
    if outs is None:
        return call.give_back(_eager(call.pruned))
    _eager(lambda: call.prune_into(outs))
    return out


@overload
def sparsify(
    x: Tensor,
    density: float,
    scope: Scope = ...,
    *,
    minus: Tensor | None = ...,
    values: Literal["difference", "x"] = ...,
) -> SparseMatrix: ...
@overload
def sparsify(
    x: Sequence[Tensor],
    density: float,
    scope: Scope = ...,
    *,
    minus: Sequence[Tensor] | None = ...,
    values: Literal["difference", "x"] = ...,
) -> list[SparseMatrix]: ...
def sparsify(
    x: Any,
    density: float,
    scope: Scope = "tensor",
    *,
    minus: Any = None,
    values: Literal["difference", "x"] = "difference",
) -> Any:
    """Keep the largest magnitudes in compact form: the entries that ``topk_mask`` marks, as a ``SparseMatrix``.

    Args:
        x: a matrix, or a tensor seen as ``[shape[0], rest]``, or a list of them; else as in ``topk_mask``.
        density, scope, minus: as in ``topk_mask``.
        values: ``"difference"`` stores ``x - minus``, rounded once to the dtype of ``x``; ``"x"`` stores ``x``'s own
            entries at the kept places.
    Returns:
        A ``SparseMatrix`` with a bitmap or with columns, whichever is smaller; a list of them for a list. Not
        differentiable.
    Raises:
        ValueError: as ``topk_mask``; a tensor with fewer than two dimensions; unknown ``values``.
    """
    if values not in ("difference", "x"):
        raise ValueError(f"values: expected 'difference' or 'x', got {values!r}")
    call = Call(x, minus, density, scope)
    for name, t in zip(call.names(), call.xs, strict=True):
        if t.dim() < 2:
            raise ValueError(f"{name}: expected at least two dimensions, got shape {list(t.shape)}")
    return call.give_back(_eager(lambda: call.matrices(values == "x")))


def _eager(call: Callable[[], _T]) -> _T:
    """Outside a traced graph; nothing in it is recorded."""
    # importing what ``torch.compiler.disable`` needs takes a second, which only compiled code has spent already
    return torch.compiler.disable(_unrecorded)(call) if _compiling() else _unrecorded(call)


@torch.no_grad()
def _unrecorded(call: Callable[[], _T]) -> _T:
    return call()


LIBRARY.define("topk_mask(Tensor x, float density, str scope, Tensor? minus) -> Tensor")
LIBRARY.define("magnitude_prune(Tensor x, float density, str scope, Tensor? minus) -> Tensor")
LIBRARY.define("magnitude_prune_(Tensor(a!) out, Tensor x, float density, str scope, Tensor? minus) -> ()")


def _mask_op(x: Tensor, density: float, scope: str, minus: Tensor | None) -> Tensor:
    return Call(x, minus, density, scope).masks()[0]


def _prune_op(x: Tensor, density: float, scope: str, minus: Tensor | None) -> Tensor:
    return Call(x, minus, density, scope).pruned()[0]


def _prune_op_(out: Tensor, x: Tensor, density: float, scope: str, minus: Tensor | None) -> None:
    call = Call(x, minus, density, scope)
    call.prune_into(call.like(out, "out", dtype_too=True))


LIBRARY.impl("topk_mask", _mask_op, "CompositeExplicitAutograd")
LIBRARY.impl("magnitude_prune", _prune_op, "CompositeExplicitAutograd")
LIBRARY.impl("magnitude_prune_", _prune_op_, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lora_fuse::topk_mask", lambda x, *args: x.new_empty(x.shape, dtype=torch.bool), lib=LIBRARY
)
torch.library.register_fake("lora_fuse::magnitude_prune", lambda x, *args: x.new_empty(x.shape), lib=LIBRARY)
torch.library.register_fake("lora_fuse::magnitude_prune_", lambda *args: None, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.density, ctx.scope, minus = inputs
    ctx.save_for_backward(x, minus)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, minus = ctx.saved_tensors
    kept = torch.where(torch.ops.lora_fuse.topk_mask(x, ctx.density, ctx.scope, minus), grad, 0.0)
    return kept, None, None, None if minus is None else -kept.to(minus.dtype)


torch.library.register_autograd("lora_fuse::magnitude_prune", _backward, setup_context=_setup_context, lib=LIBRARY)
