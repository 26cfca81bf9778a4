"""lowrank_svd against a dense fp64 SVD, on easy and on nasty factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from largest_tensor import Sizes
from torch import Tensor

import lora_fuse as lf

Factors = tuple[list[Tensor], list[Tensor], list[float]]


def _random(m: int, n: int, ranks: list[int]) -> Factors:
    return (
        [torch.randn(m, r) for r in ranks],
        [torch.randn(r, n) for r in ranks],
        [0.7 - 0.4 * i for i in range(len(ranks))],
    )


def _graded(m: int, n: int) -> Factors:
    scales = torch.logspace(0, -4, 16)
    bs, as_, _ = _random(m, n, [16] * 4)
    return [b * scales for b in bs], as_, [1.0] * 4


def _collinear(m: int, n: int, eps: float, weights: list[float]) -> Factors:
    b, a = torch.randn(m, 8), torch.randn(8, n)
    bs = [b + eps * torch.randn(m, 8) for _ in weights]
    return bs, [a + eps * torch.randn(8, n) for _ in weights], weights


def _repeated(m: int, n: int) -> Factors:
    b, a = torch.randn(m, 6), torch.randn(6, n)
    return [b, b, b], [a, a, a], [1.0, 0.5, -0.25]


CASES = {
    "one": lambda: _random(40, 30, [5]),
    "rank_1": lambda: _random(40, 30, [1, 1]),
    "mixed_ranks": lambda: _random(70, 50, [4, 16, 1, 7]),
    "negative_and_zero": lambda: (*_random(40, 30, [3, 3, 3])[:2], [-1.0, 0.0, 2.0]),
    "graded": lambda: _graded(160, 120),
    "collinear_1e-2": lambda: _collinear(90, 80, 1e-2, [1.0] * 4),
    "collinear_1e-4": lambda: _collinear(90, 80, 1e-4, [1.0] * 4),
    "cancelling": lambda: _collinear(90, 80, 1e-5, [1.0, -1.0]),
    "repeated": lambda: _repeated(60, 50),
    "wider_than_m": lambda: _random(12, 90, [8, 8]),
    "wider_than_n": lambda: _random(90, 12, [8, 8]),
    "wider_than_both": lambda: _random(12, 10, [8, 8]),
    "single_row": lambda: _random(1, 50, [4, 4]),
}


def _dense(bs: list[Tensor], as_: list[Tensor], weights: list[float]) -> Tensor:
    return sum((w * (b.double() @ a.double()) for b, a, w in zip(bs, as_, weights, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_is_the_optimal_truncation(case: str, rank: int | None) -> None:
    bs, as_, weights = CASES[case]()
    exact = _dense(bs, as_, weights)
    s_exact = torch.linalg.svdvals(exact)
    # What the fp64 truth itself cannot resolve where the terms cancel.
    noise = 1e-14 * sum(
        abs(w) * b.double().norm() * a.double().norm() for b, a, w in zip(bs, as_, weights, strict=True)
    )

    result = lf.functional.lowrank_svd([b.double() for b in bs], as_, weights, rank)
    u, s, vh = result
    k = s.shape[0]
    assert k == min(rank or 10**9, *exact.shape, sum(b.shape[1] for b in bs))
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, s_exact[:k], rtol=1e-10, atol=float(noise))
    optimal = s_exact[k:].norm()
    assert (u * s @ vh - exact).norm() <= optimal * (1 + 1e-10) + noise
    assert abs(result.residual - optimal) <= 1e-10 * optimal + noise
    assert abs(result.norm - exact.norm()) <= 1e-10 * exact.norm() + noise
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("case", ["mixed_ranks", "graded", "collinear_1e-4", "cancelling"])
def test_fp32_result_is_within_1e_5_of_optimal(case: str) -> None:
    bs, as_, weights = CASES[case]()
    exact = _dense(bs, as_, weights)
    for rank in (1, 4, 8):
        u, s, vh = lf.functional.lowrank_svd(bs, as_, weights, rank)
        assert u.dtype == s.dtype == vh.dtype == torch.float32
        error = (u.double() * s.double() @ vh.double() - exact).norm()
        optimal = torch.linalg.svdvals(exact)[rank:].norm()
        assert error <= optimal * (1 + 1e-5) + 1e-6 * exact.norm()


@pytest.mark.parametrize("case", ["mixed_ranks", "graded", "collinear_1e-4", "cancelling"])
def test_fp32_factors_lose_no_singular_value(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, geqrf = [], torch.geqrf
    monkeypatch.setattr(torch, "geqrf", lambda x: calls.append(x) or geqrf(x))
    bs, as_, weights = CASES[case]()
    s_exact = torch.linalg.svdvals(_dense(bs, as_, weights))
    got = lf.functional.lowrank_svd(bs, as_, weights)
    noise = 1e-14 * sum(
        abs(w) * b.double().norm() * a.double().norm() for b, a, w in zip(bs, as_, weights, strict=True)
    )
    torch.testing.assert_close(got.S.double(), s_exact[: got.S.shape[0]], rtol=1e-6, atol=float(noise))
    torch.testing.assert_close(got.norm, s_exact.norm(), rtol=1e-8, atol=float(noise))
    for q in (got.U.double(), got.Vh.double().T):
        torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64), rtol=0, atol=1e-6)
    assert bool(calls) == (case in ("collinear_1e-4", "cancelling"))  # Cholesky where the columns allow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_factors_are_taken_exactly(dtype: torch.dtype) -> None:
    bs, as_, weights = _random(40, 30, [4, 4])
    halves = [b.to(dtype) for b in bs], [a.to(dtype) for a in as_]
    got = lf.functional.lowrank_svd(*halves, weights)
    want = lf.functional.lowrank_svd([b.float() for b in halves[0]], [a.float() for a in halves[1]], weights)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_batches_are_independent() -> None:
    bs, as_ = [torch.randn(2, 3, 20, r) for r in (2, 5)], [torch.randn(2, 3, r, 30) for r in (2, 5)]
    batched = lf.functional.lowrank_svd(bs, as_, [1.0, -0.5], 4)
    assert batched.U.shape == (2, 3, 20, 4)
    assert batched.residual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = lf.functional.lowrank_svd([b[i, j] for b in bs], [a[i, j] for a in as_], [1.0, -0.5], 4)
            for got, want in zip(batched, one, strict=True):
                torch.testing.assert_close(got[i, j], want)
            torch.testing.assert_close(batched.energy[i, j], one.energy)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_directions(energy: float) -> None:
    bs, as_, weights = _graded(60, 50)
    squares = torch.linalg.svdvals(_dense(bs, as_, weights)).square()
    result = lf.functional.lowrank_svd(bs, as_, weights, energy=energy)
    k = result.S.shape[0]
    assert squares[:k].sum() >= energy * squares.sum() * (1 - 1e-12)
    assert k == 1 or squares[: k - 1].sum() < energy * squares.sum()
    torch.testing.assert_close(result.energy, squares[:k].sum() / squares.sum())


def test_energy_one_finds_the_numerical_rank() -> None:
    bs, as_, weights = _repeated(60, 50)
    assert lf.functional.lowrank_svd(bs, as_, weights, energy=1.0).S.shape == (6,)
    cancelled = lf.functional.lowrank_svd(bs[:2], as_[:2], [1.0, -1.0], energy=1.0)
    assert cancelled.S.shape == (1,)
    assert float(cancelled.S) < 1e-10
    zero = lf.functional.lowrank_svd([torch.zeros(5, 2)], [torch.zeros(2, 4)], energy=0.5)
    assert zero.S.tolist() == [0.0]
    assert float(zero.energy) == 1.0


def test_repeats_give_the_same_bits() -> None:
    bs, as_, weights = _random(70, 50, [4, 16])
    first, again = (lf.functional.lowrank_svd(bs, as_, weights, 8) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_never_forms_the_product() -> None:
    m, n, bs_as = 600, 500, _random(600, 500, [16, 16])
    with Sizes() as sizes:
        lf.functional.lowrank_svd(*bs_as, 16)
    assert max(m, n) * 16 < sizes.largest <= max(m, n) * 32 < m * n


NAN = torch.full((3, 2), float("nan"))
OK_B, OK_A = torch.ones(3, 2), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (([], []), {}, "at least one"),
        (([OK_B], [OK_A, OK_A]), {}, "got 1, 2 and 1"),
        (([OK_B], [OK_A], [1.0, 2.0]), {}, "got 1, 1 and 2"),
        (([OK_B], [OK_A], [float("nan")]), {}, r"weights\[0\]"),
        (([OK_B], [torch.ones(3, 4)]), {}, r"lora_bs\[0\], lora_as\[0\]: .*\(3, 2\) and \(3, 4\)"),
        (([OK_B, OK_B], [OK_A, torch.ones(2, 5)]), {}, r"lora_as\[1\].*\(2, 5\)"),
        (([OK_B.int()], [OK_A]), {}, r"lora_bs\[0\].*int32"),
        (([OK_B, NAN], [OK_A, OK_A]), {}, r"lora_bs\[1\]: has NaN or infinite"),
        (([OK_B], [OK_A * float("inf")]), {}, r"lora_as\[0\]: has NaN or infinite"),
        (([OK_B], [OK_A.to("meta")]), {}, r"lora_as\[0\]: on meta, accepted is one device for all, as cpu"),
        (([OK_B.to("meta")], [OK_A.to("meta")]), {}, r"lora_bs\[0\]: is on the meta device, it has no data"),
        (([OK_B], [OK_A]), {"rank": 0}, "rank: .* got 0"),
        (([OK_B], [OK_A]), {"energy": 0.0}, "energy: "),
        (([OK_B], [OK_A]), {"energy": 1.5}, "energy: "),
        (([OK_B], [OK_A]), {"energy": 0.5, "rank": 1}, "one of the two"),
        (([OK_B[None]], [OK_A[None]]), {"energy": 0.5}, "unbatched"),
    ],
)
def test_bad_input(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lf.functional.lowrank_svd(*args, **kwargs)
