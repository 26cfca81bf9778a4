"""knots_ties, tsv, iso_c, iso_cts, factor_average: against dense fp64 references, and the laws they keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from largest_tensor import Sizes
from merge_models import SHAPES, make_adapter, three_adapters
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import reference
from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging import knots

WEIGHTS = [0.7, -0.5, 1.25]
Adapters = list[lf.LoraAdapter]


def matrix(adapter: lf.LoraAdapter, path: str) -> Tensor:
    """The delta as the factors lie, ``[out, in]``, in fp64."""
    layer = adapter.layers[path]
    return layer.scaling * (layer.lora_b.double().flatten(1) @ layer.lora_a.double().flatten(1))


def naive(method: str, adapters: Adapters, weights: list[float], **options: Any) -> dict[str, Tensor]:
    """What the method's definition gives for each layer, from dense deltas."""
    paths = list(dict.fromkeys(path for a in adapters for path in a.layers))
    have = {
        p: [(i, a, w) for i, (a, w) in enumerate(zip(adapters, weights, strict=True)) if p in a.layers] for p in paths
    }
    if method == "knots_ties":
        layers = [{str(i): matrix(a, p) for i, a, _ in have[p]} for p in paths]
        merged = reference.knots_ties(layers, {str(i): w for i, w in enumerate(weights)}, **{"density": 0.2, **options})
        return dict(zip(paths, merged, strict=True))
    result = {}
    for path in paths:
        deltas = [w * matrix(a, path) for _, a, w in have[path]]
        if method == "iso_cts":
            total = sum(a.layers[path].rank for _, a, _ in have[path])
            result[path] = reference.iso_cts(deltas, min(total, *deltas[0].shape), **options)
        else:
            result[path] = getattr(reference, method)(deltas, **options)
    return result


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "knots_ties": ("knots_ties", {}),
    "knots_layer": ("knots_ties", {"scope": "tensor", "density": 0.3}),
    "knots_frequency": ("knots_ties", {"majority_sign": "frequency", "density": 0.9}),
    "knots_untrimmed": ("knots_ties", {"density": 1.0}),
    "tsv": ("tsv", {}),
    "iso_c": ("iso_c", {}),
    "iso_c_min_dim": ("iso_c", {"mean_over": "min_dim"}),
    "iso_cts": ("iso_cts", {}),
    "iso_cts_half": ("iso_cts", {"common_fraction": 0.5, "mean_over": "min_dim"}),
    "iso_cts_none": ("iso_cts", {"common_fraction": 0.0}),
}
METHODS = ["knots_ties", "tsv", "iso_c", "iso_cts"]


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha", "rslora"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_dense_definition(case: str, rslora: bool) -> None:
    method, options = CASES[case]
    adapters = three_adapters(rslora=rslora)
    want = naive(method, adapters, WEIGHTS, **options)
    exact = lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64, **options)
    merged = lf.merge(adapters, WEIGHTS, method=method, **options)
    assert set(exact.layers) == set(want) == set(SHAPES)
    for path in SHAPES:
        layer = exact.layers[path]
        assert layer.scaling == 1.0
        assert layer.rank <= min(sum(a.layers[path].rank for a in adapters if path in a.layers), *want[path].shape)
        assert (matrix(exact, path) - want[path]).norm() <= 1e-10 * want[path].norm()
        assert (matrix(merged, path) - want[path]).norm() <= 1e-6 * want[path].norm()
        assert (
            merged.layers[path].weight_shape == next(a for a in adapters if path in a.layers).layers[path].weight_shape
        )


