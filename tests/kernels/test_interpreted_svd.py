"""randomized_svd's kernels in Triton's CPU interpreter, and the whole of it on a GPU's path, held against the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_fuse import SparseMatrix, _cpu
from lora_fuse import functional as F
from lora_fuse.kernels import normals as drawing
from lora_fuse.kernels import sketch
from lora_fuse.kernels.normals import normals, normals_launch
from lora_fuse.kernels.sketch import Source, product, product_launch, squares, squares_launch
from lora_fuse.ops import gpu
from lora_fuse.ops.operands import as_operand
from lora_fuse.ops.svd import gram_svd
from lora_fuse.ops.thin_products import Operand

CPU = torch.device("cpu")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors take the way of CUDA tensors; what the kernels were asked for."""
    calls: list[str] = []
    monkeypatch.setattr(gpu, "takes_kernels", lambda device: True)
    for module, name in ((sketch, "product"), (sketch, "squares"), (drawing, "normals")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    return calls


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 3, 2**64 - 1])
def test_draws_are_the_cpus(seed):
    want = torch.empty(2, 290, 37)
    _cpu.normals(want, seed, 5, 1)
    got = normals(seed, 5, (2, 290, 37), CPU)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-6)
    assert normals(seed, 5, (0, 290, 37), CPU).shape == (0, 290, 37)


def test_batches_of_any_length_fit_a_grid():
    """Dimensions but the first end at 65535."""
    x = Source((100_000, 9, 8), torch.empty(100_000, 9, 8, device="meta"))
    made = [product_launch(x, None, 4, transposed, (0, 0), "cuda")[0] for transposed in (False, True)]
    made += [squares_launch(x)[0], normals_launch(torch.empty(100_000, 9, 8, device="meta"), 0, 0)]
    for launch in made:
        assert launch.grid[0] >= 100_000
        assert max(launch.grid[1:], default=1) <= 65535


def sparse(m: int, n: int, density: float) -> SparseMatrix:
    return SparseMatrix.from_mask(torch.randn(m, n), torch.rand(m, n) < density)


OPERANDS: dict[str, Callable[[], tuple[Operand, Tensor]]] = {
    "fp32": lambda: _same(torch.randn(2, 150, 70)),
    "fp16_strided": lambda: _same(torch.randn(70, 300).half()[:, ::2].T),
    "difference": lambda: _difference(torch.randn(150, 70).half(), torch.randn(70, 150).T),
    "weighted": lambda: _weighted(torch.randn(150, 70).half()),
    "two": lambda: _two(torch.randn(150, 70).half(), torch.randn(150, 70)),
    "bitmap": lambda: _sparse(sparse(150, 70, 0.4)),
    "columns": lambda: _sparse(sparse(150, 70, 0.03)),
}


def _same(x: Tensor) -> tuple[Operand, Tensor]:
    return as_operand(x, "x"), x.double()


def _difference(a: Tensor, b: Tensor) -> tuple[Operand, Tensor]:
    return F.Difference(a, b), (a.float() - b.float()).double()


def _weighted(x: Tensor) -> tuple[Operand, Tensor]:
    return F.Sum([x], [-0.3]).terms[0], -0.3 * x.double()


def _two(a: Tensor, b: Tensor) -> tuple[Operand, Tensor]:
    return F.Sum([a, b], [0.7, -0.3]), 0.7 * a.double() - 0.3 * b.double()


def _sparse(x: SparseMatrix) -> tuple[Operand, Tensor]:
    return as_operand(x, "x"), x.to_dense().double()


@pytest.mark.parametrize("name", OPERANDS)
def test_products_and_norm(name, on_gpu):
    x, exact = OPERANDS[name]()
    q = torch.randn(*exact.shape[:-2], 70, 40)
    p = torch.randn(*exact.shape[:-2], 150, 9)
    for got, want in ((x.matmul(q), exact @ q.double()), (x.rmatmul(p), exact.mT @ p.double())):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * float(want.abs().max()))
    torch.testing.assert_close(x.squares_by_kernel(), exact.square().sum((-2, -1)), rtol=1e-6, atol=0)
    assert on_gpu == ["product", "product", "squares"]


