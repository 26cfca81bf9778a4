"""One task in the weights themselves, and what may not happen meanwhile."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import nn_models
import pytest
import torch
from sparse_models import fine_tuned, materialised, model_of, sparse_adapter
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.sparse_adapter import same_bits
from lora_fuse.sparse import write_all


def prepared(kind: str = "tokens") -> tuple[nn.Module, nn.Module, Tensor, dict[str, Any]]:
    """An attached model, the bare one, a batch, and the adapters: two tasks and a LoRA."""
    model, x = model_of(kind)
    if kind == "images":
        model = model.to(memory_format=torch.channels_last)  # a weight that is not contiguous
    bare = copy.deepcopy(model)
    adapters: dict[str, Any] = {f"t{i}": sparse_adapter(model, fine_tuned(model, i)) for i in range(2)}
    adapters["lora"] = nn_models.adapter(model, ["up"] if kind == "tokens" else ["out"], 4)
    return lf.attach(model, adapters), bare, x, adapters


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bits(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", ["tokens", "images"])
@torch.no_grad()
def test_the_fine_tune_and_back_bit_for_bit(kind: str) -> None:
    model, bare, x, adapters = prepared(kind)
    parameters = dict(model.named_parameters())
    for name in ("t0", "t1", "t1", None, "t1", "t0", None, None):
        lf.switch_task(model, name)
        own = bare if name is None else materialised(bare, adapters[name])
        assert_same_state(model, own)
        assert torch.equal(model(x), own(x))
    with lf.use_adapters(model, ["t0"] * 6 + [None]):
        assert torch.equal(model(x)[6], bare(x)[6])
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_forwards_run_as_the_bare_model_does() -> None:
    model, _, x, _ = prepared()
    lf.switch_task(model, "t0")
    calls: list[Any] = []
    for module in model.modules():
        if "lora_sparse" in module._modules:
            module.lora_sparse.__dict__["serve"] = lambda *args: calls.append(args)
    model(x)
    assert not calls


def test_weights_see_the_write() -> None:
    """Graphs that saved a weight notice, as for any write in place."""
    model, _, x, _ = prepared()
    loss = model(x).sum()
    lf.switch_task(model, "t0")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_meanwhile_rows_cannot_differ() -> None:
    model, bare, x, adapters = prepared()
    lf.switch_task(model, "t0")
    state = copy.deepcopy(model.state_dict())
    token = torch.tensor([lf.adapter_slots(model)["t1"]] * 7, dtype=torch.int32)
    for selection in ("t1", ["lora"] * 7, {"t0": 0.5}, token):
        with pytest.raises(ValueError, match="switched to 't0'"):
            lf.set_adapters(model, selection)
        with pytest.raises(ValueError, match="switched to 't0'"), lf.use_adapters(model, selection):
            pass
    lf.set_adapters(model, None)
    with lf.use_adapters(model, [None] * 7):
        assert torch.equal(model(x), materialised(bare, adapters["t0"])(x))
    changes: list[Any] = [
        lambda: lf.add_adapter(model, "t2", adapters["t1"]),
        lambda: lf.swap_adapter(model, "t1", adapters["t0"]),
        lambda: lf.remove_adapter(model, "t1"),
        lambda: lf.fuse(model, [adapters["lora"]]),
        lambda: lf.fuse(model.up, [adapters["lora"]]),
    ]
    for change in changes:
        with pytest.raises(ValueError, match=r"switched to 't0'|sparse adapters are attached"):
            change()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    lf.switch_task(model, None)
    lf.remove_adapter(model, "t1")
    assert_same_state(model, bare)


def test_fuse_would_change_the_merged_weights() -> None:
    model, bare, _, adapters = prepared()
    with pytest.raises(ValueError, match="sparse adapters are attached"):
        lf.fuse(model, [adapters["lora"]])
    for name in ("t0", "t1"):
        lf.remove_adapter(model, name)
    lf.fuse(model, [adapters["lora"]])
    lf.unfuse(model)
    assert_same_state(model, bare)


def test_bad_names_and_selections_that_stand() -> None:
    model, bare, _, _ = prepared()
    with pytest.raises(ValueError, match="no adapter 'mnli'"):
        lf.switch_task(model, "mnli")
    with pytest.raises(ValueError, match="'lora' is no sparse adapter; switch_task takes \\['t0', 't1'\\]"):
        lf.switch_task(model, "lora")
    with pytest.raises(ValueError, match="no adapters attached"):
        lf.switch_task(bare, "t0")
    lf.set_adapters(model, ["t1"] + [None] * 6)
    with pytest.raises(ValueError, match="default selection"):
        lf.switch_task(model, "t0")
    lf.set_adapters(model, None)
    with lf.use_adapters(model, "t0"), pytest.raises(ValueError, match="use_adapters block"):
        lf.switch_task(model, "t0")
    assert_same_state(model, bare)
    lf.switch_task(model, "t0")


def test_detach_switches_back() -> None:
    model, bare, x, _ = prepared()
    lf.switch_task(model, "t1")
    lf.detach(model)
    assert_same_state(model, bare)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize(("before", "where"), [(None, 0), (None, 4), ("t1", 0), ("t1", 4), ("t1", 5), ("t1", 9)])
def test_a_failure_midway_leaves_the_model_as_it_was(
    before: str | None, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bare, _, adapters = prepared()
    lf.switch_task(model, before)
    state, count = copy.deepcopy(model.state_dict()), iter(range(100))

    def failing(write: Any) -> Any:
        def call(*args: Any) -> Any:
            made = write(*args)
            if next(count) == where:
                raise MemoryError
            return made

        return call

    with monkeypatch.context() as patch:
        patch.setattr("lora_fuse.nn.switch.write_all", failing(write_all))
        patch.setattr(torch.Tensor, "copy_", failing(torch.Tensor.copy_))
        with pytest.raises(MemoryError):
            lf.switch_task(model, "t0")
    assert all(same_bits(t, state[n]) for n, t in model.state_dict().items())
    lf.switch_task(model, "t0")
    assert_same_state(model, materialised(bare, adapters["t0"]))
    lf.switch_task(model, None)
    assert_same_state(model, bare)


def test_a_parameter_that_changed_its_shape() -> None:
    model, _, _, _ = prepared()
    model.up.weight = nn.Parameter(torch.zeros(3, 24))
    before = model.words.weight.detach().clone()
    with pytest.raises(ValueError, match=r"up\.weight: is \[3, 24\] on cpu, accepted is \[40, 24\]"):
        lf.switch_task(model, "t0")
    assert torch.equal(model.words.weight, before)


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_parameters_with_any_strides(kind: str) -> None:
    """Reversed dimensions: of a convolution by 1 x 1, the matrix is a view that has other strides than the weight."""
    model, _ = model_of(kind)
    peru = lf.peru_fft(model, {"t": fine_tuned(model, 1)}, density=0.2)
    for module in model.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                dims = [*reversed(range(p.dim()))]
                reversed_ = torch.empty([*reversed(p.shape)]).permute(dims)
                module._parameters[leaf] = nn.Parameter(reversed_)
    model.load_state_dict(peru.merged)
    lf.attach(model, peru.adapters)
    for name in ("t", None, "t", None):
        lf.switch_task(model, name)
        want = peru.state_dict(name)
        assert [n for n, t in model.state_dict().items() if not same_bits(t, want[n])] == []


class Thrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def tie(self, *names: str) -> Thrice:
        for leaf in ("weight", "bias"):
            for name in names[1:]:
                setattr(getattr(self, name), leaf, getattr(getattr(self, names[0]), leaf))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("exclude", [(), ("a.weight",)], ids=["sparse", "whole"])
@pytest.mark.parametrize("tied", ["abc", "ab", "ac", "bc", ""])
@torch.no_grad()
def test_a_model_that_ties_other_names(tied: str, exclude: tuple[str, ...]) -> None:
    """Of three names of one tensor in theta*, some are one in the model that it is loaded into."""
    base = Thrice().tie("a", "b", "c")
    peru = lf.peru_fft(base, {f"t{i}": fine_tuned(base, i) for i in range(2)}, density=0.3, exclude=exclude)
    model, x = Thrice(), torch.randn(3, 8)
    if tied:
        model.tie(*tied)
    model.load_state_dict(peru.merged)
    lf.attach(model, peru.adapters)
    alone = {}
    for name in ("t0", "t1", None, "t0", None):
        lf.switch_task(model, name)
        want = peru.state_dict(name)
        assert [n for n, t in model.state_dict().items() if not same_bits(t, want[n])] == []
        alone[name] = model(x)
    with lf.use_adapters(model, ["t0", None, "t1"]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.stack([alone[name][i] for i, name in enumerate(("t0", None, "t1"))]))


def test_inference_mode() -> None:
    model, bare, x, adapters = prepared()
    with torch.inference_mode():
        lf.switch_task(model, "t0")
        assert torch.equal(model(x), materialised(bare, adapters["t0"])(x))
    lf.switch_task(model, "t1")
    with torch.inference_mode():
        lf.switch_task(model, None)
    assert_same_state(model, bare)
    model(x).sum().backward()  # nothing became an inference tensor
    with torch.inference_mode():
        made = copy.deepcopy(bare)
        adapter = adapters["t0"]
        lf.attach(made, {"t0": adapter})
        lf.switch_task(made, "t0")
        assert_same_state(made, materialised(bare, adapter))
    with pytest.raises(ValueError, match="was made in inference mode"):
        lf.switch_task(made, None)
    with torch.inference_mode():
        lf.switch_task(made, None)
        assert_same_state(made, bare)


def test_copies_of_a_switched_model_switch_on_their_own() -> None:
    model, bare, _, adapters = prepared()
    lf.switch_task(model, "t0")
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.load(buffer)):
        with pytest.raises(ValueError, match="switched to 't0'"):
            lf.set_adapters(twin, "t1")
        lf.switch_task(twin, "t1")
        assert_same_state(twin, materialised(bare, adapters["t1"]))
        lf.switch_task(twin, None)
        assert_same_state(twin, bare)
    assert_same_state(model, materialised(bare, adapters["t0"]))


def test_a_cast_while_switched() -> None:
    model, bare, _, adapters = prepared()
    lf.switch_task(model, "t0")
    model.bfloat16()
    assert_same_state(model, materialised(bare, adapters["t0"]).bfloat16())
    lf.switch_task(model, None)
    assert_same_state(model, bare.bfloat16())


def test_heads_are_the_tasks() -> None:
    model, x = model_of("tokens")
    bare, adapters = copy.deepcopy(model), {}
    for i, width in enumerate((6, 4)):
        tuned = fine_tuned(model, i)
        tuned.head = nn.Linear(24, width)
        adapters[f"t{i}"] = sparse_adapter(model, tuned, heads=["head.*"])
    lf.attach(model, adapters)
    with torch.no_grad():
        for name, adapter in adapters.items():
            lf.switch_task(model, name)
            assert torch.equal(model(x), materialised(bare, adapter)(x))
            with lf.use_adapters(model, [None] * 7):
                assert torch.equal(model(x), materialised(bare, adapter)(x))
            twin = copy.deepcopy(model)
            assert torch.equal(twin(x), model(x))
        lf.switch_task(model, None)
        assert torch.equal(model(x), bare(x))
