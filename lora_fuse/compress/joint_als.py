"""Joint diagonalisation of low-rank products: ``B_i A_i ~ U core_i V^T``, U and V shared by all i.

Everything works on the factors, or on their coordinates in the span of all factors where that is smaller than the
layer; no array of the weight's shape appears. Products are scaled to unit Frobenius norm before, so that each counts
alike, and a squared error is the share of a product's squared norm that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OVERSAMPLE = 8  # directions carried beyond the rank: the last wanted one converges with them, not alone
_SPAN_EPS = 1e-13  # of a Gram matrix's largest eigenvalue: directions below are rounding
_RIDGE = 1e-9


@dataclass(frozen=True)
class Products:
    """N products ``b[i] @ a[i]`` of norm 1 (or 0), ranks filled up with zeros; fp32.

    Args:
        b: ``[N, m, p]``.
        a: ``[N, p, n]``.
    """

    b: Tensor
    a: Tensor

    def __len__(self) -> int:
        return self.b.shape[0]

    def chosen(self, index: Tensor) -> Products:
        return Products(self.b[index], self.a[index])


@dataclass(frozen=True)
class JointFit:
    """What one set of products became.

    Args:
        u, v: ``[m, r]`` and ``[n, r]``; orthonormal columns in the full form, of norm 1 in the diagonal one.
        cores: ``[N, r, r]``, or their diagonals ``[N, r]``.
        errors: ``[N]``, squared.
    """

    u: Tensor
    v: Tensor
    cores: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Span:
    """Orthonormal bases of all columns of the b's and all rows of the a's, None where the layer is no larger."""

    left: Tensor | None
    right: Tensor | None

    def lift(self, fit: JointFit) -> JointFit:
        """A fit in the coordinates of the span, back in the layer's."""
        u = fit.u if self.left is None else self.left @ fit.u
        v = fit.v if self.right is None else self.right @ fit.v
        return JointFit(u, v, fit.cores, fit.errors)


def unit_products(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> tuple[Products, Tensor]:
    """The products of these factors scaled to norm 1, and ``[N]`` their norms.

    Args:
        bs: N matrices ``[m, r_i]``.
        as_: N matrices ``[r_i, n]``.
    """
    p = max(b.shape[1] for b in bs)
    b = torch.zeros(len(bs), bs[0].shape[0], p, dtype=torch.float64)
    a = torch.zeros(len(bs), p, as_[0].shape[1], dtype=torch.float64)
    for i, (bi, ai) in enumerate(zip(bs, as_, strict=True)):
        b[i, :, : bi.shape[1]], a[i, : ai.shape[0]] = bi, ai
    norms = ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).clamp_min(0).sqrt()
    # Both factors get the same norm, so that neither leaves fp32's range.
    sizes = [torch.linalg.vector_norm(t, dim=(1, 2)) for t in (b, a)]
    scale = [torch.where(norms > 0, (sizes[1 - k] / sizes[k] / norms).sqrt(), 0.0) for k in (0, 1)]
    scaled = (t * s[:, None, None] for t, s in zip((b, a), scale, strict=True))
    return Products(*(t.float() for t in scaled)), norms


def in_span(products: Products) -> tuple[Products, Span]:
    """The products in coordinates of the span of all factors: ``[m, n]`` shrinks to at most ``[N p, N p]``."""
    left, b = _coordinates(products.b.permute(1, 0, 2))
    right, a = _coordinates(products.a.permute(2, 0, 1))
    return Products(b.permute(1, 0, 2).contiguous(), a.permute(1, 2, 0).contiguous()), Span(left, right)


def _coordinates(columns: Tensor) -> tuple[Tensor | None, Tensor]:
    """An orthonormal basis of the columns ``[m, N, p]`` and their coordinates in it, unless it would be as large."""
    m, n, p = columns.shape
    if m <= n * p:
        return None, columns
    flat = columns.reshape(m, n * p).double()
    values, vectors = torch.linalg.eigh(flat.mT @ flat)
    kept = values > _SPAN_EPS * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    root = values[kept].sqrt()
    coordinates = root[:, None] * vectors[:, kept].mT  # [s, N p]
    basis = flat @ (vectors[:, kept] / root)
    return basis.float(), coordinates.float().reshape(-1, n, p)


