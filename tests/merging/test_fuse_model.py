"""fuse and unfuse: one rounding, the original bits back, what rides along; the weights are PEFT's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_models import SHAPES, Net, assert_same_bits, bits, make_adapter, stored_delta
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging import fuse as fuse_module
from lora_fuse.merging.rounding import round_stochastic

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("tile", [None, 50], ids=["one_tile", "many_tiles"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_one_rounding_of_the_whole_sum(dtype: torch.dtype, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tile:
        monkeypatch.setitem(fuse_module._TILE, "cpu", tile)
    model, adapters, weights = Net().to(dtype), [make_adapter(), make_adapter(), make_adapter(rank=2)], [0.7, -1.3, 0.4]
    before = bits(model)
    pointers = {name: (p.data_ptr(), p._version, p.requires_grad, p.stride()) for name, p in model.named_parameters()}
    model.lin.weight.requires_grad_(False)
    assert lf.fuse(model, adapters, weights) is model
    for path in SHAPES:
        weight = model.get_parameter(f"{path}.weight")
        exact = before[f"{path}.weight"].double()
        for adapter, w in zip(adapters, weights, strict=True):
            exact = exact + w * stored_delta(adapter, path)
        rounding = (exact.to(dtype).double() - exact).abs()  # unavoidable
        accumulation = 1e-15 if dtype == torch.float64 else 1e-6
        assert ((weight.double() - exact).abs() <= rounding * (1 + 1e-2) + accumulation).all()
        pointer, version, _, stride = pointers[f"{path}.weight"]
        assert (weight.data_ptr(), weight.stride()) == (pointer, stride)
        assert weight._version > version
        assert weight.requires_grad is (path != "lin")
    for name in ("lin.bias", "norm.weight", "head.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_one_rounding_is_better_than_one_per_adapter() -> None:
    """Sixteen updates below half a step of bf16: added one by one they vanish, summed in fp32 they do not."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    small = lf.LoraAdapter({"0": LoraLayer(torch.ones(1, 8), torch.full((8, 1), 2.0**-10), 1.0)})
    lf.fuse(model, [small] * 16)
    assert model[0].weight.unique().tolist() == [1.0 + 2.0**-6]
    lf.unfuse(model)
    for _ in range(16):
        lf.fuse(model, small)
    assert model[0].weight.unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_unfuse_returns_the_original_bits(dtype: torch.dtype, rounding: Any) -> None:
    model = Net().to(dtype)
    with torch.no_grad():
        model.lin.weight[0, 0] = -0.0
    before = bits(model)
    for cycle in range(4):
        for stacked in range(1 + cycle % 3):
            lf.fuse(model, {"a": make_adapter(), "b": make_adapter()}, [0.3, 1.0], rounding=rounding, seed=stacked)
        assert not torch.equal(model.lin.weight, before["lin.weight"])
        assert lf.unfuse(model) is model
        assert_same_bits(model, before)
        assert bool(torch.signbit(model.lin.weight[0, 0]))
        with pytest.raises(ValueError, match="has no backup"):
            lf.unfuse(model)


def test_stacked_fuses_add_up() -> None:
    model, a, b = Net(), make_adapter(), make_adapter(paths=["lin", "gpt"])
    before = bits(model)
    lf.fuse(lf.fuse(model, a), b, [-2.0])
    exact = before["lin.weight"].double() + stored_delta(a, "lin") - 2 * stored_delta(b, "lin")
    torch.testing.assert_close(model.lin.weight.double(), exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="an earlier fuse of this model kept a backup"):
        lf.fuse(model, a, backup=False)
    lf.unfuse(model)
    assert_same_bits(model, before)


def test_without_backup_the_result_is_the_new_base() -> None:
    model, adapter = Net(), make_adapter()
    lf.fuse(model, adapter, backup=False)
    fused = bits(model)
    with pytest.raises(ValueError, match="backup=False"):
        lf.unfuse(model)
    lf.unfuse(lf.fuse(model, adapter))
    assert_same_bits(model, fused)


def test_copies_casts_and_compiled_models() -> None:
    model = Net().bfloat16()
    before = bits(model)
    lf.fuse(model, make_adapter())
    twin = copy.deepcopy(model)
    wide = copy.deepcopy(model).float()
    lf.unfuse(torch.compile(model, backend="eager"))
    assert_same_bits(model, before)
    assert_same_bits(lf.unfuse(twin), before)
    assert_same_bits(lf.unfuse(wide), {k: v.float() for k, v in before.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_wide_copy_beyond_one_tile(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float64):
                self.largest = max(self.largest, out.numel())
            return out

    monkeypatch.setitem(fuse_module._TILE, "cpu", 4096)
    model = nn.Sequential(nn.Linear(256, 300)).to(dtype)
    adapter = lf.LoraAdapter({"0": LoraLayer(torch.randn(8, 256), torch.randn(300, 8), 0.1)})
    with Wide() as wide:
        lf.fuse(model, [adapter])
    assert wide.largest == 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0 + 2.0**-12, -3.0 - 2.0**-11, 2.0**-20 * 1.01, 5.01e-7, 0.0, 0.5])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    x = torch.full((200_000,), value)
    rounded = round_stochastic(x, dtype, torch.Generator().manual_seed(3)).float()
    nearest = x[:1].to(dtype)
    spread = rounded.unique()
    assert nearest.float() in spread
    if float(nearest) == float(x[0]):
        assert spread.tolist() == [float(x[0])]
    else:
        assert len(spread) == 2
        assert float(spread[0]) < float(x[0]) < float(spread[1])
        step = float(spread[1] - spread[0])
        assert abs(float(rounded.double().mean()) - float(x[0])) < 0.01 * step


