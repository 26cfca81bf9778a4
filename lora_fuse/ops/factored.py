"""Matrices given as products of thin factors, ``left @ right^T``: their QR and their SVD.

All in fp64, on ``left [..., m, R]`` and ``right [..., n, R]``. Q is never formed: ``apply_q`` applies its reflectors to
the few columns that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fuse.ops.svd import robust_svd

# What geqrf returns; None stands for the identity, where a matrix has no more rows than columns.
Reflectors: TypeAlias = tuple[Tensor, Tensor] | None


def side_by_side(blocks: Sequence[Tensor]) -> Tensor:
    """``[blocks[0] | blocks[1] | ...]`` in fp64 and in LAPACK's column order, so that geqrf need not transpose it."""
    *batch, rows, _ = blocks[0].shape
    total = sum(b.shape[-1] for b in blocks)
    out = torch.empty(*batch, total, rows, dtype=torch.float64, device=blocks[0].device).mT
    torch.cat([b.mT for b in blocks], dim=-2, out=out.mT)
    return out


def reduce(x: Tensor) -> tuple[Reflectors, Tensor]:
    """Householder reflectors and R of ``x [..., m, R]``; a matrix with no more rows than columns is its own core."""
    m, cols = x.shape[-2:]
    if m <= cols:
        return None, x
    packed, tau = torch.geqrf(x)
    return (packed, tau), packed[..., :cols, :].triu()


def apply_q(reflectors: Reflectors, x: Tensor) -> Tensor:
    """``Q @ x`` for ``x [..., R, k]``: ``[..., m, k]``."""
    if reflectors is None:
        return x
    rows = reflectors[0].shape[-2]
    padded = x.new_zeros(*x.shape[:-2], x.shape[-1], rows).mT
    padded[..., : x.shape[-2], :] = x
    return torch.ormqr(*reflectors, padded)


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``left @ right^T``: ``(U [..., m, k], S [..., k], V [..., n, k])``, ``k = min(m, n, R)``."""
    left_q, left_core = reduce(left)
    right_q, right_core = reduce(right)
    u, s, vh = robust_svd(left_core @ right_core.mT, "the core of a product")
    return apply_q(left_q, u), s, apply_q(right_q, vh.mT)