def fit_full(products: Products, rank: int, seed: int, sweeps: int = 200, tolerance: float = 1e-5) -> JointFit:
    """U, V orthonormal and cores free: maximise ``sum ||U^T B_i A_i V||^2``, one side after the other.

    A half sweep is a step of orthogonal iteration on ``sum M_i V V^T M_i^T``, warm from the last one, with a
    Rayleigh-Ritz rotation; it never loses ground.

    Args:
        rank: columns of U and V, at most ``min(m, n)``.
        sweeps, tolerance: at most so many; fewer once the error falls by less than this share in five of them.
    Source: Brüel-Gabrielsson et al., arXiv:2407.00066 (JD-Full); Ye, GLRAM, 2005.
    """
    width_u, width_v = (min(rank + _OVERSAMPLE, size) for size in (products.b.shape[1], products.a.shape[2]))
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(products.a.shape[2], width_v, generator=generator)
    # A start: the right singular space of all products stacked, whose Gram matrix is sum A_i^T (B_i^T B_i) A_i.
    stacked = (torch.linalg.qr(products.b).R @ products.a).flatten(0, 1)
    for _ in range(8):
        v = torch.linalg.qr(stacked.mT @ (stacked @ v)).Q
    u = torch.randn(products.b.shape[1], width_u, generator=generator)
    b_of, a_of = (lambda q: products.b.mT @ q), (lambda q: products.a @ q)
    total = float(len(products))
    history = [total]
    for sweep in range(sweeps):
        u, _ = _half(products.b, b_of, a_of(v[:, :rank]), u, 2 if sweep else 4)
        v, caught = _half(products.a.mT, a_of, b_of(u[:, :rank]), v, 1)
        history.append(max(0.0, total - float(caught[:rank].sum())))
        if sweep >= 5 and history[-6] - history[-1] <= tolerance * history[-1]:
            break
    u, v = u[:, :rank].contiguous(), v[:, :rank].contiguous()
    cores = (products.b.mT @ u).mT @ (products.a @ v)
    return JointFit(u, v, cores, _left_over(products, cores.square().sum((1, 2))))


def errors_under(products: Products, fit: JointFit) -> Tensor:
    """``[N]`` fp64: squared errors of other products under a fit's bases, each with its best core."""
    if fit.cores.dim() == 2:
        return _diagonals(products, fit.u, fit.v)[1]
    caught = ((products.b.mT @ fit.u).mT @ (products.a @ fit.v)).square().sum((1, 2))
    return _left_over(products, caught).double()


