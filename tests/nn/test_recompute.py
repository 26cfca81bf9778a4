"""Layers that run again during a backward (activation checkpointing) see the selection of their own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn_models import Mlp, adapted_copy, adapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_fuse as lf

PATHS = ("first", "blocks.0", "blocks.1")


class Deep(nn.Module):
    """Two checkpointed blocks behind a plain layer."""

    def __init__(self, reentrant: bool | None, as_dict: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.reentrant, self.as_dict = reentrant, as_dict

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = torch.tanh(block(x))
            else:
                x = checkpoint(lambda t, b=block: torch.tanh(b(t)), x, use_reentrant=self.reentrant)
        return {"logits": x, "other": (x.mean(),)} if self.as_dict else x


def expected(bare: Deep, adapters: Any, entries: list[Any], x: Tensor, weight: Tensor) -> Tensor:
    plain = copy.deepcopy(bare)
    plain.reentrant = None
    grads = []
    for i, entry in enumerate(entries):
        row = x.detach()[i : i + 1].requires_grad_()
        out = adapted_copy(plain, adapters, entry)(row)
        ((out["logits"] if isinstance(out, dict) else out) * weight[i : i + 1]).sum().backward()
        grads.append(row.grad)
    return torch.cat(grads)  # type: ignore[arg-type]


@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_their_backwards(reentrant: bool, as_dict: bool) -> None:
    bare = Deep(reentrant, as_dict).requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    selections = [["a", None, "b"], [{"a": 0.3, "b": 0.7}, "b", None]]
    xs = [torch.randn(3, 4, 12, requires_grad=True) for _ in selections]
    weight = torch.randn(3, 4, 12)
    outs = []
    for x, entries in zip(xs, selections, strict=True):
        with lf.use_adapters(model, entries):
            out = model(x)
            outs.append(out["logits"] if as_dict else out)
    lf.set_adapters(model, "b")  # what a recomputation would see if it looked up the selection of its own time
    for out in outs:
        (out * weight).sum().backward()
    for x, entries in zip(xs, selections, strict=True):
        torch.testing.assert_close(x.grad, expected(bare, adapters, entries, x, weight), rtol=1e-4, atol=1e-5)
    # One backward over both graphs, in the middle of another selection.
    outs = []
    for x, entries in zip(xs, selections, strict=True):
        x.grad = None
        with lf.use_adapters(model, entries):
            out = model(x)
            outs.append(out["logits"] if as_dict else out)
    with lf.use_adapters(model, "a"):
        (outs[0] * weight + outs[1] * weight).sum().backward()
    for x, entries in zip(xs, selections, strict=True):
        torch.testing.assert_close(x.grad, expected(bare, adapters, entries, x, weight), rtol=1e-4, atol=1e-5)


def test_checkpoint_around_the_whole_model() -> None:
    bare = Deep(None).requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x, weight = torch.randn(2, 12, requires_grad=True), torch.randn(2, 12)
    with lf.use_adapters(model, ["a", None]):
        y = checkpoint(model, x, use_reentrant=False)
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, expected(bare, adapters, ["a", None], x, weight), rtol=1e-4, atol=1e-5)


def test_after_a_backward_the_current_selection_counts_again() -> None:
    bare = Deep(False).requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2)
    x = torch.randn(2, 12, requires_grad=True)
    with lf.use_adapters(model, ["a", None]):
        y = model(x)
    y.sum().backward()
    want = adapted_copy(bare, adapters, "b").first(x)
    with lf.use_adapters(model, "b"):
        torch.testing.assert_close(model.first(x), want, rtol=1e-5, atol=1e-5)
    lf.set_adapters(model, "b")
    torch.testing.assert_close(model.first(x), want, rtol=1e-5, atol=1e-5)
    del y
    for _ in range(3):  # the finished backward holds no slot
        lf.swap_adapter(model, "a", adapters["a"], timeout=0.05)


def test_a_selection_entered_inside_a_backward_counts_until_it_is_left() -> None:
    bare = Deep(False).requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x, weight, seen = torch.randn(2, 12, requires_grad=True), torch.randn(2, 12), []

    def inside(grad: Tensor) -> None:
        with lf.use_adapters(model, "b"), torch.no_grad():
            seen.append(model(x.detach()))

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(inside)

    model.blocks[1].register_forward_hook(watch)
    with lf.use_adapters(model, ["a", None]):
        y = model(x)
    with lf.use_adapters(model, None):
        (y * weight).sum().backward()  # block 1 is recomputed, the hook runs, then block 0 is recomputed
    assert seen
    want = adapted_copy(bare, adapters, "b")(x.detach())
    for out in seen:
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, expected(bare, adapters, ["a", None], x, weight), rtol=1e-4, atol=1e-5)


def test_a_failed_backward_leaves_nothing_behind() -> None:
    bare = Deep(None).requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(2, 12, requires_grad=True)

    def fail(grad: Tensor) -> None:
        raise RuntimeError("on purpose")

    with lf.use_adapters(model, ["a", None]):
        h = model.first(x)
        h.register_hook(fail)
        y = model(h)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    assert torch.equal(model.first(x), bare.first(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", ["grad", "jvp", "vmap", "functionalize", "fake", "flops", "make_fx"])
def test_transforms_and_modes_leave_no_tensors_of_theirs_behind(how: str) -> None:
    """The first forward of a selection builds its routing; one built under a transform must not be kept."""
    bare = Mlp().requires_grad_(False)
    model = lf.attach(copy.deepcopy(bare), {"a": adapter(bare, ["up", "down"], 3)})
    x = torch.randn(3, 24)
    lf.set_adapters(model, "a")
    want = model(x)
    lf.set_adapters(model, "a")  # forgets
    if how == "grad":
        torch.func.grad(lambda t: model(t).sum())(x)
    elif how == "jvp":
        torch.func.jvp(model, (x,), (x,))
    elif how == "vmap":
        torch.func.vmap(model)(x[None])
    elif how == "functionalize":
        with pytest.raises(RuntimeError, match="NYI"):  # torch's, of any autograd.Function
            torch.func.functionalize(model)(x)
    elif how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == want.shape
    elif how == "flops":
        with FlopCounterMode(display=False):
            assert torch.equal(model(x), want)
    else:
        make_fx(model)(x)
    for _ in range(2):
        assert torch.equal(model(x), want)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's word on vmap over an op without a rule
def test_functional_transforms_of_a_frozen_model() -> None:
    """jvp, vmap and jacobians see the LoRA part although no parameter asks for a gradient."""
    torch.manual_seed(0)
    bare = Mlp().requires_grad_(False)
    adapters = {"a": adapter(bare, ["up", "down", "out"], 3), "b": adapter(bare, ["down"], 5)}
    entries = ["a", None, {"a": 0.5, "b": -1.0}]
    model = lf.attach(copy.deepcopy(bare), adapters)
    x, tangent = torch.randn(3, 24), torch.randn(3, 24)
    merged = [adapted_copy(bare, adapters, e) for e in entries]

    def plain(x: Tensor) -> Tensor:
        return torch.stack([m(row) for m, row in zip(merged, x, strict=True)])

    with lf.use_adapters(model, entries):
        torch.testing.assert_close(torch.func.jvp(model, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)))
        torch.testing.assert_close(torch.func.jacfwd(model)(x), torch.func.jacrev(plain)(x))
        torch.testing.assert_close(torch.func.vmap(model)(torch.stack([x, tangent]))[1], plain(tangent))
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
            got = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(got, torch.func.jvp(plain, (x,), (tangent,))[1])