@pytest.mark.parametrize("method", METHODS)
def test_many_adapters_of_one_rank(method: str) -> None:
    adapters = [make_adapter({"lin": 3}, alpha=1.0 + i) for i in range(7)]
    want = naive(method, adapters, [1.0] * 7)["lin"]
    got = matrix(lf.merge(adapters, method=method, dtype=torch.float64), "lin")
    assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_optimal(method: str, rank: int) -> None:
    adapters = three_adapters()
    whole = lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64)
    merged = lf.merge(adapters, WEIGHTS, method=method, rank=rank)
    for path in SHAPES:
        want = matrix(whole, path)
        s = torch.linalg.svdvals(want)
        error = (matrix(merged, path) - want).norm()
        assert merged.layers[path].rank == min(rank, whole.layers[path].rank)
        assert error <= s[rank:].norm() * (1 + 1e-5) + 1e-6 * want.norm()
        rows, columns = merged.layers[path].lora_a.flatten(1), merged.layers[path].lora_b.flatten(1)
        if merged.layers[path].rank < whole.layers[path].rank:
            torch.testing.assert_close(rows.norm(dim=1), columns.norm(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_energy_keeps_the_fewest_directions(method: str) -> None:
    adapters = three_adapters()
    want = matrix(lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64), "lin")
    squares = torch.linalg.svdvals(want).square()
    merged = lf.merge(adapters, WEIGHTS, method=method, energy=0.7)
    k = merged.layers["lin"].rank
    assert squares[:k].sum() >= 0.7 * squares.sum() * (1 - 1e-9)
    assert squares[: k - 1].sum() < 0.7 * squares.sum()
    assert (matrix(merged, "lin") - want).norm() <= squares[k:].sum().sqrt() * (1 + 1e-5) + 1e-6 * want.norm()


@pytest.mark.parametrize("method", METHODS)
def test_order_of_adapters_does_not_matter(method: str) -> None:
    adapters, order = three_adapters(), [2, 0, 1]
    merged = lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64)
    other = lf.merge([adapters[i] for i in order], [WEIGHTS[i] for i in order], method=method, dtype=torch.float64)
    for path in SHAPES:
        torch.testing.assert_close(matrix(other, path), matrix(merged, path), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaling", [0.3, -1.5])
def test_scaling_multiplies_deltas_and_biases(method: str, scaling: float) -> None:
    adapters = three_adapters(bias=True)
    merged = lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64)
    for kwargs in ({}, {"rank": 2}):
        scaled = lf.merge(adapters, WEIGHTS, method=method, scaling=scaling, dtype=torch.float64, **kwargs)
        cut = lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64, **kwargs)
        for path in SHAPES:
            torch.testing.assert_close(matrix(scaled, path), scaling * matrix(cut, path), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scaled.layers["lin"].lora_bias, scaling * merged.layers["lin"].lora_bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-4, 7.0, -2.0])
def test_homogeneous_in_the_weights_and_in_the_factors(method: str, factor: float) -> None:
    adapters = three_adapters()
    merged = lf.merge(adapters, WEIGHTS, method=method, dtype=torch.float64)
    weighted = lf.merge(adapters, [factor * w for w in WEIGHTS], method=method, dtype=torch.float64)
    louder = [
        replace(a, layers={p: replace(layer, scaling=factor * layer.scaling) for p, layer in a.layers.items()})
        for a in adapters
    ]
    scaled = lf.merge(louder, WEIGHTS, method=method, dtype=torch.float64)
    for path in SHAPES:
        for got in (weighted, scaled):
            assert (matrix(got, path) - factor * matrix(merged, path)).norm() <= 1e-9 * matrix(got, path).norm()


@pytest.mark.parametrize("method", METHODS)
def test_rotating_the_outputs_rotates_the_result(method: str) -> None:
    adapters = three_adapters()
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    turned = [
        replace(a, layers={"lin": replace(a.layers["lin"], lora_b=rotation @ a.layers["lin"].lora_b.double())})
        for a in adapters
    ]
    plain = [replace(a, layers={"lin": a.layers["lin"]}) for a in adapters]
    want = rotation @ matrix(lf.merge(plain, WEIGHTS, method=method, dtype=torch.float64), "lin")
    got = matrix(lf.merge(turned, WEIGHTS, method=method, dtype=torch.float64), "lin")
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("method", "options"), [("knots_ties", {"density": 1.0}), ("tsv", {}), ("factor_average", {})])
def test_one_adapter_with_weight_1_is_that_adapter(method: str, options: dict[str, Any]) -> None:
    adapter = make_adapter({"lin": 7, "wide": 2, "conv": 3}, alpha=5.0, rslora=True, bias=True)
    merged = lf.merge([adapter], method=method, **options)
    for path, layer in adapter.layers.items():
        assert all(torch.equal(x, y) for x, y in zip(merged.layers[path].tensors(), layer.tensors(), strict=True))
    assert merged.config == adapter.config
    weighted = lf.merge([adapter], [-0.5], method=method, **options)
    factor = 0.25 if method == "factor_average" else -0.5
    for path in adapter.layers:
        assert (matrix(weighted, path) - factor * matrix(adapter, path)).norm() <= 2e-6 * matrix(adapter, path).norm()


