"""Compiled code as it is made for a GPU, where routings have one size for every selection; the CPU passes for one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from nn_models import INDUCTOR, PATHS, Kinds, Mlp, adapted_copy, adapter, kinds_adapter, per_row
from recorded import Graph
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fuse as lf
from lora_fuse.nn import capture
from lora_fuse.nn.serving import Serving

SELECTIONS: list[Any] = [
    ["a", None, "b"],
    [{"a": 0.3, "b": 0.7}, "b", None],
    [None] * 3,
    "a",
    None,
    {"a": 2.0, "b": -1.0},
]
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "like_a_gpu")


@pytest.fixture
def like_a_gpu() -> Iterator[None]:
    with capture.simulate("gpu"):
        yield


@pytest.fixture
def adapters(bare: Mlp) -> dict[str, Any]:
    return {name: adapter(bare, PATHS, rank) for name, rank in (("a", 2), ("b", 5))}


@pytest.fixture
def model(bare: Mlp, adapters: dict[str, Any]) -> Any:
    return lf.attach(copy.deepcopy(bare), adapters)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def spread(selection: Any, n: int) -> list[Any]:
    return selection * (n // 3) if isinstance(selection, list) else [selection] * n


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_no_recompilation(model: Any, bare: Mlp, adapters: Any, grad: bool, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    fast: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(grad):
        for batch in (3, 6, 600):  # 600 samples of 4 rows: more pairs than one kind of tile takes
            x = torch.randn(batch, 4, 24, requires_grad=grad)
            for selection in SELECTIONS:
                entries = selection * (batch // 3) if isinstance(selection, list) else selection
                with lf.use_adapters(model, entries):
                    got, want = fast(x), model(x)
                close(got, want)
        tokens = torch.tensor([0, -1, 1] * 800, dtype=torch.int32)
        lf.set_adapters(model, tokens)
        close(fast(x), model(x))
        adapters["b"] = adapter(bare, PATHS, 1)
        lf.swap_adapter(model, "b", adapters["b"])
        lf.set_adapters(model, "b")
        close(fast(x), adapted_copy(bare, adapters, "b")(x))
    assert counter.frame_count == 1
    lf.set_adapters(model, ["a"])
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"600 samples.* 1 entries"):
        fast(x)


def test_backward_uses_the_routing_of_its_forward(model: Any, bare: Mlp, adapters: Any) -> None:
    fast: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, entries = torch.randn(3, 24, requires_grad=True), ["a", None, {"a": 0.5, "b": 0.5}]
    lf.set_adapters(model, entries)
    y = fast(x)
    lf.set_adapters(model, "b")
    for _ in range(9):  # old slots come back only when nothing holds them: the graph of y does
        lf.swap_adapter(model, "b", adapter(bare, PATHS, 5), timeout=0.5)
    y.sum().backward()
    for i, entry in enumerate(entries):
        row = x.detach()[i : i + 1].requires_grad_()
        adapted_copy(bare, adapters, entry)(row).sum().backward()
        close(x.grad[i : i + 1], row.grad)  # type: ignore[index,arg-type]


def test_slots_stay_on_loan_as_long_as_a_view_of_the_routing(model: Any, bare: Mlp) -> None:
    lf.set_adapters(model, "a")
    serving: Serving = model.up.lora_serving
    rows = torch.ops.lora_fuse.current_slab(torch.randn(2, 24), None, serving.handle, False)[2:4]
    gc.collect()
    held = lf.adapter_slots(model)["a"]
    lf.set_adapters(model, None)
    lf.remove_adapter(model, "a")
    gc.collect()
    assert held in serving.allocator.live
    del rows
    gc.collect()
    assert held not in serving.allocator.live


def test_opcheck(model: Any) -> None:
    handle = model.up.lora_serving.handle
    for selection in (["a", None], None, [{"a": 1.0, "b": 2.0}, "b"]):
        lf.set_adapters(model, selection)
        for x in (torch.randn(2, 24), torch.randn(2, 5, 24)):
            torch.library.opcheck(torch.ops.lora_fuse.current_slab.default, (x, None, handle, False))
    empty = torch.randn(0, 24)
    lf.set_adapters(model, "a")
    torch.library.opcheck(torch.ops.lora_fuse.current_slab.default, (empty, None, handle, False))
    lf.set_adapters(model, dict.fromkeys("ab", 1.0))
    model.up.lora_serving.max_pairs = 1
    with pytest.raises(ValueError, match="mixes 2 adapters"):
        torch.ops.lora_fuse.current_slab(x, None, handle, False)


def test_an_op_that_is_captured_reads_what_is_selected_later(model: Any, bare: Mlp, adapters: Any) -> None:
    """As inductor's reduce-overhead mode works: one call to warm up, one that is captured, replays from then on."""
    serving: Serving = model.up.lora_serving

    def reads_slab(*args: Any) -> Tensor:  # of the op, a graph replays the copy only
        (group,) = serving.default.fixed.groups.values()
        (slab,) = group.slabs.values()
        return slab.tensor.clone()

    def like_cuda_graphs(gm: Any, example: Any) -> Any:
        calls: list[Any] = []
        fixed: list[Any] = []

        def run(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                return gm(*args)
            if len(calls) == 2:
                fixed.extend(
                    a.clone() if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) else a for a in args
                )
                with torch.no_grad():
                    graph = Graph(lambda: gm(*args), {torch.ops.lora_fuse.current_slab.default: reads_slab})
                fixed[:] = [graph, args]
                return graph.output
            graph, given = fixed
            for old, new in zip(given, args, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
            return tuple(t.clone() for t in graph.replay())

        return make_boxed_func(run)

    fast: Any = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=like_cuda_graphs))
    x = torch.randn(3, 24)
    with torch.no_grad():
        for n, mode in enumerate(("warm", "capture")):
            lf.set_adapters(model, SELECTIONS[n])
            with capture.simulate(mode):  # type: ignore[arg-type]
                close(fast(x), per_row(bare, adapters, SELECTIONS[n], x))
        for selection in SELECTIONS:
            lf.set_adapters(model, selection)
            x = torch.randn(3, 24)
            close(fast(x), per_row(bare, adapters, spread(selection, 3), x))
        adapters["b"] = adapter(bare, PATHS, 3)
        lf.swap_adapter(model, "b", adapters["b"])
        lf.set_adapters(model, ["b", "b", None])
        close(fast(x), per_row(bare, adapters, ["b", "b", None], x))


def test_embedding_conv_and_biases() -> None:
    bare = Kinds().requires_grad_(False)
    adapters = {name: kinds_adapter(bare) for name in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    counter = CompileCounterWithBackend("eager")
    fast: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for entries in (["a", None, {"a": 0.5, "b": 0.5}], ["b", "a"]):
        ids = torch.randint(0, 13, (len(entries), 5))
        with lf.use_adapters(model, entries):
            torch.testing.assert_close(fast(ids), per_row(bare, adapters, entries, ids), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
