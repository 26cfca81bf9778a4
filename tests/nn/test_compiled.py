"""Under torch.compile(fullgraph=True): same results as eager; no selection, swap or batch size compiles anew."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from nn_models import INDUCTOR, PATHS, Kinds, Mlp, adapted_copy, adapter, kinds_adapter, per_row
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fuse as lf

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: nn.Module, **kwargs: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(kwargs.pop("backend", "aot_eager"))
    return torch.compile(model, fullgraph=True, backend=counter, **kwargs), counter


SELECTIONS = [
    ["a", None, "b"],
    [{"a": 0.3, "b": 0.7}, "b", None],
    ["b"] * 3,
    [None] * 3,
    "a",
    None,
    {"a": 2.0, "b": -1.0},
]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_no_recompilation(grad: bool) -> None:
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, r) for n, r in (("a", 2), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters)
    fast, counter = compiled(model, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch in (3, 6):
            x = torch.randn(batch, 4, 24, requires_grad=grad)
            for selection in SELECTIONS:
                if isinstance(selection, list):
                    selection = selection * (batch // 3)
                with lf.use_adapters(fast, selection):
                    got, want = fast(x), model(x)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        slots = lf.adapter_slots(model)
        tokens = torch.tensor([slots["a"], -1, slots["b"]] * 8, dtype=torch.int32)
        with lf.use_adapters(model, tokens):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        for rank in (1, 5):
            adapters["b"] = adapter(bare, PATHS, rank)
            lf.swap_adapter(model, "b", adapters["b"])
            with lf.use_adapters(model, "b"):
                torch.testing.assert_close(fast(x), adapted_copy(bare, adapters, "b")(x), rtol=1e-5, atol=1e-5)
        lf.add_adapter(model, "c", adapters["a"])
        lf.set_adapters(fast, "c")
        torch.testing.assert_close(fast(x), adapted_copy(bare, adapters, "a")(x), rtol=1e-5, atol=1e-5)
        lf.remove_adapter(model, "a")
    assert counter.frame_count == 1
    lf.set_adapters(model, ["c"])
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"6 samples.* 1 entries"):
        fast(x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_backward_uses_the_routing_of_its_forward(backend: str) -> None:
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    fast, counter = compiled(model, backend=backend, dynamic=True)
    selections = [["a", None, {"a": 0.5, "b": 0.5}], ["b", "b", None]]
    xs = [torch.randn(3, 2, 24, requires_grad=True) for _ in selections]
    outs = []
    for x, entries in zip(xs, selections, strict=True):
        with lf.use_adapters(model, entries):
            outs.append(fast(x))
    weight = torch.randn(3, 2, 10)
    for out in outs:
        (out * weight).sum().backward()
    for x, out, entries in zip(xs, outs, selections, strict=True):
        torch.testing.assert_close(out, per_row(bare, adapters, entries, x), rtol=1e-5, atol=1e-5)
        for i, entry in enumerate(entries):
            row = x.detach()[i : i + 1].requires_grad_()
            (adapted_copy(bare, adapters, entry)(row) * weight[i : i + 1]).sum().backward()
            torch.testing.assert_close(x.grad[i : i + 1], row.grad, rtol=1e-4, atol=1e-5)  # type: ignore[index]
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_in_inference_keeps_base_rows() -> None:
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    fast, plain = torch.compile(model, fullgraph=True), torch.compile(bare, fullgraph=True)
    x, entries = torch.randn(3, 24), ["a", None, "b"]
    with torch.inference_mode(), lf.use_adapters(model, entries):
        got = fast(x)
        torch.testing.assert_close(got, per_row(bare, adapters, entries, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], plain(x)[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_inside_a_larger_compiled_function(backward: bool) -> None:
    """There the outermost hooks are traced too, and all layers read one pinned selection."""
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def twice(x: Tensor) -> Tensor:
        return model(x) + model(2 * x)

    x = torch.randn(3, 24, requires_grad=backward)
    for entries in (["a", None, "b"], ["b", {"a": 0.5}, "a"]):
        with lf.use_adapters(model, entries):
            got, want = twice(x), model(x) + model(2 * x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if backward:
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with lf.use_adapters(model, ["a"]), pytest.raises(ValueError, match=r"3 samples.* 1 entries"):
        twice(x)
    assert counter.frame_count == 1
    assert model.up.lora_serving.token is None


def test_threads_share_compiled_code_but_not_selections() -> None:
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    fast, counter = compiled(model)
    x = torch.randn(3, 24)
    problems: list[float] = []
    with torch.no_grad():
        fast(x)
    wanted = {name: adapted_copy(bare, adapters, name)(x) for name in "ab"}

    def serve(name: str) -> None:
        with lf.use_adapters(model, name), torch.no_grad():
            for _ in range(30):
                error = (fast(x) - wanted[name]).abs().max()
                if error > 1e-5:
                    problems.append(float(error))

    threads = [threading.Thread(target=serve, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert counter.frame_count == 1


class Regional(nn.Module):
    """A model whose repeated block is what gets compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(3))
        for block in self.blocks:
            block.out = nn.Linear(24, 24)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_regional_compilation_shares_one_graph() -> None:
    bare = Regional().requires_grad_(False)
    adapters = {n: adapter(bare, ["blocks.0.up", "blocks.1.up", "blocks.2.up"], 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    x = torch.randn(3, 4, 24)
    for entries in (["a", None, "b"], ["b", "b", {"a": 1.5}]):
        with lf.use_adapters(model, entries):
            torch.testing.assert_close(model(x), per_row(bare, adapters, entries, x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_two_models_and_a_copy_do_not_mix_their_selections() -> None:
    bare = Mlp().requires_grad_(False)
    adapters = {n: adapter(bare, PATHS, 3) for n in "ab"}
    first = lf.attach(copy.deepcopy(bare), adapters)
    second = copy.deepcopy(first)
    fast_first, fast_second = compiled(first)[0], compiled(second)[0]
    x = torch.randn(2, 24)
    lf.set_adapters(first, "a")
    lf.set_adapters(second, "b")
    for _ in range(2):
        torch.testing.assert_close(fast_first(x), adapted_copy(bare, adapters, "a")(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast_second(x), adapted_copy(bare, adapters, "b")(x), rtol=1e-5, atol=1e-5)


def test_checkpointing_inside_compiled_code() -> None:
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    bare = Block().requires_grad_(False)
    adapters = {n: adapter(bare, ["inner.up", "inner.down"], 3) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    fast, _ = compiled(model)
    x = torch.randn(2, 24, requires_grad=True)
    with lf.use_adapters(model, ["a", None]):
        y = fast(x)
    lf.set_adapters(model, "b")
    y.sum().backward()
    for i, entry in enumerate(["a", None]):
        row = x.detach()[i : i + 1].requires_grad_()
        adapted_copy(bare, adapters, entry)(row).sum().backward()
        torch.testing.assert_close(x.grad[i : i + 1], row.grad, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_embedding_and_conv_are_traceable() -> None:
    bare = Kinds().requires_grad_(False)
    adapters = {name: kinds_adapter(bare) for name in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    fast, counter = compiled(model, backend="eager", dynamic=True)
    for entries in (["a", None, {"a": 0.5, "b": 0.5}], ["b", "a"]):
        ids = torch.randint(0, 13, (len(entries), 5))
        with lf.use_adapters(model, entries):
            torch.testing.assert_close(fast(ids), per_row(bare, adapters, entries, ids), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_opcheck() -> None:
    model = lf.attach(Mlp(), {"a": adapter(Mlp(), PATHS, 2)})
    handle = model.up.lora_serving.handle
    lf.set_adapters(model, ["a", None])
    for x in (torch.randn(2, 24), torch.randn(2, 5, 24)):
        torch.library.opcheck(torch.ops.lora_fuse.current_routing.default, (x, None, handle, False))
        torch.library.opcheck(torch.ops.lora_fuse.pin_selection.default, (x, handle))
