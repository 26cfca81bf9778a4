"""TIES, DARE, DELLA, breadcrumbs and magnitude pruning on full deltas: PEFT, formulas, properties, memory, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from largest_tensor import Sizes
from merge_models import SHAPES, dense, make_adapter, three_adapters
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import reference
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.merging.methods import METHODS
from lora_fuse.merging.rules import RULES

WEIGHTS = [0.7, -0.5, 1.25]
NAMES = [name for name, rule in RULES.items() if rule.keeps != "all"]
DRAWN = [name for name in NAMES if "seed" in METHODS[name].takes]
WHOLE = 10**6  # no rank is larger: nothing is truncated
NEEDED: dict[str, dict[str, Any]] = {"magnitude_prune": {"density": 0.2}}


def merge(adapters: Any, weights: Any, method: str, **kwargs: Any) -> LoraAdapter:
    return lf.merge(adapters, weights, method=method, **(NEEDED.get(method, {}) | kwargs))


def expected(
    adapters: dict[str, LoraAdapter],
    weights: list[float],
    method: str,
    density: float,
    gamma: float = 0.0,
    epsilon: float = 0.0,
    majority_sign: str = "total",
    seed: int = 0,
    scaling: float = 1.0,
) -> dict[str, Tensor]:
    """The merged deltas by the formulas, ``[shape[0], rest]``."""
    rule, merged = RULES[method], {}
    for path in SHAPES:
        xs, ws = [], []
        for (key, adapter), w in zip(adapters.items(), weights, strict=True):
            if path in adapter.layers:
                x = dense(adapter, path).flatten(1)
                numbers = reference.random_numbers(seed, path, key, *x.shape)
                xs.append(reference.pruned(x, rule.keeps, density, gamma, epsilon, numbers))
                ws.append(w)
        if rule.elects:
            merged[path] = scaling * reference.disjoint_mean(xs, ws, majority_sign)
        else:
            merged[path] = scaling * sum((w * x for w, x in zip(ws, xs, strict=True)), torch.zeros(()))
    return merged


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("options", [{}, {"density": 0.35, "scaling": -0.8, "seed": 7, "majority_sign": "frequency"}])
def test_merged_delta_is_the_formulas(method: str, options: dict[str, Any]) -> None:
    adapters = dict(zip("abc", three_adapters(), strict=True))
    options = {name: value for name, value in options.items() if name in METHODS[method].takes}
    used: dict[str, Any] = {"density": RULES[method].density or 0.2}
    used |= {"gamma": 0.01} if RULES[method].keeps == "middle" else {}
    used |= {"epsilon": 0.07} if RULES[method].keeps == "ranked" else {}
    merged = merge(adapters, WEIGHTS, method, rank=WHOLE, dtype=torch.float64, **options)
    for path, want in expected(adapters, WEIGHTS, method, **(used | options)).items():
        layer = merged.layers[path]
        assert layer.scaling == 1.0
        torch.testing.assert_close(dense(merged, path).flatten(1), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def peft_model(adapters: list[LoraAdapter], *paths: str) -> Any:
    """These layers of the adapters in a PEFT model, by position."""
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    base = nn.ModuleDict({p: nn.Linear(SHAPES[p][2], SHAPES[p][1], bias=False) for p in paths})
    model: Any = None
    for i, adapter in enumerate(adapters):
        ranks = {p: adapter.layers[p].rank for p in base}
        alphas = {p: adapter.layers[p].scaling * ranks[p] for p in base}
        config = peft.LoraConfig(r=1, rank_pattern=ranks, alpha_pattern=alphas, target_modules=list(base))
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=str(i))
        else:
            model.add_adapter(str(i), config)
        for path in base:
            target = model.base_model.model[path]
            target.lora_A[str(i)].weight.data.copy_(adapter.layers[path].lora_a)
            target.lora_B[str(i)].weight.data.copy_(adapter.layers[path].lora_b)
    return model


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS], ids=str)
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.61])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_equals_pefts_svd_types_at_full_rank(
    method: str, density: float, majority_sign: str, weights: list[float]
) -> None:
    adapters = [make_adapter({"lin": r, "wide": r}, alpha=a) for r, a in ((4, 6.0), (2, 3.0), (5, 16.0))]
    model = peft_model(adapters, "lin", "wide")
    kwargs = {"majority_sign": majority_sign} if method == "ties" else {}
    merged = lf.merge(adapters, weights, method=method, density=density, rank=WHOLE, **kwargs)
    for path in ("lin", "wide"):
        rank = min(SHAPES[path][1:])
        name = f"merged_{path}"
        model.add_weighted_adapter(
            ["0", "1", "2"], weights, name, f"{method}_svd", rank, density=density, majority_sign_method=majority_sign
        )
        theirs = model.base_model.model[path].get_delta_weight(name)
        torch.testing.assert_close(
            dense(merged, path).float(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())
        )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_with_the_draws_replaced(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [make_adapter({"lin": 4, "wide": 4}, alpha=a) for a in (6.0, 3.0, 16.0)]
    merged = lf.merge(adapters, WEIGHTS, method=method, density=0.3, seed=5, rank=WHOLE)
    for path in ("lin", "wide"):
        shape = SHAPES[path][1:]
        draws = iter([reference.random_numbers(5, path, str(i), *shape) for i in range(3)])
        monkeypatch.setattr(torch, "bernoulli", lambda p, draws=draws: (next(draws) < p * 2**32).float())
        model = peft_model(adapters, path)
        model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "merged", f"{method}_svd", min(shape), density=0.3)
        theirs = model.base_model.model[path].get_delta_weight("merged")
        torch.testing.assert_close(
            dense(merged, path).float(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())
        )


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("kind", ["alpha", "rslora", "bias", "dora"])
def test_one_adapter_of_weight_1_and_density_1_is_that_adapter(method: str, kind: str) -> None:
    adapter = make_adapter({"lin": 7, "wide": 2, "conv": 3}, alpha=5.0, rslora=kind == "rslora", bias=kind == "bias")
    if kind == "dora":
        layers = {p: replace(layer, magnitude=torch.rand(layer.lora_b.shape[0])) for p, layer in adapter.layers.items()}
        adapter = replace(adapter, layers=layers)
    off = {name: 0.0 for name in ("gamma", "epsilon") if name in METHODS[method].takes}
    for got in (
        merge([adapter], None, method, density=1.0, **off),
        merge([three_adapters()[0], adapter], [0.0, 1.0], method, density=[0.3, 1.0][1], **off),
    ):
        for path, layer in adapter.layers.items():
            assert all(map(torch.equal, got.layers[path].tensors(), layer.tensors()))
            assert got.layers[path].scaling == layer.scaling


@pytest.mark.parametrize("method", NAMES)
def test_one_adapter_is_pruned_all_the_same(method: str) -> None:
    adapter = make_adapter({"lin": 4}, bias=True)
    got = merge([adapter], None, method, density=0.6, rank=WHOLE)
    delta, want = dense(got, "lin"), expected_one(adapter, method)
    torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-5)
    assert 0.4 < (delta.abs() > 1e-4).double().mean() < 0.8


def expected_one(adapter: LoraAdapter, method: str) -> Tensor:
    keeps = RULES[method].keeps
    x = dense(adapter, "lin")
    numbers = reference.random_numbers(0, "lin", "0", *x.shape)
    return reference.pruned(x, keeps, 0.6, 0.01 if keeps == "middle" else 0.0, 0.07, numbers)


@pytest.mark.parametrize("method", NAMES)
def test_permuting_named_adapters_changes_nothing(method: str) -> None:
    adapters = dict(zip("abc", three_adapters(bias=True), strict=True))
    weights = dict(zip("abc", WEIGHTS, strict=True))
    merged = merge(adapters, weights, method, rank=WHOLE, dtype=torch.float64)
    turned = merge({k: adapters[k] for k in "cab"}, weights, method, rank=WHOLE, dtype=torch.float64)
    for path in SHAPES:
        torch.testing.assert_close(dense(turned, path), dense(merged, path), rtol=1e-9, atol=1e-9)
        ours, theirs = turned.layers[path].lora_bias, merged.layers[path].lora_bias
        assert ours is theirs is None or torch.allclose(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", NAMES)
def test_scaling_laws(method: str) -> None:
    adapters = three_adapters(bias=True)
    merged = merge(adapters, WEIGHTS, method, rank=WHOLE, dtype=torch.float64)
    others = [
        merge(adapters, [2 * w for w in WEIGHTS], method, rank=WHOLE, dtype=torch.float64),
        merge(adapters, WEIGHTS, method, rank=WHOLE, scaling=2.0, dtype=torch.float64),
        merge([scaled(a, 2.0) for a in adapters], WEIGHTS, method, rank=WHOLE, dtype=torch.float64),
    ]
    for other in others:
        for path in SHAPES:
            torch.testing.assert_close(dense(other, path), 2 * dense(merged, path), rtol=1e-9, atol=1e-9)
            bias, twice = merged.layers[path].lora_bias, other.layers[path].lora_bias
            assert bias is twice is None or torch.allclose(2 * bias, twice)  # type: ignore[operator, arg-type]


def scaled(adapter: LoraAdapter, factor: float) -> LoraAdapter:
    layers = {p: replace(layer, scaling=factor * layer.scaling) for p, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
def test_splitting_an_adapters_weight(method: str) -> None:
    """Two halves of an adapter are the whole, where the mean divides by weights; for sums they always are."""
    adapters = three_adapters()
    kwargs: dict[str, Any] = {"majority_sign": "weighted", "divisor": "weights", "rank": WHOLE, "dtype": torch.float64}
    whole = lf.merge(adapters, [0.7, 0.5, 1.2], method=method, **kwargs)
    halves = lf.merge([*adapters, adapters[0]], [0.3, 0.5, 1.2, 0.4], method=method, **kwargs)
    linear = method.removesuffix("_ties") if method != "ties" else "magnitude_prune"
    sums = [
        merge(a, w, linear, rank=WHOLE)
        for a, w in ((adapters, [0.7, 0.5, 1.2]), ([*adapters, adapters[0]], [0.3, 0.5, 1.2, 0.4]))
    ]
    for path in SHAPES:
        torch.testing.assert_close(dense(halves, path), dense(whole, path), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dense(sums[0], path), dense(sums[1], path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", DRAWN)
def test_draws_hang_on_the_seed_the_layer_and_the_adapter(method: str) -> None:
    adapters = three_adapters()
    merged = merge(adapters, WEIGHTS, method, seed=3, rank=WHOLE)
    reordered = [replace(a, layers=dict(reversed(a.layers.items()))) for a in adapters]
    alone = [replace(a, layers={p: layer for p, layer in a.layers.items() if p == "conv"}) for a in adapters]
    for path, other in [*((p, merge(reordered, WEIGHTS, method, seed=3, rank=WHOLE)) for p in SHAPES)]:
        assert torch.equal(dense(merged, path), dense(other, path))
    assert torch.equal(dense(merged, "conv"), dense(merge(alone[:2], WEIGHTS[:2], method, seed=3, rank=WHOLE), "conv"))
    with_zero = merge([adapters[0], adapters[1], adapters[2]], [0.0, *WEIGHTS[1:]], method, seed=3, rank=WHOLE)
    without = merge({"1": adapters[1], "2": adapters[2]}, WEIGHTS[1:], method, seed=3, rank=WHOLE)
    assert torch.equal(dense(with_zero, "lin"), dense(without, "lin"))
    assert not torch.allclose(dense(merged, "lin"), dense(merge(adapters, WEIGHTS, method, seed=4, rank=WHOLE), "lin"))
    same = merge([adapters[0], adapters[0]], [1.0, -1.0], method, rank=WHOLE)
    assert dense(same, "lin").abs().max() > 0  # two copies draw differently


def test_nothing_hangs_on_the_number_of_threads() -> None:
    code = """
