"""TIES, DARE, DELLA, breadcrumbs and magnitude pruning of adapters, on their full deltas ``scaling * B A``.

A layer's deltas are formed a block of rows at a time, pruned, merged into one dense matrix and dropped; what is kept of
each beside that is a bit per entry, and nothing where the choice is a draw. Pruning A and B apart, as PEFT's types
without ``_svd`` do, is much cheaper and something else: it prunes no delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.functional import randomized_svd
from lora_fuse.merging.linear import from_svd, svd
from lora_fuse.merging.options import Options
from lora_fuse.merging.rules import Parts, Rule, Settings, choose, settle
from lora_fuse.merging.terms import LayerTerm, Term
from lora_fuse.merging.update import accumulation_dtype, stacked_factors

_TOLERANCE = 1e-3  # of the truncation's error, over the smallest possible one


def prepare(method: str, terms: Sequence[Term], options: Options) -> Options:
    """The options with all of the method's numbers as ``state``."""
    return replace(options, state=settle(method, options, [term.key for term in terms]))


def keeps_all(rule: Rule, options: Options) -> bool:
    """Whether every entry of every delta takes part, as it is."""
    off = {"middle": options.gamma, "ranked": options.epsilon}.get(rule.keeps, 0.0) == 0.0
    return off and bool(options.densities) and all(density == 1.0 for density in options.densities)


def sparsified(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """The parts' deltas merged by the rule in ``options.state``, truncated to ``rank`` or ``energy``."""
    settings: Settings = options.state
    layer = parts[0].layer
    rank = options.rank
    if rank is None and options.energy is None:
        rank = max(p.layer.rank for p in parts)
    if not settings.rule.elects and not any(settings.prunes(p.key) for p in parts):
        scaled = [replace(p, weight=settings.scaling * p.weight) for p in parts]
        return svd(path, scaled, options)  # a plain sum, whose factors are at hand
    merged = merged_delta(path, parts, settings, _dtype(parts, options))
    if layer.kind == "embedding":
        merged = merged.mT
    found = randomized_svd(merged, rank, energy=options.energy, tolerance=_TOLERANCE)
    options.kept[path] = float(found.norm), float(found.residual)
    return from_svd(found, layer, options.dtype)


def merged_delta(path: str, parts: Sequence[LayerTerm], settings: Settings, dtype: torch.dtype) -> Tensor:
    """The merged delta, dense ``[rows, cols]`` as the weight lies."""
    transposed = parts[0].layer.kind == "embedding"
    factors = [stacked_factors([replace(p, weight=1.0)], dtype, transposed) for p in parts]
    masks = [choose(settings, p.key, left @ right) for p, (left, right) in zip(parts, factors, strict=True)]

    def block(i: int, start: int, stop: int) -> Tensor:
        left, right = factors[i]
        return left[start:stop] @ right

    rows, cols = factors[0][0].shape[0], factors[0][1].shape[1]
    merged = torch.empty(rows, cols, dtype=dtype)
    keys, weights = [p.key for p in parts], [p.weight for p in parts]
    for start, block_of_sum in Parts(path, (rows, cols), keys, weights, block, masks).merged(settings):
        merged[start : start + block_of_sum.shape[0]] = block_of_sum
    return merged


def sparsified_bias(path: str, parts: Sequence[LayerTerm], options: Options) -> Tensor | None:
    """``scaling * lora_bias`` merged by the same rule, as a tensor of its own, or None where no part has one."""
    settings: Settings = options.state
    having = [p for p in parts if p.layer.lora_bias is not None]
    if not having:
        return None
    biases = [p.layer.lora_bias.to(torch.float64) * p.layer.scaling for p in having]  # type: ignore[union-attr]
    masks = [choose(settings, p.key, bias) for p, bias in zip(having, biases, strict=True)]
    keys, weights = [p.key for p in having], [p.weight for p in having]
    name, shape = f"{path}.lora_bias", (1, biases[0].numel())
    of_all = Parts(name, shape, keys, weights, lambda i, start, stop: biases[i][None].clone(), masks)
    return next(of_all.merged(settings))[1][0].to(options.dtype)


def _dtype(parts: Sequence[LayerTerm], options: Options) -> torch.dtype:
    factors = [t for p in parts for t in (p.layer.lora_a, p.layer.lora_b)]
    wide = options.dtype == torch.float64 or any(t.dtype == torch.float64 for t in factors)
    return accumulation_dtype(torch.float64 if wide else torch.float32)
