"""RegMean for adapters: the merge whose outputs are closest, in least squares, to each adapter's own on its own inputs.

``W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T`` with ``W_i = W_0 + Delta_i`` is ``W_0^T`` plus the same formula for the
deltas, so the base is not needed, and ``Delta_i = s_i B_i A_i`` gives
``Delta = [s_1 B_1 | ...] [w_1 A_1 G_1; ...] (sum w_i G_i)^-1``: B's stay, A's are solved for, the rank is the sum of
the ranks. Only Gram matrices have ``in x in`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging.linear import linear
from lora_fuse.merging.options import Grams, Options
from lora_fuse.merging.terms import LayerTerm, Term, by_name


@dataclass(frozen=True)
class _Task:
    """One adapter that takes part: its Gram matrices by layer, its weight."""

    name: str
    weight: float
    grams: Mapping[str, Tensor]


def prepare(terms: Sequence[Term], layers: Mapping[str, Sequence[LayerTerm]], options: Options) -> Options:
    """Check weights and Gram matrices; ``state`` is a list of ``_Task``."""
    for term in terms:
        if term.weight < 0:
            raise ValueError(
                f"weights: method 'regmean' takes none below 0, got {term.weight} for adapter {term.name}; a weight is "
                "how much an adapter's own outputs count"
            )
    tasks = [
        _Task(t.name, t.weight, grams)
        for t, grams in zip(terms, _by_adapter(options.grams, terms), strict=True)
        if t.weight > 0
    ]
    for path, parts in layers.items():
        features = parts[0].layer.lora_a[0].numel()
        owners = {part.name for part in parts}
        for task in tasks:
            if path in task.grams:
                _check(f"grams: adapter {task.name}, layer {path!r}", task.grams[path], features)
            elif task.name in owners:
                raise ValueError(
                    f"grams: adapter {task.name}, layer {path!r}: missing; method 'regmean' needs one for each layer "
                    "that the adapter has (lf.collect_grams makes them)"
                )
    return replace(options, state=tasks)


def regmean(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """``Delta^T = (sum w_i G_i)^-1 sum w_i G_i Delta_i^T``, exactly, in fp64.

    An adapter that lacks the layer counts with ``Delta_i = 0`` if there is a Gram matrix for it, else not at all.
    """
    layers = {part.name: part.layer for part in parts}
    features = parts[0].layer.lora_a[0].numel()
    tasks = [task for task in options.state if path in task.grams]
    diagonal = all(task.grams[path].ndim == 1 for task in tasks)
    like = parts[0].layer
    total = torch.zeros(
        (features,) if diagonal else (features, features), dtype=torch.float64, device=like.lora_a.device
    )
    bs, rows = [], []
    for task in tasks:
        gram = _regularised(task.grams[path].to(total.device), task.weight, options)
        if task.name in layers:
            layer = layers[task.name]
            a = layer.lora_a.flatten(1).to(torch.float64)
            rows.append(a * gram if gram.ndim == 1 else a @ gram)
            bs.append(layer.scaling * layer.lora_b.flatten(1).to(torch.float64))
        if gram.ndim == total.ndim:
            total += gram
        else:
            total.diagonal().add_(gram)
    a = _solved(path, total, torch.cat(rows))
    b = torch.cat(bs, 1)
    merged = LoraLayer(
        a.reshape(-1, *like.lora_a.shape[1:]), b.reshape(*b.shape, *like.lora_b.shape[2:]), 1.0, like.kind
    )
    scaling = 1.0 if options.scaling is None else options.scaling
    return linear(path, [LayerTerm(parts[0].name, merged, scaling)], options)


def _by_adapter(grams: Grams | None, terms: Sequence[Term]) -> list[Mapping[str, Tensor]]:
    if grams is None:
        raise ValueError(
            "grams: method 'regmean' needs the Gram matrices of the layers' inputs, {module path: matrix} for each "
            "adapter; lf.collect_grams(model, adapter, batches) makes them"
        )
    expected = "expected {module path: matrix} for each adapter, in their order or by the same names"
    if isinstance(grams, Mapping):
        given = by_name("grams", grams)
        if set(given) != {t.key for t in terms}:
            raise ValueError(f"grams: {expected}, got {sorted(given)} for {[t.key for t in terms]}")
        entries = [given[t.key] for t in terms]
    else:
        if not isinstance(grams, Sequence):
            raise TypeError(f"grams: {expected}, got {type(grams).__name__}")
        entries = list(grams)
        if len(entries) != len(terms):
            raise ValueError(f"grams: {expected}, got {len(entries)} for {len(terms)} adapters")
    for term, entry in zip(terms, entries, strict=True):
        if not isinstance(entry, Mapping):
            raise TypeError(f"grams: {expected}, got {type(entry).__name__} for adapter {term.name}")
    return entries


def _check(label: str, gram: Tensor, features: int) -> None:
    """ValueError unless ``gram`` is a finite symmetric matrix, or the diagonal of one, of that size."""
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        got = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"{label}: expected a floating-point tensor, got {got}")
    if gram.shape not in ((features, features), (features,)):
        raise ValueError(
            f"{label}: expected shape ({features}, {features}), inputs' products, or ({features},), their diagonal "
            f"alone; got {tuple(gram.shape)}"
        )
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    if gram.ndim == 2:
        # Two products with one vector tell as much as comparing all pairs, at a fraction of the memory traffic.
        probe = torch.randn(features, generator=torch.Generator().manual_seed(0)).to(gram)
        one, other = gram @ probe, gram.mT @ probe
        if bool(torch.isfinite(one).all()) and float((one - other).norm()) > 1e-3 * float(one.norm()):
            raise ValueError(f"{label}: is not symmetric")
        diagonal = torch.where(torch.isfinite(one), diagonal, torch.nan)
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError(f"{label}: has NaN or infinite entries")
    if bool((diagonal < 0).any()):
        raise ValueError(f"{label}: has negative numbers on its diagonal, so it is no Gram matrix")


def _regularised(gram: Tensor, weight: float, options: Options) -> Tensor:
    """``weight * (off_diagonal * G + (1 - off_diagonal) * diag(G) + ridge * mean(diag(G)) * I)``, fp64."""
    keep = 0.9 if options.off_diagonal is None else options.off_diagonal
    diagonal = (gram if gram.ndim == 1 else gram.diagonal()).to(torch.float64)
    diagonal = weight * (diagonal + (options.ridge or 0.0) * diagonal.mean())
    if gram.ndim == 1:
        return diagonal
    scaled = gram.to(torch.float64, copy=True).mul_(weight * keep)
    scaled.diagonal().copy_(diagonal)
    return scaled


def _solved(path: str, total: Tensor, rows: Tensor) -> Tensor:
    """``rows @ total^-1`` for ``rows [R, n]``; ValueError where ``total`` is singular, as far as fp64 can tell."""
    if total.ndim == 1:
        good = bool((total > 1e-14 * total.max()).all())
    else:
        lower, info = torch.linalg.cholesky_ex(total)
        pivots = lower.diagonal()
        good = int(info) == 0 and bool((pivots > 1e-7 * pivots.max()).all())
    if not good:
        raise ValueError(
            f"grams: layer {path!r}: the Gram matrices add up to a singular one, so that some inputs leave the merge "
            "open (features that are never active, or fewer rows than features); give ridge=1e-3 or more, "
            "off_diagonal below 1, or more data"
        )
    return rows / total if total.ndim == 1 else torch.cholesky_solve(rows.mT, lower).mT