import sys, torch, lora_fuse as lf
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.merging.combine import Options
from lora_fuse.merging import sparsify, terms
torch.set_num_threads(int(sys.argv[1]))
g = torch.Generator().manual_seed(0)
layer = lambda: LoraLayer(torch.randn(8, 700, generator=g), torch.randn(900, 8, generator=g), 2.0)
made = [LoraAdapter({"x": layer()}) for _ in range(3)]
for method in ("ties", "dare_ties", "della", "breadcrumbs"):
    ts = terms.make_terms(made, [1.0, 0.5, -2.0])
    state = sparsify.prepare(method, ts, Options()).state
    merged = sparsify.merged_delta("x", terms.layer_terms(ts)["x"], state, torch.float32)
    print(method, (merged != 0).sum().item(), f"{merged.double().abs().sum():.3f}")
"""
    out = [
        subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True).stdout for n in "12"
    ]
    assert out[0] == out[1]
    assert len(out[0].splitlines()) == 4


@pytest.mark.slow
def test_memory_stays_below_three_layers() -> None:
    code = """
import resource, torch, lora_fuse as lf
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
torch.set_num_threads(1)
def made(n):
    return [LoraAdapter({"x": LoraLayer(torch.randn(16, n), torch.randn(n, 16), 1.0)}) for _ in range(8)]
