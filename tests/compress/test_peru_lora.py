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


def _cost(layer: LoraLayer) -> int:
    return layer.lora_b.shape[0] + layer.lora_a[0].numel()


def _spectra(adapter: lf.LoraAdapter) -> dict[str, Tensor]:
    return {path: torch.linalg.svdvals(flat(layer)).square()[: layer.rank] for path, layer in adapter.layers.items()}


def _uneven() -> lf.LoraAdapter:
    """One layer in which little happens, one in which much does."""
    adapter = make_adapter()
    scales = {"emb": 0.01, "lin": 5.0}
    layers = {p: replace(x, lora_a=x.lora_a * scales.get(p, 1.0)) for p, x in adapter.layers.items()}
    return replace(adapter, layers=layers)


def _lost(adapter: lf.LoraAdapter, small: lf.LoraAdapter) -> float:
    """Squared error over all layers; a layer that was left out counts whole."""
    return sum(
        float((flat(layer) - (flat(small.layers[path]) if path in small.layers else 0)).norm() ** 2)
        for path, layer in adapter.layers.items()
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_budget_is_never_worse_than_one_rank_at_its_cost(rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    adapter = _uneven() if seed % 2 else make_adapter()
    uniform = lf.peru_lora([adapter], rank=rank)["0"]
    cost = sum(layer.rank * _cost(layer) for layer in uniform.layers.values())
    spread = lf.peru_lora([adapter], budget=cost)["0"]
    assert sum(layer.rank * _cost(layer) for layer in spread.layers.values()) <= cost
    assert _lost(adapter, spread) <= _lost(adapter, uniform) * (1 + 1e-6)
    if rank < 6 and seed % 2:  # and here it can do far better
        assert _lost(adapter, spread) < 0.7 * _lost(adapter, uniform)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6, 1.0])
def test_a_budget_goes_where_it_saves_most_error(budget: float) -> None:
    adapter = make_adapter()
    small = lf.peru_lora({"a": adapter}, budget=budget)
    report, spectra = small.report.adapters["a"].layers, _spectra(adapter)
    allowed = int(budget * sum(layer.rank * _cost(layer) for layer in adapter.layers.values()) + 0.5)
    spent = sum(report[path].rank_after * _cost(layer) for path, layer in adapter.layers.items())
    assert spent <= allowed
    # Nothing that was left out both fits and would have been worth more than what was taken.
    for path, layer in adapter.layers.items():
        k = report[path].rank_after
        assert k == layer.rank or spent + _cost(layer) > allowed
        assert (path in small["a"].layers) == (k > 0)
        assert report[path].squared_error == pytest.approx(float(spectra[path][k:].sum()), rel=1e-5, abs=1e-9)
    if budget == 1.0:
        for path, layer in adapter.layers.items():
            assert torch.equal(small["a"].layers[path].lora_a, layer.lora_a)
    assert small.report.energy == pytest.approx(
        1 - _lost(adapter, small["a"]) / sum(map(_total, spectra.values())), abs=1e-5
    )


def _total(squares: Tensor) -> float:
    return float(squares.sum())


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_energy_spread_over_an_adapter_costs_no_more(energy: float) -> None:
    adapter = _uneven()
    each = lf.peru_lora([adapter], energy=energy)
    small = lf.peru_lora([adapter], energy=energy, spread="adapter")
    assert small.report.energy >= energy - 1e-9
    costs = [sum(layer.rank * _cost(layer) for layer in c["0"].layers.values()) for c in (small, each)]
    assert costs[0] <= costs[1]
    if energy == 0.8:
        assert costs[0] < costs[1]
        assert set(small["0"].layers) < set(adapter.layers)  # a weak layer got nothing
        saved = small["0"]
        assert saved.config["target_modules"] == sorted(saved.layers)


def test_layers_with_a_bias_keep_a_direction() -> None:
    adapter = make_adapter()
    lin = replace(adapter.layers["small"], lora_a=adapter.layers["small"].lora_a * 1e-6, lora_bias=torch.randn(40))
    adapter = replace(adapter, layers={"big": adapter.layers["lin"], "small": lin})
    small = lf.peru_lora([adapter], budget=0.3)["0"]
    assert small.layers["small"].rank == 1
    with pytest.raises(
        ValueError, match=r"budget: adapter '0': 60 parameters, but the least that it can do with is 70"
    ):
        lf.peru_lora([adapter], budget=60)


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
        (_spoilt(), {}, "rank, energy, budget: give one of the three"),
        (_spoilt(), {"rank": 2, "energy": 0.5}, "rank, energy, budget: give one of the three"),
        (_spoilt(), {"rank": 0}, "rank: expected an integer"),
        (_spoilt(), {"energy": 2.0}, "energy: expected 0 < energy <= 1"),
        (_spoilt(), {"rank": 2, "budget": 0.5}, "give one of the three, .* got rank=2 and budget=0.5"),
        (_spoilt(), {"budget": 1.5}, "budget: expected 0 < budget <= 1"),
        (_spoilt(), {"budget": 0}, "budget: expected"),
        (_spoilt(), {"budget": 30}, "budget: adapter 'sql': 30 parameters, but the least that it can do with is 70"),
        (_spoilt(), {"energy": 0.5, "spread": "model"}, "spread: expected 'layer' or 'adapter'"),
        (_spoilt(), {"rank": 2, "spread": "adapter"}, "spread: a rank holds for each layer"),
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
