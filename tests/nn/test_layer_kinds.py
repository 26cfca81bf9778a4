"""Embedding, Conv2d, Conv1D, Linear-like and hooked modules, torch's fused encoder, experts."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_models import adapted_copy, adapter, conv_layer, embedding_layer, linear_layer, per_row
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import LoraAdapter
from lora_fuse.adapters.lora import LoraLayer


def pickled(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


ENTRIES = ["a", None, {"a": 0.5, "b": -1.0}, "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype: torch.dtype) -> None:
    bare = nn.Sequential(nn.Embedding(37, 12, padding_idx=0), nn.Linear(12, 5)).requires_grad_(False).to(dtype)
    adapters = {n: LoraAdapter({"0": embedding_layer(bare[0], r)}) for n, r in (("a", 3), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2)
    ids = torch.randint(0, 37, (4, 6))
    ids[:, 0] = 0  # the padding row has a delta like any other
    want = per_row(copy.deepcopy(bare).float(), adapters, ENTRIES, ids)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    with lf.use_adapters(model, ENTRIES):
        got = model(ids)
        torch.testing.assert_close(got.float(), want, **tolerance)
        assert torch.equal(got[1], bare(ids)[1])
        for twin in (pickled(model), copy.deepcopy(model)):
            lf.set_adapters(twin, ENTRIES)
            assert torch.equal(twin(ids), got)
    lf.swap_adapter(model, "b", adapters["a"])  # rank 3 where rank 5 was
    lf.swap_adapter(model, "a", adapters["a"])
    want = per_row(copy.deepcopy(bare).float(), {"b": adapters["a"]}, ["b"], ids[:1])
    with lf.use_adapters(model, ["b"]):
        torch.testing.assert_close(model(ids[:1]).float(), want, **tolerance)
    with lf.use_adapters(model, torch.tensor([-1, lf.adapter_slots(model)["a"]] * 3, dtype=torch.int32)):
        torch.testing.assert_close(model(ids[0])[::2], bare(ids[0])[::2], rtol=0, atol=0)
    lf.detach(model)
    assert torch.equal(model(ids), bare(ids))


def test_scaled_embedding_scales_the_lora_part_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    bare = nn.Sequential(Scaled(11, 4)).requires_grad_(False)
    adapters = {"a": LoraAdapter({"0": embedding_layer(bare[0], 2)})}
    model = lf.attach(copy.deepcopy(bare), adapters)
    ids = torch.randint(0, 11, (2, 3))
    with lf.use_adapters(model, ["a", None]):
        got = model(ids)
    torch.testing.assert_close(got, per_row(bare, adapters, ["a", None], ids), rtol=1e-5, atol=1e-5)
    assert isinstance(model[0], Scaled)


CONVS = {
    "1x1": {"kernel_size": 1},
    "1x1-stride": {"kernel_size": 1, "stride": 2},
    "1x1-pad": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "5x3-stride-dilation": {"kernel_size": (5, 3), "stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)},
    "same-even": {"kernel_size": 4, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kwargs", CONVS.values(), ids=CONVS.keys())
def test_conv2d(kwargs: dict[str, Any], channels_last: bool) -> None:
    bare = nn.Sequential(nn.Conv2d(6, 10, **kwargs), nn.Conv2d(10, 4, 1)).requires_grad_(False)
    adapters = {n: LoraAdapter({"0": conv_layer(bare[0], r)}) for n, r in (("a", 3), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(4, 6, 9, 11)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with lf.use_adapters(model, ENTRIES):
        got = model(x)
    torch.testing.assert_close(got, per_row(bare, adapters, ENTRIES, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], bare(x)[1])
    with lf.use_adapters(model, "a"):  # an unbatched image
        torch.testing.assert_close(model(x[0]), adapted_copy(bare, adapters, "a")(x[0]), rtol=1e-4, atol=1e-4)


def test_conv2d_gradient_and_bias() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 5, 3)).requires_grad_(False)
    layer = LoraLayer(*(t for t in list(conv_layer(bare[0], 2).tensors())), 0.5, "conv2d", lora_bias=torch.randn(5))
    adapters = {"a": LoraAdapter({"0": layer})}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    with lf.use_adapters(model, ["a", None]):
        y = model(x)
    torch.testing.assert_close(y, per_row(bare, adapters, ["a", None], x), rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    single = x.detach()[:1].requires_grad_()
    adapted_copy(bare, adapters, "a")(single).square().sum().backward()
    torch.testing.assert_close(x.grad[:1], single.grad, rtol=1e-4, atol=1e-3)  # type: ignore[index]


def test_conv1d_of_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    bare = nn.Sequential(conv1d(20, 12), conv1d(8, 20)).requires_grad_(False)
    adapters = {
        n: LoraAdapter({p: linear_layer(bare[int(p)], r, bias=True) for p in "01"}) for n, r in (("a", 3), ("b", 4))
    }
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(4, 5, 12)
    with lf.use_adapters(model, ENTRIES):
        got = model(x)
        torch.testing.assert_close(got, per_row(bare, adapters, ENTRIES, x), rtol=1e-4, atol=1e-4)
        assert torch.equal(got[1], bare(x)[1])
    twin = pickled(model)
    lf.set_adapters(twin, ENTRIES)
    assert torch.equal(twin(x), got)
    assert isinstance(twin[0], conv1d)
    lf.detach(twin)
    assert type(twin[0]) is conv1d


def test_conv1d_with_a_forward_of_its_own_keeps_what_it_returns() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Caching(conv1d):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    bare = nn.Sequential(Caching(8, 12)).requires_grad_(False)
    model = lf.attach(copy.deepcopy(bare), {"a": LoraAdapter({"0": linear_layer(bare[0], 2)})})
    x = torch.randn(4, 12)
    with lf.use_adapters(model, "a"):
        got = model(x)
    assert torch.equal(model[0].last, bare(x))
    assert not torch.allclose(got, bare(x))


class Int8Linear(nn.Module):
    """A quantised base: no floating weight, a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_like_modules_are_wrapped(dtype: torch.dtype) -> None:
    bare = nn.Sequential(Int8Linear(nn.Linear(12, 20)))
    adapters = {n: LoraAdapter({"0": linear_layer(nn.Linear(12, 20), 3)}) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    assert isinstance(model[0], Int8Linear)
    x = torch.randn(2, 4, 12, dtype=dtype)
    layer = adapters["b"].layers["0"]
    with lf.use_adapters(model, [None, "b"]):
        got = model(x)
    assert got.dtype is dtype
    assert torch.equal(got[0], bare(x)[0])
    want = bare(x)[1].float() + x[1].float() @ layer.lora_a.t() @ layer.lora_b.t() * layer.scaling
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(got[1].float(), want, rtol=tolerance, atol=tolerance)
    for twin in (pickled(model), copy.deepcopy(model)):
        with lf.use_adapters(twin, [None, "b"]):
            assert torch.equal(twin(x), got)
        lf.detach(twin)
        assert type(twin[0]) is Int8Linear
        assert torch.equal(twin(x), bare(x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's own, about torch.ao
def test_torch_quantised_linear() -> None:
    from torch.ao.nn.quantized.dynamic import Linear

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantised kernels")
    bare = nn.Sequential(Linear(12, 20))
    adapters = {"a": LoraAdapter({"0": linear_layer(nn.Linear(12, 20), 3)})}
    x = torch.randn(2, 12)
    want = bare(x)
    model = lf.attach(bare, adapters)
    with lf.use_adapters(model, [None, "a"]):
        got = model(x)
    assert torch.equal(got[0], want[0])
    assert not torch.allclose(got[1], want[1])


def test_subclass_with_parametrization_or_own_forward() -> None:
    bare = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))).requires_grad_(False)
    adapters = {"a": LoraAdapter({"0": linear_layer(nn.Linear(8, 8), 2)})}
    x, layer = torch.randn(2, 8), adapters["a"].layers["0"]
    model = lf.attach(copy.deepcopy(bare), adapters)
    with lf.use_adapters(model, ["a", None]):
        got = model(x)
    delta = x @ layer.lora_a.t() @ layer.lora_b.t() * layer.scaling
    torch.testing.assert_close(got[0], bare(x)[0] + delta[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], bare(x)[1])
    plain = lf.attach(nn.Sequential(nn.Linear(8, 8)), adapters)
    nn.utils.parametrizations.weight_norm(plain[0])
    with lf.use_adapters(plain, "a"):
        torch.testing.assert_close(plain(x) - F.linear(x, plain[0].weight, plain[0].bias), delta, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"0 became a ParametrizedMultiLoRALinear"):
        lf.detach(plain)
    nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
    lf.detach(plain)
    assert type(plain[0]) is nn.Linear


