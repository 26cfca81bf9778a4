"""Weighted sums of products: concatenated factors, or a truncated SVD taken from the factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import LayerTerm, Term
from lora_fuse.ops import gpu
from lora_fuse.ops.lowrank_svd import lowrank_svd
from lora_fuse.ops.lowrank_svds import lowrank_svds
from lora_fuse.ops.operands import SumOfProducts
from lora_fuse.ops.svd import LowRankSVD


def linear(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """``sum coef * lora_b @ lora_a``: exact where the ranks fit, truncated where ``rank`` or ``energy`` asks."""
    layer = parts[0].layer
    total = sum(p.layer.rank for p in parts)
    full = min(layer.lora_b.shape[0], layer.lora_a[0].numel())
    if options.energy is None and total <= (full if options.rank is None else options.rank):
        return cat(path, parts, options)
    return _truncated(path, parts, options.rank, options)


def cat(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """The same sum, by concatenation, whatever rank that gives."""
    b = torch.cat([(p.layer.lora_b.to(torch.float64) * p.coef).to(options.dtype) for p in parts], dim=1)
    a = torch.cat([p.layer.lora_a.to(options.dtype) for p in parts], dim=0)
    return LoraLayer(a, b, 1.0, parts[0].layer.kind)


def svd(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """The same sum, truncated to ``rank``, ``energy``, or the largest rank of the parts."""
    return _truncated(path, parts, _rank(parts, options), options)


@dataclass(frozen=True)
class Found:
    """The SVDs of layers on a GPU, by path: there all at once take little longer than one."""

    svds: dict[str, LowRankSVD]


def prepare(terms: Sequence[Term], layers: Mapping[str, Sequence[LayerTerm]], options: Options) -> Options:
    """The options with those layers' SVDs as ``state``, for ``svd``."""
    some = {p: parts for p, parts in layers.items() if gpu.takes_kernels(parts[0].layer.lora_b.device)}
    alone = all(len(parts) == 1 and parts[0].weight == 1.0 for parts in some.values())  # may be kept as it is
    if alone or options.energy is not None or options.dtype == torch.float64:
        return options
    sums = [SumOfProducts(*_factors(parts), [p.coef for p in parts]) for parts in some.values()]
    ranks = [_rank(parts, options) for parts in some.values()]
    return replace(options, state=Found(dict(zip(some, lowrank_svds(sums, ranks), strict=True))))


def _rank(parts: Sequence[LayerTerm], options: Options) -> int | None:
    if options.rank is None and options.energy is None:
        return max(p.layer.rank for p in parts)
    return options.rank


def _truncated(path: str, parts: Sequence[LayerTerm], rank: int | None, options: Options) -> LoraLayer:
    ready = options.state.svds.pop(path, None) if isinstance(options.state, Found) else None
    found = svd_of(parts, rank, options.energy, options.dtype) if ready is None else ready
    options.kept[path] = float(found.norm), float(found.residual)
    return from_svd(found, parts[0].layer, options.dtype)


def factor_average(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """``(sum w_i sqrt(s_i) B_i) (sum w_i sqrt(s_i) A_i)``: factors averaged apart, with cross terms ``B_i A_j``.

    For one scaling ``s`` that is LoraHub's ``s (sum w_i B_i) (sum w_i A_i)``, quadratic in the weights; PEFT's
    "linear" takes their square roots instead.

    Raises:
        ValueError: the ranks differ: which rows of A belong together is anyone's guess then.
    Source: LoraHub, arXiv:2307.13269.
    """
    first = parts[0]
    for part in parts:
        if part.layer.rank != first.layer.rank:
            raise ValueError(
                f"layer {path!r}: adapter {part.name} has rank {part.layer.rank}, adapter {first.name} has rank "
                f"{first.layer.rank}; method 'factor_average' adds A's and B's up and needs one rank in each layer "
                "(use 'linear', or truncate the adapters to one rank first)"
            )
    root = [math.sqrt(abs(p.layer.scaling)) for p in parts]
    signed = [math.copysign(r, p.layer.scaling) for r, p in zip(root, parts, strict=True)]
    a = torch.stack([r * p.weight * p.layer.lora_a.double() for r, p in zip(root, parts, strict=True)]).sum(0)
    b = torch.stack([r * p.weight * p.layer.lora_b.double() for r, p in zip(signed, parts, strict=True)]).sum(0)
    layer = LoraLayer(a, b, 1.0, first.layer.kind)
    if options.rank is None and options.energy is None:
        return replace(layer, lora_a=a.to(options.dtype), lora_b=b.to(options.dtype))
    return linear(path, [LayerTerm(first.name, layer, 1.0)], options)


def from_svd(svd: LowRankSVD, like: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    """A layer with scaling 1 whose product is ``U S Vh``, each factor taking ``sqrt(S)``; ``like`` gives the layout."""
    root = svd.S.sqrt()
    return layer_from(svd.U, svd.Vh, like, dtype, root, root[:, None])


def layer_from(
    b: Tensor,
    a: Tensor,
    like: LoraLayer,
    dtype: torch.dtype,
    b_factor: Tensor | float = 1.0,
    a_factor: Tensor | float = 1.0,
) -> LoraLayer:
    """A layer of scaling 1: factors ``b_factor * b [out, k]`` and ``a_factor * a [k, in]``, laid out as in ``like``."""
    k = a.shape[0]
    lora_a, lora_b = a.new_empty(a.shape, dtype=dtype), b.new_empty(b.shape, dtype=dtype)
    torch.mul(a, a_factor, out=lora_a)  # in one pass, and contiguous
    torch.mul(b, b_factor, out=lora_b)
    return LoraLayer(
        lora_a=lora_a.reshape(k, *like.lora_a.shape[1:]),
        lora_b=lora_b.reshape(like.lora_b.shape[0], k, *like.lora_b.shape[2:]),
        scaling=1.0,
        kind=like.kind,
    )


def svd_of(parts: Sequence[LayerTerm], rank: int | None, energy: float | None, dtype: torch.dtype) -> LowRankSVD:
    """Truncated SVD of ``sum coef * lora_b @ lora_a``, as the factors lie (an embedding's is transposed)."""
    bs, as_ = _factors(parts)
    if dtype == torch.float64:  # or lowrank_svd would round its result to fp32
        bs, as_ = [b.to(dtype) for b in bs], [a.to(dtype) for a in as_]
    return lowrank_svd(bs, as_, [p.coef for p in parts], rank, energy=energy)


def _factors(parts: Sequence[LayerTerm]) -> tuple[list[Tensor], list[Tensor]]:
    return [p.layer.lora_b.flatten(1) for p in parts], [p.layer.lora_a.flatten(1) for p in parts]
