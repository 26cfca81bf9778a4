"""What the truncated SVDs share: their result, their checks, the sign rule, and an SVD that does not give up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fuse.ops import gpu
from lora_fuse.ops.normals import Normals
from lora_fuse.ops.orthonormal import cholesky_rounds


class _Triple(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class LowRankSVD(_Triple):
    """``(U, S, Vh)``, which unpacks as three, with what the truncation dropped beside it.

    Attributes:
        U: ``[..., m, k]``, orthonormal columns.
        S: ``[..., k]``, descending.
        Vh: ``[..., k, n]``, orthonormal rows.
        residual: ``[...]``, fp64: Frobenius norm of what was cut off, ``||X - U S Vh||``.
        norm: ``[...]``, fp64: Frobenius norm of the whole matrix.
    """

    residual: Tensor
    norm: Tensor

    @property
    def energy(self) -> Tensor:
        """``[...]``, fp64: share of the squared Frobenius norm that was kept (1 for a matrix that is zero)."""
        total = self.norm.square()
        return 1.0 - self.residual.square() / torch.where(total > 0, total, 1.0)


def make_svd(u: Tensor, s: Tensor, v: Tensor, residual: Tensor, norm: Tensor, dtype: torch.dtype) -> LowRankSVD:
    """The result in ``dtype``, from ``u [..., m, k]``, ``s [..., k]`` and ``v [..., n, k]``, with the signs fixed.

    In each column of U the component of largest magnitude is positive.
    """
    sign = peak_signs(u)
    result = LowRankSVD((u * sign).to(dtype), s.to(dtype), (v * sign).mT.to(dtype).contiguous())
    result.residual, result.norm = residual, norm
    return result


def peak_signs(u: Tensor) -> Tensor:
    """``[..., 1, k]``: the sign of the entry of largest magnitude in each column of ``u [..., m, k]``."""
    return torch.where(u.amax(-2, keepdim=True) < -u.amin(-2, keepdim=True), -1.0, 1.0).to(u.dtype)


def check_rank(rank: int | None, energy: float | None) -> None:
    """ValueError if both are given or one is out of range."""
    if rank is not None and energy is not None:
        raise ValueError(f"rank, energy: give one of the two, got rank={rank} and energy={energy}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected an integer of at least 1, got {rank!r}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy: expected 0 < energy <= 1, got {energy}")


def robust_svd(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.svd(x, full_matrices=False)``, and where LAPACK does not converge, by eigenvectors in fp64.

    Args:
        x: ``[..., m, n]``, fp32 or fp64, finite.
        name: what the error calls it.
    Raises:
        RuntimeError: nothing converges.
    """
    try:
        return torch.linalg.svd(x, full_matrices=False)
    except torch.linalg.LinAlgError:
        pass
    try:
        k = min(x.shape[-2:])
        u, s, v, _ = gram_svd(x, k)
        return u.to(x.dtype), s.to(x.dtype), v.mT.to(x.dtype)
    except torch.linalg.LinAlgError as error:
        raise RuntimeError(
            f"{name}: the SVD of shape {tuple(x.shape)} does not converge, nor do the eigenvalues of its Gram matrix "
            f"({error}); look for extreme entries (largest magnitude {float(x.abs().amax()):.3g}), or rescale it"
        ) from error


def core_svd(core: Tensor, k: int | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``k`` singular triples (all if None) of a small ``core [..., d, e]``: U, S and V, in its dtype.

    On a GPU from the eigenvectors of its Gram matrix, which take one call for a whole batch and the host waits for
    once; LAPACK's SVD elsewhere. ``robust_svd`` says what ``name`` is for.
    """
    if gpu.takes_kernels(core.device):
        try:
            u, s, v, _ = gram_svd(core, min(core.shape[-2:]) if k is None else k)
            return u, s, v
        except torch.linalg.LinAlgError:
            pass
    u, s, vh = robust_svd(core, name)
    return u[..., :k], s[..., :k], vh[..., :k, :].mT


def gram_svd(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First ``k`` singular triples of ``x [..., m, n]`` from the fp64 Gram matrix of its shorter side.

    Singular values below 1e-8 of the largest drown in rounding; their vectors are orthonormal all the same.

    Returns:
        ``u [..., m, k]``, ``s [..., k]``, ``v [..., n, k]`` and the sum of the squares of the other singular values
        ``[...]``, all fp64.
    """
    m, n = x.shape[-2:]
    wide = x.to(torch.float64)
    if m > n:
        v, s, u, tail = gram_svd(wide.mT, k)
        return u, s, v, tail
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    u = vectors[..., -k:].flip(-1)  # [..., m, k]
    v, d = _nearly_orthogonal_qr(wide.mT @ u)
    s, order = d.abs().sort(dim=-1, descending=True, stable=True)
    order = order[..., None, :]
    u, v = u.gather(-1, order.expand_as(u)), (v * torch.where(d < 0, -1.0, 1.0)[..., None, :])
    v = v.gather(-1, order.expand_as(v))
    return u, s, v, values[..., : m - k].clamp_min(0).sum(-1)


def _nearly_orthogonal_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q and the diagonal of R of ``x [..., n, k]``, fp64, whose columns are orthogonal up to the largest's rounding."""
    if not gpu.takes_kernels(x.device):
        q, r = torch.linalg.qr(x)
        return q, r.diagonal(dim1=-2, dim2=-1)
    # Cholesky's, which comes in batches. What drowned in rounding gives way to random directions.
    lengths = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    drowned = lengths <= 3e-8 * lengths.amax(-1, keepdim=True)
    other = Normals(0).draw(x.shape, x.device) / x.shape[-2] ** 0.5
    q = cholesky_rounds(torch.where(drowned, other, x / lengths))
    return q, (q * x).sum(-2)


def directions_for(squares: Tensor, energy: float, noise: float = 0.0, beyond: float = 0.0) -> int:
    """Fewest leading entries that add up to ``energy`` of all, at least one.

    Args:
        squares: ``[k]``, squared singular values, descending.
        energy: ``0 < energy <= 1``.
        noise: a tail whose sum is no larger counts as nothing.
        beyond: squared norm of what ``squares`` does not cover.
    """
    tail = squares.flip(0).cumsum(0).flip(0) + beyond  # tail[i] = sum from i on, smallest first
    return max(1, int((tail > (1.0 - energy) * tail[:1] + noise).sum()))
