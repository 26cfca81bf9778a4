"""lorahub: the search, its objective, what it leaves alone."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from composed_models import ALL, Net, batches, branched, cross_entropy, make_adapter, three_adapters
from torch import Tensor, nn

import lora_fuse as lf

needs_cma = pytest.mark.skipif(importlib.util.find_spec("cma") is None, reason="pycma is not installed")


@needs_cma
def test_objective_of_every_evaluation_and_the_best_is_returned() -> None:
    model = Net()
    adapters, data = three_adapters(model), batches()
    found = lf.lorahub(model, adapters, cross_entropy, data, budget=12)
    assert list(found) == ["a", "b", "c"]
    assert len(found.history) == 12
    assert found.history[0][0] == (0.0, 0.0, 0.0)
    assert found.objective == min(o for _, o in found.history)
    for weights, objective in found.history:
        assert max(map(abs, weights)) <= 1.5
        shares = dict(zip("abc", weights, strict=True))
        naive = branched(model.eval(), adapters, dict.fromkeys(ALL, shares))
        with torch.no_grad():
            loss = sum(cross_entropy(naive, b).item() for b in data) / 3
        assert objective == pytest.approx(loss + 0.05 * np.abs(weights).mean(), rel=1e-4)
    assert tuple(found.values()) in [w for w, o in found.history if o == found.objective]


@needs_cma
def test_factors_added_up_apart_are_merges_factor_average() -> None:
    model = Net().eval()
    paths = ("emb", "conv", "blocks.0.up")
    adapters = {
        n: make_adapter(model, dict.fromkeys(paths, 2), alpha, bias=n == "b")
        for n, alpha in zip("ab", (3, -2), strict=True)
    }
    data = batches()
    found = lf.lorahub(model, adapters, cross_entropy, data, budget=8, method="factor_average")
    for weights, objective in found.history[1:]:
        lf.fuse(fused := copy.deepcopy(model), lf.merge(list(adapters.values()), weights, method="factor_average"))
        with torch.no_grad():
            loss = sum(cross_entropy(fused, b).item() for b in data) / 3
        assert objective == pytest.approx(loss + 0.05 * np.abs(weights).mean(), rel=1e-4)
    with pytest.raises(ValueError, match=r"layer 'emb': method 'factor_average' .* one rank, got {'a': 2, 'b': 3"):
        lf.lorahub(model, three_adapters(model), cross_entropy, data, method="factor_average")


@needs_cma
def test_finds_the_adapter_that_the_target_is() -> None:
    model = Net().eval()
    adapters = {n: make_adapter(model, dict.fromkeys(ALL, 2)) for n in "abcd"}
    want = {"a": 0.0, "b": 1.0, "c": 0.0, "d": -0.5}
    teacher = branched(model, adapters, dict.fromkeys(ALL, want)).eval()
    ids = [torch.randint(30, (16, 6)) for _ in range(2)]

    def distance(student: nn.Module, ids: Tensor) -> float:
        return float((student(ids) - teacher(ids)).square().mean())

    found = lf.lorahub(model, adapters, distance, ids, budget=600, penalty=0.0)
    assert found.objective < 1e-3 * found.history[0][1]
    assert all(abs(found[n] - w) < 0.1 for n, w in want.items())


@needs_cma
def test_weights_are_a_selection_and_merges_weights() -> None:
    model = Net().eval()
    adapters, data = three_adapters(model), batches()
    found = lf.lorahub(model, adapters, cross_entropy, data)
    assert found.objective < found.history[0][1]
    fused = copy.deepcopy(model)
    lf.fuse(fused, lf.merge(adapters, found))
    lf.attach(model, adapters)
    with torch.no_grad(), lf.use_adapters(model, found):
        torch.testing.assert_close(model(data[0][0]), fused(data[0][0]), rtol=1e-4, atol=1e-5)


@needs_cma
def test_seeded_and_numpys_random_state_stays() -> None:
    model = Net().train()
    adapters, data = three_adapters(model), batches()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = lf.lorahub(model, adapters, cross_entropy, data, budget=25, seed=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    np.random.rand(3)  # noqa: NPY002
    assert lf.lorahub(model, adapters, cross_entropy, data, budget=25, seed=1).history == first.history
    assert lf.lorahub(model, adapters, cross_entropy, data, budget=25, seed=2).history != first.history
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@needs_cma
def test_one_adapter_losses_without_gradient_and_overflow() -> None:
    model = Net()
    adapters = {"a": make_adapter(model, {"mix": 2})}

    def errors(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0]).argmax(1) != batch[1]).sum()

    found = lf.lorahub(model, adapters, errors, batches(), budget=9)
    assert len(found) == 1
    assert len({w for w, _ in found.history}) == 9

    losses = iter([1.0] + [math.nan] * 8)
    found = lf.lorahub(model, adapters, lambda m, b: next(losses), batches(1), budget=9)
    assert found["a"] == 0.0
    assert [o for _, o in found.history[1:]] == [math.inf] * 8


@needs_cma
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapters": [1]}, TypeError, "adapters: expected a dict of names to adapters, got list"),
        ({"budget": 0}, ValueError, "budget: expected an integer from 1, got 0"),
        ({"seed": 1.5}, ValueError, "seed: expected an integer from 0"),
        ({"method": "svd"}, ValueError, "method: expected one of linear, factor_average, got 'svd'"),
        ({"bound": 0}, ValueError, "bound: expected a positive finite number, got 0"),
        ({"penalty": -1}, ValueError, "penalty: expected a finite number from 0"),
        ({"batches": iter(batches(3))}, ValueError, "batches: an iterator can be read once"),
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        ({"loss_fn": lambda m, b: m(b[0])}, ValueError, r"loss_fn: expected a scalar, got a tensor of shape \(5, 4\)"),
        ({"loss_fn": lambda m, b: None}, TypeError, "loss_fn: expected a scalar tensor or a number, got NoneType"),
        ({"loss_fn": lambda m, b: math.nan}, ValueError, "loss_fn: expected a finite loss, got nan with all weights 0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Net()
    given: dict[str, Any] = {"adapters": three_adapters(model), "loss_fn": cross_entropy, "batches": batches()} | change
    with pytest.raises(error, match=message):
        lf.lorahub(model, **given)
    assert all(not m._forward_hooks for m in model.modules())


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    model = Net()
    with pytest.raises(ImportError, match=r"pip install 'lora-fuse\[lorahub\]'"):
        lf.lorahub(model, three_adapters(model), cross_entropy, batches())


def test_importing_lora_fuse_imports_no_optimiser() -> None:
    code = (
        "import sys, lora_fuse; print([m for m in ('cma', 'scipy', 'nevergrad', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
