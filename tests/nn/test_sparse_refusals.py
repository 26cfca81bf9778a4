"""What cannot be served per row is refused by its parameter's name, and the model is then as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import nn_models
import pytest
import torch
from sparse_models import fine_tuned, materialised, model_of, sparse_adapter
from torch import Tensor, nn

import lora_fuse as lf


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.weight.norm()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4))
        self.inner = nn.Linear(4, 4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(4, 6, bias=False)
        self.part = nn.Linear(4, 2, bias=False)
        self.part.weight = nn.Parameter(self.whole.weight.detach()[2:4])


def t5_bias() -> nn.Module:
    return nn.ModuleDict({"relative_attention_bias": nn.Embedding(8, 2), "up": nn.Linear(3, 3)})


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    torch.nn.utils.parametrizations.orthogonal(model[0])
    return model


UNSERVABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bare parameter": (Bare, "token: a Bare holds it, and no row of a batch can have a 'token' of its own there"),
    "multihead": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight: a MultiheadAttention holds it"),
    "out_proj": (lambda: nn.MultiheadAttention(4, 2), "out_proj.weight: nn.MultiheadAttention reads this module's"),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "self_attn.in_proj_bias: a MultiheadAttention holds it",
    ),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(4)), "0.weight: a BatchNorm1d cannot differ per row"),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4)), "0.bias: a GroupNorm cannot differ per row"),
    "grouped conv": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0.weight: Conv2d with groups=2"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3)), "0.weight: a Conv1d cannot differ per row"),
    "recurrent": (lambda: nn.GRU(4, 4), "weight_ih_l0: a GRU holds it"),
    "bilinear": (lambda: nn.Sequential(nn.Bilinear(3, 3, 2)), "0.weight: a Bilinear cannot differ per row"),
    "own forward": (lambda: nn.Sequential(Own(4, 4)), "0.weight: Own has a forward of its own"),
    "parametrized": (parametrized, "parametrizations.weight.original: a ParametrizationList holds it"),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), "0.weight: an Embedding with max_norm"),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4)), "0.weight: a EmbeddingBag cannot differ per row"),
    "T5's bias": (t5_bias, "relative_attention_bias.weight: is looked up by pairs of positions"),
    "part of a tensor": (Tied, "part.weight: shares part of its memory with whole.weight"),
}


def snapshot(model: nn.Module) -> Any:
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return state, [(type(m), sorted(m.__dict__), sorted(m._modules), len(m._forward_hooks)) for m in model.modules()]


def assert_unchanged(model: nn.Module, before: Any) -> None:
    state, modules = snapshot(model)
    assert modules == before[1]
    assert all(torch.equal(t, before[0][name]) for name, t in state.items())


@pytest.mark.parametrize("case", UNSERVABLE)
def test_unservable_parameters(case: str) -> None:
    make, why = UNSERVABLE[case]
    torch.manual_seed(0)
    model = make()
    adapter, before = sparse_adapter(model, fine_tuned(model, 1), 0.5), snapshot(model)
    with pytest.raises(ValueError) as caught:
        lf.attach(model, {"t": adapter})
    assert why in str(caught.value)
    assert "adapter 't'" in str(caught.value)
    assert_unchanged(model, before)


def test_running_statistics_of_the_tasks_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapter = sparse_adapter(model, fine_tuned(model, 1))
    state = model.state_dict()
    whole = {name: t for name, t in adapter.dense.items() if name.startswith("0")}
    same = replace(adapter, dense={**whole, "1.running_mean": state["1.running_mean"].clone()})
    prints = {**adapter.fingerprint, "1.running_mean": lf.adapters.sparse_adapter.fingerprint(state["1.running_mean"])}
    lf.detach(lf.attach(model, {"t": replace(same, fingerprint=prints)}))
    other = replace(same, dense={**whole, "1.running_mean": torch.ones(4)}, fingerprint=prints)
    with pytest.raises(ValueError, match=r"1\.running_mean: a BatchNorm1d holds it"):
        lf.attach(model, {"t": other})


def test_other_weights_than_the_merged_ones() -> None:
    model, _ = model_of("tokens")
    adapter = sparse_adapter(model, fine_tuned(model, 1))
    with torch.no_grad():
        model.rms.weight[3] += 1e-6
        model.up.weight[0, 0] += 1e-6
    before = snapshot(model)
    first = next(n for n in adapter.fingerprint if n in ("rms.weight", "up.weight"))
    with pytest.raises(ValueError, match=f"the model's {first} .* is not the merged weight"):
        lf.attach(model, {"t": adapter})
    assert_unchanged(model, before)
    wide, _ = model_of("tokens")
    with pytest.raises(ValueError, match="cast the model after attach"):
        lf.attach(wide.bfloat16(), {"t": adapter})


@pytest.mark.parametrize("dense", [(), ("*",)], ids=["sparse", "whole"])
def test_a_model_that_ties_what_the_fine_tune_has_apart(dense: tuple[str, ...]) -> None:
    """As from files, which hold a tied weight twice: good where both are the same, refused where they differ."""
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    base[2].load_state_dict(base[0].state_dict())
    apart = fine_tuned(base, 1)
    alike = copy.deepcopy(apart)
    alike[2].load_state_dict(alike[0].state_dict())
    half = copy.deepcopy(alike)
    half[2].load_state_dict(base[2].state_dict())  # only the first has moved
    tied = copy.deepcopy(base)
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    before = snapshot(tied)
    for tuned in (apart, half):
        adapter = sparse_adapter(base, tuned, dense=dense)
        lf.detach(lf.attach(copy.deepcopy(base), {"t": adapter}))
        held = {name: t for name, t in adapter.dense.items() if not torch.equal(t, base.state_dict()[name])}
        with pytest.raises(ValueError, match=r"0\.(weight|bias) and 2\.\1 are one tensor in the model \(tied"):
            lf.attach(tied, {"t": replace(adapter, dense=held)})
        assert_unchanged(tied, before)
    adapter = sparse_adapter(base, alike, dense=dense)
    lf.attach(tied, {"t": adapter})
    for name in ("t", None):
        lf.switch_task(tied, name)
        want = adapter.state_dict(base.state_dict()) if name else before[0]
        assert all(torch.equal(t, want[n]) for n, t in tied.state_dict().items())


def test_parameters_that_the_model_lacks() -> None:
    model, _ = model_of("tokens")
    tuned = fine_tuned(model, 1)
    adapter = sparse_adapter(model, tuned)
    with pytest.raises(ValueError, match=r"words\.weight: the model has no .*, nearest: encoder\.words\.weight"):
        lf.attach(nn.ModuleDict({"encoder": model}), {"t": adapter})
    headless = copy.deepcopy(model)
    headless.head = nn.Identity()
    with pytest.raises(ValueError, match=r"(?s)head.weight: the model has no such parameter.*head.bias"):
        lf.attach(headless, {"t": sparse_adapter(model, tuned, heads=["head.*"])})
    tuned.head = nn.Linear(30, 6)
    with pytest.raises(ValueError, match=r"head\.weight: the saved weight has shape"):
        lf.attach(model, {"t": sparse_adapter(model, tuned, heads=["head.*"])})


def test_adapters_that_are_damaged() -> None:
    model, _ = model_of("tokens")
    adapter, before = sparse_adapter(model, fine_tuned(model, 1)), snapshot(model)
    nan = {**adapter.dense, "norm.bias": torch.full((24,), torch.nan)}
    short = {**adapter.dense, "norm.bias": torch.zeros(23)}
    words = adapter.matrices["words.weight"]
    wrong = {**adapter.matrices, "words.weight": replace(words, row_starts=words.row_starts.flip(0))}
    for bad, why in (
        (replace(adapter, dense=nan), "'norm.bias' has NaN"),
        (replace(adapter, dense=short), r"norm.bias has shape \[23\], the model's \[24\]"),
        (replace(adapter, matrices=wrong), "'words.weight': row_starts: must rise from 0"),
        (replace(adapter, fingerprint={}), "has no fingerprint"),
    ):
        with pytest.raises(ValueError, match=why):
            lf.attach(model, {"t": bad})
        assert_unchanged(model, before)


def test_a_layer_that_one_adapter_changes_and_another_replaces() -> None:
    model, _ = model_of("tokens")
    plain = sparse_adapter(model, fine_tuned(model, 1))
    headed = sparse_adapter(model, fine_tuned(model, 2), heads=["head.*"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="head: one adapter has values of its own here, another a full copy of head"):
        lf.attach(model, {"a": plain, "b": headed})
    assert_unchanged(model, before)
    lf.attach(model, {"b": headed})
    with pytest.raises(ValueError, match=r"head\.weight: another adapter has a full copy of this Linear"):
        lf.add_adapter(model, "a", plain)
    lf.detach(model)
    lf.attach(model, {"a": plain, "lora": nn_models.adapter(model, ["up"], 2)})
    with pytest.raises(ValueError, match="head: one adapter has values of its own here"):
        lf.add_adapter(model, "b", headed)
    with pytest.raises(ValueError, match="a head"):
        lf.add_adapter(model, "c", lf.LoraAdapter({}, {"up": {"weight": torch.zeros(40, 24), "bias": torch.zeros(40)}}))
    assert sorted(lf.adapters(model)) == ["a", "lora"]
    lf.detach(model)
    assert_unchanged(model, before)


def test_refused_additions_leave_the_served_rows_alone() -> None:
    model, x = model_of("tokens")
    bare = copy.deepcopy(model)
    adapter = sparse_adapter(model, fine_tuned(model, 1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.up.weight += 1
    foreign = sparse_adapter(other, fine_tuned(other, 2))
    lf.attach(model, {"t": adapter}, num_slots=2)
    for change in (lambda: lf.add_adapter(model, "u", foreign), lambda: lf.swap_adapter(model, "t", foreign)):
        with pytest.raises(ValueError, match=r"the model's .* is not the merged weight"):
            change()
    with torch.no_grad(), lf.use_adapters(model, "t"):
        torch.testing.assert_close(model(x), materialised(bare, adapter)(x), rtol=1e-5, atol=1e-6)
