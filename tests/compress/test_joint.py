"""``joint_compress``: bases that many adapters share, against dense alternating least squares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fuse as lf
from lora_fuse import LoraAdapter, LoraLayer
from lora_fuse.compress.joint import joint_compress
from lora_fuse.compress.joint_als import fit_diagonal, fit_full, in_span, unit_products

SIZES = {"a": (48, 32), "b": (24, 56)}


def bank_of(
    count: int, groups: int = 1, noise: float = 0.3, seed: int = 0, shared: int = 6, ranks: tuple[int, ...] = (4, 3)
) -> dict[str, LoraAdapter]:
    """Adapters whose factors lie in the bases of their group, up to noise; group of adapter i: ``i % groups``."""
    g = torch.Generator().manual_seed(seed)
    spaces = {
        path: [(torch.randn(m, shared, generator=g), torch.randn(shared, n, generator=g)) for _ in range(groups)]
        for path, (m, n) in SIZES.items()
    }
    made = {}
    for i in range(count):
        r, layers = ranks[i % len(ranks)], {}
        for path, (m, n) in SIZES.items():
            u, v = spaces[path][i % groups]
            b = u @ torch.randn(shared, r, generator=g) + noise * torch.randn(m, r, generator=g)
            a = torch.randn(r, shared, generator=g) @ v + noise * torch.randn(r, n, generator=g)
            layers[path] = LoraLayer(a, b, 0.5 + i / 10)
        made[f"t{i}"] = LoraAdapter(layers, source=f"t{i}")
    return made


def deltas(adapters: dict[str, LoraAdapter], path: str) -> Tensor:
    return torch.stack([a.delta(path).double() for a in adapters.values()])


def dense_full(units: Tensor, rank: int, sweeps: int = 300) -> Tensor:
    """Squared errors of converged dense alternating least squares with exact eigenvectors, ``[N]``."""
    v = torch.linalg.eigh((units.mT @ units).sum(0)).eigenvectors[:, -rank:]
    for _ in range(sweeps):
        mv = units @ v
        u = torch.linalg.eigh((mv @ mv.mT).sum(0)).eigenvectors[:, -rank:]
        mu = units.mT @ u
        v = torch.linalg.eigh((mu @ mu.mT).sum(0)).eigenvectors[:, -rank:]
    return 1 - (u.mT @ units @ v).square().sum((1, 2))


def dense_diagonal(units: Tensor, rank: int, seed: int, sweeps: int = 600) -> float:
    """Squared error, summed, of dense alternating least squares from random bases."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(size, rank, generator=g, dtype=torch.float64) for size in units.shape[1:])
    for _ in range(sweeps):
        d = torch.einsum("imn,mk,nk->ik", units, u, v) @ torch.linalg.pinv((u.mT @ u) * (v.mT @ v))
        u = torch.einsum("imn,ik,nk->mk", units, d, v) @ torch.linalg.pinv((d.mT @ d) * (v.mT @ v))
        v = torch.einsum("imn,ik,mk->nk", units, d, u) @ torch.linalg.pinv((d.mT @ d) * (u.mT @ u))
    d = torch.einsum("imn,mk,nk->ik", units, u, v) @ torch.linalg.pinv((u.mT @ u) * (v.mT @ v))
    return float((units - torch.einsum("ik,mk,nk->imn", d, u, v)).square().sum())


