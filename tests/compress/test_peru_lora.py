"""peru_lora: optimal per task, with a report that says the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer


def make_adapter(scaling: float = 2.0, dtype: torch.dtype = torch.float32) -> lf.LoraAdapter:
    def layer(kind: Any, a: tuple[int, ...], b: tuple[int, ...], decay: float = 0.5) -> LoraLayer:
        scales = decay ** torch.arange(a[0]).float()
        factor_a = torch.randn(a) * scales.reshape(-1, *[1] * (len(a) - 1))
        return LoraLayer(factor_a.to(dtype), torch.randn(b).to(dtype), scaling, kind)

    layers = {
        "lin": layer("linear", (8, 30), (40, 8)),
        "small": layer("linear", (2, 30), (40, 2)),
        "conv": layer("conv2d", (6, 5, 3, 3), (16, 6, 1, 1)),
        "emb": layer("embedding", (7, 90), (24, 7)),
    }
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8 * scaling,
        "task_type": "SEQ_CLS",
        "modules_to_save": ["head"],
    }
    head = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    return lf.LoraAdapter(layers, {"head": head}, config=config)


def flat(layer: LoraLayer) -> Tensor:
    return layer.scaling * (layer.lora_b.double().flatten(1) @ layer.lora_a.double().flatten(1))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_each_product_is_truncated_optimally(rank: int) -> None:
    adapters = {"sql": make_adapter(), "math": make_adapter(-0.3)}
    small = lf.peru_lora(adapters, rank=rank)
    assert list(small) == ["sql", "math"]
    for name, adapter in adapters.items():
        for path, layer in adapter.layers.items():
            got = small[name].layers[path]
            s = torch.linalg.svdvals(flat(layer))
            optimal = s[rank:].norm() if layer.rank > rank else torch.zeros(())
            error = (flat(got) - flat(layer)).norm()
            assert got.rank == min(rank, layer.rank)
            assert (got.kind, got.weight_shape) == (layer.kind, layer.weight_shape)
            assert error <= optimal * (1 + 1e-5) + 1e-6 * s.norm()
            report = small.report.adapters[name].layers[path]
            assert report.energy == pytest.approx(float(1 - optimal**2 / s.norm() ** 2), abs=1e-9)
            assert report.squared_norm == pytest.approx(float(s.norm() ** 2), rel=1e-6)
            assert (report.rank_before, report.rank_after) == (layer.rank, got.rank)
        assert torch.equal(small[name].modules_to_save["head"]["bias"], adapter.modules_to_save["head"]["bias"])


def test_report_adds_up() -> None:
    adapters = {"sql": make_adapter(), "math": make_adapter(-0.3)}
    small = lf.peru_lora(adapters, rank=2)
    report = small.report
    lost = dict.fromkeys(adapters, 0.0)
    total = dict(lost)
    for name, adapter in adapters.items():
        for path, layer in adapter.layers.items():
            lost[name] += float((flat(layer) - flat(small[name].layers[path])).norm() ** 2)
            total[name] += float(flat(layer).norm() ** 2)
        assert report.adapters[name].energy == pytest.approx(1 - lost[name] / total[name], abs=1e-5)
        assert report.adapters[name].nbytes_before == adapter.nbytes
        assert report.adapters[name].nbytes_after == small[name].nbytes < adapter.nbytes
    assert report.energy == pytest.approx(1 - sum(lost.values()) / sum(total.values()), abs=1e-5)
    assert report.nbytes_after == sum(a.nbytes for a in small.values())
    lines = str(report).splitlines()
    assert lines[1].split()[:4] == ["sql", "8", "->", "2"]
    assert f"{report.nbytes_before:,} -> {report.nbytes_after:,}" in lines[-1]


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_is_met_in_every_layer_by_the_fewest_directions(energy: float) -> None:
    adapter = make_adapter()
    small = lf.peru_lora([adapter], energy=energy)
    for path, layer in adapter.layers.items():
        squares = torch.linalg.svdvals(flat(layer)).square()
        k = small["0"].layers[path].rank
        assert squares[:k].sum() >= energy * squares.sum() * (1 - 1e-9)
        assert k == 1 or squares[: k - 1].sum() < energy * squares.sum()
        assert small.report.adapters["0"].layers[path].energy >= energy - 1e-9


def test_large_rank_changes_nothing() -> None:
    adapter = make_adapter()
    same = lf.peru_lora([adapter], rank=8)
    for path, layer in adapter.layers.items():
        assert all(torch.equal(x, y) for x, y in zip(same["0"].layers[path].tensors(), layer.tensors(), strict=True))
    assert same.report.energy == 1.0
    assert same.report.nbytes_before == same.report.nbytes_after


def test_dtype_and_bias() -> None:
    adapter = make_adapter(dtype=torch.bfloat16)
    bias = torch.randn(40).bfloat16()
    adapter = replace(
        adapter,
        layers={k: replace(v, lora_bias=bias) if k in ("lin", "small") else v for k, v in adapter.layers.items()},
    )
    small = lf.peru_lora([adapter], rank=3)["0"]
    assert all(layer.lora_a.dtype == layer.lora_b.dtype == torch.bfloat16 for layer in small.layers.values())
    for path in ("lin", "small"):  # truncated (scaling folded in) and kept
        got, layer = small.layers[path], adapter.layers[path]
        assert got.lora_bias is not None
        torch.testing.assert_close(got.scaling * got.lora_bias, layer.scaling * bias)
    assert lf.peru_lora([adapter], rank=3, dtype=torch.float32)["0"].layers["lin"].lora_a.dtype == torch.float32


def test_saves_and_loads(tmp_path: Path) -> None:
    small = lf.peru_lora({"a": make_adapter(3.7)}, rank=3)["a"]
    assert small.config["task_type"] == "SEQ_CLS"
    small.save_pretrained(tmp_path)
    loaded = lf.load_adapter(tmp_path)
    for path, layer in small.layers.items():
        torch.testing.assert_close(flat(loaded.layers[path]), flat(layer), rtol=1e-12, atol=0)
    assert torch.equal(loaded.modules_to_save["head"]["weight"], small.modules_to_save["head"]["weight"])


def _spoilt(**changes: Any) -> dict[str, lf.LoraAdapter]:
    adapter = make_adapter()
    return {"sql": replace(adapter, layers={"lin": replace(adapter.layers["lin"], **changes)})}


@pytest.mark.parametrize(
    ("adapters", "kwargs", "message"),
    [
        (_spoilt(), {}, "rank, energy: give one of the two"),
        (_spoilt(), {"rank": 2, "energy": 0.5}, "rank, energy: give one of the two"),
        (_spoilt(), {"rank": 0}, "rank: expected an integer"),
        (_spoilt(), {"energy": 2.0}, "energy: expected 0 < energy <= 1"),
        (_spoilt(), {"rank": 2, "dtype": torch.int32}, "dtype: expected one of"),
        (_spoilt(magnitude=torch.ones(40)), {"rank": 2}, "adapter 'sql': uses DoRA"),
        (_spoilt(lora_a=torch.full((8, 30), torch.nan)), {"rank": 2}, "adapter 'sql', layer 'lin': lora_a has NaN"),
        (_spoilt(lora_b=torch.ones(40, 3)), {"rank": 2}, "adapter 'sql', layer 'lin'.*do not share a rank"),
        ({}, {"rank": 2}, "at least one adapter"),
    ],
)
def test_bad_input(adapters: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lf.peru_lora(adapters, **kwargs)