def _half(
    factors: Tensor, project: Callable[[Tensor], Tensor], other: Tensor, q: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Orthogonal iteration on ``sum f_i h_i h_i^T f_i^T``.

    Args:
        factors: ``[N, m, p]``; ``project(q)`` is ``f_i^T q``.
        other: ``[N, p, r]``, h: the other side's factors, projected.
    Returns:
        q with columns in descending order of what they catch, and that, ``[k]``.
    """
    wide = factors.transpose(0, 1).flatten(1)  # [m, N p]
    for _ in range(steps):
        q = torch.linalg.qr(wide @ (other @ (other.mT @ project(q))).flatten(0, 1)).Q
    seen = (other.mT @ project(q)).flatten(0, 1)  # [N r, k]
    values, vectors = torch.linalg.eigh((seen.mT @ seen).double())
    return q @ vectors.flip(1).to(q.dtype), values.flip(0)


def fit_diagonal(products: Products, rank: int, seed: int, sweeps: int = 300, tolerance: float = 1e-4) -> JointFit:
    """Diagonal cores, U and V free: ``B_i A_i ~ sum_k d_ik u_k v_k^T``, by alternating least squares.

    It starts from singular pairs of the products themselves, and of three such starts goes on with the best.

    Args:
        rank: number of pairs; may exceed ``min(m, n)``.
        sweeps, tolerance: as for ``fit_full``.
    Source: Brüel-Gabrielsson et al., arXiv:2407.00066 (JD-Diag); Harshman, PARAFAC, 1970.
    """
    if not rank:  # the span of products that are all zero
        m, n, count = products.b.shape[1], products.a.shape[2], len(products)
        return JointFit(torch.zeros(m, 0), torch.zeros(n, 0), torch.zeros(count, 0), torch.zeros(count))
    generator = torch.Generator().manual_seed(seed)
    starts = [_pairs_of(products, rank, generator) for _ in range(3)]
    u, v, _ = min((_sweeps(products, *start, 10, 0.0) for start in starts), key=lambda tried: float(tried[2].sum()))
    u, v, errors = _sweeps(products, u, v, sweeps, tolerance)
    d, _ = _diagonals(products, u, v)
    return JointFit(u, v, d.float(), errors.float())


def _pairs_of(products: Products, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``rank`` singular pairs of the products, drawn by their energy."""
    qb, rb = torch.linalg.qr(products.b)
    qa, ra = torch.linalg.qr(products.a.mT)
    x, s, yh = torch.linalg.svd(rb @ ra.mT)
    us, vs = (qb @ x).transpose(0, 1).flatten(1), (qa @ yh.mT).transpose(0, 1).flatten(1)  # [m, N p]
    energy = s.flatten().square().double() + 1e-12
    if rank <= energy.numel():
        index = torch.multinomial(energy, rank, generator=generator)
        return us[:, index], vs[:, index]
    more = rank - energy.numel()
    noise = (torch.randn(t.shape[0], more, generator=generator) / t.shape[0] ** 0.5 for t in (us, vs))
    u, v = (torch.cat(pair, 1) for pair in zip((us, vs), noise, strict=True))
    return u, v


def _sweeps(products: Products, u: Tensor, v: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    history: list[float] = []
    wide_b, wide_a = products.b.transpose(0, 1).flatten(1), products.a.permute(2, 0, 1).flatten(1)
    for _ in range(count):
        d, errors = _diagonals(products, u, v)
        history.append(float(errors.sum()))
        if len(history) > 10 and history[-11] - history[-1] <= tolerance * history[-1]:
            break
        gram = d.mT @ d
        u = _solve(wide_b @ ((products.a @ v) * d[:, None].float()).flatten(0, 1), gram * _gram(v))
        u = u / torch.linalg.vector_norm(u, dim=0).clamp_min(1e-30)
        d, _ = _diagonals(products, u, v)
        gram = d.mT @ d
        v = _solve(wide_a @ ((products.b.mT @ u) * d[:, None].float()).flatten(0, 1), gram * _gram(u))
        v = v / torch.linalg.vector_norm(v, dim=0).clamp_min(1e-30)
    _, errors = _diagonals(products, u, v)
    return u, v, errors


def _diagonals(products: Products, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, r]`` least-squares diagonals for given u, v, and ``[N]`` squared errors; fp64."""
    seen = ((products.b.mT @ u) * (products.a @ v)).sum(1).double()  # [N, r]: u_k^T M_i v_k
    gram = _gram(u) * _gram(v)
    d = _solve(seen, gram)
    caught = 2 * (d * seen).sum(1) - ((d @ gram) * d).sum(1)
    return d, _left_over(products, caught).double()


def _gram(x: Tensor) -> Tensor:
    return x.double().mT @ x.double()


def _solve(right: Tensor, gram: Tensor) -> Tensor:
    """``right @ inverse(gram)`` with a ridge that only matters where gram is singular."""
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-300)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype))
    return torch.cholesky_solve(right.double().mT, factor).mT.to(right.dtype)


def _left_over(products: Products, caught: Tensor) -> Tensor:
    norms = ((products.b.mT @ products.b) * (products.a @ products.a.mT)).sum((1, 2))
    return (norms - caught).clamp_min(0)
