"""randomized_svd: near the optimum on every spectrum, whatever the matrix is made of, and the truth about its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fuse import SparseMatrix, _cpu
from lora_fuse import functional as F
from lora_fuse.ops import randomized_svd as module
from lora_fuse.ops.normals import Normals
from lora_fuse.ops.operands import as_operand
from lora_fuse.ops.orthonormal import orthonormal, orthonormalize
from lora_fuse.ops.sketch import worthwhile
from lora_fuse.ops.thin_products import Dense

M, N, RANK = 320, 400, 16
FP32 = torch.float32


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


@pytest.fixture(params=["random start", "bf16 start"])
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to start, whatever this CPU would choose for matrices of this size."""
    rough = request.param == "bf16 start"
    monkeypatch.setattr(module, "worthwhile", lambda x, block: rough and isinstance(x, Dense) and x.dtype == FP32)
    return str(request.param)


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_error_is_near_the_optimum(spectrum: str) -> None:
    x = SPECTRA[spectrum]()
    _check(F.randomized_svd(x, RANK), x, RANK, excess=1e-2)
    _check(F.randomized_svd(x.T, RANK), x.T, RANK, excess=1e-2)


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_worse_than_subspace_iteration(spectrum: str) -> None:
    x = SPECTRA[spectrum]()
    for iters in (0, 1, 2):
        ours = torch.linalg.matrix_norm(x.double() - _dense(F.randomized_svd(x, RANK, power_iters=iters)))
        u, s, v = torch.svd_lowrank(x, q=RANK, niter=iters)
        theirs = torch.linalg.matrix_norm(x.double() - _dense((u, s, v.T)))
        assert ours <= theirs + 1e-5 * x.norm()


@pytest.mark.usefixtures("start")
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
    monkeypatch.setattr("lora_fuse.ops.thin_products._TILE", tile)
    x, exact = OPERANDS[name]()
    svd = F.randomized_svd(x, RANK)
    assert all(t.dtype == (torch.float64 if name == "fp64" else torch.float32) for t in svd)
    _check(svd, exact, RANK, excess=2e-2)


class _Own:
    """A caller's operator around a dense matrix."""

    def __init__(self, x: Tensor, knows_norm: bool) -> None:
        self.x, self.shape = x, x.shape
        if knows_norm:
            self.squared_norm = lambda: x.square().sum()

    def matmul(self, q: Tensor) -> Tensor:
        return self.x @ q

    def rmatmul(self, q: Tensor) -> Tensor:
        return self.x.mT @ q


@pytest.mark.parametrize("knows_norm", [False, True])
def test_operator(knows_norm: bool) -> None:
    x = torch.randn(M, N)
    got, want = F.randomized_svd(_Own(x, knows_norm), RANK), F.randomized_svd(x, RANK)
    torch.testing.assert_close(_dense(got), _dense(want), rtol=0, atol=1e-3)
    torch.testing.assert_close(got.norm, want.norm, rtol=1e-6 if knows_norm else 0.1, atol=0)
    torch.testing.assert_close(got.residual, want.residual, rtol=1e-6 if knows_norm else 0.1, atol=0)
    torch.testing.assert_close(_dense(F.randomized_svd(_Own(x, knows_norm), 300)), _dense(F.randomized_svd(x, 300)))
    if knows_norm:
        assert F.randomized_svd(_Own(x, True), energy=0.3).S.shape == F.randomized_svd(x, energy=0.3).S.shape
    else:
        with pytest.raises(ValueError, match=r"energy, tolerance: .* method squared_norm\(\)"):
            F.randomized_svd(_Own(x, False), energy=0.3)


