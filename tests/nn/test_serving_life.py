"""Attached models as models go: copied, moved, trained, interrupted, without data, inside each other."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from nn_models import Mlp, adapted_copy, adapter, linear_layer, per_row
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import LoraAdapter


def test_half_precision_and_device_moves(bare: Mlp, adapters: Any) -> None:
    model = lf.attach(copy.deepcopy(bare), adapters).to(torch.bfloat16)
    pool = model.up.lora_pool
    assert pool.pool_a.dtype is torch.bfloat16
    assert pool.slot_scaling.dtype is torch.float32
    x, entries = torch.randn(4, 3, 24), ["sql", None, "chat", {"sql": 0.5, "math": 0.5}]
    with lf.use_adapters(model, entries):
        got = model(x.bfloat16())
    assert torch.equal(got[1], copy.deepcopy(bare).bfloat16()(x.bfloat16())[1])
    torch.testing.assert_close(got.float(), per_row(bare, adapters, entries, x), rtol=0.05, atol=0.05)
    late = lf.attach(copy.deepcopy(bare).bfloat16(), adapters)  # the same bits, whichever came first
    with lf.use_adapters(late, entries):
        assert torch.equal(late(x.bfloat16()), got)
    model.float()
    assert model.up.lora_pool.slot_scaling.dtype is torch.float32
    assert model.up.lora_pool.pool_a.dtype is torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(model: Mlp, bare: Mlp, adapters: Any, how: str) -> None:
    x, entries = torch.randn(3, 24), ["sql", None, {"chat": 0.5}]
    lf.set_adapters(model, entries)
    want = model(x)
    with lf.use_adapters(model, "math"):  # a block in progress is the thread's, not the model's
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), want)
    assert twin.up.lora_serving is not model.up.lora_serving
    assert twin.up.lora_serving is twin.down.lora_serving
    lf.remove_adapter(twin, "sql")
    lf.add_adapter(twin, "new", adapters["part"])
    lf.set_adapters(twin, "new")
    assert torch.equal(model(x), want)
    assert set(lf.adapters(model)) == set(adapters)
    torch.testing.assert_close(twin(x), adapted_copy(bare, {"new": adapters["part"]}, "new")(x), rtol=1e-5, atol=1e-5)
    lf.detach(twin)
    assert torch.equal(twin(x), bare(x))
    assert torch.equal(model(x), want)


def test_inference_mode_everywhere(bare: Mlp, adapters: Any) -> None:
    x, entries = torch.randn(3, 24), ["sql", None, "math"]
    want = per_row(bare, adapters, entries, x)
    own = copy.deepcopy(bare)
    with torch.inference_mode():
        model = lf.attach(own, {n: adapters[n].to(dtype=torch.float32) for n in ("sql", "chat")})
        lf.set_adapters(model, None)
        lf.add_adapter(model, "math", adapters["math"])
        with lf.use_adapters(model, entries):
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    lf.set_adapters(model, entries)  # the routing cached in inference mode must serve a backward as well
    with torch.inference_mode():
        model(x)
    grad_x = x.clone().requires_grad_()
    y = model(grad_x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    lf.swap_adapter(model, "math", adapters["part"])


def test_to_inside_inference_mode(model: Mlp, adapters: Any) -> None:
    with torch.inference_mode():
        model.to(torch.float64)
    lf.swap_adapter(model, "sql", adapters["part"])
    with torch.inference_mode(), lf.use_adapters(model, ["sql", None]):
        model(torch.randn(2, 24, dtype=torch.float64))


def test_gradients_reach_inputs_and_weights(model: Mlp, bare: Mlp, adapters: Any) -> None:
    entries = ["sql", None, {"chat": 0.5, "math": 2.0}]
    x = torch.randn(3, 2, 24, requires_grad=True)
    with lf.use_adapters(model, entries):
        y = model(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()  # after the block: the routing is the forward's own
    for i, entry in enumerate(entries):
        row = x.detach()[i : i + 1].requires_grad_()
        (adapted_copy(bare, adapters, entry)(row) * weights[i : i + 1]).sum().backward()
        torch.testing.assert_close(x.grad[i : i + 1], row.grad, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_training_the_base_keeps_base_rows_exact(bare: Mlp, adapters: Any) -> None:
    bare.requires_grad_(True)
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(3, 24)
    with lf.use_adapters(model, ["sql", None, None]):
        y = model(x)
    assert torch.equal(y[1:], bare(x)[1:])
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_interrupted_forward_leaves_nothing_behind(bare: Mlp) -> None:
    """torch runs no forward hook after a KeyboardInterrupt; the end of the block cleans up instead."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model = lf.attach(copy.deepcopy(bare), {"sql": LoraAdapter({"up": linear_layer(bare.up, 2)})}, num_slots=1)
    hook = model.down.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), lf.use_adapters(model, "sql"):
        model(torch.randn(2, 24))
    hook.remove()
    x = torch.randn(2, 24)
    assert torch.equal(model.up(x), bare.up(x))  # on its own, under the default selection: base
    for _ in range(3):  # its slot comes back
        lf.swap_adapter(model, "sql", LoraAdapter({"up": linear_layer(bare.up, 2)}), timeout=0.5)


