"""Truncated SVD of a weighted sum of low-rank products, from the factors alone.

With ``Bc = [B_1 | ... | B_N]``, ``Ac = [A_1; ...; A_N]`` and W the weights, one per column, the sum is ``Bc W Ac``. QR
gives ``Bc = Qb Rb`` and ``Ac^T = Qa Ra``; the SVD of the ``R x R`` core ``Rb W Ra^T = U S V^T`` then yields the sum's
own: ``(Qb U) S (Qa V)^T``.

Everything runs in fp64. The factors are thin, so that is affordable, and it keeps the answer right where fp32 loses it:
for adapters that differ by 1e-4 and get weights 1 and -1 the fp32 result is off by 5e-3, for 1e-6 by half. The QR is
Householder's for such adapters and for fp64 factors: a Gram matrix squares the condition number, in fp64 it drowns
singular values below 1e-8 of the largest. Well-conditioned fp32 factors take the Gram matrix (``thin_qr``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fuse.ops.factored import thin_qr
from lora_fuse.ops.svd import LowRankSVD, check_rank, directions_for, make_svd, robust_svd


@torch.no_grad()
def lowrank_svd(
    lora_bs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    rank: int | None = None,
    *,
    energy: float | None = None,
) -> LowRankSVD:
    """Best rank-k approximation of ``sum_i weights[i] * lora_bs[i] @ lora_as[i]``, exact, without forming the sum.

    Args:
        lora_bs: N tensors ``[..., m, r_i]``, any floating dtype; ranks may differ, leading batch dimensions may not.
        lora_as: N tensors ``[..., r_i, n]``.
        weights: N numbers, of any sign; scalings belong in here. None: all 1.
        rank: keep at most this many directions; ``k = min(rank, m, n, sum r_i)``. None: all of them.
        energy: instead of ``rank``: the fewest directions that keep this share of the squared Frobenius norm,
            ``0 < energy <= 1``; unbatched only. At least one direction is kept.

    Returns:
        ``LowRankSVD``: U, S, Vh in fp32 (fp64 if any factor is), and ``residual``, ``norm`` and ``energy`` in fp64.
        Computed in fp64 throughout. The component of largest magnitude in each column of U is positive, which fixes
        the signs; the vectors of equal singular values remain a choice of LAPACK's. Not differentiable.
        Memory is O((m + n) * sum r_i); an m x n array appears only if ``sum r_i >= max(m, n)``, when the factors
        themselves are larger.

    Raises:
        ValueError: lengths, shapes or devices disagree, rank or energy is out of range, or a factor or weight is not
            finite (it is named).

    Source: low-rank recompression, Bebendorf, Hierarchical Matrices (2008), section 1.1.4; Eckart-Young.
    """
    coefs = check_products(lora_bs, lora_as, weights, rank, energy)
    columns = [c for b, c in zip(lora_bs, coefs, strict=True) for _ in range(b.shape[-1])]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (*lora_bs, *lora_as)) else torch.float32
    exact = dtype == torch.float64
    left, right = thin_qr(lora_bs, exact), thin_qr([a.mT for a in lora_as], exact)
    left_core, right_core = left.core, right.core
    column_coefs = left_core.new_tensor(columns)
    left_core = left_core * column_coefs  # Bc diag(c) = Qb (Rb diag(c)), and Rb has far fewer rows
    core = left_core @ right_core.mT  # [..., min(m, R), min(n, R)]
    if not bool(torch.isfinite(core).all()):
        raise ValueError(_name_non_finite(lora_bs, lora_as))
    u, s, vh = robust_svd(core, "lora_bs, lora_as: their core")

    k = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    if energy is not None:
        # What rounding can leave where the terms cancel: eps times the sum of the terms' own norms.
        scale = torch.linalg.vector_norm(left_core, dim=0) @ torch.linalg.vector_norm(right_core, dim=0)
        noise = float(10 * torch.finfo(s.dtype).eps * scale)
        k = directions_for(s.square(), energy, noise**2)
    norm, residual = torch.linalg.vector_norm(s, dim=-1), torch.linalg.vector_norm(s[..., k:], dim=-1)
    u = left.apply(u[..., :k])  # [..., m, k]
    v = right.apply(vh[..., :k, :].mT)  # [..., n, k]
    return make_svd(u, s[..., :k], v, residual, norm, dtype)


def check_products(
    lora_bs: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None,
    rank: int | None,
    energy: float | None,
) -> list[float]:
    """The weights as floats, after every check that needs no arithmetic on the factors."""
    coefs = [1.0] * len(lora_bs) if weights is None else [float(w) for w in weights]
    if not lora_bs or len({len(lora_bs), len(lora_as), len(coefs)}) != 1:
        raise ValueError(
            "lora_bs, lora_as, weights: expected the same number of each, at least one; "
            f"got {len(lora_bs)}, {len(lora_as)} and {len(coefs)}"
        )
    for i, coef in enumerate(coefs):
        if not abs(coef) < float("inf"):
            raise ValueError(f"weights[{i}]: expected a finite number, got {coef}")
    b0, a0 = lora_bs[0], lora_as[0]
    for i, (b, a) in enumerate(zip(lora_bs, lora_as, strict=True)):
        for name, t in ((f"lora_bs[{i}]", b), (f"lora_as[{i}]", a)):
            if t.ndim < 2 or not t.is_floating_point():
                raise ValueError(f"{name}: expected a floating-point matrix, got {t.dtype} of shape {tuple(t.shape)}")
            if t.device != b0.device:
                raise ValueError(f"{name}: on {t.device}, accepted is one device for all, as {b0.device}")
            if t.is_meta:
                raise ValueError(f"{name}: is on the meta device, it has no data")
        if b.shape[-1] != a.shape[-2] or b.shape[-1] == 0:
            raise ValueError(
                f"lora_bs[{i}], lora_as[{i}]: expected [..., m, r] and [..., r, n] with one rank r >= 1, "
                f"got {tuple(b.shape)} and {tuple(a.shape)}"
            )
        if b.shape[:-1] != b0.shape[:-1] or (*a.shape[:-2], a.shape[-1]) != (*b0.shape[:-2], a0.shape[-1]):
            raise ValueError(
                f"lora_bs[{i}], lora_as[{i}]: shapes {tuple(b.shape)} and {tuple(a.shape)} do not give the same "
                f"product shape as lora_bs[0], lora_as[0]: {tuple(b0.shape)} and {tuple(a0.shape)}"
            )
    check_rank(rank, energy)
    if energy is not None and b0.ndim > 2:
        raise ValueError(f"energy: needs unbatched factors, got lora_bs[0] of shape {tuple(b0.shape)}")
    return coefs


def _name_non_finite(lora_bs: Sequence[Tensor], lora_as: Sequence[Tensor]) -> str:
    for name, tensors in (("lora_bs", lora_bs), ("lora_as", lora_as)):
        for i, t in enumerate(tensors):
            if not bool(torch.isfinite(t).all()):
                return f"{name}[{i}]: has NaN or infinite entries"
    return "lora_bs, lora_as: finite, but their product overflows fp64"
