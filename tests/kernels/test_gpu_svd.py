"""The SVDs on a device (``make test-gpu``): the CPU's results for the same seed, fp64's truth, no waiting inside."""

from __future__ import annotations

import pytest
import torch
from gpu_runs import nothing_waits
from torch import Tensor

from lora_fuse import SparseMatrix, _cpu
from lora_fuse import functional as F
from lora_fuse.kernels.normals import normals
from lora_fuse.ops.normals import Normals
from lora_fuse.ops.operands import as_operand
from lora_fuse.ops.orthonormal import orthonormal

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def spectrum(s: Tensor, m: int, n: int) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(size, s.shape[0], dtype=torch.float64)).Q for size in (m, n))
    return (u * s.double() @ v.T).float()


def to_cuda(x: SparseMatrix) -> SparseMatrix:
    parts = (None if t is None else t.cuda() for t in (x.values, x.row_starts, x.columns, x.bitmap))
    return SparseMatrix(*parts, x.num_cols)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_draws_are_the_cpus(seed):
    want = torch.empty(3, 1000, 77)
    _cpu.normals(want, seed, 2, 1)
    torch.testing.assert_close(normals(seed, 2, (3, 1000, 77), CUDA).cpu(), want, rtol=0, atol=3e-6)


M, N = 1100, 900


def operands() -> dict[str, tuple[object, object, Tensor]]:
    """On the CPU, on the device, and exactly."""
    a, b = torch.randn(M, N), torch.randn(M, N).bfloat16()
    h = a.half()
    dense, few = (SparseMatrix.from_mask(a, torch.rand(M, N) < density) for density in (0.3, 0.02))
    made = {
        "fp32": (a, a.cuda(), a.double()),
        "fp16": (h, h.cuda(), h.double()),
        "bf16": (b, b.cuda(), b.double()),
        "bf16_strided": (b.T[:, ::2], b.cuda().T[:, ::2], b.T[:, ::2].double()),
        "batch": (torch.stack([a, -2 * a]), torch.stack([a, -2 * a]).cuda(), torch.stack([a, -2 * a]).double()),
        "difference": (F.Difference(h, b), F.Difference(h.cuda(), b.cuda()), h.double() - b.double()),
        "pruned_bitmap": (dense, to_cuda(dense), dense.to_dense().double()),
        "pruned_columns": (few, to_cuda(few), few.to_dense().double()),
    }
    factors = [torch.randn(M, 90), torch.randn(M, 60)], [torch.randn(90, N), torch.randn(60, N)]
    products = F.SumOfProducts(*factors, [1.0, -0.5])
    exact = products.dense(torch.float64)
    made["products"] = products, F.SumOfProducts(*([t.cuda() for t in f] for f in factors), [1.0, -0.5]), exact
    made["sum"] = F.Sum([a, dense]), F.Sum([a.cuda(), to_cuda(dense)]), a.double() + dense.to_dense().double()
    return made