@pytest.mark.parametrize("entry", [None, "sql", ["sql", None, "math"]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_shapes_on_the_meta_device(model: Mlp, entry: Any, grad: bool) -> None:
    twin = copy.deepcopy(model).to("meta")
    lf.set_adapters(twin, entry)
    with torch.set_grad_enabled(grad):
        y = twin(torch.empty(3, 7, 24, device="meta"))
    assert (y.shape, y.device.type) == ((3, 7, 10), "meta")


def test_nested_attached_models(bare: Mlp, adapters: Any) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(24, 24), copy.deepcopy(bare)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x))

    plain = Outer().requires_grad_(False)
    outer = copy.deepcopy(plain)
    mine = {"o": adapter(plain, ("first",), 2)}
    lf.attach(outer.inner, adapters)
    lf.attach(outer, mine)
    x = torch.randn(3, 24)
    with lf.use_adapters(outer, ["o", None, "o"]), lf.use_adapters(outer.inner, ["sql", "math", None]):
        got = outer(x)
    for i, (o, n) in enumerate([("o", "sql"), (None, "math"), ("o", None)]):
        h = adapted_copy(plain, mine, o).first(x[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], adapted_copy(bare, adapters, n)(h), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"inner\.up: already has slots"):
        lf.add_adapter(outer, "x", LoraAdapter({"inner.up": linear_layer(bare.up, 2)}))
    lf.detach(outer)
    lf.detach(outer.inner)
    assert torch.equal(outer(x), plain(x))


def test_one_module_at_two_paths_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a  # the same module
            self.embed = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight  # the same parameter

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.embed(ids))))

    bare = Tied().requires_grad_(False)
    layer, head = linear_layer(bare.a, 2), linear_layer(bare.head, 2)
    ids = torch.tensor([[1, 2], [3, 4]])
    outs = []
    for path in ("a", "b"):
        model = lf.attach(copy.deepcopy(bare), {"x": LoraAdapter({path: layer, "head": head})})
        assert model.head.weight is model.embed.weight
        with lf.use_adapters(model, ["x", None]):
            outs.append(model(ids))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0][1], bare(ids)[1])
    h = bare.embed(ids[:1])
    for _ in range(2):
        h = bare.a(h) + 0.5 * h @ layer.lora_a.t() @ layer.lora_b.t()
    want = bare.head(h) + 0.5 * h @ head.lora_a.t() @ head.lora_b.t()
    torch.testing.assert_close(outs[0][:1], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="b: is the same module as a"):
        lf.attach(copy.deepcopy(bare), {"x": LoraAdapter({"a": layer, "b": layer})})
