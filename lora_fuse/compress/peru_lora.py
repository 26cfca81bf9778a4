"""PERU-LoRA: each task's own low-rank product at a smaller rank, with a report of what that kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.compress.budget import ranks_keeping, ranks_within
from lora_fuse.functional import LowRankSVD
from lora_fuse.merging.config import FACTOR_KEYS, lora_config
from lora_fuse.merging.linear import from_svd, svd_of
from lora_fuse.merging.progress import track
from lora_fuse.merging.terms import (
    LayerTerm,
    Sources,
    Term,
    check_dtype,
    check_finite,
    check_truncation,
    layer_terms,
    load_sources,
)

Spread: TypeAlias = Literal["layer", "adapter"]


@dataclass(frozen=True)
class LayerReport:
    """One layer of one adapter: ranks, bytes of its tensors, and squared Frobenius norms of its product."""

    rank_before: int
    rank_after: int
    nbytes_before: int
    nbytes_after: int
    squared_norm: float
    squared_error: float

    @property
    def energy(self) -> float:
        """Share of the squared Frobenius norm that was kept; 1 for a product that is zero."""
        return 1.0 - self.squared_error / self.squared_norm if self.squared_norm > 0 else 1.0


@dataclass(frozen=True)
class AdapterReport:
    """One adapter: its layers by module path, and bytes of everything it holds, heads included."""

    layers: Mapping[str, LayerReport]
    nbytes_before: int
    nbytes_after: int

    @property
    def energy(self) -> float:
        """Share of the squared norms that was kept, over all layers together."""
        return _energy(self.layers.values())


@dataclass(frozen=True)
class CompressionReport:
    """What a compression kept; ``str()`` gives a table with a line per adapter.

    Energies are those of the truncation, computed in fp64, before the factors were rounded to their dtype.
    """

    adapters: Mapping[str, AdapterReport]

    @property
    def energy(self) -> float:
        """Share of the squared norms that was kept, over all adapters together."""
        return _energy([layer for adapter in self.adapters.values() for layer in adapter.layers.values()])

    @property
    def nbytes_before(self) -> int:
        return sum(a.nbytes_before for a in self.adapters.values())

    @property
    def nbytes_after(self) -> int:
        return sum(a.nbytes_after for a in self.adapters.values())

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.adapters, "adapter", "all"))
        lines = [f"{'adapter':{width}}  {'rank':>9}  {'energy kept':>11}  {'worst layer':>11}  {'bytes':>25}"]
        for name, a in self.adapters.items():
            before = max((layer.rank_before for layer in a.layers.values()), default=0)
            after = max((layer.rank_after for layer in a.layers.values()), default=0)
            worst = min((layer.energy for layer in a.layers.values()), default=1.0)
            sizes = f"{a.nbytes_before:,} -> {a.nbytes_after:,}"
            lines.append(f"{name:{width}}  {f'{before} -> {after}':>9}  {a.energy:>11.4f}  {worst:>11.4f}  {sizes:>25}")
        sizes = f"{self.nbytes_before:,} -> {self.nbytes_after:,}"
        lines.append(f"{'all':{width}}  {'':>9}  {self.energy:>11.4f}  {'':>11}  {sizes:>25}")
        return "\n".join(lines)


class CompressedAdapters(dict[str, LoraAdapter]):
    """Adapters by name; ``report`` says what the compression kept."""

    report: CompressionReport

    def __init__(self, adapters: Mapping[str, LoraAdapter], report: CompressionReport) -> None:
        super().__init__(adapters)
        self.report = report


@torch.no_grad()
def peru_lora(
    adapters: Sources,
    rank: int | None = None,
    *,
    energy: float | None = None,
    budget: float | int | None = None,
    spread: Spread = "layer",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> CompressedAdapters:
    """Truncate every task's own product: ``scaling * B A = U S Vh  ->  (U_q sqrt(S_q)) (sqrt(S_q) Vh_q)``.

    Each adapter is treated alone; no merged model is involved. The SVD is exact and comes from the factors, so no
    array of the weight's shape is formed. A layer whose rank is no larger than ``rank`` keeps its factors. Heads and
    other replaced values, and ``lora_bias``, are kept in full.

    Args:
        adapters: a dict name -> adapter, or a list (then the names are "0", "1", ...); an entry may be a path.
        rank: largest rank to keep, q.
        energy: instead of ``rank``: the fewest directions that keep this share of the squared Frobenius norm,
            ``0 < energy <= 1``, as ``spread`` says of each layer or of each adapter.
        budget: instead of both: what each adapter's factors may take in all, a float for a share of the parameters that
            they have, ``0 < budget <= 1``, an integer for a number of parameters. It goes to the layers where it leaves
            the least squared error, never more than one rank for all layers would leave at that cost.
        spread: "layer": ``energy`` holds for each layer. "adapter": for an adapter's layers together, at the least
            cost. Where one budget or energy is spread, a layer in which little happens may get no direction: it is left
            out (one with a ``lora_bias`` keeps one).
        dtype: of the factors. None: as they came. Computed in fp64, rounded once.
        progress: show a bar on stderr.

    Returns:
        A dict name -> adapter, in the order given, with ``.report``: energy kept per layer, per adapter and overall,
        and bytes before and after. Truncated layers have scaling 1.

    Raises:
        ValueError: none or several of rank, energy and budget, or one out of range; a budget below one direction, or
            below one for each layer with a ``lora_bias``; an adapter uses DoRA, whose magnitudes belong to the product
            as it is; factors that are not finite or do not fit each other.

    Source: Jiang et al., arXiv:2310.01886, PERU-LoRA (BYOM-LoRA in its third version).
    """
    _check_options(rank, energy, budget, spread)
    if dtype is not None:
        check_dtype(dtype)
    sources = load_sources(adapters)
    for name, adapter in sources.items():
        term = Term(repr(name), adapter, 1.0)
        for path, layer in adapter.layers.items():
            if layer.magnitude is not None:
                raise ValueError(
                    f"adapter {name!r}: uses DoRA (layer {path!r}); its magnitudes belong to the product as it is, so "
                    "it cannot be truncated"
                )
        layer_terms([term])  # for its checks of shapes
        check_finite([term])

    layers: dict[str, dict[str, LoraLayer]] = {name: {} for name in sources}
    kept: dict[str, dict[str, LayerReport]] = {name: {} for name in sources}
    together = budget is not None or spread == "adapter"
    work = (
        []
        if together
        else [(name, path, layer) for name, adapter in sources.items() for path, layer in adapter.layers.items()]
    )
    for name, path, layer in track(work, "compress", progress):
        svd = None
        if rank is None or rank < layer.rank:
            svd = svd_of([LayerTerm(name, layer, 1.0)], rank, energy, dtype or layer.lora_a.dtype)
        layers[name][path], kept[name][path] = _truncated(name, path, layer, svd, dtype)
    for name, adapter in track(list(sources.items()) if together else [], "compress", progress):
        for path, cut in _spread(name, adapter, energy, budget).items():
            layer = adapter.layers[path]
            small_layer, kept[name][path] = _truncated(name, path, layer, cut, dtype)
            if small_layer.rank > 0:
                layers[name][path] = small_layer
    small = {name: _with_layers(adapter, layers[name]) for name, adapter in sources.items()}
    reports = {n: AdapterReport(kept[n], adapter.nbytes, small[n].nbytes) for n, adapter in sources.items()}
    return CompressedAdapters(small, CompressionReport(reports))


def _check_options(rank: int | None, energy: float | None, budget: float | int | None, spread: Spread) -> None:
    given = [f"{n}={v}" for n, v in (("rank", rank), ("energy", energy), ("budget", budget)) if v is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"rank, energy, budget: give one of the three, for example rank=4 or energy=0.9, got {got}")
    check_truncation(rank, energy)
    if budget is not None:
        whole = isinstance(budget, int) and not isinstance(budget, bool)
        if not whole and not isinstance(budget, float):
            raise TypeError(f"budget: expected a share (float) or a number of parameters (int), got {budget!r}")
        if budget <= 0 or (not whole and not budget <= 1.0):
            raise ValueError(f"budget: expected 0 < budget <= 1, or an integer of at least 1, got {budget!r}")
    if spread not in ("layer", "adapter"):
        raise ValueError(f"spread: expected 'layer' or 'adapter', got {spread!r}")
    if spread == "adapter" and rank is not None:
        raise ValueError("spread: a rank holds for each layer; give budget= or energy= to spread it")


def _spread(
    name: str, adapter: LoraAdapter, energy: float | None, budget: float | int | None
) -> dict[str, LowRankSVD | None]:
    """Layer by layer, the truncated SVD under one budget or energy for all; None where all directions stay."""
    layers = adapter.layers
    svds = {path: svd_of([LayerTerm(name, layer, 1.0)], None, None, torch.float64) for path, layer in layers.items()}
    costs = [layer.lora_b.shape[0] + layer.lora_a[0].numel() for layer in layers.values()]
    squares = [svd.S.square() for svd in svds.values()]
    least = [int(layer.lora_bias is not None) for layer in layers.values()]
    if budget is None:
        assert energy is not None
        ranks = ranks_keeping(squares, costs, energy)
    else:
        has = sum(layer.rank * cost for layer, cost in zip(layers.values(), costs, strict=True))
        allowed = budget if isinstance(budget, int) else int(budget * has + 0.5)
        needs = sum(floor * cost for floor, cost in zip(least, costs, strict=True)) or min(costs, default=0)
        if allowed < needs:
            raise ValueError(
                f"budget: adapter {name!r}: {allowed:,} parameters, but the least that it can do with is {needs:,}"
            )
        rest = [s[floor:] for s, floor in zip(squares, least, strict=True)]
        more = ranks_within(rest, costs, allowed - sum(f * c for f, c in zip(least, costs, strict=True)))
        ranks = [floor + rank for floor, rank in zip(least, more, strict=True)]
    ranks = [max(floor, rank) for floor, rank in zip(least, ranks, strict=True)]
    cut: dict[str, LowRankSVD | None] = {}
    for (path, svd), rank in zip(svds.items(), ranks, strict=True):
        cut[path] = None if rank >= layers[path].rank else _first(svd, rank)
    return cut


def _first(svd: LowRankSVD, rank: int) -> LowRankSVD:
    short = LowRankSVD(svd.U[:, :rank], svd.S[:rank], svd.Vh[:rank])
    short.norm, short.residual = svd.norm, torch.linalg.vector_norm(svd.S[rank:])
    return short


def _truncated(
    name: str, path: str, layer: LoraLayer, svd: LowRankSVD | None, dtype: torch.dtype | None
) -> tuple[LoraLayer, LayerReport]:
    """The layer from ``svd``, or as it was where that is None."""
    dtype = layer.lora_a.dtype if dtype is None else dtype
    bias = layer.lora_bias
    if svd is None:
        small = replace(layer, lora_a=layer.lora_a.to(dtype), lora_b=layer.lora_b.to(dtype))
        norm, residual = _norm(layer), 0.0
    else:
        small, norm, residual = from_svd(svd, layer, dtype), float(svd.norm), float(svd.residual)
        bias = None if bias is None else bias.to(torch.float64) * layer.scaling  # the new scaling is 1
    small = replace(small, lora_bias=None if bias is None else bias.to(dtype))
    for t in small.tensors():
        if not all_finite(t):
            raise ValueError(f"adapter {name!r}, layer {path!r}: the truncated factors overflow {dtype}")
    before, after = (sum(t.numel() * t.element_size() for t in x.tensors()) for x in (layer, small))
    return small, LayerReport(layer.rank, small.rank, before, after, norm**2, residual**2)


def _norm(layer: LoraLayer) -> float:
    """Frobenius norm of ``scaling * lora_b @ lora_a`` from two rank x rank Gram matrices, fp64."""
    a, b = layer.lora_a.flatten(1).to(torch.float64), layer.lora_b.flatten(1).to(torch.float64)
    return abs(layer.scaling) * float(((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).sqrt())


def _with_layers(adapter: LoraAdapter, layers: dict[str, LoraLayer]) -> LoraAdapter:
    """``adapter`` with other factors and a config that describes them; everything else as it was."""
    config = lora_config(layers, adapter.modules_to_save, [adapter.config])
    others = {key: value for key, value in adapter.config.items() if key not in FACTOR_KEYS}
    return replace(adapter, layers=layers, config={**config, **others})


def _energy(layers: Iterable[LayerReport]) -> float:
    layers = list(layers)
    total = sum(layer.squared_norm for layer in layers)
    return 1.0 - sum(layer.squared_error for layer in layers) / total if total > 0 else 1.0