big = made(4096)
methods = ("ties", "dare_ties", "della", "breadcrumbs")
for method in methods:
    lf.merge(made(256), method=method)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for method in methods:
    lf.merge(big, method=method)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * 4096**2))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.5 < float(out) <= 3.0


@pytest.mark.parametrize("rank", [None, 1, 5])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "della"])
def test_truncation_is_nearly_optimal(method: str, rank: int | None) -> None:
    adapters = three_adapters()
    whole = merge(adapters, WEIGHTS, method, rank=WHOLE)
    cut = merge(adapters, WEIGHTS, method, rank=rank)
    for path in SHAPES:
        k = rank or max(a.layers[path].rank for a in adapters if path in a.layers)
        want = dense(whole, path).flatten(1)
        assert cut.layers[path].rank == min(k, *want.shape)
        optimal = torch.linalg.svdvals(want)[k:].norm()
        assert (dense(cut, path).flatten(1) - want).norm() <= 1.001 * optimal + 1e-5 * want.norm()


@pytest.mark.parametrize("rank", [16, 64, 200])
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_truncation_of_a_larger_layer_is_nearly_optimal(method: str, rank: int) -> None:
    torch.manual_seed(0)
    made = [LoraAdapter({"x": LoraLayer(torch.randn(16, 512), torch.randn(640, 16), 1.0)}) for _ in range(4)]
    whole = lf.merge(made, method=method, rank=WHOLE).delta("x").double()
    cut = lf.merge(made, method=method, rank=rank).delta("x").double()
    assert (cut - whole).norm() <= 1.001 * torch.linalg.svdvals(whole)[rank:].norm()


