"""thin_qr: which of its ways is taken, and that Q is orthonormal and ``Q core`` the matrix in each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lora_fuse as lf
from lora_fuse.ops import factored
from lora_fuse.ops.factored import product_svd, thin_qr

Blocks = Callable[[], list[Tensor]]


def collinear(eps: float) -> list[Tensor]:
    x = torch.randn(90, 8)
    return [x, x + eps * torch.randn(90, 8)]


CASES: dict[str, tuple[str, Blocks]] = {
    "random": ("cholesky", lambda: [torch.randn(90, 8), torch.randn(90, 5)]),
    "half": ("cholesky", lambda: [torch.randn(90, 8).bfloat16(), torch.randn(90, 5)]),
    "one_column": ("cholesky", lambda: [torch.randn(90, 1)]),
    "columns_of_all_sizes": ("cholesky", lambda: [torch.randn(90, 16) * torch.logspace(-12, 12, 16)]),
    "batch": ("cholesky", lambda: [torch.randn(2, 3, 90, 8), torch.randn(2, 3, 90, 2)]),
    "collinear_0.1": ("cholesky", lambda: collinear(0.1)),
    "collinear_1e-3": ("householder", lambda: collinear(1e-3)),
    "collinear_1e-6": ("householder", lambda: collinear(1e-6)),
    "twice_the_same": ("householder", lambda: [torch.arange(90.0)[:, None]] * 2),
    "column_of_zeros": ("householder", lambda: [torch.randn(90, 3), torch.zeros(90, 1)]),
    "batch_with_one_bad": ("householder", lambda: [torch.stack([torch.randn(90, 4), torch.ones(90, 4)])]),
    "fp64": ("householder", lambda: [torch.randn(90, 8), torch.randn(90, 2).double()]),
    "square": ("identity", lambda: [torch.randn(16, 8), torch.randn(16, 8)]),
    "wide": ("identity", lambda: [torch.randn(10, 8), torch.randn(10, 8)]),
}


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("case", CASES)
def test_q_is_orthonormal_and_q_core_is_the_matrix(case: str, exact: bool) -> None:
    way, make = CASES[case]
    blocks = make()
    qr = thin_qr(blocks, exact)
    taken = "cholesky" if qr.product is not None else "householder" if qr.reflectors is not None else "identity"
    assert taken == ("householder" if exact and way == "cholesky" else way)
    x = torch.cat([b.double() for b in blocks], -1)
    size = min(x.shape[-2:])
    assert qr.core.shape == (*x.shape[:-2], size, x.shape[-1])
    eye = torch.eye(size, dtype=torch.float64).expand(*x.shape[:-2], size, size)
    q = qr.apply(eye)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-10)
    error = torch.linalg.vector_norm(q @ qr.core - x, dim=-2) / torch.linalg.vector_norm(x, dim=-2).clamp_min(1e-300)
    assert error.max() <= 1e-11  # of each column, however small it is beside the others


@pytest.mark.parametrize("eps", [0.3, 0.1, 0.03])
def test_cholesky_keeps_its_promise_up_to_the_limit(eps: float) -> None:
    left, right = torch.cat(collinear(eps), 1), torch.cat(collinear(eps), 1)
    qrs = thin_qr([left]), thin_qr([right])
    assert all(qr.product is not None for qr in qrs)
    s = torch.linalg.svdvals(qrs[0].core @ qrs[1].core.mT)
    want = torch.linalg.svdvals(left.double() @ right.double().mT)[:16]
    assert ((s - want).abs() / want).max() <= 1e-8  # the smallest too


def test_product_svd_is_the_svd_of_the_product() -> None:
    left, right = torch.randn(50, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    u, s, v = product_svd(left, right)
    assert (u.shape, s.shape, v.shape) == ((50, 4), (4,), (4, 4))
    torch.testing.assert_close(u * s @ v.mT, left @ right.mT)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right.mT)[:4])


def test_lowrank_svd_is_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bs, as_ = [torch.randn(80, 8) for _ in range(3)], [torch.randn(8, 60) for _ in range(3)]
    fast = lf.functional.lowrank_svd(bs, as_, [1.0, -0.5, 2.0], 8)
    monkeypatch.setattr(factored, "cholesky_qr", lambda x: (x, x, torch.tensor(False)))
    slow = lf.functional.lowrank_svd(bs, as_, [1.0, -0.5, 2.0], 8)
    torch.testing.assert_close(fast.S, slow.S, rtol=2e-7, atol=0)
    torch.testing.assert_close(fast.U * fast.S @ fast.Vh, slow.U * slow.S @ slow.Vh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.residual, slow.residual, rtol=1e-10, atol=0)
