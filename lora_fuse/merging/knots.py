"""KnOTS: TIES in the basis that the adapters of a layer share on the output side.

``[Delta_1 | ... | Delta_T] = U S [V_1 | ... | V_T]^T`` turns every adapter into ``diag(S) V_t^T = U^T Delta_t``. With
``coef_t lora_b_t = Qb L_t`` and ``U = Qb U_c`` that is ``(U_c^T L_t) lora_a_t``, a thin product: made in strips
of columns, twice where one threshold holds for the whole model, and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging.core import Core, significant
from lora_fuse.merging.elementwise import disjoint_mean
from lora_fuse.merging.linear import layer_from
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import LayerTerm, Term
from lora_fuse.ops.factored import ThinQR, thin_qr
from lora_fuse.ops.svd import robust_svd

# Entries of all adapters' strips together: they stay in a cache, and with 8 adapters torch does not split an operation
# on one of them among threads, whose hand-overs would cost more than they bring, the more so on a busy machine.
_STRIP = 1 << 18
_SAMPLE_FROM = 1 << 22  # with fewer entries than this the threshold is picked among all of them
_SAMPLE_STEP, _MARGIN = 256, 0.01
DENSITY = 0.2


@dataclass(frozen=True)
class _Basis:
    """Rotated adapters of one layer: ``U^T Delta_t = rotated[t] @ lora_a_t``, with the sign of the weight.

    Attributes:
        rotated: ``[k, r_t]`` for each part.
        core: ``[., k]``, ``U = Qb core``.
    """

    rotated: list[Tensor]
    core: Tensor


@dataclass(frozen=True)
class _Prepared:
    bases: Mapping[str, _Basis]
    thresholds: Mapping[str, float]


def knots_ties(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """``U @ TIES(U^T Delta_1, ..., U^T Delta_T)``, with thresholds from ``prepare`` or, per layer, of its own."""
    dtype = _dtype(parts, options)
    left_qr = _left(parts, dtype)
    if options.state is None:
        basis = _basis(parts, left_qr.core, dtype)
        thresholds = _thresholds([(parts, basis)], options)
    else:
        basis, thresholds = options.state.bases[path], options.state.thresholds
    weights = [abs(p.weight) for p in parts]
    limits = [_below(thresholds[p.name], dtype) for p in parts]
    like = parts[0].layer
    merged = torch.empty(basis.core.shape[1], like.lora_a[0].numel(), dtype=dtype, device=basis.core.device)  # [k, in]
    for start, strip in _strips(parts, basis, dtype):
        for part, limit in zip(strip, limits, strict=True):
            if limit is not None:
                torch.hardshrink(part, limit, out=part)
        # Signs of basis vectors are arbitrary: where votes tie the values decide, and where those cancel nobody wins.
        if_zero = strip.sum(0).sign_() if options.majority_sign == "frequency" else 0.0
        merged[:, start : start + strip.shape[2]] = disjoint_mean(
            [*strip], weights, options.majority_sign or "total", if_zero=if_zero
        )

    factor = 1.0 if options.scaling is None else options.scaling
    k, columns = merged.shape
    if 0 < k <= min(columns, options.rank or columns) and options.energy is None:
        return layer_from(left_qr.apply(basis.core), merged, like, options.dtype, b_factor=factor)
    right_qr = thin_qr([merged.mT])
    return Core([basis.core], [right_qr.core], left_qr, right_qr, like).summed(options)


def prepare(terms: Sequence[Term], layers: Mapping[str, Sequence[LayerTerm]], options: Options) -> Options:
    """Find each adapter's threshold over all its layers, unless each layer has its own."""
    if options.scope == "tensor" or options.density == 1.0:
        return options
    bases = {}
    for path, parts in layers.items():
        dtype = _dtype(parts, options)
        bases[path] = _basis(parts, _left(parts, dtype).core, dtype)
    thresholds = _thresholds([(parts, bases[path]) for path, parts in layers.items()], options)
    return replace(options, state=_Prepared(bases, thresholds))


def _below(threshold: float, dtype: torch.dtype) -> float | None:
    """The number that exactly those magnitudes exceed that reach ``threshold``; None where all of them do."""
    if threshold == 0.0:
        return None
    return float(torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.zeros((), dtype=dtype)))


def _left(parts: Sequence[LayerTerm], dtype: torch.dtype) -> ThinQR:
    """The common space of the outputs."""
    return thin_qr([p.layer.lora_b.flatten(1) for p in parts], exact=dtype == torch.float64)


def _basis(parts: Sequence[LayerTerm], core: Tensor, dtype: torch.dtype) -> _Basis:
    """From ``core [., R]``, that of the lora_b's side by side."""
    left = [
        math.copysign(p.layer.scaling, p.coef) * block
        for p, block in zip(parts, core.split([p.layer.rank for p in parts], 1), strict=True)
    ]
    # A_t^T = Q_t R_t, so that [Delta_1 | Delta_2 | ...] has the singular values and the U of Qb [L_1 R_1^T | ...].
    right = [thin_qr([p.layer.lora_a.flatten(1).mT], exact=dtype == torch.float64).core for p in parts]
    side_by_side = torch.cat([l_t @ r_t.mT for l_t, r_t in zip(left, right, strict=True)], 1)
    u, s, _ = robust_svd(side_by_side, "the core of the adapters side by side")
    u = u[:, : significant(s)]
    return _Basis([u.mT @ l_t for l_t in left], u)