def test_sums_of_few_products_are_exact() -> None:
    x = _products(20)
    got, want = F.randomized_svd(x, RANK), F.lowrank_svd(x.lora_bs, x.lora_as, x.weights, RANK)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_products_that_cancel_are_computed_in_fp64() -> None:
    b, a, extra = torch.randn(M, 150), torch.randn(150, N), 1e-5 * torch.randn(M, 150)
    x = F.SumOfProducts([b + extra, b], [a, a], [1.0, -1.0])
    exact = ((b + extra).double() - b.double()) @ a.double()
    svd = F.randomized_svd(x, 8)
    optimal = torch.linalg.svdvals(exact)[8:].norm()
    assert (exact - _dense(svd)).norm() <= 1.02 * optimal


def test_seeds() -> None:
    x, state = torch.randn(M, N), torch.get_rng_state()
    seeds = (None, 0, 2**64, torch.Generator().manual_seed(5), torch.Generator().manual_seed(5), 1, -1)
    runs = [F.randomized_svd(x, RANK, generator=g) for g in seeds]
    for a, b in ((0, 1), (0, 2), (3, 4)):
        assert all(torch.equal(p, q) for p, q in zip(runs[a], runs[b], strict=True))
    for a, b in ((0, 3), (0, 5), (0, 6), (5, 6)):
        assert not torch.equal(runs[a].S, runs[b].S)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0, 3, 5, 6, 8, 14, 40])
def test_ill_conditioned_blocks_become_orthonormal(decades: int, dtype: torch.dtype) -> None:
    random = Normals(0)
    q, p = (torch.linalg.qr(torch.randn(s, 24, dtype=torch.float64)).Q for s in (200, 24))
    before = torch.linalg.qr(torch.randn(200, 24, dtype=dtype)).Q
    w = (q * torch.logspace(0, -decades, 24, dtype=torch.float64) @ p).to(dtype)
    got = orthonormal(w + 100.0 * before @ torch.randn(24, 24, dtype=dtype), [before], random)
    eps = torch.finfo(dtype).eps
    eye = torch.eye(24, dtype=dtype)
    torch.testing.assert_close(got.T @ got, eye, rtol=0, atol=20 * eps)
    torch.testing.assert_close(before.T @ got, torch.zeros_like(eye), rtol=0, atol=100 * eps)
    alone = orthonormal(w, [], random)
    torch.testing.assert_close(alone.T @ alone, eye, rtol=0, atol=20 * eps)
    if decades <= 3:  # nothing was replaced by noise
        assert (w - alone @ (alone.T @ w)).norm() <= 100 * eps


@pytest.mark.parametrize("condition", [1e2, 1e9])
def test_householder_takes_over_only_where_it_must(condition: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, qr = [], torch.linalg.qr
    w = qr(torch.randn(200, 24, dtype=torch.float64)).Q.float() * torch.logspace(
        0, -torch.tensor(condition).log10().item(), 24
    )
    monkeypatch.setattr(torch.linalg, "qr", lambda x: calls.append(x) or qr(x))
    orthonormalize(w, Normals(0))
    assert len(calls) == (condition > 1e7)


@pytest.mark.parametrize("shape", [(M, N), (1, 5), (7, 1), (150, 140)])
def test_zeros(shape: tuple[int, int]) -> None:
    svd = F.randomized_svd(torch.zeros(shape), 4)
    assert torch.count_nonzero(svd.S) == 0
    assert float(svd.norm) == float(svd.residual) == 0.0
    assert float(svd.energy) == 1.0
    k = min(4, *shape)
    torch.testing.assert_close(svd.U.T @ svd.U, torch.eye(k), rtol=0, atol=1e-5)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, torch.eye(k), rtol=0, atol=1e-5)
    assert F.randomized_svd(torch.zeros(shape), energy=0.9).S.shape == (1,)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-14, 1e15, 1e25, 1e36])
def test_magnitudes_whose_squares_leave_fp32(start: str, scale: float) -> None:
    x = torch.randn(M, N)
    want, got = F.randomized_svd(x, RANK), F.randomized_svd(x * scale, RANK)
    torch.testing.assert_close(got.S / scale, want.S, rtol=2e-2 if start == "bf16 start" else 1e-3, atol=0)
    torch.testing.assert_close(got.norm / scale, want.norm, rtol=1e-5, atol=0)