def _instance_forward(module: nn.Module) -> None:
    """What accelerate's add_hook_to_module does."""
    old = module.forward

    def new_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1  # type: ignore[assignment]
        return old(*args, **kwargs)

    module.forward = functools.partial(new_forward, module)  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_on_the_instance(kind: str, when: str) -> None:
    module, x, layer = {
        "linear": lambda: (m := nn.Linear(8, 8), torch.randn(2, 8), linear_layer(m, 2)),
        "embedding": lambda: (m := nn.Embedding(9, 8), torch.randint(0, 9, (2, 4)), embedding_layer(m, 2)),
        "conv2d": lambda: (m := nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5), conv_layer(m, 2)),
    }[kind]()
    bare = nn.Sequential(module).requires_grad_(False)
    adapters = {"a": LoraAdapter({"0": layer})}
    want = per_row(bare, adapters, ["a", None], x)
    model = copy.deepcopy(bare)
    if when == "before":
        _instance_forward(model[0])
    own = model[0].__dict__.get("forward")
    lf.attach(model, adapters)
    if when == "after":
        _instance_forward(model[0])
    with lf.use_adapters(model, ["a", None]):
        got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(got[1], bare(x)[1])
    assert model[0].calls == 1
    lf.detach(model)
    if when == "before":
        assert model[0].__dict__["forward"] is own
        assert torch.equal(model(x), bare(x))
        assert model[0].calls == 2