def test_energy() -> None:
    adapters = three_adapters()
    whole, cut = (lf.merge(adapters, WEIGHTS, method="ties", **k) for k in ({"rank": WHOLE}, {"energy": 0.8}))
    for path in SHAPES:
        squares = torch.linalg.svdvals(dense(whole, path).flatten(1)).square()
        fewest = int((squares.cumsum(0) < 0.8 * squares.sum()).sum()) + 1
        assert cut.layers[path].rank == fewest


def test_bias_is_merged_by_the_same_rule() -> None:
    adapters = [make_adapter({"lin": 4}, alpha=a, bias=True) for a in (6.0, 3.0, 16.0)]
    biases = [a.layers["lin"].scaling * a.layers["lin"].lora_bias.double()[None] for a in adapters]  # type: ignore[union-attr]
    merged = lf.merge(adapters, WEIGHTS, method="ties", density=0.5, dtype=torch.float64).layers["lin"]
    want = reference.disjoint_mean([reference.pruned(b, "largest", 0.5) for b in biases], WEIGHTS)[0]
    torch.testing.assert_close(merged.lora_bias, want)
    drawn = lf.merge(adapters, WEIGHTS, method="dare_linear", seed=2, dtype=torch.float64).layers["lin"]
    numbers = [reference.random_numbers(2, "lin.lora_bias", str(i), 1, 40) for i in range(3)]
    kept = [reference.pruned(b, "random", 0.5, numbers=n) for b, n in zip(biases, numbers, strict=True)]
    torch.testing.assert_close(drawn.lora_bias, sum(w * b[0] for w, b in zip(WEIGHTS, kept, strict=True)))


def test_a_density_for_each_adapter() -> None:
    adapters = dict(zip("abc", three_adapters(), strict=True))
    by_name = {"a": 0.1, "b": 0.9, "c": 0.5}
    first = lf.merge(adapters, WEIGHTS, method="ties", density=by_name, rank=WHOLE)
    second = lf.merge([*adapters.values()], WEIGHTS, method="ties", density=[0.1, 0.9, 0.5], rank=WHOLE)
    xs = [
        reference.pruned(dense(a, "lin"), "largest", d)
        for a, d in zip(adapters.values(), by_name.values(), strict=True)
    ]
    for merged in (first, second):
        torch.testing.assert_close(dense(merged, "lin"), reference.disjoint_mean(xs, WEIGHTS), rtol=1e-5, atol=1e-5)


