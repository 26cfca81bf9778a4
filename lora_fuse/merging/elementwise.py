"""Merging entry by entry: which entries of each task vector take part, and what becomes of those that do.

What is here works on plain tensors, whole ones or blocks of rows, whatever they are a part of. Conventions are PEFT's:
signs are elected on unweighted values, an entry whose values cancel counts as positive, and the mean divides by how
many agree. mergekit elects on weighted values and divides by the sum of the weights: ``majority_sign="weighted"``,
``divisor="weights"``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lora_fuse.functional import magnitude_prune, topk_mask

MajoritySign: TypeAlias = Literal["total", "frequency", "weighted"]
Divisor: TypeAlias = Literal["count", "weights", "none"]
MAJORITY_SIGNS = ("total", "frequency", "weighted")
DIVISORS = ("count", "weights", "none")


def ties(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    density: float | Sequence[float],
    majority_sign: MajoritySign = "total",
    divisor: Divisor = "count",
) -> Tensor:
    """TIES on tensors of one shape: ``disjoint_mean`` of the ``density`` largest magnitudes of each.

    Args:
        vectors: at least one, of one shape, fp32 or fp64; not changed.
        weights: a number for each.
        density: share of each that stays, exactly ``int(density * n)`` entries as in ``topk_mask``; one, or one each.
        majority_sign, divisor: as in ``disjoint_mean``.
    Returns:
        A new tensor.
    Source: Yadav et al., arXiv:2306.01708; conventions as PEFT's ``ties_svd``.
    """
    densities = [density] * len(vectors) if isinstance(density, (int, float)) else density
    pruned = [magnitude_prune(v, d) for v, d in zip(vectors, densities, strict=True)]
    return disjoint_mean(pruned, weights, majority_sign, divisor)


def disjoint_mean(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    majority_sign: MajoritySign = "total",
    divisor: Divisor = "count",
    if_zero: float | Tensor = 1.0,
) -> Tensor:
    """Elect a sign per entry, and average the values that have it: ``sum_{i agrees} w_i x_i / number that agree``.

    Args:
        vectors: at least one, of one shape, zero where an entry was pruned; not changed.
        weights: a number for each, of any sign.
        majority_sign: the elected sign is that of ``sum x_i`` ("total"), of ``sum sign(x_i)`` ("frequency") or of ``sum
            w_i x_i`` ("weighted", where also the sign of ``w_i x_i`` is what has to agree).
        divisor: number of values that agree ("count"), sum of their weights ("weights"; 1 where that is nearly 0), or 1
            ("none").
        if_zero: the sign of an entry whose sum is zero; a number, or a tensor of one shape with the vectors.
    Returns:
        A new tensor; zero where nothing agrees.
    """
    sign = votes(vectors, weights, majority_sign).sign_()
    sign = torch.where(sign == 0, if_zero, sign)

    total, divide_by = torch.zeros_like(sign), torch.zeros_like(sign)
    agreeing, agrees = torch.empty_like(sign), torch.empty_like(sign)
    for x, w in zip(vectors, weights, strict=True):
        side = -1.0 if majority_sign == "weighted" and w < 0 else 1.0
        torch.mul(x, sign, out=agreeing)
        agreeing.clamp_(min=0.0) if side > 0 else agreeing.clamp_(max=0.0)  # |x| where it agrees, with that side's sign
        total.add_(agreeing, alpha=w)
        if divisor != "none":
            divide_by.add_(torch.ne(agreeing, 0.0, out=agrees), alpha=w if divisor == "weights" else 1.0)
    total.mul_(sign)
    if divisor == "count":
        return total.div_(divide_by.clamp_(min=1.0))
    if divisor == "weights":
        return total.div_(divide_by.masked_fill_(divide_by.abs() < 1e-8, 1.0))
    return total


def votes(vectors: Sequence[Tensor], weights: Sequence[float], majority_sign: MajoritySign) -> Tensor:
    """What the elected sign is the sign of: a new tensor."""
    total = torch.zeros_like(vectors[0])
    for x, w in zip(vectors, weights, strict=True):
        if majority_sign == "frequency":
            total.add_(x.sign())
        else:
            total.add_(x, alpha=w if majority_sign == "weighted" else 1.0)
    return total


def breadcrumbs_mask(x: Tensor, density: float, gamma: float, minus: Tensor | None = None) -> Tensor:
    """Mark ``int(density * n)`` magnitudes: the largest below the ``int(gamma * n)`` outliers at the top.

    Args:
        x, minus: as in ``topk_mask``.
        density, gamma: ``0 < density``, ``0 <= gamma``, ``density + gamma <= 1``.
    Returns:
        bool, the shape of ``x``.
    Source: Davari and Belilovsky, arXiv:2312.06795.
    """
    n = x.numel()
    dropped = int(gamma * n)
    kept = min(int(density * n), n - dropped)
    if not kept:
        return torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    mask = topk_mask(x, _share(kept + dropped, n), minus=minus)
    return mask.logical_and_(topk_mask(x, _share(dropped, n), minus=minus).logical_not_()) if dropped else mask


def _share(k: int, n: int) -> float:
    """A density that keeps ``k`` of ``n``."""
    return min(1.0, (k + 0.5) / n)


def keep_probabilities(x: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's chances to stay: in each row from ``density - epsilon`` (smallest magnitude) to ``density + epsilon``.

    They rise evenly with the rank of the magnitude in fp32, from 0 to ``cols - 1``; of equal ones the lowest index
    ranks highest. A row of one entry gets ``density``.

    Args:
        x: ``[rows, cols]``.
    Returns:
        fp32, ``[rows, cols]``.
    Source: Deep et al., arXiv:2406.11617.
    """
    rows, cols = x.shape
    if epsilon == 0 or cols == 1:
        return torch.full((rows, cols), density)
    size = x.to(torch.float32).abs().contiguous().numpy().view(np.uint32)  # as integers they order alike
    keys = size.astype(np.uint64) << np.uint64(32) | np.arange(cols - 1, -1, -1, dtype=np.uint64)
    keys.sort(axis=1)
    columns = torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).astype(np.int64)).neg_().add_(cols - 1)
    chances = torch.linspace(density - epsilon, density + epsilon, cols, dtype=torch.float64).to(torch.float32)
    return torch.empty(rows, cols).scatter_(1, columns, chances.expand(rows, cols))


