"""What ``randomized_svd`` takes for a matrix: differences, sums of products, sparse ones, none of them formed whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from lora_fuse.ops import gpu
from lora_fuse.ops.lowrank_svd import check_products
from lora_fuse.ops.thin_products import Dense, Operand, multiply
from lora_fuse.sparse import SparseMatrix

if TYPE_CHECKING:
    from lora_fuse.kernels.sketch import Source

_SPARSE = 0.05  # density below which products of CSR tensors, with the transpose they need, beat tiles


@runtime_checkable
class Operator(Protocol):
    """What a caller's own matrix needs: its products with thin ones, of the dtype and on the device of ``q``.

    It may have ``dtype`` (fp32 if not), ``device`` (the CPU), and ``squared_norm()``, its squared Frobenius norm.
    """

    shape: torch.Size | tuple[int, ...]  # [..., m, n]

    def matmul(self, q: Tensor) -> Tensor:
        """``X @ q``: ``[..., n, l] -> [..., m, l]``."""

    def rmatmul(self, q: Tensor) -> Tensor:
        """``X^T @ q``: ``[..., m, l] -> [..., n, l]``."""


class Difference(Dense):
    """``a - b``, such as a fine-tuned weight and its base, formed by tiles in fp32 (fp64 if one of them is).

    Args:
        a: ``[..., m, n]``, any floating dtype.
        b: the same shape, on the same device; its dtype may differ.
    Raises:
        ValueError: shapes or devices disagree, or one is not a floating-point matrix.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        _check_matrix(a, "a")
        _check_matrix(b, "b")
        if a.shape != b.shape or a.device != b.device:
            raise ValueError(
                f"a, b: expected one shape and device, got {tuple(a.shape)} on {a.device} and {tuple(b.shape)} on "
                f"{b.device}"
            )
        super().__init__([a.detach(), b.detach()], [1.0, -1.0])

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}: a", self.terms[0]
        yield f"{name}: b", self.terms[1]


class SumOfProducts(Operand):
    """``sum_i weights[i] * lora_bs[i] @ lora_as[i]``, never formed; arguments and errors as ``lowrank_svd``."""

    def __init__(
        self,
        lora_bs: Sequence[Tensor],
        lora_as: Sequence[Tensor],
        weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        coefs = check_products(lora_bs, lora_as, weights, None, None)
        self.lora_bs, self.lora_as, self.weights = list(lora_bs), list(lora_as), coefs
        wide = any(t.dtype == torch.float64 for t in (*lora_bs, *lora_as))
        self.dtype = torch.float64 if wide else torch.float32
        self.device = lora_bs[0].device
        self.shape = torch.Size((*lora_bs[0].shape[:-1], lora_as[0].shape[-1]))
        self._stacked: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """Sum of the ranks."""
        return sum(b.shape[-1] for b in self.lora_bs)

    def squared_norm(self) -> Tensor:
        b, a = self.factors(torch.float64)
        return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0)

    def cancels(self, squared_norm: Tensor) -> bool:
        """Whether the terms cancel so far that fp32 products would lose more than three digits of what is left."""
        sizes = [
            abs(w)
            * torch.linalg.matrix_norm(b.detach(), dtype=torch.float64)
            * torch.linalg.matrix_norm(a.detach(), dtype=torch.float64)
            for b, a, w in zip(self.lora_bs, self.lora_as, self.weights, strict=True)
        ]
        return bool((squared_norm < 1e-6 * torch.stack(sizes).sum(0).square()).any())

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[..., m, R]`` with the weights in it, and ``[..., R, n]``."""
        if self._stacked is None or self._stacked[0].dtype != dtype:
            b = torch.cat([b.detach().to(dtype) * w for b, w in zip(self.lora_bs, self.weights, strict=True)], dim=-1)
            self._stacked = b, torch.cat([a.detach().to(dtype) for a in self.lora_as], dim=-2)
        return self._stacked

    def matmul(self, q: Tensor) -> Tensor:
        b, a = self.factors(q.dtype)
        return multiply(b, multiply(a, q))

    def rmatmul(self, q: Tensor) -> Tensor:
        b, a = self.factors(q.dtype)
        return multiply(a.mT, multiply(b.mT, q))

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        b, a = self.factors(dtype)
        return b[..., start:stop, :] @ a

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        for i, (b, a) in enumerate(zip(self.lora_bs, self.lora_as, strict=True)):
            yield f"{name}: lora_bs[{i}]", b
            yield f"{name}: lora_as[{i}]", a


class Sparse(Operand):
    """A ``SparseMatrix``."""

    def __init__(self, matrix: SparseMatrix) -> None:
        self.matrix = matrix
        self.dtype = torch.float64 if matrix.values.dtype == torch.float64 else torch.float32
        self.shape, self.device = torch.Size(matrix.shape), matrix.values.device
        on_gpu = gpu.takes_kernels(self.device)
        self._few = not on_gpu and matrix.nnz < _SPARSE * self.shape.numel()
        self._csr: tuple[Tensor, Tensor] | None = None
        self._read: Source | None = None

    def _both(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Itself and its transpose as CSR tensors."""
        if self._csr is None or self._csr[0].dtype != dtype:
            values, rows = self.matrix.values.to(dtype), self.shape[0]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
                csr = self.matrix.with_values(values).to_csr()
                by_column = (self._at % self.shape[1]).sort(stable=True)
                starts = torch.searchsorted(by_column.values, torch.arange(self.shape[1] + 1, device=self.device))
                columns = (self._at // self.shape[1])[by_column.indices]
                sorted_values, shape = values[by_column.indices], (self.shape[1], rows)
                other = torch.sparse_csr_tensor(starts, columns, sorted_values, shape, check_invariants=False)
            self._csr = csr, other
        return self._csr

    def matmul(self, q: Tensor) -> Tensor:
        return self._both(q.dtype)[0] @ q if self._few else super().matmul(q)

    def rmatmul(self, q: Tensor) -> Tensor:
        return self._both(q.dtype)[1] @ q if self._few else super().rmatmul(q)

    @cached_property
    def _at(self) -> Tensor:
        return self.matrix.flat_index()

    def _source(self, dtype: torch.dtype) -> Source | None:
        if dtype != torch.float32 or not gpu.takes_kernels(self.device) or self.matrix.nnz >= 1 << 31:
            return None
        if self._read is None:
            from lora_fuse.kernels.sketch import Source

            words, starts = _bitmap(self.matrix)
            self._read = Source((1, *self.shape), self.matrix.values.contiguous(), words=words, starts=starts)
        return self._read

    def squared_norm(self) -> Tensor:
        return self.matrix.values.to(torch.float64).square().sum()

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        here = slice(int(self.matrix.row_starts[start]), int(self.matrix.row_starts[stop]))
        cols = self.shape[1]
        out = torch.zeros((stop - start) * cols, dtype=dtype, device=self.device)
        out[self._at[here] - start * cols] = self.matrix.values[here].to(dtype)
        return out.view(stop - start, cols)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}: values", self.matrix.values