def test_accelerate_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).requires_grad_(False)
    adapters = {"a": adapter(bare, ("0", "1"), 2)}
    x = torch.randn(2, 8)
    model = copy.deepcopy(bare)
    for m in model:
        weights = {k: v.clone() for k, v in m.state_dict().items()}
        hooks.add_hook_to_module(
            m, hooks.AlignDevicesHook(execution_device="cpu", offload=True, io_same_device=True, weights_map=weights)
        )
    assert model[0].weight.device.type == "meta"
    lf.attach(model, adapters)
    with lf.use_adapters(model, ["a", None]), torch.no_grad():
        got = model(x)
    torch.testing.assert_close(got, per_row(bare, adapters, ["a", None], x), rtol=1e-5, atol=1e-5)
    lf.detach(model)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(x), bare(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torchs_fused_encoder_is_switched_off_and_on_again() -> None:
    def encoder() -> nn.TransformerEncoder:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)

    bare = encoder().eval().requires_grad_(False)
    flags = [(layer.activation_relu_or_gelu, bare.use_nested_tensor) for layer in bare.layers]
    assert flags == [(1, True)] * 2
    paths = [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    adapters = {n: adapter(bare, paths, 2) for n in "ab"}
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    entries = ["a", "b", None]
    model = lf.attach(copy.deepcopy(bare), adapters)
    with torch.no_grad():
        want = torch.cat([
            adapted_copy(bare, adapters, e)(x[i : i + 1], src_key_padding_mask=mask[i : i + 1])
            for i, e in enumerate(entries)
        ])  # fmt: skip
        with lf.use_adapters(model, entries):
            got = model(x, src_key_padding_mask=mask)
            keep = ~mask
            torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-5)
            for path in paths:  # every layer's own path ran
                ranks = model.get_submodule(path).lora_pool.slot_rank
                kept = ranks.clone()
                ranks.zero_()
                assert not torch.equal(model(x, src_key_padding_mask=mask)[keep], got[keep]), path
                ranks.copy_(kept)
    lf.detach(model)
    assert [(layer.activation_relu_or_gelu, model.use_nested_tensor) for layer in model.layers] == flags
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask)[keep], bare(x, src_key_padding_mask=mask)[keep])


