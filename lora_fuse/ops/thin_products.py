"""A matrix times thin ones: by kernels where they read it, else whole or by tiles of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_fuse.ops import gpu
from lora_fuse.ops.normals import Normals

if TYPE_CHECKING:
    from lora_fuse.kernels.sketch import Source

_TILE = 1 << 22  # entries of a tile: 16 MB in fp32, where a product of its own is as fast as the whole one's share


class Operand(ABC):
    """A matrix ``[..., m, n]`` that can be multiplied with thin ones, and formed a few rows at a time.

    As written here it is formed by tiles of rows, anew for each product; what fits one tile is kept.
    """

    shape: torch.Size
    dtype: torch.dtype  # in which it is computed: fp32, or fp64 if something in it is
    device: torch.device
    _kept: Tensor | None = None

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """``X[..., start:stop, :]`` in ``dtype``: to be read only, and before the next call, which may reuse it."""

    @abstractmethod
    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """What it is made of, by the names that errors use."""

    def matmul(self, q: Tensor) -> Tensor:
        """``X @ q``, ``[..., n, l] -> [..., m, l]``, in the dtype of ``q``."""
        source = self._source(q.dtype)
        if source is not None:
            return _product(source, q, False)
        whole = self._whole(q.dtype)
        if whole is not None:
            return multiply(whole, q)
        out = q.new_empty(*self.shape[:-1], q.shape[-1])
        for tile in self.tiles():
            out[..., tile, :] = multiply(self.rows(tile.start, tile.stop, q.dtype), q)
        return out

    def rmatmul(self, q: Tensor) -> Tensor:
        """``X^T @ q``, ``[..., m, l] -> [..., n, l]``, in the dtype of ``q``."""
        source = self._source(q.dtype)
        if source is not None:
            return _product(source, q, True)
        whole = self._whole(q.dtype)
        if whole is not None:
            return multiply_transposed(whole, q)
        out = q.new_zeros(*self.shape[:-2], self.shape[-1], q.shape[-1])
        for tile in self.tiles():
            out += multiply_transposed(self.rows(tile.start, tile.stop, q.dtype), q[..., tile, :])
        return out

    def sketch(self, columns: int, random: Normals, dtype: torch.dtype) -> Tensor:
        """``X @ W``, ``[..., m, columns]``, for the next draw W, which kernels do not store."""
        source = self._source(dtype)
        if source is not None:
            made = _product(source, None, False, columns, (random.seed, random.next_draw()))
            return made.mT.view(*self.shape[:-2], columns, self.shape[-2]).mT
        return self.matmul(random.draw((*self.shape[:-2], self.shape[-1], columns), self.device).to(dtype))

    def squares_by_kernel(self) -> Tensor | None:
        """``||X||_F^2``, ``[...]`` in fp64 from rows in fp32, where a kernel reads X."""
        source = self._source(torch.float32)
        if source is None:
            return None
        from lora_fuse.kernels.sketch import squares

        return squares(source).view(self.shape[:-2])

    def _source(self, dtype: torch.dtype) -> Source | None:
        """X as kernels read it, for products in ``dtype``; None: they do not."""
        return None

    def tiles(self) -> Iterator[slice]:
        """Slices of rows whose tiles stay small."""
        step = max(1, _TILE // max(1, self.shape[:-2].numel() * self.shape[-1]))
        return (slice(i, min(i + step, self.shape[-2])) for i in range(0, self.shape[-2], step))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All of it; may be the caller's own memory."""
        return self.rows(0, self.shape[-2], dtype)

    def squared_norm(self) -> Tensor | None:
        """``||X||_F^2``, ``[...]`` in fp64, where there is a better way than by tiles."""
        return None

    def _whole(self, dtype: torch.dtype) -> Tensor | None:
        if self.shape.numel() > _TILE:
            return None
        if self._kept is None or self._kept.dtype != dtype:
            self._kept = self.dense(dtype)
        return self._kept


class Dense(Operand):
    """``sum_i weights[i] * terms[i]`` of tensors of one shape, in fp32 or better."""

    def __init__(self, terms: Sequence[Tensor], weights: Sequence[float]) -> None:
        self.terms, self.weights = list(terms), list(weights)
        self.shape, self.device = terms[0].shape, terms[0].device
        wide = any(t.dtype == torch.float64 for t in terms)
        self.dtype = torch.float64 if wide else torch.float32
        self._tile: Tensor | None = None

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        first = self.terms[0][..., start:stop, :]
        if len(self.terms) == 1 and first.dtype == dtype and self.weights[0] == 1.0:
            return first
        total = self._scratch(first.shape, dtype).copy_(first)
        if self.weights[0] != 1.0:
            total *= self.weights[0]
        for term, weight in zip(self.terms[1:], self.weights[1:], strict=True):
            total.add_(term[..., start:stop, :], alpha=weight)
        return total

    def _source(self, dtype: torch.dtype) -> Source | None:
        if len(self.terms) > 2 or dtype != torch.float32 or not gpu.takes_kernels(self.device):
            return None
        from lora_fuse.kernels.sketch import Source

        first, *others = (t.reshape(-1, *self.shape[-2:]) for t in self.terms)
        weights = self.weights[0], self.weights[1] if others else 0.0
        batch = first.shape[0]
        return Source((batch, *self.shape[-2:]), first, others[0] if others else None, weights)

    def parts(self) -> Iterator[tuple[Tensor, float]]:
        """Terms and weights."""
        return zip(self.terms, self.weights, strict=True)

    def _scratch(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for a tile, the same each time: fresh pages cost as much as the product with what is in them."""
        if shape == self.shape:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self._tile is None or self._tile.dtype != dtype or self._tile.numel() < shape.numel():
            self._tile = torch.empty(shape.numel(), dtype=dtype, device=self.device)
        return self._tile[: shape.numel()].view(shape)

    def _whole(self, dtype: torch.dtype) -> Tensor | None:
        only = self.terms[0]
        if len(self.terms) == 1 and only.dtype == dtype and self.weights[0] == 1.0:
            return only
        return super()._whole(dtype)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        for i, term in enumerate(self.terms):
            yield (name if len(self.terms) == 1 else f"{name}: term {i}"), term


def multiply(x: Tensor, q: Tensor) -> Tensor:
    """``x [..., m, n] @ q [..., n, l]`` of one dtype; fp32 on a GPU is fp32, whatever torch may do with TF32."""
    if gpu.takes_kernels(x.device) and q.dtype == torch.float32:
        return _product(Dense([x], [1.0])._source(q.dtype), q, False)
    return x @ q


def multiply_transposed(x: Tensor, q: Tensor) -> Tensor:
    """``x^T q``, ``[..., m, n]`` and ``[..., m, l] -> [..., n, l]``."""
    if gpu.takes_kernels(x.device) and q.dtype == torch.float32:
        return _product(Dense([x], [1.0])._source(q.dtype), q, True)
    return (q.mT @ x).mT  # 1.5 times as fast as x.mT @ q in MKL


def _product(
    x: Source | None, q: Tensor | None, transposed: bool, columns: int = 0, drawn: tuple[int, int] = (0, 0)
) -> Tensor:
    """Columns as rows there, as columns here."""
    from lora_fuse.kernels.sketch import product

    assert x is not None
    if q is None:
        return product(x, None, columns, transposed, drawn).mT
    flat = q.mT.contiguous().view(-1, q.shape[-1], q.shape[-2])
    made = product(x, flat, q.shape[-1], transposed)
    return made.view(*q.shape[:-2], *made.shape[1:]).mT
