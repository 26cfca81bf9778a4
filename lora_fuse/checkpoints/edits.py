"""What can happen to one tensor of a checkpoint, as blocks of rows: low-rank deltas, new values, new rows, nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_fuse.checkpoints.header import TensorInfo
from lora_fuse.checkpoints.read import read_tensor, read_tiles
from lora_fuse.merging.terms import LayerTerm
from lora_fuse.merging.update import accumulation_dtype, dora_scale, stacked_factors


class Edit(Protocol):
    """One output tensor: its shape, and its values as blocks of rows in order, in fp32 (or the file's own dtype)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def tiles(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class AddDeltas:
    """``W + sum_i w_i * delta_i``, accumulated in fp32 (fp64 for an fp64 weight), a block of W's rows at a time.

    DoRA (one term only): ``magnitude * (W + delta) / ||W + delta||``, the norm over everything but the output features.

    Args:
        source: the base weight, in a file or (where the adapter brought it) in memory.
        terms: the layers, all of one kind.
        transposed: the weight is stored ``[in, out]``.
    """

    source: TensorInfo | Tensor
    terms: Sequence[LayerTerm]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def tiles(self) -> Iterator[Tensor]:
        magnitude = self.terms[0].layer.magnitude
        if magnitude is None:
            yield from self._sums()
            return
        magnitude = magnitude.to(torch.float64)
        columns = self.transposed or self.terms[0].layer.kind == "embedding"
        if columns:  # the norms run down the rows, so all blocks are needed before the first is scaled
            squares = torch.zeros_like(magnitude)
            for tile in self._sums():
                squares += tile.to(torch.float64).square().sum(0)
        start = 0
        for tile in self._sums():
            stop = start + tile.shape[0]
            if columns:
                scale = dora_scale(magnitude, squares)
            else:
                squares = tile.flatten(1).to(torch.float64).square().sum(1)
                scale = dora_scale(magnitude[start:stop], squares).reshape(-1, *[1] * (tile.dim() - 1))
            yield tile.mul_(scale.to(tile.dtype))
            start = stop

    def _sums(self) -> Iterator[Tensor]:
        given = self.source.torch_dtype if isinstance(self.source, TensorInfo) else self.source.dtype
        dtype = accumulation_dtype(given)
        columns_first = self.transposed or self.terms[0].layer.kind == "embedding"
        left, right = stacked_factors(self.terms, dtype, columns_first)
        for start, block in _tiles_of(self.source):
            tile = block.to(dtype)
            tile.flatten(1).addmm_(left[start : start + tile.shape[0]], right)
            yield tile


def _tiles_of(source: TensorInfo | Tensor) -> Iterator[tuple[int, Tensor]]:
    if isinstance(source, TensorInfo):
        yield from read_tiles(source)
        return
    for start in range(0, source.shape[0], 4096):
        yield start, source[start : start + 4096].clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Bias:
    """``b + sum_i w_i s_i lora_bias_i``, where ``b`` is the base's bias or the one that an adapter puts in its place.

    Args:
        source: the base's bias in the file.
        added: pairs of factor (weight times scaling) and bias ``[out_features]``.
        instead: replaces the base's.
    """

    source: TensorInfo
    added: Sequence[tuple[float, Tensor]] = ()
    instead: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def tiles(self) -> Iterator[Tensor]:
        base = read_tensor(self.source) if self.instead is None else self.instead
        result = base.to(torch.float64)
        for factor, bias in self.added:
            result = result + factor * bias.to(torch.float64)
        yield result


@dataclass(frozen=True)
class NewValues:
    """The tensor is replaced, or inserted."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def tiles(self) -> Iterator[Tensor]:
        yield self.values


@dataclass(frozen=True)
class NewRows:
    """Rows ``ids`` of the tensor become ``rows``; the others stay.

    Args:
        source: ``[num_embeddings, embedding_dim]``.
        ids: ``[n]``, distinct, in range.
        rows: ``[n, embedding_dim]``.
    """

    source: TensorInfo
    ids: Tensor
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def tiles(self) -> Iterator[Tensor]:
        for start, tile in read_tiles(self.source):
            here = (self.ids >= start) & (self.ids < start + tile.shape[0])
            tile[self.ids[here] - start] = self.rows[here].to(tile.dtype)
            yield tile


@dataclass(frozen=True)
class Unchanged:
    """The tensor as it is (under its own name, or copied under another)."""

    source: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def tiles(self) -> Iterator[Tensor]:
        for _, tile in read_tiles(self.source):
            yield tile