@pytest.mark.parametrize("rank", [1, 4, 6, 12])
def test_full_form_reaches_the_dense_optimum(rank: int) -> None:
    adapters = bank_of(20)
    bank = lf.joint_compress(adapters, rank=rank)
    for path in SIZES:
        whole = deltas(adapters, path)
        norms = torch.linalg.vector_norm(whole, dim=(1, 2))
        best = float(dense_full(whole / norms[:, None, None], rank).sum())
        left = torch.stack([a.delta(path).double() for a in bank.adapters.values()]) - whole
        errors = torch.linalg.vector_norm(left, dim=(1, 2)) / norms
        assert float(errors.square().sum()) <= best * 1.001 + 1e-9
        reported = [bank.report.errors[name][path] for name in adapters]
        torch.testing.assert_close(errors.float(), torch.tensor(reported), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_diagonal_form_is_as_good_as_dense_least_squares(rank: int) -> None:
    adapters = bank_of(20)
    bank = lf.joint_compress(adapters, rank=rank, form="diagonal")
    for path in SIZES:
        whole = deltas(adapters, path)
        units = whole / torch.linalg.vector_norm(whole, dim=(1, 2), keepdim=True)
        best = min(dense_diagonal(units, rank, seed) for seed in range(3))
        ours = sum(bank.report.errors[name][path] ** 2 for name in adapters)
        assert ours**0.5 <= 1.05 * best**0.5
        core = bank.adapters["t0"].cores[path]
        assert core.shape == (rank,)


def test_what_fits_is_exact() -> None:
    adapters = bank_of(12, noise=0.0)
    for rank in (6, 9):
        bank = lf.joint_compress(adapters, rank=rank)
        assert bank.report.error < 2e-3
        for name, adapter in adapters.items():
            for path in SIZES:
                want = adapter.delta(path)
                assert torch.linalg.vector_norm(bank.adapters[name].delta(path) - want) < 2e-3 * want.norm()


def test_bases_are_orthonormal_and_shared() -> None:
    bank = lf.joint_compress(bank_of(10), rank=5)
    for basis in bank.bases.values():
        for t in (basis.u[0], basis.v[0]):
            torch.testing.assert_close(t.mT @ t, torch.eye(5), atol=1e-5, rtol=0)
    assert all(adapter.bases is bank.bases for adapter in bank.adapters.values())


def test_the_span_changes_nothing() -> None:
    g = torch.Generator().manual_seed(1)
    bs = [torch.randn(60, 3, generator=g) for _ in range(5)]
    as_ = [torch.randn(3, 80, generator=g) for _ in range(5)]
    products, norms = unit_products(bs, as_)
    reduced, span = in_span(products)
    assert reduced.b.shape[1] == reduced.a.shape[2] == 15
    assert span.left is not None
    assert span.right is not None
    torch.testing.assert_close(span.left @ reduced.b[2], products.b[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norms[1], torch.linalg.vector_norm((bs[1] @ as_[1]).double()))
    for fit, rtol in ((fit_full, 2e-2), (fit_diagonal, 0.1)):  # least squares end in one of several minima
        inside, outside = fit(reduced, 4, 0), fit(products, 4, 0)
        torch.testing.assert_close(inside.errors.sum(), outside.errors.sum(), rtol=rtol, atol=0)


def test_scale_does_not_matter() -> None:
    adapters = bank_of(8)
    big = {
        name: LoraAdapter({p: LoraLayer(x.lora_a * 1e3, x.lora_b, x.scaling) for p, x in a.layers.items()})
        for name, a in adapters.items()
    }
    one, other = lf.joint_compress(adapters, rank=4), lf.joint_compress({**adapters, "t0": big["t0"]}, rank=4)
    assert abs(one.report.error - other.report.error) < 1e-4
    want = one.adapters["t0"].delta("a") * 1e3
    assert torch.linalg.vector_norm(other.adapters["t0"].delta("a") - want) < 1e-2 * want.norm()


def test_clusters_find_the_groups() -> None:
    adapters = bank_of(18, groups=3, noise=0.05)
    bank = lf.joint_compress(adapters, rank=6, num_clusters=3)
    clusters = [a.cluster for a in bank.adapters.values()]
    assert len({(i % 3, c) for i, c in enumerate(clusters)}) == 3, clusters
    assert bank.report.error < 0.3 * lf.joint_compress(adapters, rank=6).report.error
    assert bank.bases["a"].u.shape == (3, 48, 6)


def test_more_clusters_than_kinds_leaves_none_empty() -> None:
    same = bank_of(1)["t0"]
    bank = lf.joint_compress([same] * 4, rank=4, num_clusters=4)
    assert sorted(a.cluster for a in bank.adapters.values()) == [0, 1, 2, 3]
    assert bank.report.error < 1e-3


def test_different_layers_biases_and_heads() -> None:
    adapters = bank_of(6)
    layers = dict(adapters["t1"].layers)
    del layers["b"]
    bias = torch.randn(48)
    layers["a"] = LoraLayer(layers["a"].lora_a, layers["a"].lora_b, 2.0, lora_bias=bias)
    head = {"classifier": {"weight": torch.randn(3, 8)}}
    adapters["t1"] = LoraAdapter(layers, head)
    bank = lf.joint_compress(adapters, rank=4)
    small = bank.adapters["t1"]
    assert set(small.cores) == {"a"}
    torch.testing.assert_close(small.lora_bias["a"], 2 * bias)
    assert torch.equal(small.modules_to_save["classifier"]["weight"], head["classifier"]["weight"])
    lora = bank.to_adapter("t1")
    assert lora.rank == 4
    assert lora.layers["a"].lora_bias is not None
    torch.testing.assert_close(lora.delta("a"), small.delta("a"))
    with pytest.raises(ValueError, match="not 'b'"):
        small.delta("b")


def test_an_adapter_of_zeros() -> None:
    adapters = bank_of(4)
    zero = {p: LoraLayer(torch.zeros_like(x.lora_a), x.lora_b, 1.0) for p, x in adapters["t0"].layers.items()}
    adapters["t0"] = LoraAdapter(zero)
    for form in ("full", "diagonal"):
        bank = lf.joint_compress(adapters, rank=4, form=form)  # type: ignore[arg-type]
        assert not bank.adapters["t0"].delta("a").any()
        assert bank.report.errors["t0"]["a"] == 0


def test_seed_and_dtype() -> None:
    adapters = bank_of(8)
    one, two = (lf.joint_compress(adapters, rank=4, seed=3) for _ in range(2))
    assert torch.equal(one.bases["a"].u, two.bases["a"].u)
    half = lf.joint_compress(adapters, rank=4, dtype=torch.bfloat16)
    assert half.bases["a"].u.dtype == half.adapters["t0"].cores["a"].dtype == torch.bfloat16
    want = one.adapters["t0"].delta("a")
    assert torch.linalg.vector_norm(half.adapters["t0"].delta("a") - want) < 0.02 * want.norm()


def test_bytes_and_report() -> None:
    adapters = bank_of(40)
    bank = lf.joint_compress(adapters, rank=4)
    assert bank.report.nbytes_before == sum(a.nbytes for a in adapters.values())
    held = sum(b.nbytes for b in bank.bases.values()) + sum(a.nbytes for a in bank.adapters.values())
    assert bank.nbytes == bank.report.nbytes_after == held
    assert bank.report.nbytes_before > 5 * bank.nbytes
    assert "times fewer" in str(bank.report)
    assert "t39" in str(bank.report)
    assert "40 adapters" in repr(bank)
    assert "rank 4" in repr(bank.adapters["t0"])


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_files(tmp_path: Path, form: Any) -> None:
    adapters = bank_of(6, groups=2)
    head = {"head": {"weight": torch.randn(3, 8), "bias": torch.randn(3)}}
    adapters["a/../b"] = LoraAdapter(adapters.pop("t5").layers, head)  # a name that is no file's
    bank = lf.joint_compress(adapters, rank=4, num_clusters=2, form=form)
    bank.save_pretrained(tmp_path / "bank")
    back = lf.load_joint(tmp_path / "bank")
    assert list(back.adapters) == list(bank.adapters)
    assert back.form == form
    for path, basis in bank.bases.items():
        assert torch.equal(basis.u, back.bases[path].u)
        assert torch.equal(basis.v, back.bases[path].v)
    for name, adapter in bank.adapters.items():
        other = back.adapters[name]
        assert other.cluster == adapter.cluster
        assert other.cores.keys() == adapter.cores.keys()
        assert all(torch.equal(core, other.cores[path]) for path, core in adapter.cores.items())
        assert other.modules_to_save.keys() == adapter.modules_to_save.keys()
    assert back.report.error == pytest.approx(bank.report.error)
    assert back.nbytes == bank.nbytes
    some = lf.load_joint(tmp_path / "bank", ["t1"])
    assert list(some.adapters) == ["t1"]
    with pytest.raises(ValueError, match=r"no adapter 'x'; it has 't0'"):
        lf.load_joint(tmp_path / "bank", "x")


def test_damaged_files(tmp_path: Path) -> None:
    lf.joint_compress(bank_of(4), rank=4).save_pretrained(tmp_path)
    config, weights = tmp_path / "joint.json", tmp_path / "joint.safetensors"
    whole = json.loads(config.read_text())

    def refused(match: str, **changes: Any) -> None:
        config.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(ValueError, match=match):
            lf.load_joint(tmp_path)

    refused("'form' is 'x'", form="x")
    refused("version 9", version=9)
    refused("two adapters have one name", adapters=[whole["adapters"][0]] * 2)
    refused("described as", adapters=[{"name": "t"}])
    refused("cluster 7", adapters=[{**whole["adapters"][0], "cluster": 7}, *whole["adapters"][1:]])
    refused("lacks", checksums={**whole["checksums"], "core/9/a": "00000000"})
    config.write_text(json.dumps(whole))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or damaged"):
        lf.load_joint(tmp_path)
    with pytest.raises(ValueError, match="not a joint bank"):
        lf.load_joint(tmp_path / "nothing")


def conv(adapters: dict[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    layer = LoraLayer(torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1), 1.0, kind="conv2d")
    return {**adapters, "c": LoraAdapter({"conv": layer})}


def dora(adapters: dict[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    x = adapters["t0"].layers["a"]
    return {"d": LoraAdapter({"a": LoraLayer(x.lora_a, x.lora_b, 1.0, magnitude=torch.ones(48))})}


def poisoned(adapters: dict[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    x = adapters["t0"].layers["a"]
    return {**adapters, "n": LoraAdapter({"a": LoraLayer(x.lora_a * float("nan"), x.lora_b, 1.0)})}


def other_shape(adapters: dict[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    return {**adapters, "o": LoraAdapter({"a": LoraLayer(torch.ones(2, 31), torch.ones(48, 2), 1.0)})}


@pytest.mark.parametrize(
    ("change", "kwargs", "match"),
    [
        (None, {"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        (None, {"rank": 2.5}, "rank: expected an integer"),
        (None, {"num_clusters": 9}, "num_clusters: 9 for 4 adapters"),
        (None, {"form": "round"}, "form: expected one of full, diagonal, got 'round'"),
        (None, {"dtype": torch.int8}, "dtype"),
        (conv, {}, "'c': layer 'conv' is a conv2d layer"),
        (dora, {}, "'d': uses DoRA"),
        (poisoned, {}, "'n'"),
        (other_shape, {}, "they belong to different models"),
        (lambda _: {}, {}, "at least one adapter"),
    ],
)
def test_bad_input(change: Any, kwargs: dict[str, Any], match: str) -> None:
    adapters = bank_of(4)
    with pytest.raises(ValueError, match=match):
        joint_compress(adapters if change is None else change(adapters), **kwargs)


@pytest.mark.parametrize("form", ["full", "diagonal"])
@pytest.mark.parametrize("clusters", [1, 3])
def test_adapters_that_are_zero(form: Any, clusters: int) -> None:
    adapters = bank_of(2)
    zero = {path: LoraLayer(torch.zeros(2, n), torch.zeros(m, 2), 1.0) for path, (m, n) in SIZES.items()}
    adapters["zero"] = LoraAdapter(zero)
    bank = joint_compress(adapters, rank=4, num_clusters=clusters, form=form)
    assert not any(bank.adapters["zero"].delta(path).any() for path in SIZES)
    alone = joint_compress({"zero": adapters["zero"]}, rank=4, form=form)
    assert not any(alone.adapters["zero"].delta(path).any() for path in SIZES)
    assert alone.report.error == 0


def test_seed_and_form_of_wrong_types() -> None:
    with pytest.raises(TypeError, match="seed: expected an integer, got 'a'"):
        joint_compress(bank_of(2), seed="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"form: expected one of full, diagonal, got \['full'\]"):
        joint_compress(bank_of(2), form=["full"])  # type: ignore[arg-type]