def _bitmap(matrix: SparseMatrix) -> tuple[Tensor, Tensor]:
    """A bit for each kept entry, in int32 words of 32 columns, and how many entries lie before each word."""
    rows, cols = matrix.shape
    if matrix.bitmap is not None:
        words = matrix.bitmap.view(torch.int32)
    else:
        words = torch.zeros(rows, -(-cols // 32), dtype=torch.int32, device=matrix.values.device)
        column = matrix.column_index()
        bits = torch.bitwise_left_shift(torch.ones_like(column), column & 31)
        at = matrix.row_index() * words.shape[1] + (column >> 5)
        words.view(-1).index_add_(0, at, bits.to(torch.int32))  # no bit twice: a sum of them is their union
    bytes_ = words.view(torch.uint8)
    bytes_ = bytes_ - ((bytes_ >> 1) & 0x55)
    bytes_ = (bytes_ & 0x33) + ((bytes_ >> 2) & 0x33)
    counts = ((bytes_ + (bytes_ >> 4)) & 0x0F).view(rows, -1, 4).sum(-1, dtype=torch.int32)
    starts = counts.cumsum(1, dtype=torch.int32) - counts + matrix.row_starts[:-1, None].to(torch.int32)
    return words, starts


class Sum(Operand):
    """``sum_i weights[i] * terms[i]`` of tensors, ``SparseMatrix``, ``Difference``, ``SumOfProducts`` and other sums.

    Args:
        terms: at least one, all of one shape ``[..., m, n]`` and on one device.
        weights: a finite number per term; all 1 if None.
    Raises:
        TypeError: a term is none of these.
        ValueError: shapes or devices disagree, or the weights do not fit.
    """

    def __init__(self, terms: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        coefs = [1.0] * len(terms) if weights is None else [float(w) for w in weights]
        if not terms or len(coefs) != len(terms):
            raise ValueError(f"terms, weights: expected one weight per term, got {len(terms)} and {len(coefs)}")
        if not all(abs(w) < float("inf") for w in coefs):
            raise ValueError(f"weights: expected finite numbers, got {coefs}")
        given = [as_operand(term, f"terms[{i}]") for i, term in enumerate(terms)]
        first = given[0]
        for i, term in enumerate(given):
            if term.shape != first.shape or term.device != first.device:
                raise ValueError(
                    f"terms[{i}]: {tuple(term.shape)} on {term.device}, but terms[0] is {tuple(first.shape)} on "
                    f"{first.device}"
                )
        self.shape, self.device = first.shape, first.device
        wide = any(term.dtype == torch.float64 for term in given)
        self.dtype = torch.float64 if wide else torch.float32
        # What is dense is added before it is multiplied: products of large terms that cancel would lose digits.
        dense = [(t, w * c) for x, c in zip(given, coefs, strict=True) if isinstance(x, Dense) for t, w in x.parts()]
        rest = [(x, c) for x, c in zip(given, coefs, strict=True) if not isinstance(x, Dense)]
        self.terms: list[Operand] = [x for x, _ in rest]
        self.weights = [c for _, c in rest]
        if dense:
            self.terms.insert(0, Dense([t for t, _ in dense], [w for _, w in dense]))
            self.weights.insert(0, 1.0)

    def _source(self, dtype: torch.dtype) -> Source | None:
        return self.terms[0]._source(dtype) if self.weights == [1.0] else None  # two tensors are read as one

    def _added(self, parts: Iterator[Tensor]) -> Tensor:
        total = next(parts) * self.weights[0]
        for part, weight in zip(parts, self.weights[1:], strict=True):
            total.add_(part, alpha=weight)
        return total

    def matmul(self, q: Tensor) -> Tensor:
        return self._added(term.matmul(q) for term in self.terms)

    def rmatmul(self, q: Tensor) -> Tensor:
        return self._added(term.rmatmul(q) for term in self.terms)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._added(term.rows(start, stop, dtype) for term in self.terms)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        for i, term in enumerate(self.terms):
            yield from term.tensors(f"{name}: terms[{i}]")


class Custom(Operand):
    """A caller's own ``Operator``; it is formed only where the SVD is exact, from its product with the identity."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.shape = torch.Size(operator.shape)
        if len(self.shape) < 2:
            raise ValueError(f"x: expected an operator of shape [..., m, n], got {tuple(self.shape)}")
        self.dtype = torch.float64 if getattr(operator, "dtype", None) == torch.float64 else torch.float32
        self.device = torch.device(getattr(operator, "device", "cpu"))

    def matmul(self, q: Tensor) -> Tensor:
        return self._checked("matmul", self.operator.matmul(q), q, self.shape[-2])

    def rmatmul(self, q: Tensor) -> Tensor:
        return self._checked("rmatmul", self.operator.rmatmul(q), q, self.shape[-1])

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        some = torch.zeros(*self.shape[:-1], stop - start, dtype=dtype, device=self.device)
        some[..., start:stop, :] = torch.eye(stop - start, dtype=dtype, device=self.device)
        return self.rmatmul(some).mT

    def squared_norm(self) -> Tensor | None:
        """``[...]``, fp64, if the operator knows it."""
        own = getattr(self.operator, "squared_norm", None)
        return None if own is None else torch.as_tensor(own(), dtype=torch.float64, device=self.device)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def _checked(self, what: str, got: Tensor, q: Tensor, size: int) -> Tensor:
        want = (*self.shape[:-2], size, q.shape[-1])
        if not isinstance(got, Tensor) or tuple(got.shape) != want or got.dtype != q.dtype:
            shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"x.{what}: expected {q.dtype} {want}, got {shown}")
        return got


Matrix: TypeAlias = Tensor | SparseMatrix | Operand | Operator


def as_operand(x: Any, name: str) -> Operand:
    """``x`` as an ``Operand``; TypeError or ValueError if it is no matrix, or has none of its data here."""
    if isinstance(x, Operand):
        return x
    if isinstance(x, SparseMatrix):
        return Sparse(x)
    if isinstance(x, Tensor):
        _check_matrix(x, name)
        return Dense([x.detach()], [1.0])
    if isinstance(x, Operator):
        return Custom(x)
    raise TypeError(
        f"{name}: expected a tensor, a SparseMatrix, a Difference, SumOfProducts or Sum, or an object with shape, "
        f"matmul and rmatmul, got {type(x).__name__}"
    )


def _check_matrix(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.ndim < 2 or not x.is_floating_point() or x.layout is not torch.strided:
        raise ValueError(
            f"{name}: expected a dense floating-point tensor [..., m, n], got {x.dtype} of shape {tuple(x.shape)} "
            f"with layout {x.layout}"
        )
    if x.is_meta:
        raise ValueError(f"{name}: is on the meta device, it has no data")
