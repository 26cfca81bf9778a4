"""What fuse and unfuse refuse or cannot finish: nothing is half done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuse_models import Net, assert_same_bits, bits, make_adapter, stored_delta
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging import fuse as fuse_module


def _raises_and_leaves(model: nn.Module, message: str, call: Callable[[], Any], error: Any = ValueError) -> None:
    before, versions = bits(model), [p._version for p in model.parameters()]
    with pytest.raises(error, match=message):
        call()
    assert_same_bits(model, before)
    assert versions == [p._version for p in model.parameters()]
    with pytest.raises(ValueError, match="no backup"):
        lf.unfuse(model)


def _changed(path: str, **changes: Any) -> lf.LoraAdapter:
    adapter = make_adapter()
    return replace(adapter, layers={**adapter.layers, path: replace(adapter.layers[path], **changes)})


def _renamed(old: str, new: str) -> lf.LoraAdapter:
    adapter = make_adapter()
    return replace(adapter, layers={new if p == old else p: layer for p, layer in adapter.layers.items()})


BAD = {
    "missing module": (lambda: make_adapter_at("block.gone"), {}, r"Net has no module at 1 path.*'block.gone'"),
    "wrong kind of module": (lambda: _renamed("lin", "norm"), {}, "'norm': cannot fuse into a LayerNorm"),
    "wrong factors": (lambda: _renamed("emb", "head"), {}, "'head': the adapter has embedding factors"),
    "wrong shape": (lambda: _renamed("lin", "head"), {}, r"'head': .*\(40, 24\).*\(3, 24\)"),
    "nan": (lambda: _changed("gpt", lora_a=torch.full((8, 24), torch.nan)), {}, "'gpt': lora_a has NaN"),
    "bias without a bias": (lambda: _changed("block.bare", lora_bias=torch.ones(33)), {}, "'block.bare'.*has no bias"),
    "dora weighted": (lambda: _changed("lin", magnitude=torch.ones(40)), {"weights": [0.5]}, "uses DoRA"),
    "head of another width": (
        lambda: replace(make_adapter(), modules_to_save={"head": {"weight": torch.ones(4, 24)}}),
        {},
        r"head.weight: .*\(4, 24\).*\(3, 24\)",
    ),
    "head and layer": (
        lambda: replace(make_adapter(), modules_to_save={"lin": {"weight": torch.ones(40, 24)}}),
        {},
        "lin.weight: the adapter both replaces it",
    ),
    "nan in a head": (
        lambda: replace(make_adapter(), modules_to_save={"head": {"weight": torch.full((3, 24), torch.inf)}}),
        {},
        "head.weight: .*infinite",
    ),
    "token out of range": (
        lambda: replace(make_adapter(), trainable_tokens={"emb": (torch.tensor([70]), torch.ones(1, 24))}),
        {},
        r"emb: trainable tokens .*\[70\]",
    ),
    "rounding": (make_adapter, {"rounding": "up"}, "rounding: expected 'nearest' or 'stochastic'"),
    "weights": (make_adapter, {"weights": [1.0, 2.0]}, "weights: expected 1"),
}


def make_adapter_at(path: str) -> lf.LoraAdapter:
    return lf.LoraAdapter({path: LoraLayer(torch.ones(2, 3), torch.ones(3, 2), 1.0)})


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case: str) -> None:
    make, kwargs, message = BAD[case]
    model = Net()
    _raises_and_leaves(model, message, lambda: lf.fuse(model, [make()], **kwargs))


def test_overflow_and_interrupts_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().half()
    before = bits(model)
    huge = _changed("gpt", lora_b=torch.full((36, 8), 6e4))
    for backup in (True, False):
        with pytest.raises(ValueError, match=r"gpt.weight: the fused value is not finite in torch.float16"):
            lf.fuse(model, huge, backup=backup)
        assert_same_bits(model, before)
    with pytest.raises(ValueError, match="no backup"):
        lf.unfuse(model)

    lf.fuse(model, make_adapter())
    fused = bits(model)
    run, calls = fuse_module._Write.run, []

    def interrupted(self: Any, round_to: Any) -> None:
        run(self, round_to)
        calls.append(self.name)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(fuse_module._Write, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lf.fuse(model, make_adapter())
    assert_same_bits(model, fused)
    lf.unfuse(model)
    assert_same_bits(model, before)


def test_dora_needs_the_original_weights() -> None:
    model = lf.fuse(Net(), make_adapter())
    with pytest.raises(ValueError, match="uses DoRA, which rescales the original weights; unfuse"):
        lf.fuse(model, _changed("lin", magnitude=torch.ones(40)))


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(70, 24), nn.Linear(24, 70, bias=False)
            self.head.weight = self.emb.weight

    model, adapter = Tied(), make_adapter(paths=["emb"])
    _raises_and_leaves(model, "emb.weight: shares its memory with head.weight", lambda: lf.fuse(model, adapter))
    before = bits(model)
    lf.fuse(model, adapter, allow_tied=True)
    torch.testing.assert_close(model.head.weight.double(), before["emb.weight"] + stored_delta(adapter, "emb"))
    lf.unfuse(model)
    assert_same_bits(model, before)
    both = replace(adapter, layers={**adapter.layers, "head": LoraLayer(torch.ones(1, 24), torch.ones(70, 1), 1.0)})
    _raises_and_leaves(
        model, "emb.weight and head.weight are one tensor", lambda: lf.fuse(model, both, allow_tied=True)
    )


def test_views_of_one_buffer_are_not_tied_unless_they_overlap() -> None:
    flat = torch.randn(3 * 40 * 24)
    model = nn.ModuleDict({"lin": nn.Linear(24, 40, bias=False), "other": nn.Linear(24, 40, bias=False)})
    adapter = make_adapter(paths=["lin"])
    model["lin"].weight = nn.Parameter(flat[: 40 * 24].view(40, 24))
    model["other"].weight = nn.Parameter(flat[40 * 24 : 2 * 40 * 24].view(40, 24))
    lf.unfuse(lf.fuse(model, adapter))
    model["other"].weight = nn.Parameter(flat[40 * 24 - 1 : 2 * 40 * 24 - 1].view(40, 24))
    _raises_and_leaves(model, "lin.weight: shares its memory with other.weight", lambda: lf.fuse(model, adapter))


def test_a_module_under_two_paths_is_one_module() -> None:
    shared = nn.Linear(24, 40)
    model = nn.ModuleDict({"first": shared, "lin": shared})
    adapter = make_adapter(paths=["lin"])
    lf.unfuse(lf.fuse(model, adapter))
    twice = replace(adapter, layers={**adapter.layers, "first": adapter.layers["lin"]})
    _raises_and_leaves(model, "are one tensor", lambda: lf.fuse(model, twice))


class Quantised(nn.Linear):
    def __init__(self) -> None:
        super().__init__(24, 40)
        self.weight = nn.Parameter(torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False)


class Subclass(Tensor):
    pass


def test_quantised_and_computed_weights_are_refused() -> None:
    adapter = make_adapter(paths=["lin"])
    quantised = nn.ModuleDict({"lin": Quantised()})
    _raises_and_leaves(quantised, "Quantised holds it as Parameter of torch.uint8", lambda: lf.fuse(quantised, adapter))
    other = nn.ModuleDict({"lin": nn.Linear(24, 40)})
    other["lin"].weight = nn.Parameter(torch.zeros(40, 24).as_subclass(Subclass))
    with pytest.raises(ValueError, match="holds it as Subclass"):
        lf.fuse(other, adapter)
    normed = nn.ModuleDict({"lin": torch.nn.utils.parametrizations.weight_norm(nn.Linear(24, 40))})
    _raises_and_leaves(normed, "lin.weight: .* parametrization", lambda: lf.fuse(normed, adapter))
    meta = nn.ModuleDict({"lin": nn.Linear(24, 40, device="meta")})
    with pytest.raises(ValueError, match="meta device"):
        lf.fuse(meta, adapter)
    like = nn.ModuleDict({"lin": nn.Module()})
    like["lin"].in_features, like["lin"].out_features = 24, 40
    with pytest.raises(ValueError, match="serve a quantised layer with the adapter attached"):
        lf.fuse(like, adapter)
    grouped = nn.ModuleDict({"conv": nn.Conv2d(10, 16, 3, groups=2)})
    wide = make_adapter(paths=["conv"])
    layer = replace(wide.layers["conv"], lora_a=torch.randn(4, 10, 3, 3))
    with pytest.raises(ValueError, match="groups=2, which is not supported"):
        lf.fuse(grouped, replace(wide, layers={"conv": layer}))


def test_unfuse_checks_before_it_writes() -> None:
    model = lf.fuse(Net(), make_adapter())
    fused = bits(model)
    original = model.emb.weight
    model.emb.weight = nn.Parameter(torch.zeros(71, 24))
    with pytest.raises(ValueError, match=r"emb.weight: has shape \(71, 24\), but was fused as \(70, 24\)"):
        lf.unfuse(model)
    model.emb.weight = original
    assert_same_bits(model, fused)
    lf.unfuse(model)