def test_a_start_in_bf16_reads_the_matrix_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this path there is one product with X and one with X^T in fp32, unless the remainder is very faint."""
    calls: list[str] = []
    monkeypatch.setattr(module, "worthwhile", lambda x, block: True)
    for name in ("matmul", "rmatmul"):
        real = getattr(Dense, name)
        monkeypatch.setattr(Dense, name, lambda self, q, name=name, real=real: calls.append(name) or real(self, q))
    F.randomized_svd(torch.randn(M, N), RANK)
    assert calls == ["matmul", "rmatmul"]
    calls.clear()
    F.randomized_svd(SPECTRA["fast"](), RANK)  # the 17th value is 1/55 of the first, the 40th below a ten thousandth
    few = len(calls)
    calls.clear()
    x = _with_spectrum(torch.exp(-torch.arange(M) / 2.0))
    svd = F.randomized_svd(x, RANK)
    assert len(calls) == 6 > few
    _check(svd, x, RANK, excess=1e-2)


def test_large_matrices_start_in_bf16_where_that_pays() -> None:
    wanted = _cpu.isa() == "amx_bf16"
    big, small = torch.empty(1024, 1100), torch.empty(1000, 1100)
    assert worthwhile(as_operand(big, "x"), 96) is wanted
    for x in (small, big.double(), torch.empty(2, 1024, 1024), SparseMatrix.from_mask(torch.eye(4), torch.eye(4) > 0)):
        assert not worthwhile(as_operand(x, "x"), 96)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (2, 2), (129, 1000)])
@pytest.mark.parametrize("rank", [1, 5])
def test_narrow_matrices(shape: tuple[int, int], rank: int) -> None:
    x = torch.randn(shape)
    _check(F.randomized_svd(x, rank), x, min(rank, *shape), excess=2e-2)


@pytest.mark.parametrize("rank", [64, 128])
def test_rank_of_the_matrix_below_the_one_asked_for(rank: int) -> None:
    x = torch.randn(600, 30) @ torch.randn(30, 500)
    svd = F.randomized_svd(x, rank)
    _check(svd, x, rank, excess=0.0, floor=5e-6)
    assert float(svd.residual) <= 1e-5 * float(svd.norm)
    assert F.randomized_svd(x, energy=0.9999999).S.shape[0] <= 32


WITHIN: dict[str, Callable[[], Tensor]] = {  # matrices whose later blocks lie within the earlier ones
    "equal entries": lambda: torch.ones(208, 215),
    "identity, mostly masked": lambda: torch.eye(180, 240) * (torch.rand(180, 1) < 0.1),
    "few entries": lambda: torch.zeros(140, 162).index_put_(
        (torch.randint(140, (12,)), torch.randint(162, (12,))), 10.0 ** torch.linspace(-9, 1, 12)
    ),
    "rows that fade": lambda: torch.randn(150, 200) * torch.logspace(0, -18, 150)[:, None],
}


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", WITHIN)
def test_blocks_within_earlier_ones(name: str, dtype: torch.dtype) -> None:
    """A basis that is not orthonormal would count directions twice: S above the true values, U askew."""
    for rank, oversample, power_iters in ((1, 0, 2), (6, 4, 4), (10, 8, 2)):
        x = WITHIN[name]().to(dtype)
        svd, truth = F.randomized_svd(x, rank, oversample, power_iters), torch.linalg.svdvals(x.double())
        for q in (svd.U, svd.Vh.mT):
            error = (q.T @ q - torch.eye(rank, dtype=dtype)).abs().max()
            assert error <= 200 * torch.finfo(dtype).eps
        assert (svd.S.double() <= truth[:rank] + 50 * torch.finfo(dtype).eps * truth[0]).all()


def test_no_whole_difference_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fuse.ops.thin_products._TILE", 64 * N)
    largest, new = [], torch.Tensor.copy_
    a, b = torch.randn(M, N).bfloat16(), torch.randn(M, N).bfloat16()
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *args: largest.append(self.numel()) or new(self, *args))
    F.randomized_svd(F.Difference(a, b), RANK)
    assert max(largest) == 64 * N


def test_lapack_that_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    x, y = torch.randn(M, N), torch.randn(100, 90)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    _check(F.randomized_svd(x, RANK), x, RANK, excess=1e-2)  # the core by eigenvectors
    _check(F.randomized_svd(y, 80), y, 80, excess=1e-5)
    _check(F.randomized_svd(y.double(), 80), y, 80, excess=1e-5)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(RuntimeError, match=r"x: the SVD of shape \(100, 90\) does not converge, .* rescale"):
        F.randomized_svd(y, 80)


NAN, INF = torch.full((3, 4), torch.nan), torch.full((3, 4), torch.inf)
OK = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (OK, {}, "rank, energy: give one of the two"),
        (OK, {"rank": 2, "energy": 0.5}, "rank, energy: give one of the two"),
        (OK, {"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        (OK, {"rank": True}, "rank: expected an integer"),
        (OK, {"energy": 1.1}, "energy: expected"),
        (OK[None], {"energy": 0.5}, r"energy: needs one matrix, got x of shape \(1, 3, 4\)"),
        (OK, {"rank": 1, "oversample": -1}, "oversample: expected an integer of at least 0, got -1"),
        (OK, {"rank": 1, "power_iters": 1.5}, "power_iters: expected an integer"),
        (OK, {"rank": 1, "tolerance": 0.0}, "tolerance: expected 0 < tolerance < 1"),
        (NAN, {"rank": 1}, "x: has NaN or infinite"),
        (INF, {"rank": 1}, "x: has NaN or infinite"),
        (F.Difference(OK, NAN), {"rank": 1}, "x: b: has NaN or infinite"),
        (F.Sum([OK, F.Difference(INF, OK)]), {"rank": 1}, "x: terms.*has NaN or infinite"),
        (F.SumOfProducts([NAN.T], [OK]), {"rank": 1}, r"lora_bs\[0\]: has NaN"),
        (torch.ones(4), {"rank": 1}, r"x: expected a dense floating-point tensor \[..., m, n\], .* \(4,\)"),
        (torch.ones(3, 4, dtype=torch.int64), {"rank": 1}, "x: expected a dense floating-point tensor .*int64"),
        (torch.empty(3, 4, device="meta"), {"rank": 1}, "x: is on the meta device"),
        (torch.empty(3, 0), {"rank": 1}, r"x: shape \(3, 0\) has no entries"),
    ],
)  # fmt: skip
def test_bad_input(x: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.randomized_svd(x, **kwargs)


def test_bad_operands() -> None:
    with pytest.raises(ValueError, match=r"a, b: expected one shape .*\(3, 4\) on cpu and \(4, 3\)"):
        F.Difference(OK, OK.T)
    with pytest.raises(ValueError, match=r"terms\[1\]: \(4, 3\) on cpu, but terms\[0\] is \(3, 4\)"):
        F.Sum([OK, OK.T])
    with pytest.raises(ValueError, match="one weight per term, got 1 and 2"):
        F.Sum([OK], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights: expected finite"):
        F.Sum([OK], [torch.nan])
    with pytest.raises(TypeError, match="x: expected a tensor, a SparseMatrix"):
        F.randomized_svd("x", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator: expected"):
        F.randomized_svd(OK, 1, generator="x")  # type: ignore[arg-type]
    wrong = _Own(torch.randn(200, 300), False)
    wrong.matmul = lambda q: q  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"x.matmul: expected torch.float32 \(200, 16\), got torch.float32 \(300, 16\)"
    ):
        F.randomized_svd(wrong, 8)
