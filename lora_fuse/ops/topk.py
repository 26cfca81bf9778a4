"""Exact selection by magnitude: masks, pruned tensors and compact sparse matrices.

The ops ``lora_fuse::topk_mask`` and ``lora_fuse::magnitude_prune`` are there for tracing and autograd; plain eager
calls, and lists, go to the kernels (csrc/topk.cpp) directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch  # before _cpu: the extension shares the OpenMP runtime that torch loads
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops.eager import under_transform
from lora_fuse.sparse import SparseMatrix, bitmap_is_smaller, column_dtype

Scope = Literal["tensor", "row", "global"]
SCOPES = ("tensor", "row", "global")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*KERNEL_DTYPES, torch.float64)
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
    call = _Call(x, minus, density, scope)
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
    call = _Call(x, minus, density, scope)
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
        return call.give_back([_masked(*args) for args in zip(masks, call.xs, call.subtracted(), strict=True)])
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
    call = _Call(x, minus, density, scope)
    for name, t in zip(call.names(), call.xs, strict=True):
        if t.dim() < 2:
            raise ValueError(f"{name}: expected at least two dimensions, got shape {list(t.shape)}")
    return call.give_back(_eager(lambda: call.matrices(values == "x")))


class _Call:
    """One checked call: the tensors as lists, and how many entries each group keeps."""

    def __init__(self, x: Any, minus: Any, density: float, scope: str) -> None:
        self.single = isinstance(x, Tensor)
        self.xs: list[Tensor] = [x] if self.single else _tensors(x, "x")
        self.scope = scope
        for name, t in zip(self.names(), self.xs, strict=True):
            if t.dtype not in _DTYPES or t.layout is not torch.strided:
                accepted = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
                raise ValueError(f"{name}: {t.dtype}, {t.layout}; accepted are strided tensors of {accepted}")
            if t.device != self.xs[0].device:
                raise ValueError(f"{name}: on {t.device}, accepted is one device for all, as {self.xs[0].device}")
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        if density is None or isinstance(density, (bool, str)) or not 0 < density <= 1:
            raise ValueError(f"density: expected 0 < density <= 1, got {density!r}")
        self.minus: list[Tensor] | None = None if minus is None else self.like(minus, "minus")
        self.shapes = [matrix_shape(t) for t in self.xs]
        if scope == "global":
            sizes = [sum(t.numel() for t in self.xs)]
        elif scope == "row":
            sizes = [cols for _, cols in self.shapes]
        else:
            sizes = [t.numel() for t in self.xs]
        self.ks = [min(n, int(density * n)) for n in sizes]

    def names(self, name: str = "x") -> list[str]:
        return [name] if self.single else [f"{name}[{i}]" for i in range(len(self.xs))]

    def like(self, given: Any, name: str, dtype_too: bool = False) -> list[Tensor]:
        """``minus`` or ``out`` as a list of tensors that fit ``x``."""
        if isinstance(given, Tensor) != self.single:
            raise ValueError(f"{name}: expected a {'tensor' if self.single else 'list of tensors'}, as x is")
        tensors = [given] if self.single else _tensors(given, name)
        if len(tensors) != len(self.xs):
            raise ValueError(f"{name}: has {len(tensors)} tensors, x has {len(self.xs)}")
        for label, t, x in zip(self.names(name), tensors, self.xs, strict=True):
            if t.shape != x.shape or t.device != x.device or t.layout is not torch.strided:
                raise ValueError(
                    f"{label}: shape {list(t.shape)} on {t.device}, expected {list(x.shape)} on {x.device} as x has"
                )
            if t.dtype not in _DTYPES or (dtype_too and t.dtype != x.dtype):
                raise ValueError(f"{label}: {t.dtype}, expected {x.dtype} as x has")
        return tensors

    def subtracted(self) -> list[Tensor] | list[None]:
        return [None] * len(self.xs) if self.minus is None else self.minus

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*self.xs, *(self.minus or ())))

    @property
    def traced(self) -> bool:
        """Whether torch has to see the call."""
        return _compiling() or not all(_cpu.may_bypass(x, m) for x, m in zip(self.xs, self.subtracted(), strict=True))

    @property
    def by_kernel(self) -> bool:
        return all(
            t.device.type == "cpu" and t.dtype in KERNEL_DTYPES and (m is None or m.dtype == t.dtype)
            for t, m in zip(self.xs, self.subtracted(), strict=True)
        )

    @property
    def by_gpu_kernel(self) -> bool:
        return all(
            t.device.type == "cuda" and t.dtype in KERNEL_DTYPES and (m is None or m.dtype == t.dtype)
            for t, m in zip(self.xs, self.subtracted(), strict=True)
        )

    def give_back(self, results: list[_T]) -> _T | list[_T]:
        return results[0] if self.single else results

    def select(self, histogram: bool = False) -> _cpu.Selection:
        selection = _cpu.Selection(
            [_flat(t) for t in self.xs],
            None if self.minus is None else [_flat(t) for t in self.minus],
            self.shapes,
            self.scope,
            self.ks,
        )
        bad = selection.select(torch.get_num_threads(), histogram)
        if bad >= 0:
            self.refuse_nan(bad)
        return selection

    def refuse_nan(self, i: int) -> None:
        name, x = self.names()[i], self.xs[i]
        if bool(x.isnan().any()):
            raise ValueError(f"{name}: has NaN entries")
        if self.minus is not None and bool(self.minus[i].isnan().any()):
            raise ValueError(f"{self.names('minus')[i]}: has NaN entries")
        raise ValueError(f"{name}: x - minus has NaN entries, where both are infinite")

    def select_on_gpu(self, form: Literal["mask", "dense"], outs: list[Tensor], guarded: bool) -> None:
        """Have ``outs`` written, which are contiguous; guarded: not at all if there is NaN."""
        from lora_fuse.kernels import topk

        flat_minus = None if self.minus is None else [_flat(t) for t in self.minus]
        flat_outs = [t.detach().view(-1) for t in outs]
        made = topk.select(
            [_flat(t) for t in self.xs], flat_minus, self.shapes, self.scope, self.ks, form, flat_outs, guarded
        )
        made.run()
        self.look_for_nan(made)

    def look_for_nan(self, made: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        bad = made.bad_input()
        if bad >= 0:
            self.refuse_nan(bad)

    def matrices_on_gpu(self, own: bool) -> list[SparseMatrix]:
        """Without the dense result; how many entries a tensor keeps is read back only where it hangs on the data."""
        from lora_fuse.kernels import topk, topk_sparse

        flat_minus = None if self.minus is None else [_flat(t) for t in self.minus]
        made = topk.select([_flat(t) for t in self.xs], flat_minus, self.shapes, self.scope, self.ks)
        made.run()
        compact = topk_sparse.Compact(made, self.shapes, self.scope)
        compact.count()
        there = [item.row["tensor"] for item in made.items]
        kept = [0] * len(self.xs)
        if self.scope == "global":
            self.look_for_nan(made)
            for i, n in zip(there, compact.kept(), strict=True):
                kept[i] = n
        else:
            for i in there:
                kept[i] = self.ks[i] * (self.shapes[i][0] if self.scope == "row" else 1)
        parts = [
            topk_sparse.Parts(*_room(t.dtype, rows, cols, n, t.device))
            for t, (rows, cols), n in zip(self.xs, self.shapes, kept, strict=True)
        ]
        for t, part in zip(self.xs, parts, strict=True):
            if t.numel() == 0:
                part.row_starts.zero_()
        compact.write([parts[i] for i in there], own)
        self.look_for_nan(made)
        return [SparseMatrix(*part, cols) for part, (_, cols) in zip(parts, self.shapes, strict=True)]

    def masks(self) -> list[Tensor]:
        if self.xs and self.by_gpu_kernel:
            masks = [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in self.xs]
            self.select_on_gpu("mask", masks, False)
            return masks
        if not self.by_kernel:
            return self.composite_masks()
        selection = self.select()
        out = [torch.empty(t.shape, dtype=torch.bool) for t in self.xs]
        selection.write_mask([_flat(t) for t in out], torch.get_num_threads())
        return out

    def pruned(self) -> list[Tensor]:
        if self.xs and self.by_gpu_kernel:
            dense = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in self.xs]
            self.select_on_gpu("dense", dense, False)
            return dense
        if not self.by_kernel:
            return self.composite_pruned()
        selection = self.select()
        out = [torch.empty(t.shape, dtype=t.dtype) for t in self.xs]
        selection.write_dense([_flat(t) for t in out], True, torch.get_num_threads())
        return out

    def prune_into(self, outs: list[Tensor]) -> None:
        plain = bool(outs) and all(t.is_contiguous() and not t.is_neg() for t in outs)
        if plain and self.by_gpu_kernel:
            self.select_on_gpu("dense", outs, True)
            torch.autograd.graph.increment_version(outs)
            return
        if plain and self.by_kernel:
            self.select().write_dense([_flat(t) for t in outs], False, torch.get_num_threads())
            return
        for out, result in zip(outs, self.pruned(), strict=True):
            out.copy_(result)

    def matrices(self, own: bool) -> list[SparseMatrix]:
        if self.xs and self.by_gpu_kernel:
            return self.matrices_on_gpu(own)
        if not self.by_kernel:
            dense = self.xs if own else self.composite_pruned()
            return [
                SparseMatrix.from_mask(t.detach().reshape(shape), mask.view(shape))
                for t, mask, shape in zip(dense, self.composite_masks(), self.shapes, strict=True)
            ]
        selection = self.select()
        parts = [
            _room(t.dtype, rows, cols, kept)
            for t, (rows, cols), kept in zip(self.xs, self.shapes, selection.kept(), strict=True)
        ]
        selection.write_sparse(parts, own, torch.get_num_threads())
        return [SparseMatrix(*part, cols) for part, (_, cols) in zip(parts, self.shapes, strict=True)]

    def composite_masks(self) -> list[Tensor]:
        """Plain torch, by stable sorts: the path of devices and dtypes that have no kernel."""
        sizes = [_difference(t, m).abs() for t, m in zip(self.xs, self.subtracted(), strict=True)]
        for i, size in enumerate(sizes):
            if bool(size.isnan().any()):
                self.refuse_nan(i)
        if self.scope == "row":
            return [
                _largest(size.reshape(shape), k).view(size.shape)
                for size, shape, k in zip(sizes, self.shapes, self.ks, strict=True)
            ]
        if self.scope == "tensor":
            return [_largest(s.reshape(1, -1), k).view(s.shape) for s, k in zip(sizes, self.ks, strict=True)]
        if not sizes:
            return []
        whole = _largest(torch.cat([s.reshape(-1) for s in sizes])[None], self.ks[0])[0]
        parts = whole.split([s.numel() for s in sizes])
        return [part.view(s.shape) for part, s in zip(parts, sizes, strict=True)]

    def composite_pruned(self) -> list[Tensor]:
        return [_masked(*args) for args in zip(self.composite_masks(), self.xs, self.subtracted(), strict=True)]


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """``x`` as rows: ``(shape[0], rest)``; fewer than two dimensions are one row."""
    return (1, x.numel()) if x.dim() < 2 else (x.shape[0], x.shape[1:].numel())


def _tensors(given: Any, name: str) -> list[Tensor]:
    tensors = list(given) if isinstance(given, Sequence) else None
    if tensors is None or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {type(given).__name__}")
    return tensors


def _flat(t: Tensor) -> Tensor:
    """As the kernels take it; a view if they can read it as it lies."""
    return t.detach().resolve_neg().contiguous().view(-1)


def _difference(x: Tensor, minus: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) if minus is None else x.to(wide) - minus.to(wide)


def _masked(mask: Tensor, x: Tensor, minus: Tensor | None) -> Tensor:
    return torch.where(mask, _difference(x, minus), 0.0).to(x.dtype)


def _largest(size: Tensor, k: int) -> Tensor:
    """The ``k`` largest of every row of ``size [rows, cols]`` as a mask; ties to the lowest index."""
    order = size.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(size.shape, dtype=torch.bool, device=size.device).scatter_(1, order, True)


def _room(
    dtype: torch.dtype, rows: int, cols: int, kept: int, on: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What a ``SparseMatrix`` with ``kept`` entries is made of, not yet filled in."""
    columns = bitmap = None
    if bitmap_is_smaller(rows, cols, kept):
        bitmap = torch.empty(rows, -(-cols // 64) * 8, dtype=torch.uint8, device=on)
    else:
        columns = torch.empty(kept, dtype=column_dtype(cols), device=on)
    starts = torch.empty(rows + 1, dtype=torch.int64, device=on)
    return torch.empty(kept, dtype=dtype, device=on), starts, columns, bitmap


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
    return _Call(x, minus, density, scope).masks()[0]


def _prune_op(x: Tensor, density: float, scope: str, minus: Tensor | None) -> Tensor:
    return _Call(x, minus, density, scope).pruned()[0]


def _prune_op_(out: Tensor, x: Tensor, density: float, scope: str, minus: Tensor | None) -> None:
    call = _Call(x, minus, density, scope)
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
