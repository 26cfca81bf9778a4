"""One naive PyTorch function per op: the specification. For tests and benchmarks; nothing shipped imports it."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def multi_lora(
    x: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    slot_rank: Tensor,
    slot_scaling: Tensor,
    pairs: list[tuple[int, int, float]],
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``y[row] += weight * scaling[slot] * B[slot] (A[slot] x[row])`` for every (row, slot, weight), in ``dtype``."""
    num_slots = slot_rank.shape[0]
    max_rank = pool_a.shape[0] // max(num_slots, 1)
    y = torch.zeros(x.shape[0], pool_b.shape[1], dtype=dtype) if out is None else out.to(dtype)
    x, pool_a, pool_b = x.to(dtype), pool_a.to(dtype), pool_b.to(dtype)
    for row, slot, weight in pairs:
        rows = slice(slot * max_rank, slot * max_rank + int(slot_rank[slot]))
        h = pool_a[rows] @ x[row]  # [rank]
        y[row] += weight * float(slot_scaling[slot]) * (h @ pool_b[rows])
    return y


def topk_mask(
    xs: list[Tensor], density: float, scope: str = "tensor", minus: list[Tensor] | None = None
) -> list[Tensor]:
    """The ``int(density * n)`` largest ``|x - minus|`` (fp32, or fp64 for fp64) by a stable sort; unchecked."""
    sizes = []
    for i, x in enumerate(xs):
        wide = torch.promote_types(x.dtype, torch.float32)
        sizes.append((x.to(wide) if minus is None else x.to(wide) - minus[i].to(wide)).abs().reshape(-1))
    if scope == "global":
        groups = [torch.cat(sizes)]
    elif scope == "tensor":
        groups = sizes
    else:
        cols = [x.numel() if x.dim() < 2 else x.shape[1:].numel() for x in xs]
        groups = [row for s, c in zip(sizes, cols, strict=True) for row in s.split(max(c, 1))]
    masks = []
    for size in groups:
        order = size.sort(descending=True, stable=True).indices[: int(density * size.numel())]
        masks.append(torch.zeros(size.shape, dtype=torch.bool).index_fill_(0, order, True))
    parts = torch.cat(masks).split([x.numel() for x in xs])
    return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]


