"""merge(..., base=) of whole models: formulas, exactness, sources, ties of names, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import three_adapters
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import reference
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.merging import elementwise, full
from lora_fuse.merging.methods import METHODS
from lora_fuse.merging.rules import RULES

WEIGHTS = [0.7, -0.5, 1.25]
PRUNING = [name for name, rule in RULES.items() if rule.keeps != "all"]
NEEDED: dict[str, dict[str, Any]] = {"magnitude_prune": {"density": 0.2}}
State = dict[str, Tensor]


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"emb.weight": (30, 8), "conv.weight": (6, 3, 2, 2), "lin.weight": (8, 21), "lin.bias": (8,), "scale": ()}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"steps": torch.tensor([3]), "empty": torch.empty(0, 4, dtype=dtype)}


def tuned(base: State, seed: int) -> State:
    other = make(100 + seed)
    return {
        name: (t + 0.1 * other[name].to(t.dtype) if t.is_floating_point() else t + seed) for name, t in base.items()
    }


@pytest.fixture
def models() -> tuple[State, dict[str, State]]:
    base = make()
    return base, {name: tuned(base, i) for i, name in enumerate("abc", 1)}


def vectors(base: State, tunes: dict[str, State], name: str) -> list[Tensor]:
    shape = (1, -1) if base[name].dim() < 2 else (base[name].shape[0], -1)
    return [(t[name].double() - base[name].double()).reshape(shape) for t in tunes.values()]


@pytest.mark.parametrize("method", PRUNING)
def test_every_tensor_by_the_formulas(models: tuple[State, dict[str, State]], method: str) -> None:
    base, tunes = models
    rule = RULES[method]
    options: dict[str, Any] = {"density": 0.4, "scaling": 0.8}
    options |= {"scope": "tensor"} if rule.keeps == "largest" else {}
    options |= {"seed": 6} if rule.keeps in ("random", "ranked") else {}
    merged = lf.merge(tunes, WEIGHTS, method=method, base=base, **options)
    assert list(merged) == list(base)
    for name, weight in base.items():
        assert merged[name].dtype == weight.dtype
        assert merged[name].shape == weight.shape
        if not weight.is_floating_point() or not weight.numel():
            assert torch.equal(merged[name], weight)
            continue
        xs = []
        for key, x in zip(tunes, vectors(base, tunes, name), strict=True):
            numbers = reference.random_numbers(6, name, key, *x.shape)
            gamma = 0.01 if rule.keeps == "middle" else 0.0
            xs.append(reference.pruned(x, rule.keeps, 0.4, gamma, 0.07, numbers))
        if rule.elects:
            total = reference.disjoint_mean(xs, WEIGHTS)
        else:
            total = sum((w * x for w, x in zip(WEIGHTS, xs, strict=True)), torch.zeros(()))
        want = weight.double() + 0.8 * total.reshape(weight.shape)
        torch.testing.assert_close(merged[name].double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, [0.1, 0.5, 1.0]], ids=str)
def test_one_threshold_over_the_whole_model_is_the_default_of_ties(
    models: tuple[State, dict[str, State]], density: Any
) -> None:
    base, tunes = models
    merged = lf.merge([*tunes.values()], WEIGHTS, method="ties", base=base, density=density)
    names = [name for name, t in base.items() if t.is_floating_point()]
    shares = density if isinstance(density, list) else [density] * 3
    long = []
    for state, share in zip(tunes.values(), shares, strict=True):
        x = torch.cat([(state[n] - base[n]).reshape(-1) for n in names])
        long.append(reference.pruned(x[None], "largest", share)[0].double())
    # where the values cancel, the sign is that of the sum of all signs
    majority = float(torch.stack(long).sum(0).sign().sum().sign())
    total = elementwise.disjoint_mean(long, WEIGHTS, if_zero=majority)
    got = torch.cat([(merged[n].double() - base[n].double()).reshape(-1) for n in names])
    torch.testing.assert_close(got, total, rtol=1e-5, atol=1e-6)


def test_sums_are_task_arithmetic_and_the_average(models: tuple[State, dict[str, State]]) -> None:
    base, tunes = models
    states = [*tunes.values()]
    for got, want in (
        (lf.merge(tunes, base=base, scaling=0.3), full.task_arithmetic(base, states, 0.3)),
        (lf.merge(tunes, [0.3] * 3, base=base), full.task_arithmetic(base, states, 0.3)),
        (lf.merge(tunes, method="uniform", base=base), full.average(base, states)),
        (lf.merge(tunes, method="ties", base=base, scaling=0.4, density=0.2), full.ties(base, states, 0.4)),
    ):
        for name in base:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-7)
    mean = {n: torch.stack([s[n] for s in states]).mean(0) for n, t in base.items() if t.is_floating_point()}
    for name, want_mean in mean.items():
        torch.testing.assert_close(lf.merge(tunes, method="uniform", base=base)[name], want_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", list(RULES))
def test_one_model_of_weight_1_and_density_1_is_that_model(method: str, dtype: torch.dtype) -> None:
    base = make(dtype=dtype)
    tune = tuned(base, 1)
    options: dict[str, Any] = {} if RULES[method].keeps == "all" else {"density": 1.0}
    options |= {name: 0.0 for name in ("gamma", "epsilon") if name in RULES[method].takes}
    merged = lf.merge([tune], method=method, base=base, **options)
    for name, t in tune.items():
        assert torch.equal(merged[name], t if t.is_floating_point() else base[name])
        assert merged[name].data_ptr() != t.data_ptr() or not t.numel()


@pytest.mark.parametrize("method", PRUNING)
def test_adapters_and_the_models_they_make_are_merged_alike(method: str) -> None:
    adapters = dict(zip("abc", three_adapters(), strict=True))
    path = "lin"  # the one that all have
    states = {name: {path: a.layers[path].product(torch.float64)} for name, a in adapters.items()}
    base = {path: torch.zeros_like(states["a"][path])}
    options: dict[str, Any] = NEEDED.get(method, {})
    of_adapters = lf.merge(adapters, WEIGHTS, method=method, rank=10**6, dtype=torch.float64, **options)
    assert isinstance(of_adapters, LoraAdapter)
    scope: dict[str, Any] = {"scope": "tensor"} if RULES[method].keeps == "largest" else {}
    of_models = lf.merge(states, WEIGHTS, method=method, base=base, **options, **scope)
    torch.testing.assert_close(of_adapters.layers[path].product(torch.float64), of_models[path], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", PRUNING)
def test_permutation_and_scaling(models: tuple[State, dict[str, State]], method: str) -> None:
    base, tunes = models
    weights = dict(zip("abc", WEIGHTS, strict=True))
    options: dict[str, Any] = NEEDED.get(method, {})
    merged = lf.merge(tunes, weights, method=method, base=base, **options)
    turned = lf.merge({k: tunes[k] for k in "cab"}, weights, method=method, base=base, **options)
    twice = lf.merge(tunes, {k: 2 * w for k, w in weights.items()}, method=method, base=base, **options)
    for name, weight in base.items():
        torch.testing.assert_close(turned[name], merged[name], rtol=1e-6, atol=1e-6)
        if weight.is_floating_point():
            torch.testing.assert_close(twice[name] - weight, 2 * (merged[name] - weight), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(12, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 12, bias=False)
        self.out.weight = self.emb.weight
        self.register_buffer("ids", torch.arange(4))


def test_modules_with_tied_weights_and_files(tmp_path: Path) -> None:
    base, one, two = Tied(0), Tied(1), Tied(2)
    merged = lf.merge([one, two], method="ties", base=base, density=0.5)
    assert merged["out.weight"] is merged["emb.weight"]
    base.load_state_dict(merged)
    fresh = Tied(0)
    paths = []
    for name, model in (("base", fresh), ("one", one), ("two", two)):
        state = {n: t.clone() for n, t in model.state_dict().items() if n != "out.weight"}
        save_file(state, tmp_path / f"{name}.safetensors")
        paths.append(tmp_path / f"{name}.safetensors")
    from_files = lf.merge(paths[1:], method="ties", base=paths[0], density=0.5)
    assert from_files.keys() == merged.keys() - {"out.weight"}
    assert all(torch.equal(t, merged[name]) for name, t in from_files.items())
    two.out.weight = nn.Parameter(two.out.weight + 1)
    with pytest.raises(ValueError, match=r"models\[1\]: 'emb.weight', 'out.weight' are one tensor in the base"):
        lf.merge([one, two], base=fresh)


def test_heads_prefix_and_dtype(models: tuple[State, dict[str, State]]) -> None:
    base, tunes = models
    wrapped = {
        key: {f"model.{n}": t for n, t in state.items()} | {"score.weight": torch.randn(i, 3)}
        for i, (key, state) in enumerate(tunes.items(), 2)
    }
    merged = lf.merge(wrapped, base=base, prefix="model.", heads="score", dtype=torch.bfloat16)
    plain = lf.merge(tunes, base=base)
    assert list(merged) == [f"model.{name}" for name in base]
    for name, t in plain.items():
        assert torch.equal(merged[f"model.{name}"], t.to(torch.bfloat16) if t.is_floating_point() else t)
    kept = lf.merge(tunes, base=base, heads=["emb", "lin.bias"])
    assert torch.equal(kept["emb.weight"], base["emb.weight"])
    assert torch.equal(kept["lin.weight"], plain["lin.weight"])


STATE = make()
ADAPTERS = three_adapters()


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "models: expected at least one"),
        (STATE, {}, "models: got one state dict; put the models in a list or a dict"),
        ("model", {}, "expected a list or a dict of models, got str"),
        ([3], {}, r"models\[0\]: expected a state dict, an nn.Module, or the path"),
        ([ADAPTERS[0]], {}, r"models\[0\]: expected a state dict"),
        ({"x": {n: t for n, t in STATE.items() if n != "scale"}}, {}, r"models\['x'\]: lacks 'scale'"),
        ([STATE | {"lin.bias": torch.ones(9)}], {}, r"models\[0\]: 'lin.bias' has shape \[9\], the base's is \[8\]"),
        ([STATE | {"more": torch.ones(9)}], {}, r"has 'more', which the base lacks; if every task has its own"),
        ([STATE | {"scale": torch.tensor(torch.nan)}], {}, r"models\[0\]: 'scale' has NaN"),
        ([STATE], {"method": "svd"}, "'svd' works on adapters only; whole models are merged by one of linear, uniform"),
        ([STATE], {"method": "tie"}, "'tie' does not exist; whole models"),
        ([STATE], {"method": "ties", "rank": 4}, "rank: method 'ties' does not take it; no merge of whole models does"),
        ([STATE], {"method": "dare_ties", "scope": "row"}, "scope: method 'dare_ties' does not take it; ties, magn"),
        ([STATE], {"density": 0.5}, "density: method 'linear' does not take it"),
        ([STATE], {"method": "magnitude_prune"}, "density: method 'magnitude_prune' has no default"),
        ([STATE], {"weights": [0.0]}, "weights: all are 0"),
        ([STATE], {"weights": [1.0, 2.0]}, "weights: expected 1, one per model, got 2"),
        ([STATE], {"weights": [1.0], "method": "uniform"}, "weighs every model 1 / N"),
        ([STATE], {"heads": "no"}, "heads: 'no' matches no parameter"),
        ([STATE], {"modules_to_save": "first"}, "modules_to_save: is about adapters"),
        ([STATE | {"scale": torch.tensor(3e38)}] * 2, {}, "merge: 'scale' has NaN or infinite entries, or overflows"),
    ],
)
def test_bad_input_is_refused(models: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        lf.merge(models, base=STATE, **options)


def test_what_belongs_to_models_and_what_to_adapters() -> None:
    with pytest.raises(ValueError, match="heads, prefix: are about whole models, which need base="):
        lf.merge(ADAPTERS, heads="x")
    with pytest.raises(TypeError, match="whole models need base="):
        lf.merge([STATE])  # type: ignore[list-item]
    assert set(RULES) <= set(METHODS)


def test_only_the_tensor_at_hand_is_read(models: tuple[State, dict[str, State]], tmp_path: Path) -> None:
    base, tunes = models
    for name, state in {"base": base, **tunes}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    merged, _ = full.open_merge(
        {k: tmp_path / f"{k}.safetensors" for k in tunes},
        None,
        "dare_ties",
        tmp_path / "base.safetensors",
        full.Options(),
    )
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-16])  # the last tensor is cut
    first, *_, last = merged
    assert torch.equal(merged[first], lf.merge(tunes, method="dare_ties", base=base)[first])
    with pytest.raises(ValueError, match="cut short"):
        merged[last]