@pytest.mark.parametrize("splits", [1, 2])
def test_the_sketch_is_the_cpus(splits, monkeypatch):
    """Of more columns than a program takes; sums of several segments in one place, and in several."""
    x = torch.randn(17, 700)
    drawn = torch.empty(1, 700, 70)
    _cpu.normals(drawn, 2**40, 2, 1)
    real, source = sketch.plan, Source((1, 17, 700), x[None])
    made = real(700, 17, 70, 1, "float32", True, "cuda")
    assert (made.groups, made.splits, made.segment) == (2, 2, 512)
    split_len = made.split_len * made.splits // splits
    monkeypatch.setattr(sketch, "plan", lambda *a: replace(real(*a), splits=splits, split_len=split_len))
    got = product(source, None, 70, False, (2**40, 2))
    want = drawn[0].double().T @ x.double().T
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=3e-6 * float(want.abs().max()))
    torch.testing.assert_close(squares(source), x.double().square().sum()[None])


def with_spectrum(s: Tensor, m: int, n: int) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(size, s.shape[0], dtype=torch.float64)).Q for size in (m, n))
    return (u * s.double() @ v.T).float()


M, N, RANK = 140, 150, 6
MATRICES: dict[str, Callable[[], object]] = {
    "flat": lambda: torch.randn(M, N),
    "fast": lambda: with_spectrum(torch.exp(-torch.arange(60) / 1.5), M, N),  # blocks of condition 1e4 and more
    "batch": lambda: torch.stack([torch.randn(M, N), torch.zeros(M, N)]),
    "rank_3": lambda: torch.randn(M, 3) @ torch.randn(3, N),  # the Gram matrices are singular
    "fp16_difference": lambda: F.Difference(torch.randn(M, N).half(), torch.randn(M, N).half()),
    "sparse_sum": lambda: F.Sum([sparse(M, N, 0.2), torch.randn(M, 2) @ torch.randn(2, N)], [1.0, 0.5]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_svd_is_the_cpus(name, monkeypatch):
    """The same subspace for the same seed, not only one as good."""
    x = MATRICES[name]()
    want = F.randomized_svd(x, RANK, generator=3)
    monkeypatch.setattr(gpu, "takes_kernels", lambda device: True)
    got = F.randomized_svd(x, RANK, generator=3)
    scale = want.S.amax(-1, keepdim=True)
    torch.testing.assert_close(got.S / scale, want.S / scale, rtol=0, atol=3e-6, equal_nan=True)
    size = float(want.norm.amax())
    ours, theirs = ((svd.U * svd.S[..., None, :]) @ svd.Vh for svd in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * size)
    torch.testing.assert_close(got.residual, want.residual, rtol=1e-4, atol=1e-6 * size)
    torch.testing.assert_close(got.norm, want.norm, rtol=1e-6, atol=0)
    for q in (got.U, got.Vh.mT):
        eye = torch.eye(RANK).expand(*q.shape[:-2], RANK, RANK)
        torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=5e-6)


def test_large_ranks_and_sums_of_products(on_gpu):
    """Exact, from the Gram matrix and from the factors."""
    x = torch.randn(40, 50)
    got = F.randomized_svd(x, 10)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    torch.testing.assert_close((got.U * got.S @ got.Vh).double(), u[:, :10] * s[:10] @ vh[:10], rtol=0, atol=1e-5)
    factors = [torch.randn(40, 3), torch.randn(40, 2)], [torch.randn(3, 50), torch.randn(2, 50)]
    exact = factors[0][0].double() @ factors[1][0].double() - factors[0][1].double() @ factors[1][1].double()
    low = F.lowrank_svd(*factors, [1.0, -1.0], 4)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close((low.U * low.S @ low.Vh).double(), u[:, :4] * s[:4] @ vh[:4], rtol=0, atol=1e-5)
    torch.testing.assert_close(low.residual, s[4:].norm(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="x: has NaN or infinite"):
        F.randomized_svd(torch.full((3, 4), torch.nan), 1)


@pytest.mark.parametrize("decades", [0, 4, 12, 40])
def test_gram_svd_has_orthonormal_vectors(decades, on_gpu):
    """Where singular values drown, as on the CPU."""
    s = torch.logspace(0, -decades, 30, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(2, size, 30, dtype=torch.float64)).Q for size in (30, 45))
    x = u * s @ v.mT
    left, values, right, tail = gram_svd(x, 20)
    eye = torch.eye(20, dtype=torch.float64).expand(2, 20, 20)
    for q in (left, right):
        torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(values, s[:20].expand(2, 20), rtol=0, atol=1e-7)
    assert ((x - left * values[:, None] @ right.mT).norm(dim=(1, 2)) <= s[20:].norm() + 1e-7).all()
    torch.testing.assert_close(tail.sqrt(), s[20:].norm().expand(2), rtol=1e-6, atol=1e-7)