def test_rows_prune_for_themselves() -> None:
    adapter = make_adapter({"lin": 4})
    delta = lf.merge([adapter], method="magnitude_prune", density=0.25, scope="row", rank=WHOLE).delta("lin")
    assert ((delta.abs() > 1e-4).sum(1) == 6).all()


def test_a_plain_sum_goes_by_the_factors() -> None:
    adapters = three_adapters()
    with Sizes() as sizes:
        merged = lf.merge(adapters, WEIGHTS, method="dare_linear", density=1.0, rank=WHOLE, scaling=0.5)
    for path in SHAPES:
        want = 0.5 * sum(w * dense(a, path) for a, w in zip(adapters, WEIGHTS, strict=True) if path in a.layers)
        torch.testing.assert_close(dense(merged, path), want, rtol=1e-5, atol=1e-5)
    assert sizes.largest < 64 * 45


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "magnitude_prune"}, "density: method 'magnitude_prune' has no default; give the share"),
        ({"method": "ties", "density": 0.0}, "density: expected 0 < density <= 1, got 0.0"),
        ({"method": "ties", "density": 1.5}, "density: expected 0 < density <= 1, got 1.5"),
        ({"method": "ties", "density": float("nan")}, "density: expected 0 < density <= 1, got nan"),
        ({"method": "ties", "density": [0.5, 0.5]}, "density: expected a number or 3 of them, got 2"),
        ({"method": "ties", "density": {"x": 0.5}}, "density: a dict needs the names"),
        ({"method": "ties", "density": [0.5, 0.5, 2]}, "density: expected 0 < density <= 1, got 2"),
        ({"method": "knots_ties", "density": [0.5, 0.5, 0.5]}, "density: method 'knots_ties' takes one number"),
        ({"method": "linear", "density": 0.5}, "density: method 'linear' does not take it; .*ties.* do"),
        ({"method": "ties", "seed": 1}, "seed: method 'ties' does not take it; dare_linear"),
        ({"method": "dare_ties", "seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"method": "dare_ties", "gamma": 0.1}, "gamma: method 'dare_ties' does not take it; breadcrumbs"),
        ({"method": "dare_linear", "majority_sign": "total"}, "majority_sign: method 'dare_linear' does not take it"),
        ({"method": "ties", "majority_sign": "most"}, "majority_sign: expected one of total, frequency, weighted"),
        ({"method": "ties", "divisor": "sum"}, "divisor: expected one of count, weights, none, got 'sum'"),
        ({"method": "ties", "scope": "global"}, "scope: method 'ties' takes tensor, row, got 'global'"),
        ({"method": "breadcrumbs", "density": 0.95, "gamma": 0.1}, "density, gamma: 0.95 .* choose density <= 0.9"),
        ({"method": "breadcrumbs", "density": 1.0}, "density, gamma: 1.0 .* or gamma=0"),
        ({"method": "della", "density": 0.97}, "density, epsilon: chances from 0.9 to 1.04"),
        ({"method": "della", "epsilon": 0.6}, "epsilon: expected 0 <= epsilon < 0.5, got 0.6"),
        ({"method": "ties", "scaling": float("inf")}, "scaling: expected a finite number"),
        ({"method": "ties", "weights": [0, 0, 0]}, "weights: all are 0"),
    ],
)
def test_bad_options_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lf.merge(three_adapters(), call.pop("weights", None), **call)


@pytest.mark.parametrize("method", NAMES)
def test_dora_is_refused_in_a_combination(method: str) -> None:
    adapter = make_adapter({"lin": 4})
    layers = {p: replace(layer, magnitude=torch.rand(layer.lora_b.shape[0])) for p, layer in adapter.layers.items()}
    with pytest.raises(ValueError, match="uses DoRA"):
        merge([replace(adapter, layers=layers), adapter], None, method)
    with pytest.raises(ValueError, match="uses DoRA"):
        merge([replace(adapter, layers=layers)], None, method, density=0.5)