def test_stochastic_rounding_at_the_ends() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        x = torch.tensor([largest, -largest, torch.inf, -torch.inf, torch.nan]).repeat(1000, 1)
        got = round_stochastic(x, dtype, torch.Generator().manual_seed(0))
        torch.testing.assert_close(got.float(), x, rtol=0, atol=0, equal_nan=True)
    x = torch.randn(9)
    assert torch.equal(round_stochastic(x, torch.float32, torch.Generator()), x)


def test_stochastic_fuse_keeps_small_updates() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    small = lf.LoraAdapter({"0": LoraLayer(torch.ones(1, 512), torch.full((512, 1), 2.0**-11), 1.0)})
    runs = []
    for seed in (1, 1, 2):
        lf.fuse(model, small, rounding="stochastic", seed=seed)
        runs.append(model[0].weight.detach().clone())
        lf.unfuse(model)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert float(runs[0].double().mean()) == pytest.approx(1 + 2.0**-11, abs=2.0**-15)


def test_lowered_matmul_precision_changes_nothing() -> None:
    model, adapter = Net(), make_adapter(1.0)
    try:
        torch.set_float32_matmul_precision("medium")
        before = bits(model)
        lf.fuse(model, adapter)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = before["lin.weight"].double() + stored_delta(adapter, "lin")
    assert (model.lin.weight.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_everything_that_rides_along() -> None:
    model, adapter = Net(), make_adapter()
    before = bits(model)
    bias, tokens = torch.randn(40), (torch.tensor([3, 69]), torch.randn(2, 24))
    lora_bias = torch.randn(40)
    layers = {**adapter.layers, "lin": replace(adapter.layers["lin"], lora_bias=lora_bias)}
    base = torch.randn(70, 24)
    adapter = replace(
        adapter,
        layers=layers,
        base_biases={"lin": bias, "norm": torch.ones(24)},
        trainable_tokens={"emb": tokens},
        base_weights={"emb": base},
        modules_to_save={"head": {"weight": torch.ones(3, 24), "bias": torch.zeros(3)}},
    )
    lf.fuse(model, adapter)
    torch.testing.assert_close(model.lin.bias, bias + layers["lin"].scaling * lora_bias)
    assert torch.equal(model.norm.bias, torch.ones(24))
    want = base.clone()
    want[tokens[0]] = tokens[1]
    torch.testing.assert_close(
        model.emb.weight.double(), want.double() + stored_delta(adapter, "emb"), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(model.head.weight, torch.ones(3, 24))
    lf.unfuse(model)
    assert_same_bits(model, before)
    lf.fuse(model, [make_adapter(), adapter], [1.0, 0.0])  # weight 0: nothing of it
    assert torch.equal(model.head.weight, before["head.weight"])


def test_lora_biases_add_up_over_adapters() -> None:
    model = Net()
    before = model.lin.bias.detach().clone()
    parts = []
    for _ in range(2):
        adapter = make_adapter(paths=["lin"])
        parts.append(replace(adapter, layers={"lin": replace(adapter.layers["lin"], lora_bias=torch.randn(40))}))
    lf.fuse(model, parts, [2.0, -1.0])
    scaled = [p.layers["lin"].scaling * p.layers["lin"].lora_bias for p in parts]
    torch.testing.assert_close(model.lin.bias, before + 2 * scaled[0] - scaled[1])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_same_weights_as_peft(tmp_path: Path, dora: bool) -> None:
    """PEFT's merge_and_unload in fp32, for every kind of layer (it gives DoRA's embedding the norm per dimension)."""
    peft = pytest.importorskip("peft")
    model = Net()
    names = ["emb", "lin", "bare", "conv", "gpt"]
    config = peft.LoraConfig(r=4, lora_alpha=10, use_dora=dora, init_lora_weights=False, target_modules=names)
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    merged = wrapped.merge_and_unload()
    adapter = lf.load_adapter(tmp_path)
    assert any(layer.magnitude is not None for layer in adapter.layers.values()) is dora
    lf.fuse(plain, adapter)
    for path in SHAPES:
        name = f"{path}.weight"
        torch.testing.assert_close(plain.get_parameter(name), merged.get_parameter(name), rtol=1e-5, atol=1e-5)


def test_fuse_into_an_attached_model() -> None:
    model, adapter = Net().eval(), make_adapter(paths=["lin", "emb", "conv"])
    before, ids = bits(model), torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        want = lf.fuse(copy.deepcopy(model), adapter)(ids)
        lf.attach(model, {"a": adapter})
        lf.fuse(model, adapter)
        torch.testing.assert_close(model(ids), want)
        lf.unfuse(model)
        with lf.use_adapters(model, "a"):
            torch.testing.assert_close(model(ids), want)
    assert_same_bits(model, before)
