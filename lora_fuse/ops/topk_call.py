"""A checked call that selects by magnitude, and how it is answered: by a kernel of the device, or by plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch  # before _cpu: the extension shares the OpenMP runtime that torch loads
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.sparse import SparseMatrix, bitmap_is_smaller, column_dtype

Scope = Literal["tensor", "row", "global"]
SCOPES = ("tensor", "row", "global")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*KERNEL_DTYPES, torch.float64)
_compiling = torch.compiler.is_compiling
_T = TypeVar("_T")


class Call:
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
        return self._fits("cpu")

    @property
    def by_gpu_kernel(self) -> bool:
        return self._fits("cuda")

    def _fits(self, device_type: str) -> bool:
        return all(
            t.device.type == device_type and t.dtype in KERNEL_DTYPES and (m is None or m.dtype == t.dtype)
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
        flat_xs, flat_outs = [_flat(t) for t in self.xs], [t.detach().view(-1) for t in outs]
        if guarded:
            _refuse_overlaps(flat_outs, flat_xs, flat_minus)
        made = topk.select(flat_xs, flat_minus, self.shapes, self.scope, self.ks, form, flat_outs, guarded)
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
        return [masked(*args) for args in zip(self.composite_masks(), self.xs, self.subtracted(), strict=True)]


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


def _refuse_overlaps(outs: list[Tensor], xs: list[Tensor], minus: list[Tensor] | None) -> None:
    """As csrc/bind_topk.cpp: an output may be its own x or minus, other shared memory would be read once written."""
    pieces: list[tuple[int, int, int, bool]] = []  # begin, end, place in the list, written
    for i, out in enumerate(outs):
        begin, size = out.data_ptr(), out.nbytes
        if size:
            pieces.append((begin, begin + size, i, True))
            reads = {t.data_ptr() for t in (xs[i], None if minus is None else minus[i]) if t is not None}
            pieces += [(read, read + size, i, False) for read in reads if read != begin]
    last = last_written = (0, 0, 0, False)  # those that reach furthest
    for piece in sorted(pieces):
        begin, _end, i, written = piece
        other = last if written else last_written
        if other[1] > begin:
            own, also = (i, other[2]) if written else (other[2], i)
            what = f"out[{also}]" if written and other[3] else f"x[{also}] or its minus"
            raise ValueError(f"out[{own}]: shares memory with {what}")
        last = max(last, piece, key=lambda p: p[1])
        if written:
            last_written = max(last_written, piece, key=lambda p: p[1])


def _difference(x: Tensor, minus: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) if minus is None else x.to(wide) - minus.to(wide)


def masked(mask: Tensor, x: Tensor, minus: Tensor | None) -> Tensor:
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
