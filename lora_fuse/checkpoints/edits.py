"""What can happen to one tensor of a checkpoint, as blocks of rows: low-rank deltas, new values, new rows, nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..adapters.lora import LoraLayer
from .header import TensorInfo
from .read import read_tensor, read_tiles


class Edit(Protocol):
    """One output tensor: its shape, and its values as blocks of rows in order, in fp32 (or the file's own dtype)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def tiles(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Term:
    """``weight * delta`` of one adapter's layer; ``label`` names the adapter in messages."""

    layer: LoraLayer
    weight: float
    label: str


@dataclass(frozen=True)
class AddDeltas:
    """``W + sum_i w_i * delta_i``, accumulated in fp32 (fp64 for an fp64 weight), a block of W's rows at a time.

    DoRA (one term only): ``magnitude * (W + delta) / ||W + delta||``, the norm over everything but the output features.

    Args:
        source: the base weight.
        terms: the layers, all of one kind.
        transposed: the weight is stored ``[in, out]``.
    """

    source: TensorInfo
    terms: Sequence[Term]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def tiles(self) -> Iterator[Tensor]:
        magnitude = self.terms[0].layer.magnitude
        if magnitude is None:
            yield from self._sums()
            return
        columns = self.transposed or self.terms[0].layer.kind == "embedding"
        if columns:  # the norms run down the rows, so all blocks are needed before the first is scaled
            norms = torch.stack([tile.double().square().sum(0) for tile in self._sums()]).sum(0).sqrt()
        start = 0
        for tile in self._sums():
            if columns:
                yield tile.mul_((magnitude.double() / norms).to(tile.dtype))
                continue
            stop = start + tile.shape[0]
            scale = magnitude[start:stop].to(tile.dtype) / tile.flatten(1).norm(dim=1)
            yield tile.mul_(scale.reshape(-1, *[1] * (tile.dim() - 1)))
            start = stop

    def _sums(self) -> Iterator[Tensor]:
        dtype = torch.float64 if self.source.dtype == "F64" else torch.float32
        for start, block in read_tiles(self.source):
            tile = block.to(dtype)
            for term in self.terms:
                rows = _rows_of(term.layer, start, start + tile.shape[0], self.transposed)
                _add_product_(tile, rows, term.weight, self.transposed)
            yield tile


def _rows_of(layer: LoraLayer, start: int, stop: int, transposed: bool) -> LoraLayer:
    """The layer whose delta is rows ``start:stop`` of ``layer``'s delta as the weight is stored."""
    if transposed or layer.kind == "embedding":
        return replace(layer, lora_a=layer.lora_a[:, start:stop])
    return replace(layer, lora_b=layer.lora_b[start:stop])


def _add_product_(tile: Tensor, layer: LoraLayer, weight: float, transposed: bool) -> None:
    """``tile += weight * scaling * lora_b @ lora_a`` in the tile's dtype, without a buffer of the tile's size."""
    a, b = layer.lora_a.to(tile).flatten(1), layer.lora_b.to(tile).flatten(1)
    flat = tile.flatten(1)
    if transposed or layer.kind == "embedding":
        flat.addmm_(a.t(), b.t(), alpha=weight * layer.scaling)
    else:
        flat.addmm_(b, a, alpha=weight * layer.scaling)


@dataclass(frozen=True)
class Bias:
    """``b + sum_i w_i (b_i - b) + sum_i w_i s_i lora_bias_i``: absolute biases ``b_i`` of adapters, and LoRA biases.

    A single absolute bias with weight 1 is taken as it is, exactly.

    Args:
        source: the base bias.
        absolute: pairs of weight and bias ``[out_features]``.
        added: pairs of factor (weight times scaling) and bias.
    """

    source: TensorInfo
    absolute: Sequence[tuple[float, Tensor]] = ()
    added: Sequence[tuple[float, Tensor]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def tiles(self) -> Iterator[Tensor]:
        base = read_tensor(self.source)
        result = base.to(torch.float64)
        if len(self.absolute) == 1 and self.absolute[0][0] == 1:
            result = self.absolute[0][1].to(torch.float64)
        else:
            for weight, bias in self.absolute:
                result = result + weight * (bias.to(torch.float64) - base.to(torch.float64))
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
