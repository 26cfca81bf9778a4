"""Sparse slots under torch.compile(fullgraph=True): eager's results, and nothing compiles anew."""

from __future__ import annotations

import copy
from typing import Any

import nn_models
import pytest
import torch
from sparse_models import Flat, Picture, fine_tuned, materialised, model_of, sparse_adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fuse as lf

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def prepared(kind: str) -> tuple[nn.Module, nn.Module, Tensor, dict[str, Any]]:
    model, x = model_of(kind)
    bare = copy.deepcopy(model)
    adapters: dict[str, Any] = {f"t{i}": sparse_adapter(model, fine_tuned(model, i)) for i in range(2)}
    adapters["lora"] = nn_models.adapter(model, ["up"] if kind == "tokens" else ["out"], 4)
    return lf.attach(model, adapters, num_slots=4), bare, x, adapters


SELECTIONS = [
    ["t0", None, "t1", "lora", None, "t0", "t1"],
    [{"t0": 0.5, "t1": -0.3}, *["t1"] * 5, {"lora": 0.5, "t0": 1.0}],
    [None] * 7,
    "t0",
    None,
    {"t0": 0.5, "lora": 1.0},
]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("tokens", "aot_eager"), ("images", "aot_eager"), pytest.param("tokens", "inductor", marks=nn_models.INDUCTOR)],
)
def test_no_recompilation(kind: str, backend: str) -> None:
    """Positions are looked up once for the whole batch in one of the models, and still differ by row."""
    model, bare, x, adapters = prepared(kind)
    counter = CompileCounterWithBackend(backend)
    fast: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=kind == "tokens")
    with torch.no_grad():
        fast(x)
        compiled = counter.frame_count
        for selection in SELECTIONS:
            with lf.use_adapters(fast, selection):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        if kind == "tokens":
            with lf.use_adapters(model, ["t1", None, "t0"]):
                smaller = x[:3, :5].contiguous()
                torch.testing.assert_close(fast(smaller), model(smaller), rtol=1e-5, atol=1e-6)
        lf.swap_adapter(model, "t0", adapters["t1"])
        lf.add_adapter(model, "t2", adapters["t0"])
        for name in ("t0", "t2"):
            with lf.use_adapters(model, name):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        for name in ("t1", None):
            lf.switch_task(model, name)
            own = bare if name is None else materialised(bare, adapters[name])
            torch.testing.assert_close(fast(x), own(x), rtol=1e-5, atol=1e-6)
        assert counter.frame_count == compiled > 0
        with lf.use_adapters(model, ["t1"]):  # a batch of one is always a graph of its own
            torch.testing.assert_close(fast(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-6)


def test_inside_a_larger_graph() -> None:
    model, _, x, _ = prepared("tokens")
    fast = torch.compile(lambda ids: model(ids) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for selection in SELECTIONS:
            with lf.use_adapters(model, selection):
                torch.testing.assert_close(fast(x), model(x) * 2, rtol=1e-5, atol=1e-6)


def test_a_backward_is_refused() -> None:
    model, _, x, _ = prepared("images")
    fast: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="cannot be compiled together with their backward"):
        fast(x)


def test_positions_in_one_dimension() -> None:
    bare, ids = Flat(), torch.randint(9, (3, 5))
    model = lf.attach(copy.deepcopy(bare), {"t": sparse_adapter(bare, fine_tuned(bare, 0))})
    fast: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with lf.use_adapters(model, "t"):
            torch.testing.assert_close(fast(ids), model(ids))
        with lf.use_adapters(model, ["t", None, "t"]), pytest.raises(ValueError, match="places: compiled code wants"):
            fast(ids)


def test_ops_are_sound() -> None:
    """The op's fake agrees with what it returns."""
    model = Picture().eval()
    lf.attach(model, {"t": sparse_adapter(model, fine_tuned(model, 0))})
    x = torch.randn(3, 3, 12, 12)
    y = nn.Conv2d.forward(model.stem, x).detach()
    serving, site = model.stem.lora_serving, model.stem.lora_sparse.site
    with lf.use_adapters(model, ["t", None, "t"]):
        torch.library.opcheck(torch.ops.lora_fuse.serve_sparse.default, (y, x, None, serving.handle, site))