NAMES = (
    "fp32", "fp16", "bf16", "bf16_strided", "batch", "difference", "pruned_bitmap", "pruned_columns", "products", "sum",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_fp32(name):
    """At most twice the error of fp32 without TF32 on the CPU, whatever torch is allowed on the device."""
    host, device, exact = operands()[name]
    host, device = as_operand(host, "x"), as_operand(device, "x")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for columns in (5, 40, 72, 200):
            q = torch.linalg.qr(torch.randn(*exact.shape[:-2], exact.shape[-1], columns)).Q
            p = torch.linalg.qr(torch.randn(*exact.shape[:-2], exact.shape[-2], columns)).Q
            for got, theirs, want in (
                (device.matmul(q.cuda()), host.matmul(q), exact @ q.double()),
                (device.rmatmul(p.cuda()), host.rmatmul(p), exact.mT @ p.double()),
            ):
                error, own = ((t.cpu().double() - want).abs().max() for t in (got, theirs))
                assert error <= 2 * own + 1e-6 * want.abs().max()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", NAMES)
def test_the_svd_is_the_cpus(name):
    host, device, exact = operands()[name]
    got, want = F.randomized_svd(device, 16, generator=7), F.randomized_svd(host, 16, generator=7)
    assert all(t.is_cuda for t in got)
    size = float(want.norm.amax())
    ours, theirs = ((svd.U.cpu() * svd.S.cpu()[..., None, :]) @ svd.Vh.cpu() for svd in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5 * size)
    torch.testing.assert_close(got.S.cpu(), want.S, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(got.norm.cpu(), want.norm, rtol=1e-6, atol=0)
    error = torch.linalg.matrix_norm(exact - ours.double())
    torch.testing.assert_close(got.residual.cpu(), error, rtol=1e-3, atol=2e-6 * size)
    for q in (got.U, got.Vh.mT):
        eye = torch.eye(16, device=CUDA).expand(*q.shape[:-2], 16, 16)
        torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=5e-6)
    again = F.randomized_svd(device, 16, generator=7)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("decades", [1, 3, 6, 9])
def test_error_is_near_the_optimum(decades):
    x = spectrum(torch.logspace(0, -decades, 400), 700, 640)
    u, s, vh = (t.cpu().double() for t in F.randomized_svd(x.cuda(), 32))
    best = torch.linalg.svdvals(x.double())[32:].norm()
    assert (x.double() - u * s @ vh).norm() <= 1.01 * best + 2e-6 * x.norm()


@pytest.mark.parametrize("decades", [0, 5, 8, 40])
def test_blocks_of_any_condition_become_orthonormal_without_waiting(decades):
    w = spectrum(torch.logspace(0, -decades, 72), 2000, 72).cuda().expand(3, 2000, 72).contiguous()
    before = torch.linalg.qr(torch.randn(3, 2000, 72, device=CUDA)).Q
    orthonormal(w, [before], Normals(0))  # compiles, and makes what libraries keep
    with nothing_waits():
        got = orthonormal(w, [before], Normals(0))
    eye = torch.eye(72, device=CUDA).expand(3, 72, 72)
    torch.testing.assert_close(got.mT @ got, eye, rtol=0, atol=5e-6)
    torch.testing.assert_close(before.mT @ got, torch.zeros_like(eye), rtol=0, atol=5e-6)


def test_products_and_sketches_do_not_wait():
    x = as_operand(torch.randn(800, 700, device=CUDA).bfloat16(), "x")
    q = torch.randn(700, 72, device=CUDA)
    x.rmatmul(x.matmul(q))
    x.sketch(72, Normals(0), torch.float32)
    with nothing_waits():
        x.rmatmul(x.matmul(q))
        x.sketch(72, Normals(0), torch.float32)


def test_rank_below_the_one_asked_for():
    x = torch.randn(900, 20, device=CUDA) @ torch.randn(20, 800, device=CUDA)
    svd = F.randomized_svd(torch.stack([x, torch.zeros_like(x)]), 48)
    assert (svd.residual <= 1e-5 * svd.norm).all()
    for q in (svd.U, svd.Vh.mT):
        eye = torch.eye(48, device=CUDA).expand(2, 48, 48)
        torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=5e-6)


def test_energy_and_fp64():
    x = spectrum(torch.exp(-torch.arange(300) / 20.0), 500, 450)
    assert F.randomized_svd(x.cuda(), energy=0.99).S.shape == F.randomized_svd(x, energy=0.99).S.shape
    got, want = F.randomized_svd(x.cuda().double(), 20), F.randomized_svd(x.double(), 20)
    torch.testing.assert_close(got.S.cpu(), want.S, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_input_is_named_as_on_the_cpu(value):
    x = torch.ones(300, 300, device=CUDA)
    x[7, 5] = value
    with pytest.raises(ValueError, match=r"^x: b: has NaN or infinite entries$"):
        F.randomized_svd(F.Difference(torch.ones_like(x), x), 3)
    with pytest.raises(ValueError, match=r"^lora_bs\[0\]: has NaN or infinite entries$"):
        F.lowrank_svds([F.SumOfProducts([x], [torch.ones(300, 310, device=CUDA)])], 3)


def test_layers_of_a_model():
    def products(m: int, n: int, eps: float = 1.0) -> F.SumOfProducts:
        b, a = torch.randn(m, 16), torch.randn(16, n)
        bs = [b + eps * torch.randn(m, 16) for _ in range(4)]
        return F.SumOfProducts(bs, [a + eps * torch.randn(16, n) for _ in range(4)], [1.0, -0.5, 0.3, 0.2])

    sums = [products(*shape) for shape in ((256, 320), (320, 256)) for _ in range(5)] + [products(256, 320, 1e-6)]
    moved = [F.SumOfProducts([b.cuda() for b in x.lora_bs], [a.cuda() for a in x.lora_as], x.weights) for x in sums]
    for got, x in zip(F.lowrank_svds(moved, 16), sums, strict=True):
        want = F.lowrank_svd(x.lora_bs, x.lora_as, x.weights, 16)
        size = float(want.norm)
        torch.testing.assert_close(got.S.cpu(), want.S, rtol=1e-6, atol=1e-7 * size)
        ours, theirs = ((svd.U.cpu() * svd.S.cpu()) @ svd.Vh.cpu() for svd in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * size)
        torch.testing.assert_close(got.residual.cpu(), want.residual, rtol=1e-6, atol=1e-7 * size)