class Stream:
    """Uniform numbers for the entries of one task vector's tensor, a block of rows after another.

    Every row of ``cols`` entries takes ``ceil(cols / 2)`` 64-bit words of numpy's SFC64, whose stream is fixed for
    good, each word giving two 32-bit numbers, the low half first. So the numbers hang on nothing but the key.

    Args:
        seed: what the user gave.
        name: path of the layer, or the parameter's name.
        key: which of the task vectors.
    """

    def __init__(self, seed: int, name: str, key: str) -> None:
        digest = hashlib.sha256(f"{seed}\0{key}\0{name}".encode()).digest()
        words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
        self._bits = np.random.SFC64(np.random.SeedSequence(words))

    def keep(self, rows: int, cols: int, probability: float | Tensor) -> Tensor:
        """Draw for the next ``[rows, cols]``: true with ``probability``, rounded to a multiple of 2**-32.

        Args:
            probability: one, or ``[rows, cols]``.
        """
        words = np.asarray(self._bits.random_raw(rows * -(-cols // 2)), dtype="<u8").view("<u4")
        numbers = words.reshape(rows, -1)[:, :cols]
        if isinstance(probability, Tensor):
            limits = probability.to(torch.float64).mul_(2.0**32).round_().numpy()
            return torch.from_numpy(numbers < limits)
        limit = round(probability * 2**32)
        return (
            torch.from_numpy(numbers < np.uint32(limit)) if limit < 2**32 else torch.ones(rows, cols, dtype=torch.bool)
        )


class PackedMask:
    """A mask at a bit per entry.

    Args:
        mask: bool, ``[rows, cols]``.
    """

    def __init__(self, mask: Tensor) -> None:
        self._cols = mask.shape[1]
        self._bits = np.packbits(mask.numpy(), axis=1)

    def rows(self, start: int, stop: int) -> Tensor:
        """bool, ``[stop - start, cols]``."""
        return torch.from_numpy(np.unpackbits(self._bits[start:stop], axis=1, count=self._cols).view(np.bool_))
