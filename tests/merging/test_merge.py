"""merge: exact sums, optimal truncation, identities, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from largest_tensor import Sizes
from merge_models import SHAPES, dense, make_adapter, three_adapters
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer

WEIGHTS = [0.7, -0.5, 1.25]


def expected(adapters: list[lf.LoraAdapter], weights: list[float]) -> dict[str, Tensor]:
    return {
        path: sum(
            (w * dense(a, path) for a, w in zip(adapters, weights, strict=True) if path in a.layers), torch.zeros(())
        )
        for path in SHAPES
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["linear", "cat", "uniform", "svd"])
def test_exact_sum_of_deltas(method: str, rslora: bool) -> None:
    adapters = three_adapters(rslora=rslora)
    weights = [1 / 3] * 3 if method == "uniform" else WEIGHTS
    kwargs: dict[str, Any] = {"rank": 64} if method == "svd" else {}
    merged = lf.merge(adapters, None if method == "uniform" else weights, method=method, **kwargs)
    assert set(merged.layers) == set(SHAPES)
    for path, want in expected(adapters, weights).items():
        layer = merged.layers[path]
        assert layer.scaling == 1.0
        assert layer.weight_shape == adapters[1 if path == "emb" else 0].layers[path].weight_shape
        assert (dense(merged, path) - want).norm() <= 5e-7 * want.norm()


def test_linear_compresses_what_cat_keeps() -> None:
    adapters = [make_adapter({"wide": 4}), make_adapter({"wide": 5}), make_adapter({"wide": 3})]  # 12 > min(6, 50)
    linear, cat = lf.merge(adapters, WEIGHTS), lf.merge(adapters, WEIGHTS, method="cat")
    assert (linear.rank, cat.rank) == (6, 12)
    assert torch.equal(cat.layers["wide"].lora_a[:4], adapters[0].layers["wide"].lora_a)
    torch.testing.assert_close(dense(linear, "wide"), dense(cat, "wide"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "svd"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncation_is_optimal(method: str, rank: int) -> None:
    adapters = three_adapters()
    merged = lf.merge(adapters, WEIGHTS, method=method, rank=rank)
    for path, want in expected(adapters, WEIGHTS).items():
        total = sum(a.layers[path].rank for a in adapters if path in a.layers)
        matrix = want.flatten(1)
        optimal = torch.linalg.svdvals(matrix)[rank:].norm()
        error = (dense(merged, path) - want).norm()
        assert merged.layers[path].rank == min(rank, total, *matrix.shape)
        assert error <= optimal * (1 + 1e-5) + 1e-6 * matrix.norm()


def test_svd_defaults_to_the_largest_rank_in_each_layer_and_splits_evenly() -> None:
    merged = lf.merge(three_adapters(), WEIGHTS, method="svd")
    assert {p: layer.rank for p, layer in merged.layers.items()} == {"lin": 7, "wide": 5, "conv": 4, "emb": 4}
    for layer in merged.layers.values():
        rows, columns = layer.lora_a.flatten(1), layer.lora_b.flatten(1)
        torch.testing.assert_close(rows.norm(dim=1), columns.norm(dim=0))
        assert (columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all()


def test_energy() -> None:
    adapters = three_adapters()
    for path, want in expected(adapters, WEIGHTS).items():
        merged = lf.merge(adapters, WEIGHTS, energy=0.8)
        share = dense(merged, path).norm() ** 2 / want.norm() ** 2
        fewer = torch.linalg.svdvals(want.flatten(1))[: merged.layers[path].rank - 1].norm() ** 2 / want.norm() ** 2
        assert fewer < 0.8 <= share * (1 + 1e-6)


@pytest.mark.parametrize("method", ["linear", "uniform", "cat", "svd"])
@pytest.mark.parametrize("kind", ["alpha", "rslora", "bias", "dora"])
def test_one_adapter_with_weight_1_is_that_adapter(method: str, kind: str) -> None:
    adapter = make_adapter({"lin": 7, "wide": 2, "conv": 3}, alpha=5.0, rslora=kind == "rslora", bias=kind == "bias")
    if kind == "dora":
        layers = {p: replace(layer, magnitude=torch.rand(layer.lora_b.shape[0])) for p, layer in adapter.layers.items()}
        adapter = replace(adapter, layers=layers)
    rows = (torch.tensor([3]), torch.randn(1, 20))
    adapter = replace(
        adapter,
        modules_to_save={"head": {"weight": torch.randn(2, 3)}},
        base_biases={"norm": torch.randn(4)},
        trainable_tokens={"emb": rows},
    )
    other = three_adapters()[0]
    for got in (
        lf.merge([adapter], method=method),
        *([] if method == "uniform" else [lf.merge([other, adapter], [0.0, 1.0], method=method)]),
    ):
        assert got.config == adapter.config
        for path, layer in adapter.layers.items():
            same = got.layers[path]
            assert (same.scaling, same.kind) == (layer.scaling, layer.kind)
            assert all(torch.equal(x, y) for x, y in zip(same.tensors(), layer.tensors(), strict=True))
        assert got.layers.keys() == adapter.layers.keys()
        assert torch.equal(got.modules_to_save["head"]["weight"], adapter.modules_to_save["head"]["weight"])
        assert torch.equal(got.base_biases["norm"], adapter.base_biases["norm"])
        assert torch.equal(got.trainable_tokens["emb"][1], rows[1])


def test_one_adapter_truncated_keeps_its_smaller_layers() -> None:
    adapter = make_adapter({"lin": 7, "wide": 2}, rslora=True)
    merged = lf.merge([adapter], rank=3)
    assert torch.equal(merged.layers["wide"].lora_a, adapter.layers["wide"].lora_a)
    assert merged.layers["lin"].rank == 3
    settings = merged.config
    assert not settings["use_rslora"]
    assert settings["rank_pattern"] == {"^wide": 2}
    assert settings["alpha_pattern"] == {"^wide": pytest.approx(2 * 6 / 2**0.5)}


def test_lora_bias_sums_with_scaling() -> None:
    with_bias, without = make_adapter({"lin": 4, "conv": 3}, bias=True), make_adapter({"lin": 2})
    merged = lf.merge({"a": with_bias, "b": without}, {"b": 3.0, "a": -0.5})
    assert merged.config["lora_bias"] is True
    for path in ("lin", "conv"):
        layer = with_bias.layers[path]
        assert layer.lora_bias is not None
        torch.testing.assert_close(merged.layers[path].lora_bias, -0.5 * layer.scaling * layer.lora_bias)


def test_all_weights_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="weights: all are 0"):
        lf.merge(three_adapters(), [0, 0.0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_result(dtype: torch.dtype) -> None:
    adapters = three_adapters()
    for kwargs in ({"method": "cat"}, {"rank": 64, "method": "svd"}):
        merged = lf.merge(adapters, WEIGHTS, dtype=dtype, **kwargs)
        for path, want in expected(adapters, WEIGHTS).items():
            assert merged.layers[path].lora_a.dtype == merged.layers[path].lora_b.dtype == dtype
            assert (dense(merged, path) - want).norm() <= 2 * max(torch.finfo(dtype).eps, 1e-14) * want.norm()


def test_inputs_are_left_alone() -> None:
    adapters = three_adapters(bias=True)
    before = [t.clone() for a in adapters for t in a.tensors()]
    for method in ("linear", "cat", "svd"):
        merged = lf.merge(adapters, WEIGHTS, method=method)
        for t in merged.tensors():
            t.zero_()
    assert all(torch.equal(x, y) for x, y in zip(before, (t for a in adapters for t in a.tensors()), strict=True))


def _with_head(width: int, value: float) -> lf.LoraAdapter:
    head = {"weight": torch.full((width, 3), value), "count": torch.tensor(5)}
    return replace(make_adapter({"lin": 2}), modules_to_save={"head": head})


def test_modules_to_save_policies() -> None:
    a, b = _with_head(2, 1.0), _with_head(2, 5.0)
    with pytest.raises(ValueError, match=r"'head' is replaced by adapters 'x', 'y'"):
        lf.merge({"x": a, "y": b})
    first = lf.merge([a, b], modules_to_save="first")
    assert first.modules_to_save["head"]["weight"].unique().tolist() == [1.0]
    average = lf.merge([a, b], [3.0, 1.0], modules_to_save="average")
    assert average.modules_to_save["head"]["weight"].unique().tolist() == [2.0]
    assert average.modules_to_save["head"]["count"].item() == 5
    assert average.config["modules_to_save"] == ["head"]
    alone = lf.merge([a, make_adapter({"lin": 3})], [0.5, 0.5])
    assert alone.modules_to_save["head"]["weight"].unique().tolist() == [1.0]
    assert not lf.merge([a, make_adapter({"lin": 3})], [0.0, 0.5]).modules_to_save
    with pytest.raises(ValueError, match=r"cannot average 'head'.*\(2, 3\) and \(3, 3\)"):
        lf.merge([a, _with_head(3, 1.0)], modules_to_save="average")
    with pytest.raises(ValueError, match="cannot average 'head', adapter #1 has weight -1"):
        lf.merge([a, b], [2.0, -1.0], modules_to_save="average")
    with pytest.raises(ValueError, match="modules_to_save: expected one of refuse, first, average"):
        lf.merge([a, b], modules_to_save="last")


def test_base_weights_must_agree() -> None:
    a, b = make_adapter({"emb": 2}), make_adapter({"emb": 3})
    weight = torch.randn(64, 20)
    a, b = replace(a, base_weights={"emb": weight.bfloat16()}), replace(b, base_weights={"emb": weight})
    assert torch.equal(lf.merge([a, b]).base_weights["emb"], weight.bfloat16())
    with pytest.raises(ValueError, match="'emb': adapters #0 and #1 bring different base weights"):
        lf.merge([a, replace(b, base_weights={"emb": weight + 1})])


def test_different_bases() -> None:
    """Another model is refused, the same name in another place may be a copy."""
    a, b = make_adapter({"lin": 2}), make_adapter({"lin": 2})
    a = replace(a, config={**a.config, "base_model_name_or_path": "org/one"})
    b = replace(b, config={**b.config, "base_model_name_or_path": "org/two"})
    with pytest.raises(ValueError, match="adapters 'x' and 'y' were made for different base models, 'org/one' and"):
        lf.merge({"x": a, "y": b})
    b = replace(b, config={**b.config, "base_model_name_or_path": "/models/One/"})
    with pytest.warns(UserWarning, match=r"'org/one' \(adapter 'x'\), '/models/One/' \(adapter 'y'\)") as caught:
        lf.merge({"x": a, "y": b})
    assert caught[0].filename == __file__


def _spoilt(**changes: Any) -> lf.LoraAdapter:
    adapter = make_adapter({"lin": 4})
    return replace(adapter, layers={"lin": replace(adapter.layers["lin"], **changes)})


GOOD = make_adapter({"lin": 4})


@pytest.mark.parametrize(
    ("adapters", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "at least one adapter"),
        (3, {}, TypeError, "adapters: expected a list or a dict"),
        ([GOOD, 3], {}, TypeError, r"adapters\[1\]: expected a LoraAdapter or a path, got int"),
        ([GOOD], {"method": "tie"}, ValueError, "method: expected one of linear, uniform, cat, svd, .* got 'tie'"),
        ([GOOD], {"weights": [1.0, 2.0]}, ValueError, "weights: expected 1, one per adapter, got 2"),
        ([GOOD], {"weights": 2.0}, TypeError, "weights: expected a sequence of numbers, one per adapter, got float"),
        ([GOOD], {"weights": torch.tensor(2.0)}, TypeError, "weights: expected a sequence of numbers"),
        ([GOOD], {"weights": ["1"]}, TypeError, "weights: expected numbers"),
        ([GOOD], {"weights": [True]}, TypeError, "weights: expected numbers"),
        ([GOOD], {"weights": [float("inf")]}, ValueError, "weights: expected finite numbers"),
        ([GOOD], {"weights": {"a": 1.0}}, ValueError, "weights: a dict needs the adapters' own names"),
        ({"b": GOOD}, {"weights": {"a": 1.0}}, ValueError, r"got \['a'\] for \['b'\]"),
        ([GOOD], {"weights": [1.0], "method": "uniform"}, ValueError, "weights: method 'uniform'"),
        ([GOOD], {"rank": 3, "method": "cat"}, ValueError, "method 'cat' does not take it"),
        ([GOOD], {"rank": 0}, ValueError, "rank: expected an integer of at least 1"),
        ([GOOD], {"rank": 2.0}, ValueError, "rank: expected an integer of at least 1"),
        ([GOOD], {"energy": -1.0}, ValueError, "energy: expected 0 < energy <= 1"),
        ([GOOD], {"rank": 2, "energy": 0.5}, ValueError, "give one of the two"),
        ([GOOD], {"dtype": torch.int8}, ValueError, "dtype: expected one of"),
        (
            {"x": GOOD, "y": _spoilt(lora_a=torch.randn(4, 99))},
            {},
            ValueError,
            r"'lin': adapter 'y' is for .*\(40, 99\)",
        ),
        ([GOOD, _spoilt(kind="embedding")], {}, ValueError, "a embedding|embedding weight of shape"),
        ({"x": GOOD, "y": _spoilt(lora_b=torch.randn(40, 2))}, {}, ValueError, "do not share a rank"),
        (
            {"x": GOOD, "y": _spoilt(lora_b=torch.full((40, 4), torch.nan))},
            {},
            ValueError,
            "'y', layer 'lin': lora_b has NaN",
        ),
        ({"x": GOOD, "y": _spoilt(magnitude=torch.ones(40))}, {}, ValueError, "adapter 'y': uses DoRA"),
        ({"y": _spoilt(magnitude=torch.ones(40))}, {"weights": [0.5]}, ValueError, "adapter 'y': uses DoRA"),
        ({"y": _spoilt(magnitude=torch.ones(40))}, {"rank": 2}, ValueError, "adapter 'y': uses DoRA"),
        (
            [replace(GOOD, base_biases={"n": torch.ones(3)})],
            {"weights": [0.5]},
            ValueError,
            "replaces biases .* at 'n'",
        ),
        (
            [GOOD, replace(GOOD, trainable_tokens={"emb": (torch.tensor([1]), torch.ones(1, 2))})],
            {},
            ValueError,
            "replaces rows .* at 'emb'",
        ),
        (
            [_spoilt(lora_b=torch.full((40, 4), 3e4))],
            {"weights": [9.0], "dtype": torch.float16},
            ValueError,
            "overflow",
        ),
    ],
)
def test_bad_input(adapters: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lf.merge(adapters, **kwargs)


def test_paths_and_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter({"lin": 4, "wide": 2})
    adapter.save_pretrained(tmp_path / "a")
    merged = lf.merge([str(tmp_path / "a"), tmp_path / "a"], [0.5, 0.25], progress=True)
    torch.testing.assert_close(dense(merged, "lin"), 0.75 * dense(adapter, "lin"), rtol=1e-6, atol=1e-5)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_no_array_of_the_weights_shape(method: str) -> None:
    layers = [LoraLayer(torch.randn(8, 500), torch.randn(400, 8), 0.5) for _ in range(4)]
    adapters = [lf.LoraAdapter({"lin": layer}) for layer in layers]
    with Sizes() as sizes:
        lf.merge(adapters, [0.25, -0.5, 1.0, 2.0], method=method)
    assert 8 * 400 < sizes.largest <= 4 * 8 * 500 < 400 * 500


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.wide = nn.Embedding(64, 20), nn.Linear(24, 40), nn.Linear(50, 6)
        self.conv = nn.Conv2d(5, 16, 3)

    def forward(self, ids: Tensor, x: Tensor, y: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        return self.emb(ids), self.lin(x), self.wide(y), self.conv(image)


def _inputs() -> tuple[Tensor, ...]:
    return torch.arange(8), torch.randn(3, 24), torch.randn(3, 50), torch.randn(2, 5, 6, 6)


@pytest.mark.parametrize("kwargs", [{}, {"method": "svd", "rank": 3}], ids=["linear", "svd"])
def test_peft_loads_what_was_merged(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    net, inputs, adapters = Net().eval(), _inputs(), three_adapters()
    merged = lf.merge(adapters, WEIGHTS, **kwargs)
    merged.save_pretrained(tmp_path / "merged")
    fused = Net().eval()
    fused.load_state_dict(net.state_dict())
    with torch.no_grad():
        for path in SHAPES:
            fused.get_submodule(path).weight += merged.delta(path)
        loaded = peft.PeftModel.from_pretrained(net, tmp_path / "merged").eval()
        for got, want in zip(loaded(*inputs), fused(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_agrees_with_peft_where_peft_is_right(tmp_path: Path, combination: str) -> None:
    """Equal layers, no rsLoRA, no bias: there PEFT's `cat` and `svd` are the weighted sum of deltas too."""
    peft = pytest.importorskip("peft")
    adapters = [
        make_adapter({"lin": r, "wide": r, "emb": r}, alpha=alpha) for r, alpha in ((4, 6.0), (4, 12.0), (3, 1.0))
    ]
    model = None
    for i, adapter in enumerate(adapters):
        adapter.save_pretrained(tmp_path / str(i))
        if model is None:
            model = peft.PeftModel.from_pretrained(Net(), tmp_path / str(i), adapter_name="0")
        else:
            model.load_adapter(tmp_path / str(i), adapter_name=str(i))
    assert model is not None
    rank = {"svd_rank": 5} if combination == "svd" else {}
    model.add_weighted_adapter(["0", "1", "2"], [0.7, 0.5, 1.25], "mix", combination_type=combination, **rank)
    merged = lf.merge(adapters, [0.7, 0.5, 1.25], method=combination, rank=5 if rank else None)
    for path in ("lin", "wide", "emb"):
        theirs = model.base_model.model.get_submodule(path).get_delta_weight("mix").detach()
        torch.testing.assert_close(merged.delta(path), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"energy": "0.5"}, TypeError, "energy: expected 0 < energy <= 1, got '0.5'"),
        ({"energy": True}, TypeError, "energy: expected 0 < energy <= 1, got True"),
        ({"method": ["ties"]}, ValueError, r"method: expected one of .*, got \['ties'\]"),
        ({"method": "ties", "density": torch.tensor([0.2, 0.3])}, TypeError, "density: expected 0 < density <= 1, got"),
        ({"method": "ties", "density": {"0": 0.2, 5: 0.3}}, ValueError, "density: a dict needs the names"),
        ({"method": "regmean", "grams": 5}, TypeError, "grams: expected .*, got int"),
        ({"weights": {0: 1.0, "a": 2.0}}, ValueError, "weights: a dict needs the adapters' own names"),
    ],
)
def test_wrong_types_name_the_argument(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lf.merge(three_adapters()[:2], **kwargs)


def test_names_are_compared_as_strings() -> None:
    one, two = three_adapters()[:2]
    merged = lf.merge({1: one, 2: two}, {1: 0.5, 2: -1.0})  # type: ignore[dict-item]
    same = lf.merge([one, two], [0.5, -1.0])
    assert all(torch.equal(layer.lora_b, same.layers[path].lora_b) for path, layer in merged.layers.items())
    with pytest.raises(ValueError, match=r"adapters: names have to differ as strings, got \[1, '1'\]"):
        lf.merge({1: one, "1": two})  # type: ignore[dict-item]
    state = {"w": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="models: names have to differ as strings"):
        lf.merge({1: state, "1": state}, base=state)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="heads: expected patterns for parameter names, got int"):
        lf.merge([state], base=state, heads=3)  # type: ignore[call-overload]