def test_experts_take_one_entry_only() -> None:
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
            choice = (flat.sum(-1) > 0).long()
            for i, expert in enumerate(self.experts):
                out[choice == i] = expert(flat[choice == i])
            return out.view(x.shape)

    bare = Moe().requires_grad_(False)
    adapters = {n: adapter(bare, ("experts.0", "experts.1"), 2) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(2, 5, 8)
    with lf.use_adapters(model, "a"):
        torch.testing.assert_close(model(x), adapted_copy(bare, adapters, "a")(x), rtol=1e-5, atol=1e-5)
    with lf.use_adapters(model, ["a", "b"]), pytest.raises(ValueError, match=r"experts\.0: an expert sees its own"):
        model(x)
    with lf.use_adapters(model, [None, None]):
        assert torch.equal(model(x), bare(x))


def test_autocast_follows_the_layer() -> None:
    bare = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
    adapters = {"a": adapter(bare, ("0",), 4)}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16), lf.use_adapters(model, ["a", None]):
        got, base = model(x), bare(x)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got[1], base[1])
    torch.testing.assert_close(got[:1].float(), per_row(bare, adapters, ["a"], x), rtol=0.05, atol=0.05)


def test_warmup_counts_distinct_kinds() -> None:
    bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Embedding(5, 8))
    layers = {**adapter(bare, ("0", "1", "2"), 2).layers, "3": embedding_layer(bare[3], 2)}
    model = lf.attach(bare, {"a": LoraAdapter(layers)})
    before = {k: v.clone() for k, v in model.named_buffers()}
    assert lf.warmup(model) == 3
    assert lf.warmup(model, num_tokens=()) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_called_by_keyword(wrapped: bool, pack: bool) -> None:
    """As their classes allow: every layer's argument is called ``input`` in torch, ``x`` in transformers' Conv1D."""

    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Own(nn.Linear):
        pass

    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
            kind = Own if wrapped else nn.Linear
            self.q_proj, self.k_proj = kind(8, 8), kind(8, 8)
            self.mix = nn.Conv2d(1, 1, 1)
            self.old = conv1d(6, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(input=self.words(input=ids))
            x = self.q_proj(input=x) + self.k_proj(input=x)
            y: Tensor = self.old(x=self.mix(input=x[:, None])[:, 0])
            return y

    model = ByKeyword()
    bare = copy.deepcopy(model)
    paths = ["q_proj", "k_proj", "old"]
    adapters = {"a": adapter(model, paths, 2)}
    more = {"words": embedding_layer(model.words, 2), "mix": conv_layer(model.mix, 2)}
    lf.attach(model, {"a": LoraAdapter({**adapters["a"].layers, **more})}, pack=pack)
    ids = torch.randint(9, (3, 4))
    with torch.no_grad():
        assert torch.equal(model(ids), bare(ids))
        for path, layer in more.items():
            weight: Any = bare.get_submodule(path).weight
            weight += layer.product()
        with lf.use_adapters(model, ["a"] * 3):
            got = model(ids)
        torch.testing.assert_close(got, per_row(bare, adapters, ["a"] * 3, ids), rtol=1e-4, atol=1e-5)
