"""lowrank_svds: each sum as lowrank_svd has it, batched where a GPU would, the bad ones by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_fuse as lf
from lora_fuse import functional as F
from lora_fuse.ops import gpu, lowrank_svds


def products(m: int, n: int, ranks: list[int], dtype: torch.dtype = torch.float32) -> F.SumOfProducts:
    weights = [0.7 - 0.4 * i for i in range(len(ranks))]
    bs, as_ = (
        [torch.randn(s).to(dtype) for s in sizes] for sizes in ([(m, r) for r in ranks], [(r, n) for r in ranks])
    )
    return F.SumOfProducts(bs, as_, weights)


def collinear(m: int, n: int) -> F.SumOfProducts:
    b, a = torch.randn(m, 8), torch.randn(8, n)
    return F.SumOfProducts([b, b + 1e-5 * torch.randn(m, 8)], [a, a], [1.0, -1.0])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """CPU tensors take the way of CUDA tensors (nothing of it is a Triton kernel); which sums were not batched."""
    calls, real = [], F.lowrank_svd
    monkeypatch.setattr(gpu, "takes_kernels", lambda device: True)
    monkeypatch.setattr(lowrank_svds, "lowrank_svd", lambda *args: calls.append(args[0][0].shape) or real(*args))
    monkeypatch.setattr(lowrank_svds, "_BYTES", 8 * 130 * 12 * 2)  # two of the first shape
    monkeypatch.setattr("lora_fuse.ops.svd.Normals.draw", lambda self, shape, device: torch.randn(shape).double())
    return calls


def check(got: F.LowRankSVD, x: F.SumOfProducts, rank: int | None) -> None:
    want = F.lowrank_svd(x.lora_bs, x.lora_as, x.weights, rank)
    assert [t.shape for t in got] == [t.shape for t in want]
    assert [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got.S, want.S, rtol=1e-6, atol=1e-7 * float(want.norm))
    torch.testing.assert_close(got.norm, want.norm, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.residual, want.residual, rtol=1e-6, atol=1e-7 * float(want.norm))
    ours, theirs = (svd.U * svd.S @ svd.Vh for svd in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * float(want.norm))
    for q in (got.U, got.Vh.T):
        torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1]).to(q.dtype), rtol=0, atol=2e-6)
    assert (got.U.gather(0, got.U.abs().argmax(0, keepdim=True)) > 0).all()


def test_each_is_its_own(alone: list[Any]) -> None:
    sums = [products(70, 60, [4, 8]) for _ in range(5)]
    sums.insert(2, products(60, 70, [4, 8], torch.bfloat16))  # another shape
    sums.insert(4, collinear(70, 60))  # of rank 16, ill-conditioned
    sums.insert(5, products(70, 60, [12], torch.float64))
    sums.append(products(10, 90, [12]))  # wider than tall
    sums.append(products(10, 9, [12]))
    ranks = [5] * len(sums)
    ranks[-2:] = [None, 100]
    for got, x, k in zip(F.lowrank_svds(sums, ranks), sums, ranks, strict=True):
        check(got, x, k)
    assert alone == [(70, 8), (70, 12)]  # the collinear one, and that of fp64


def test_one_ill_conditioned_among_its_like(alone: list[Any]) -> None:
    sums = [products(70, 60, [8, 8]), collinear(70, 60), products(70, 60, [8, 8])]
    lowrank_svds._BYTES *= 10  # all in one batch
    for got, x in zip(F.lowrank_svds(sums, 6), sums, strict=True):
        check(got, x, 6)
    assert alone == [(70, 8)]


def test_on_the_cpu_nothing_changes() -> None:
    sums = [products(70, 60, [4, 8]), collinear(70, 60)]
    for got, x in zip(F.lowrank_svds(sums), sums, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, F.lowrank_svd(x.lora_bs, x.lora_as, x.weights), strict=True))


@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_bad_input(path: str, request: pytest.FixtureRequest) -> None:
    if path == "gpu":
        request.getfixturevalue("alone")
    good, bad = products(7, 6, [2]), products(7, 6, [2])
    bad.lora_bs[0][3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"lora_bs\[0\]: has NaN or infinite"):
        F.lowrank_svds([good, bad], 1)
    with pytest.raises(ValueError, match="rank: expected an integer of at least 1, got 0"):
        F.lowrank_svds([good], 0)
    with pytest.raises(ValueError, match="rank: expected one for each of 1 sums, got 2"):
        F.lowrank_svds([good], [1, 2])
    assert F.lowrank_svds([]) == []


def test_merge_takes_all_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapter() -> lf.LoraAdapter:
        state = {}
        for i in range(3):
            state[f"base_model.model.layers.{i}.q.lora_A.weight"] = torch.randn(4, 20)
            state[f"base_model.model.layers.{i}.q.lora_B.weight"] = torch.randn(24, 4)
        return lf.load_adapter(state, config={"r": 4, "lora_alpha": 8, "target_modules": ["q"], "peft_type": "LORA"})

    pair = [adapter(), adapter()]
    want = lf.merge(pair, [0.5, -1.0], method="svd", rank=3)
    batches, real = [], lowrank_svds._batch
    monkeypatch.setattr(gpu, "takes_kernels", lambda device: True)
    monkeypatch.setattr(lowrank_svds, "_batch", lambda sums, rank: batches.append(len(sums)) or real(sums, rank))
    monkeypatch.setattr("lora_fuse.ops.svd.Normals.draw", lambda self, shape, device: torch.randn(shape).double())
    got = lf.merge(pair, [0.5, -1.0], method="svd", rank=3)
    assert batches == [3]
    for path in want.layers:
        torch.testing.assert_close(got.delta(path), want.delta(path), rtol=1e-5, atol=1e-4)