def test_one_adapter_is_levelled_by_iso() -> None:
    """And so with one adapter both are the same: there is nothing but common directions."""
    adapter = make_adapter({"lin": 7, "conv": 3, "emb": 4})
    for method in ("iso_c", "iso_cts"):
        merged = lf.merge([adapter], method=method, dtype=torch.float64)
        for path in adapter.layers:
            u, s, vh = torch.linalg.svd(matrix(adapter, path), full_matrices=False)
            r = adapter.layers[path].rank
            want = s[:r].mean() * u[:, :r] @ vh[:r]
            torch.testing.assert_close(matrix(merged, path), want, rtol=1e-9, atol=1e-9)


def test_one_adapter_is_trimmed_by_knots() -> None:
    adapter = make_adapter({"lin": 7})
    merged = matrix(lf.merge([adapter], method="knots_ties", density=0.5, dtype=torch.float64), "lin")
    u, s, vh = torch.linalg.svd(matrix(adapter, "lin"), full_matrices=False)
    rows = s[:7, None] * vh[:7]
    kept = torch.where(rows.abs() >= rows.abs().flatten().sort(descending=True).values[7 * 24 // 2 - 1], rows, 0.0)
    torch.testing.assert_close(merged, u[:, :7] @ kept, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["iso_c", "tsv", "knots_ties"])
def test_an_adapter_twice(method: str) -> None:
    """iso_c sees the sum only; whitening makes copies one; the mean over agreeing copies is the adapter."""
    adapter, other = make_adapter({"lin": 5}), make_adapter({"lin": 3})
    options: dict[str, Any] = {"method": method, "dtype": torch.float64}
    if method == "iso_c":
        whole = lf.merge([adapter, other], [0.9, 0.5], **options)
        split = lf.merge([adapter, other, adapter], [0.7, 0.5, 0.2], **options)
    else:
        whole = lf.merge([adapter], [0.9], **options)
        split = lf.merge([adapter, adapter, adapter], [0.9] * 3, **options)
    torch.testing.assert_close(matrix(split, "lin"), matrix(whole, "lin"), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_zero(method: str) -> None:
    """An adapter that never learnt a layer (B = 0) adds no direction there; a layer that is all zero stays zero."""
    adapters = [make_adapter({"lin": 4, "wide": 3}) for _ in range(3)]
    for a in adapters:
        a.layers["wide"].lora_b.zero_()
    adapters[1].layers["lin"].lora_b.zero_()
    merged = lf.merge(adapters, method=method, dtype=torch.float64)
    assert not matrix(merged, "wide").any()
    assert merged.layers["wide"].rank >= 1
    want = naive(method, adapters, [1.0] * 3)["lin"]
    assert (matrix(merged, "lin") - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kwargs", [{}, {"rank": 8}], ids=["exact", "rank"])
def test_no_array_of_the_weights_shape(method: str, kwargs: dict[str, Any]) -> None:
    layers = [LoraLayer(torch.randn(8, 900), torch.randn(800, 8), 0.5) for _ in range(4)]
    adapters = [lf.LoraAdapter({"lin": layer}) for layer in layers]
    with Sizes() as sizes:
        merged = lf.merge(adapters, [0.25, -0.5, 1.0, 2.0], method=method, **kwargs)
    assert merged.rank == (8 if kwargs else 32)
    assert 32 * 800 <= sizes.largest <= 4 * 32 * 900 < 800 * 900


def bumpy(columns: int, spoil: bool) -> Adapters:
    """Adapters whose columns differ in size, on layers of different size."""
    adapters = []
    for i in range(3):
        layers = {}
        for j, scale in enumerate((0.02, 1.0, 5.0)):
            a = torch.randn(4, columns * (j + 1)) * torch.logspace(0, -2, columns * (j + 1))
            if spoil:  # what the sample sees is not what there is
                a[:, (97 * j) % 256 :: 256] *= 1e4
            layers[str(j)] = LoraLayer(a, torch.randn(30, 4), scale * (i + 1))
        adapters.append(lf.LoraAdapter(layers))
    return adapters


@pytest.mark.parametrize("spoil", [False, True], ids=["sample_fits", "sample_misleads"])
def test_thresholds_from_a_sample_are_exact(spoil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = bumpy(1500, spoil)
    want = lf.merge(adapters, WEIGHTS, method="knots_ties")
    monkeypatch.setattr(knots, "_SAMPLE_FROM", 100)
    margins = []
    sampled = knots._sampled

    def recording(*args: Any) -> Any:
        margins.append(args[-1])
        return sampled(*args)

    monkeypatch.setattr(knots, "_sampled", recording)
    got = lf.merge(adapters, WEIGHTS, method="knots_ties")
    assert all(torch.equal(got.layers[p].lora_a, want.layers[p].lora_a) for p in want.layers)
    assert len(margins) >= (2 if spoil else 1)


def test_thresholds_count_ties_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most entries are zero, so that the threshold is: everything stays, as without trimming."""
    monkeypatch.setattr(knots, "_SAMPLE_FROM", 100)
    adapters = bumpy(1500, False)
    for a in adapters:
        a.layers["2"].lora_a[:, 100:] = 0
        a.layers["1"].lora_a[:, 100:] = 0
    trimmed, whole = (lf.merge(adapters, method="knots_ties", density=d) for d in (0.6, 1.0))
    for path in ("0", "1", "2"):
        torch.testing.assert_close(matrix(trimmed, path), matrix(whole, path))


def test_an_svd_that_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [make_adapter({"lin": 4}), make_adapter({"lin": 3})]
    want = matrix(lf.merge(adapters, method="iso_c", dtype=torch.float64), "lin")

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", failing)
    got = matrix(lf.merge(adapters, method="iso_c", dtype=torch.float64), "lin")
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(RuntimeError, match=r"the SVD of shape \(7, 7\) does not converge"):
        lf.merge(adapters, method="iso_c")


def test_factor_average_is_lorahubs_formula() -> None:
    adapters = [make_adapter({"lin": 4, "conv": 2}, alpha=6.0) for _ in range(3)]
    merged = lf.merge(adapters, WEIGHTS, method="factor_average", dtype=torch.float64)
    for path in ("lin", "conv"):
        layers = [a.layers[path] for a in adapters]
        b = sum(w * layer.lora_b.double().flatten(1) for w, layer in zip(WEIGHTS, layers, strict=True))
        a = sum(w * layer.lora_a.double().flatten(1) for w, layer in zip(WEIGHTS, layers, strict=True))
        torch.testing.assert_close(matrix(merged, path), layers[0].scaling * b @ a, rtol=1e-12, atol=1e-12)
        want = matrix(merged, path)
        cut = lf.merge(adapters, WEIGHTS, method="factor_average", rank=1)
        s = torch.linalg.svdvals(want)
        assert (matrix(cut, path) - want).norm() <= s[1:].norm() * (1 + 1e-5) + 1e-6 * s[0]


def test_factor_average_with_weight_1_is_pefts_linear(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = [make_adapter({"lin": 4}, alpha=alpha) for alpha in (6.0, 12.0, 1.0)]
    for i, adapter in enumerate(adapters):
        adapter.save_pretrained(tmp_path / str(i))
    net = nn.ModuleDict({"lin": nn.Linear(24, 40)})
    model = peft.PeftModel.from_pretrained(net, tmp_path / "0", adapter_name="0")
    for name in ("1", "2"):
        model.load_adapter(tmp_path / name, adapter_name=name)
    model.add_weighted_adapter(["0", "1", "2"], [1.0] * 3, "mix", combination_type="linear")
    theirs = model.base_model.model["lin"].get_delta_weight("mix").detach()
    torch.testing.assert_close(lf.merge(adapters, method="factor_average").delta("lin"), theirs, rtol=1e-5, atol=1e-5)


def test_peft_loads_what_was_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = [make_adapter({"lin": r}, bias=True) for r in (4, 3)]
    for method in METHODS:
        merged = lf.merge(adapters, method=method)
        merged.save_pretrained(tmp_path / method)
        model = peft.PeftModel.from_pretrained(nn.ModuleDict({"lin": nn.Linear(24, 40)}), tmp_path / method)
        theirs = model.base_model.model["lin"].get_delta_weight("default").detach()
        torch.testing.assert_close(theirs, merged.delta("lin"), rtol=1e-5, atol=1e-5)


A, B = make_adapter({"lin": 4}), make_adapter({"lin": 3})
DORA = replace(A, layers={"lin": replace(A.layers["lin"], magnitude=torch.ones(40))})
ROWS = replace(A, trainable_tokens={"emb": (torch.tensor([1]), torch.ones(1, 2))})


@pytest.mark.parametrize(
    ("adapters", "kwargs", "error", "message"),
    [
        ([A, B], {"method": "factor_average"}, ValueError, "adapter #1 has rank 3, adapter #0 has rank 4.*'linear'"),
        ([A, B], {"method": "tsv", "density": 0.5}, ValueError, "density: method 'tsv' does not take it; knots_ties"),
        ([A, B], {"method": "linear", "scaling": 0.5}, ValueError, "scaling: method 'linear' does not take it"),
        ([A, B], {"method": "tsv", "mean_over": "rank"}, ValueError, "mean_over: .* iso_c, iso_cts do"),
        ([A, B], {"method": "iso_c", "common_fraction": 0.5}, ValueError, "common_fraction: .* iso_cts do"),
        ([A, B], {"method": "iso_c", "mean_over": "all"}, ValueError, "mean_over: expected one of rank, min_dim"),
        ([A, B], {"method": "iso_cts", "common_fraction": 1.5}, ValueError, "0 <= common_fraction <= 1, got 1.5"),
        ([A, B], {"method": "knots_ties", "density": 0.0}, ValueError, "0 < density <= 1, got 0.0"),
        ([A, B], {"method": "knots_ties", "density": "0.2"}, TypeError, "density: .* got '0.2'"),
        (
            [A, B],
            {"method": "knots_ties", "scope": "row"},
            ValueError,
            "scope: method 'knots_ties' takes tensor, global",
        ),
        ([A, B], {"method": "knots_ties", "majority_sign": "all"}, ValueError, "majority_sign: expected one of"),
        (
            [A, B],
            {"method": "iso_c", "scaling": float("nan")},
            ValueError,
            "scaling: expected a finite number, got nan",
        ),
        ([A, B], {"method": "tsv", "weights": [0, 0]}, ValueError, "weights: all are 0"),
        ([DORA, B], {"method": "tsv"}, ValueError, "adapter #0: uses DoRA.*only alone and with weight 1"),
        ([DORA], {"method": "iso_c"}, ValueError, "adapter #0: uses DoRA.*merge.method='iso_c'. takes no such adapter"),
        ([DORA], {"method": "tsv", "scaling": 0.5}, ValueError, "adapter #0: uses DoRA"),
        ([ROWS], {"method": "iso_cts"}, ValueError, "replaces rows .* takes no such adapter"),
    ],
)
def test_bad_input(adapters: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lf.merge(adapters, **kwargs)


def test_adapters_of_other_models() -> None:
    other = lf.LoraAdapter({"lin": LoraLayer(torch.randn(2, 25), torch.randn(40, 2), 1.0)})
    for method in (*METHODS, "factor_average"):
        with pytest.raises(ValueError, match="they belong to different models"):
            lf.merge([A, other], method=method)
