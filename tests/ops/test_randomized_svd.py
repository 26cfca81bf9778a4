"""randomized_svd: near the optimum on every spectrum, whatever the matrix is made of, and the truth about its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fuse import SparseMatrix
from lora_fuse import functional as F
from lora_fuse.ops import randomized_svd as module

M, N, RANK = 320, 400, 16


def _with_spectrum(s: Tensor, m: int = M, n: int = N) -> Tensor:
    u = torch.linalg.qr(torch.randn(m, s.shape[0], dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, s.shape[0], dtype=torch.float64)).Q
    return (u * s.double() @ v.T).float()


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "flat": lambda: torch.randn(M, N),
    "slow": lambda: _with_spectrum(torch.arange(1, M + 1) ** -0.5),
    "fast": lambda: _with_spectrum(torch.exp(-torch.arange(M) / 4.0)),
    "low_rank_plus_noise": lambda: torch.randn(M, 10) @ torch.randn(10, N) + 0.05 * torch.randn(M, N),
    "graded": lambda: torch.randn(M, N) * torch.logspace(0, -9, N),
}


def _dense(svd: Any) -> Tensor:
    u, s, vh = (t.double() for t in svd)
    return u * s[..., None, :] @ vh


def _check(svd: F.LowRankSVD, exact: Tensor, k: int, excess: float, floor: float = 2e-6) -> None:
    """Orthonormal factors, falling values, an error near the smallest, and a report of it that is right."""
    u, s, vh = (t.double() for t in svd)
    assert s.shape[-1] == k
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye.expand_as(u.mT @ u), rtol=0, atol=5e-6)
    torch.testing.assert_close(vh @ vh.mT, eye.expand_as(vh @ vh.mT), rtol=0, atol=5e-6)
    assert (s.diff(dim=-1) <= 0).all()
    assert (u.gather(-2, u.abs().argmax(-2, keepdim=True)) > 0).all()
    exact = exact.double()
    norm = torch.linalg.matrix_norm(exact)
    error = torch.linalg.matrix_norm(exact - _dense(svd))
    optimal = torch.linalg.svdvals(exact)[..., k:].norm(dim=-1)
    assert (error <= optimal * (1 + excess) + floor * norm).all()
    torch.testing.assert_close(svd.norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(svd.residual, error, rtol=1e-3, atol=float(floor * norm.max()))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_error_is_near_the_optimum(spectrum: str) -> None:
    x = SPECTRA[spectrum]()
    _check(F.randomized_svd(x, RANK), x, RANK, excess=1e-2)
    _check(F.randomized_svd(x.T, RANK), x.T, RANK, excess=1e-2)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_worse_than_subspace_iteration(spectrum: str) -> None:
    x = SPECTRA[spectrum]()
    for iters in (0, 1, 2):
        ours = torch.linalg.matrix_norm(x.double() - _dense(F.randomized_svd(x, RANK, power_iters=iters)))
        u, s, v = torch.svd_lowrank(x, q=RANK, niter=iters)
        theirs = torch.linalg.matrix_norm(x.double() - _dense((u, s, v.T)))
        assert ours <= theirs + 1e-5 * x.norm()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_tolerance_is_met(spectrum: str) -> None:
    x = SPECTRA[spectrum]()
    _check(F.randomized_svd(x, RANK, power_iters=0, tolerance=1e-3), x, RANK, excess=1e-3)


@pytest.mark.parametrize("rank", [60, 152, 320, 1000])
def test_large_ranks_are_exact(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_krylov", None)  # rank + oversample, or the Krylov space, would fill the matrix
    x = torch.randn(M, N) if rank > 100 else torch.randn(140, 400)
    _check(F.randomized_svd(x, rank), x, min(rank, *x.shape), excess=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_is_kept_by_few_directions(spectrum: str, energy: float) -> None:
    x = SPECTRA[spectrum]()
    squares = torch.linalg.svdvals(x.double()).square()
    fewest = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
    got = F.randomized_svd(x, energy=energy)
    assert fewest <= got.S.shape[0] <= 1.02 * fewest + 1
    _check(got, x, got.S.shape[0], excess=1e-2)
    assert float(got.energy) >= energy - 1e-6


OPERANDS: dict[str, Callable[[], tuple[Any, Tensor]]] = {}


def _operand(build: Callable[[], tuple[Any, Tensor]]) -> None:
    OPERANDS[build.__name__.removeprefix("_")] = build


def _sparse() -> SparseMatrix:
    dense = torch.randn(M, N)
    return SparseMatrix.from_mask(dense, torch.rand(M, N) < 0.05)


def _products(rank: int) -> F.SumOfProducts:
    return F.SumOfProducts(
        [torch.randn(M, rank), torch.randn(M, 7)], [torch.randn(rank, N), torch.randn(7, N)], [0.3, -2.0]
    )


@_operand
def _bf16() -> tuple[Any, Tensor]:
    x = torch.randn(M, N).bfloat16()
    return x, x.double()


@_operand
def _fp16_strided() -> tuple[Any, Tensor]:
    x = torch.randn(N, 2 * M).half()[:, ::2].T
    return x, x.double()


@_operand
def _fp64() -> tuple[Any, Tensor]:
    x = torch.randn(M, N, dtype=torch.float64)
    return x, x


@_operand
def _difference() -> tuple[Any, Tensor]:
    base = torch.randn(M, N).bfloat16()
    tuned = (base.float() + 0.1 * torch.randn(M, N)).half()
    return F.Difference(tuned, base), tuned.double() - base.double()


@_operand
def _sum_of_products() -> tuple[Any, Tensor]:
    x = _products(120)
    return x, x.dense(torch.float64)


@_operand
def _sparse_matrix() -> tuple[Any, Tensor]:
    x = _sparse()
    return x, x.to_dense().double()


@_operand
def _sum() -> tuple[Any, Tensor]:
    terms = [torch.randn(M, N), _sparse(), _products(3), F.Difference(torch.randn(M, N), torch.ones(M, N))]
    exact = terms[0].double() - 3 * terms[1].to_dense().double() + 0.5 * terms[2].dense(torch.float64)
    return F.Sum(terms, [1.0, -3.0, 0.5, 2.0]), exact + 2 * terms[3].dense(torch.float64)


@_operand
def _batch() -> tuple[Any, Tensor]:
    x = torch.randn(2, 3, M, N)
    x[0, 1] = 0
    x[1, 2] *= 1e-6
    return x, x


@_operand
def _batched_difference() -> tuple[Any, Tensor]:
    x = torch.randn(2, M, N)
    return F.Difference(x, x.flip(0) * 0.5), x.double() - x.flip(0).double() * 0.5


@pytest.mark.parametrize("tile", [1 << 22, N * 33])
@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fuse.ops.operands._TILE", tile)
    x, exact = OPERANDS[name]()
    svd = F.randomized_svd(x, RANK)
    assert all(t.dtype == (torch.float64 if name == "fp64" else torch.float32) for t in svd)
    _check(svd, exact, RANK, excess=2e-2)
