"""learn_composition: the model is as it was, whatever happens; models of other makes; bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from composed_models import ALL, Net, batches, branched, cross_entropy, make_adapter, three_adapters
from largest_tensor import Sizes
from torch import Tensor, nn

import lora_fuse as lf


def fingerprint(model: nn.Module) -> Any:
    """All that must not change, by identity where it has one."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return (
        [(n, id(p), p.requires_grad, id(p.grad), p._version, p.clone()) for n, p in model.named_parameters()],
        [(n, id(b), b._version, b.clone()) for n, b in model.named_buffers()],
        [(n, id(m), type(m), m.training, sorted(m.__dict__), [[*getattr(m, h).items()] for h in hooks])
         for n, m in model.named_modules()],
    )  # fmt: skip


def same(before: Any, after: Any, buffers_written: bool = False) -> None:
    (parameters, buffers, modules), (parameters2, buffers2, modules2) = before, after
    assert modules == modules2
    for one, two in ((parameters, parameters2), (buffers, buffers2)):
        assert [x[:2] for x in one] == [x[:2] for x in two]
        assert all(torch.equal(x[-1], y[-1]) for x, y in zip(one, two, strict=True))
    assert [x[:-1] for x in parameters] == [x[:-1] for x in parameters2]
    assert buffers_written or [x[:-1] for x in buffers] == [x[:-1] for x in buffers2]


def touched() -> nn.Module:
    """A model in a mixed state: some frozen, some with gradients, one block in eval mode, a hook, batch norm."""
    model = Net()
    model.mix = nn.Sequential(model.mix, nn.BatchNorm1d(6))
    model.blocks[0].eval()
    model.emb.weight.requires_grad_(False)
    cross_entropy(model, batches(1)[0]).backward()
    model.blocks[1].up.register_forward_hook(lambda m, args, y: None)  # type: ignore[operator, union-attr]
    return model


def fails_at(step: int, error: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = cross_entropy(model, batch)
        if next(calls) == step:
            raise error
        return found

    return loss


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("mine"), KeyboardInterrupt()], ids=["ok", "exception", "ctrl-c"])
def test_model_is_as_it_was(error: BaseException | None, train_mode: bool) -> None:
    model = touched()
    adapters = {n: make_adapter(model, {"emb": 2, "conv": 2, "mix.0": 2, "blocks.1.up": 3}) for n in "ab"}
    before = fingerprint(model)
    kwargs: dict[str, Any] = {"trainable": ["classifier"], "train_mode": train_mode, "validation": batches(1)}
    if error is None:
        lf.learn_composition(model, adapters, cross_entropy, batches(), steps=5, **kwargs)
    else:
        with pytest.raises(type(error)):
            lf.learn_composition(model, adapters, fails_at(3, error), batches(), steps=5, **kwargs)
    same(before, fingerprint(model), buffers_written=train_mode)


def test_within_no_grad_and_inference_mode_of_the_caller() -> None:
    model = Net()
    adapters = three_adapters(model)
    data = batches()
    want = lf.learn_composition(model, adapters, cross_entropy, data, steps=3).history.loss
    with torch.no_grad():
        assert lf.learn_composition(model, adapters, cross_entropy, data, steps=3).history.loss == want
    with torch.inference_mode():
        comp = lf.learn_composition(model, adapters, cross_entropy, data, steps=3)
    assert comp.history.loss == want
    assert not comp.weights["mix"].is_inference()


def test_attached_adapters_take_no_part() -> None:
    model = Net().eval()
    adapters, data = three_adapters(model), batches()
    want = lf.learn_composition(model, adapters, cross_entropy, data, steps=3)
    lf.attach(model, {"x": make_adapter(model, dict.fromkeys(ALL, 3)), "a": adapters["a"]}, max_rank=8)
    lf.set_adapters(model, "x")
    before, selected = fingerprint(model), model(data[0][0])
    comp = lf.learn_composition(model, adapters, cross_entropy, data, steps=3)
    assert comp.history.loss == pytest.approx(want.history.loss, rel=1e-5)
    same(before, fingerprint(model))
    assert torch.equal(model(data[0][0]), selected)


def test_compiled_model_takes_part(fresh_dynamo: None) -> None:
    model = Net().eval()
    adapters, data = three_adapters(model), batches()
    want = lf.learn_composition(model, adapters, cross_entropy, data, steps=3)
    for backend_model in (torch.compile(model, backend="eager"), copy.deepcopy(model)):
        if not hasattr(backend_model, "_orig_mod"):
            backend_model.compile(backend="eager")
        bare = backend_model(data[0][0])
        comp = lf.learn_composition(backend_model, adapters, cross_entropy, data, steps=3)
        assert comp.history.loss == pytest.approx(want.history.loss, rel=1e-5)
        assert torch.equal(backend_model(data[0][0]), bare)