def sparse_delta_linear(
    x: Tensor,
    deltas: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[tuple[int, int, float]],
    out: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``y[row] += weight * (U[slot] x[row] + bias[slot])`` for every (row, slot, weight), in ``dtype``.

    ``deltas``: dense ``[out_features, in_features]`` per slot, zeros where nothing is kept.
    """
    y, x, deltas = out.to(dtype), x.to(dtype), [delta.to(dtype) for delta in deltas]
    for row, slot, weight in pairs:
        h = deltas[slot] @ x[row]
        bias = biases[slot]
        y[row] += weight * (h if bias is None else h + bias.to(dtype))
    return y


# Merges of one layer's deltas ``[out, in]``, from full SVDs in fp64. Directions whose singular value is below 1e-6 of
# the largest do not exist: the papers' own code fills them with whatever the SVD returns.


def _svd(x: Tensor, count: int | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = int((s > 1e-6 * (s[:1].sum() if scale is None else scale)).sum())
    k = k if count is None else min(k, count)
    return u[:, :k], s[:k], vh[:k]


def _polar(x: Tensor) -> Tensor:
    u, _, vh = _svd(x)
    return u @ vh


def knots_ties(
    layers: list[dict[str, Tensor]],
    weights: dict[str, float],
    density: float,
    scope: str = "global",
    majority_sign: str = "total",
) -> list[Tensor]:
    """KnOTS-TIES, arXiv:2410.19735. ``layers``: for each layer the deltas by adapter, which may lack some."""
    bases, rotated = [], []
    for deltas in layers:
        signed = {name: math.copysign(1.0, weights[name]) * delta for name, delta in deltas.items()}
        u, s, vh = _svd(torch.cat(list(signed.values()), 1))
        bases.append(u)
        blocks = (s[:, None] * vh).split([d.shape[1] for d in signed.values()], 1)
        rotated.append(dict(zip(signed, blocks, strict=True)))
    merged = []
    for i, parts in enumerate(rotated):
        trimmed = []
        for name, part in parts.items():
            whole = [part] if scope == "tensor" else [other[name] for other in rotated if name in other]
            sizes = torch.cat([t.abs().flatten() for t in whole]).sort(descending=True).values
            k = int(density * sizes.numel())
            trimmed.append(torch.where(part.abs() >= sizes[k - 1], part, 0.0) if k else torch.zeros_like(part))
        stacked = torch.stack(trimmed)
        sign, votes = stacked.sum(0).sign(), stacked.sign().sum(0).sign()
        if majority_sign == "frequency":
            sign = torch.where(votes == 0, sign, votes)
        agree = stacked * sign > 0
        weighted = stacked * torch.tensor([abs(weights[name]) for name in parts], dtype=torch.float64)[:, None, None]
        merged.append(bases[i] @ ((weighted * agree).sum(0) / agree.sum(0).clamp(min=1)))
    return merged


def tsv(deltas: list[Tensor]) -> Tensor:
    """TSV-M, arXiv:2412.00081, of weighted deltas."""
    count = max(1, min(deltas[0].shape) // len(deltas))
    us, ss, vhs = zip(*(_svd(d, count) for d in deltas), strict=True)
    return _polar(torch.cat(us, 1)) * torch.cat(ss) @ _polar(torch.cat(vhs, 0))


def iso_c(deltas: list[Tensor], mean_over: str = "rank") -> Tensor:
    """Iso-C, arXiv:2502.04959, of weighted deltas."""
    u, s, vh = _svd(torch.stack(deltas).sum(0))
    return s.sum() / (s.numel() if mean_over == "rank" else min(deltas[0].shape)) * (u @ vh)


def iso_cts(deltas: list[Tensor], dim: int, common_fraction: float = 0.8, mean_over: str = "rank") -> Tensor:
    """Iso-CTS, arXiv:2502.04959, of weighted deltas, with ``dim`` directions in place of ``min(out, in)``."""
    each = round((dim - int(common_fraction * dim)) / len(deltas))
    triples = [_svd(torch.stack(deltas).sum(0), max(0, dim - each * len(deltas)))]
    common = triples[0][0]
    triples += [_svd(d - common @ (common.T @ d), each, scale=d.norm()) for d in deltas]
    us, ss, vhs = zip(*triples, strict=True)
    s = torch.cat(ss)
    mean = s.sum() / (s.numel() if mean_over == "rank" else min(deltas[0].shape))
    return mean * _polar(torch.cat(us, 1)) @ _polar(torch.cat(vhs, 0))


def regmean(
    deltas: list[Tensor], grams: list[Tensor], weights: list[float], off_diagonal: float = 0.9, ridge: float = 0.0
) -> Tensor:
    """RegMean, arXiv:2212.09849: ``W^T = (sum G_i)^-1 sum G_i W_i^T`` with ``W_i = delta_i``, ``G_i [in, in]``."""
    scaled = []
    for gram, weight in zip(grams, weights, strict=True):
        diagonal = gram.diag().diag()
        eye = torch.eye(gram.shape[0], dtype=gram.dtype)
        scaled.append(weight * (off_diagonal * gram + (1 - off_diagonal) * diagonal + ridge * gram.diag().mean() * eye))
    return torch.linalg.solve(sum(scaled), sum(g @ d.T for g, d in zip(scaled, deltas, strict=True))).T


def random_numbers(seed: int, name: str, key: str, rows: int, cols: int) -> Tensor:
    """The 32-bit integers ``[rows, cols]``, in fp64, that decide about one task vector's tensor in DARE and DELLA."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{name}".encode()).digest()
    entropy = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(8)]
    bits = np.random.SFC64(np.random.SeedSequence(entropy))
    numbers = []
    for _ in range(rows):
        words = [int(word) for word in bits.random_raw((cols + 1) // 2)]
        numbers.append([half for word in words for half in (word % 2**32, word // 2**32)][:cols])
    return torch.tensor(numbers, dtype=torch.float64).view(rows, cols)


def pruned(
    x: Tensor, keeps: str, density: float, gamma: float = 0.0, epsilon: float = 0.0, numbers: Tensor | None = None
) -> Tensor:
    """What stays of a task vector ``[rows, cols]`` under TIES ("largest"), breadcrumbs ("middle"), DARE or DELLA."""
    n, cols = x.numel(), x.shape[1]
    numbers = torch.empty(0) if numbers is None else numbers
    if keeps == "random":
        return torch.where(numbers < round(density * 2**32), x / density, 0.0)
    if keeps == "ranked":
        rank = x.float().abs().flip(1).argsort(dim=1, stable=True).argsort(dim=1).flip(1)
        spread = rank.double() / (cols - 1) - 0.5 if cols > 1 else torch.zeros(x.shape, dtype=torch.float64)
        chance = (density + 2 * epsilon * spread).float().double()
        return torch.where(numbers < (chance * 2**32).round(), x / chance, 0.0)
    order = x.abs().reshape(-1).sort(descending=True, stable=True).indices
    top = int(gamma * n) if keeps == "middle" else 0
    mask = torch.zeros(n, dtype=torch.bool).index_fill_(0, order[top : top + int(density * n)], True)
    return torch.where(mask.view(x.shape), x, 0.0)


def disjoint_mean(xs: list[Tensor], weights: list[float], majority_sign: str = "total") -> Tensor:
    """TIES' election and mean, arXiv:2306.01708, as PEFT has them; ``xs`` are pruned."""
    stacked = torch.stack(xs)
    votes = stacked.sign().sum(0) if majority_sign == "frequency" else stacked.sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1.0, -1.0)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, *[1] * xs[0].dim())
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