def _strips(parts: Sequence[LayerTerm], basis: _Basis, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """``U^T Delta_t`` of all adapters as ``[T, k, width]``, strip by strip; a strip is overwritten by the next."""
    num, k = len(parts), basis.core.shape[1]
    columns = parts[0].layer.lora_a[0].numel()
    width = min(columns, max(64, _STRIP // max(num * k, 1)))
    rotated = [r.to(dtype) for r in basis.rotated]
    a = [p.layer.lora_a.flatten(1) for p in parts]
    buffer = torch.empty(num, k, width, dtype=dtype)
    for start in range(0, columns, width):
        strip = buffer[:, :, : min(width, columns - start)]
        for out, r_t, a_t in zip(strip, rotated, a, strict=True):
            torch.mm(r_t, a_t[:, start : start + width].to(dtype), out=out)
        yield start, strip


def _thresholds(layers: Sequence[tuple[Sequence[LayerTerm], _Basis]], options: Options) -> dict[str, float]:
    """Each adapter's ``int(density * n)``-th largest magnitude in these layers: entries below it go.

    A sample of columns gives a bracket for each; one pass over all entries counts what lies above it and collects what
    lies inside, which is a few per cent.
    """
    density = DENSITY if options.density is None else options.densities[0]
    sizes: dict[str, int] = {}
    for parts, basis in layers:
        for part in parts:
            sizes[part.name] = sizes.get(part.name, 0) + basis.core.shape[1] * part.layer.lora_a[0].numel()
    wanted = {name: int(density * n) for name, n in sizes.items()}
    found = {name: 0.0 if wanted[name] == n else math.inf for name, n in sizes.items() if wanted[name] in (0, n)}
    margin = _MARGIN if max(sizes.values(), default=0) > _SAMPLE_FROM else 1.0
    while open_names := [name for name in sizes if name not in found]:
        brackets = dict.fromkeys(open_names, (0.0, math.inf))
        if margin < 1.0:
            brackets = _sampled(layers, brackets, {name: wanted[name] / sizes[name] for name in open_names}, margin)
        found.update(_picked(layers, brackets, wanted, options))
        margin *= 8.0
    return found


def _sampled(
    layers: Sequence[tuple[Sequence[LayerTerm], _Basis]],
    names: Collection[str],
    shares: Mapping[str, float],
    margin: float,
) -> dict[str, tuple[float, float]]:
    """Where each adapter's threshold for keeping ``shares`` lies, give or take ``margin`` of all entries."""
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    for i, (parts, basis) in enumerate(layers):
        for part, rotated in zip(parts, basis.rotated, strict=True):
            if part.name in values:
                columns = part.layer.lora_a.flatten(1)[:, (97 * i) % _SAMPLE_STEP :: _SAMPLE_STEP]
                values[part.name].append((rotated.float() @ columns.float()).abs().flatten())
    brackets = {}
    for name, pieces in values.items():
        ordered = torch.cat(pieces).sort(descending=True).values
        last, share = ordered.numel() - 1, shares[name]
        high, low = int((share - margin) * last), int((share + margin) * last)
        brackets[name] = (
            float(ordered[low]) if low <= last else 0.0,
            float(ordered[high]) if high >= 0 else math.inf,
        )
    return brackets


def _picked(
    layers: Sequence[tuple[Sequence[LayerTerm], _Basis]],
    brackets: Mapping[str, tuple[float, float]],
    wanted: Mapping[str, int],
    options: Options,
) -> dict[str, float]:
    """The exact thresholds of those adapters whose bracket ``low < threshold <= high`` holds it."""
    above = dict.fromkeys(brackets, 0)
    inside: dict[str, list[Tensor]] = {name: [] for name in brackets}
    for parts, basis in layers:
        for _, strip in _strips(parts, basis, _dtype(parts, options)):
            strip.abs_()
            for part, sizes in zip(parts, strip, strict=True):
                if part.name in brackets:
                    more, within = _bracketed(sizes, *brackets[part.name])
                    above[part.name] += more
                    inside[part.name].append(within)
    found = {}
    for name, (low, _) in brackets.items():
        k, values = wanted[name] - above[name], torch.cat(inside.pop(name))
        if 0 < k <= values.numel():
            found[name] = float(values.kthvalue(values.numel() - k + 1).values)
        elif k > 0 and low == 0.0:
            found[name] = 0.0
    return found


def _bracketed(sizes: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many exceed ``high``, and those with ``low < size <= high``."""
    if sizes.device.type != "cpu":
        return int((sizes > high).sum()), sizes[(sizes > low) & (sizes <= high)]
    array = sizes.numpy()  # whose comparisons and boolean indexing take a fifth of the time of torch's
    more = array > high
    return int(np.count_nonzero(more)), torch.from_numpy(array[(array > low) & ~more])


def _dtype(parts: Sequence[LayerTerm], options: Options) -> torch.dtype:
    wide = torch.float64
    factors = [t for p in parts for t in (p.layer.lora_a, p.layer.lora_b)]
    return wide if options.dtype == wide or any(t.dtype == wide for t in factors) else torch.float32