class Tied(nn.Module):
    """One module under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_module_of_two_names_is_weighed_once() -> None:
    model = Tied()
    adapters = {n: make_adapter(model, {"second": 2}) for n in "ab"}
    data = [torch.randn(4, 6) for _ in range(2)]
    comp = lf.learn_composition(model, adapters, lambda m, x: m(x).square().mean(), data, steps=20, lr=0.1)
    assert list(comp.weights) == ["first"]
    fused = copy.deepcopy(model)
    lf.fuse(fused, comp.to_adapter())
    live = copy.deepcopy(model)
    with torch.no_grad(), lf.use_adapters(live, comp.attach(live, "new")):
        torch.testing.assert_close(live(data[0]), fused(data[0]))


def test_transformers_conv1d_and_a_tied_head() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=12, n_inner=24)
    model = transformers.GPT2LMHeadModel(config).eval()
    shapes = {"attn.c_attn": (48, 16), "mlp.c_fc": (24, 16)}
    layer = type(make_adapter(Net(), {"mix": 1}).layers["mix"])
    adapters = {
        n: lf.LoraAdapter(
            {
                f"transformer.h.{i}.{path}": layer(torch.randn(r, cols) / 4, torch.randn(rows, r), 0.5)
                for i in range(2)
                for path, (rows, cols) in shapes.items()
            }
        )
        for n, r in (("a", 2), ("b", 3))
    }
    ids = [torch.randint(40, (3, 8)) for _ in range(2)]
    comp = lf.learn_composition(
        model, adapters, lambda m, x: m(input_ids=x, labels=x).loss, ids, "kind", steps=12, lr=0.2
    )
    assert comp.history.loss[-1] < comp.history.loss[0]
    assert len({tuple(w.tolist()) for w in comp.weights.values()}) == 2
    live, fused = copy.deepcopy(model), copy.deepcopy(model)
    lf.fuse(fused, comp.to_adapter())
    with torch.no_grad(), lf.use_adapters(live, comp.attach(live, "new")):
        torch.testing.assert_close(live(ids[0]).logits, fused(ids[0]).logits, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_weights_shape_is_made() -> None:
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300)).requires_grad_(False)
    adapters = {f"{i}": make_adapter(model, {"0": 4, "2": 4}) for i in range(8)}
    data = [torch.randn(6, 300)]
    with Sizes(ignored=list(model.parameters())) as sizes:
        lf.learn_composition(model, adapters, lambda m, x: m(x).square().mean(), data, steps=2)
    assert 400 * 32 <= sizes.largest < 400 * 300 / 2


GOOD = three_adapters(Net())
DORA = replace(GOOD["a"].layers["mix"], magnitude=torch.ones(12))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapters": list(GOOD.values())}, TypeError, "adapters: expected a dict of names to adapters, got list"),
        ({"adapters": {}}, ValueError, "adapters: expected at least one adapter"),
        ({"adapters": {"a": 3}}, TypeError, r"adapters\['a'\]: expected a LoraAdapter or a path, got int"),
        ({"adapters": {"a": lf.LoraAdapter({"mix": DORA})}}, ValueError, "'a': uses DoRA .*'mix'.*plain LoRA of the"),
        ({"adapters": {"a": lf.LoraAdapter({})}}, ValueError, "adapter 'a': it has no layers"),
        ({"adapters": {"a": lf.LoraAdapter({"mixx": DORA})}}, ValueError, "uses DoRA"),
        (
            {"adapters": {"a": lf.LoraAdapter({"mixx": GOOD["a"].layers["mix"]})}},
            ValueError,
            r"adapter 'a' .*does not fit this model, 1 of 1 modules:\n  mixx: no such module, nearest: mix",
        ),
        (
            {"adapters": {"a": replace(GOOD["a"], base_biases={"mix": torch.ones(12)})}},
            ValueError,
            "'a': it replaces biases of the base",
        ),
        ({"loss_fn": lambda m, b: None}, TypeError, "loss_fn: expected a scalar tensor, got NoneType at step 0"),
        ({"loss_fn": lambda m, b: m(b[0])}, ValueError, r"loss_fn: expected a scalar, got .*\(5, 4\) at step 0"),
        ({"loss_fn": lambda m, b: m(b[0]).sum() * 1j}, ValueError, "loss_fn: expected a real scalar, got torch.comp"),
        ({"loss_fn": lambda m, b: m(b[0]).mean() * torch.nan}, ValueError, "a finite loss, got nan at step 0"),
        ({"loss_fn": lambda m, b: m(b[0]).mean().detach()}, ValueError, "loss_fn: the loss does not depend on the wei"),
        (
            {"loss_fn": lambda m, b: m.classifier(torch.ones(12)).mean(), "trainable": ["classifier"]},
            ValueError,
            "loss_fn: the loss does not depend on the wei",
        ),
        ({"batches": []}, ValueError, "batches: expected at least one batch, got none"),
        ({"batches": iter([])}, ValueError, "batches: expected at least one batch, got none"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"batches": iter(batches(2))}, ValueError, "batches: an iterator that ended after 2 of 4 steps .*steps=2"),
        ({"validation": iter(batches(2))}, ValueError, "validation: an iterator can be read once"),
        ({"validation": []}, ValueError, "validation: expected at least one batch"),
        ({"per": "model"}, ValueError, "per: expected one of layer, kind, global, got 'model'"),
        ({"steps": 0}, ValueError, "steps: expected an integer from 1, got 0"),
        ({"steps": 2.0}, ValueError, "steps: expected an integer from 1, got 2.0"),
        ({"seed": -1}, ValueError, "seed: expected an integer from 0, got -1"),
        ({"patience": 0}, ValueError, "patience: expected an integer from 1, got 0"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every: expected an integer from 1"),
        ({"lr": 0.0}, ValueError, "lr: expected a positive finite number, got 0.0"),
        ({"lr": "a"}, TypeError, "lr: expected a positive finite number, got 'a'"),
        ({"trainable_lr": float("nan")}, ValueError, "trainable_lr: expected a positive"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: expected a finite number from 0"),
        ({"trainable": "classifier"}, TypeError, "trainable: expected a sequence of module paths, got 'classifier'"),
        ({"trainable": ["clasifier"]}, ValueError, "trainable: the model has no module 'clasifier'; nearest: classif"),
        ({"trainable": ["drop"]}, ValueError, "trainable: 'drop' has no parameters"),
        ({"trainable": ["mix"]}, ValueError, "trainable: 'mix' has an adapted module, 'mix'"),
        ({"trainable": ["blocks"]}, ValueError, "'blocks' has an adapted module, 'blocks.0.up'"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Net()
    before = fingerprint(model)
    given: dict[str, Any] = {"adapters": GOOD, "loss_fn": cross_entropy, "batches": batches(), "steps": 4} | change
    with pytest.raises(error, match=message):
        lf.learn_composition(model, **given)
    same(before, fingerprint(model))


def test_an_iterator_that_lasts_is_fine_and_progress_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    comp = lf.learn_composition(model, GOOD, cross_entropy, iter(batches(4)), steps=4, progress=True)
    assert len(comp.history.loss) == 4
    assert capfd.readouterr().out == ""


def test_different_bases() -> None:
    model = Net()
    other = replace(GOOD["b"], config={**GOOD["b"].config, "base_model_name_or_path": "other"})
    with pytest.raises(ValueError, match="different base models, 'net' and 'other'"):
        lf.learn_composition(model, {"a": GOOD["a"], "b": other}, cross_entropy, batches(), steps=1)
    other = replace(GOOD["b"], config={**GOOD["b"].config, "base_model_name_or_path": "org/net"})
    with pytest.warns(UserWarning, match="'net' .*'org/net'") as caught:
        lf.learn_composition(model, {"a": GOOD["a"], "b": other}, cross_entropy, batches(), steps=1)
    assert caught[0].filename == __file__


def test_paths_are_loaded_and_a_parametrized_teacher_stays(tmp_path: Any) -> None:
    model = Net().eval()
    GOOD["b"].save_pretrained(tmp_path / "b")
    comp = lf.learn_composition(model, {"a": GOOD["a"], "b": tmp_path / "b"}, cross_entropy, batches(), steps=2)
    want = branched(model, comp.adapters, {p: dict(zip("ab", w, strict=True)) for p, w in comp.weights.items()})
    fused = copy.deepcopy(model)
    lf.fuse(fused, comp.to_adapter())
    with torch.no_grad():
        torch.testing.assert_close(fused(batches(1)[0][0] * 0), want(batches(1)[0][0] * 0), rtol=1e-4, atol=1e-5)
