"""Packed siblings compute what they compute alone, whatever a model does with them, and keep nothing alive."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from nn_models import adapter, check_threads, per_row
from packed_models import ENTRIES, GATED, QKV, block, close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fuse as lf
from lora_fuse import _cpu


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_get_their_adapters(mode: Any, dtype: torch.dtype, products: list[Any]) -> None:
    bare, adapters, model = block(dtype)
    x = torch.randn(4, 3, 24, dtype=dtype)
    plain = lf.attach(copy.deepcopy(bare), adapters)
    with mode():
        close(model(x), bare(x))
        assert products == [QKV, GATED]
        for entries in (ENTRIES, "b", {"a": 2.0}):
            with lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
                close(model(x), plain(x))
        if dtype == torch.float32:
            with lf.use_adapters(model, ENTRIES):
                close(model(x), per_row(bare, adapters, ENTRIES, x))
        with lf.use_adapters(model, ["a"] * 3), pytest.raises(ValueError, match=r"4 samples.* 3 entries"):
            model(x)
    assert set(products) == {QKV, GATED}


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("entries", ["one", "many", "mixed"])
def test_one_team_for_all_slices_changes_no_bit(isa: str, rows: int, entries: str, two_threads: None) -> None:
    """The slices' LoRA in one call, on two threads and on one, against a call for each."""
    before = _cpu.isa()
    _cpu.choose_isa(isa)
    try:
        _compare_slices(rows, entries)
    finally:
        _cpu.choose_isa(before)


def _compare_slices(rows: int, entries: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(Block3(512, 512, 96)).requires_grad_(False).to(dtype)
        adapters = {n: adapter(model, ["0.q_proj", "0.v_proj"], r) for n, r in (("a", 16), ("b", 9), ("c", 40))}
        lf.attach(model, adapters, pack=True)
        selection: Any = {
            "one": "c",
            "many": [["a", "b", "c", None][i % 4] for i in range(rows)],
            "mixed": [None if i % 2 else {"a": 0.5, "c": 2.0} for i in range(rows)],
        }[entries]
        x = torch.randn(rows, 512, dtype=dtype)
        for threads in (2, 1):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                wanted = dict(zip(QKV, model(x), strict=True))
                with lf.use_adapters(model, selection):
                    got = dict(zip(QKV, model(x), strict=True))
                    for name in ("q_proj", "v_proj"):
                        layer = getattr(model[0], name)
                        routing = layer.lora_serving.routing((rows,), x.device, name)
                        lf.functional.multi_lora(x, layer.lora_pool, routing, out=wanted[name])
            for name in QKV:
                assert torch.equal(got[name], wanted[name]), (name, threads, dtype)


class Block3(nn.Module):
    def __init__(self, features: int, q: int, kv: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(features, q), nn.Linear(features, kv), nn.Linear(features, kv)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Odd(nn.Module):
    """Uses its siblings as a test says."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def cross(m: Any, x: Tensor) -> Tensor:
    other = x.flip(-1)
    return m.q_proj(x) + m.k_proj(other) * m.v_proj(other)


def written_between(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    q = m.q_proj(x)
    x += 1
    return q + m.k_proj(x) * m.v_proj(x)


def reversed_order(m: Any, x: Tensor) -> Tensor:
    return m.v_proj(x) * m.k_proj(x) - m.q_proj(x)


def one_of_them(m: Any, x: Tensor) -> Tensor:
    return m.k_proj(x)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.q_proj(x) + m.k_proj(x) + m.v_proj(x) + 2 * m.q_proj(x)


def views(m: Any, x: Tensor) -> Tensor:
    return m.q_proj(x) + m.k_proj(x.view_as(x)) * m.v_proj(x[..., :])


def writes_into_outputs(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    q *= 3
    k.relu_()
    return q + k - v


ODD = [
    (cross, [QKV, QKV] * 2 + [QKV[1:]] * 3),
    (written_between, [QKV, QKV] * 2 + [QKV[1:]] * 3),
    (reversed_order, [QKV] * 5),
    (one_of_them, [QKV] * 2),
    (twice, None),
    (views, [QKV] * 5),
    (writes_into_outputs, [QKV] * 5),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("use", "want"), ODD, ids=[use.__name__ for use, _ in ODD])
def test_whatever_a_parent_does(mode: Any, use: Any, want: Any, products: list[Any]) -> None:
    """Right from the first forward on; what goes to waste twice is not computed again."""
    bare = Odd(use).requires_grad_(False)
    adapters = {n: adapter(bare, ["q_proj", "v_proj"], r) for n, r in (("a", 3), ("b", 5))}
    plain = lf.attach(copy.deepcopy(bare), adapters)
    model = lf.attach(copy.deepcopy(bare), adapters, pack=True)
    with mode(), lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
        for _ in range(5):
            x = torch.randn(4, 24)
            close(model(x), plain(x))
    if want is not None:
        assert products == want


def test_nothing_outlives_its_forward() -> None:
    class Keeps(Odd):
        pass

    seen: list[Any] = []

    def use(m: Any, x: Tensor) -> Tensor:
        h = x + 1
        seen.append(weakref.ref(h))
        y = m.q_proj(h)
        if len(seen) == 2:
            raise RuntimeError("on the way")
        return y

    model = lf.attach(Keeps(use).requires_grad_(False), {}, pack=True)
    local = model.q_proj.lora_serving.local
    with torch.no_grad():
        model(torch.randn(2, 24))
        with pytest.raises(RuntimeError, match="on the way"):
            model(torch.randn(2, 24))
    assert local.packed is None
    assert [ref() for ref in seen] == [None, None]
    pack = model.q_proj.lora_pack[0]
    assert pack.wasted == [1, 0, 0]  # an exception teaches nothing
    with torch.no_grad():  # outside a forward of the model there is nobody to clear up: alone
        model.q_proj(torch.randn(2, 24))
    assert local.packed is None


def test_threads_do_not_share_outputs() -> None:
    bare, adapters, model = block()
    check_threads(bare, adapters, model, torch.randn(1, 7, 24), times=200)


def test_gradients_autocast_and_transforms_compute_alone(products: list[Any]) -> None:
    bare, adapters, model = block()
    plain = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(4, 24, requires_grad=True)
    with lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
        (got,) = torch.autograd.grad(model(x).square().sum(), x)
        (want,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.equal(got, want)
        for m in (model, plain):
            m.requires_grad_(True)
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), plain(x))
        with torch.no_grad():
            (got, want) = (torch.func.jvp(m, (x.detach(),), (torch.ones_like(x),))[1] for m in (model, plain))
            assert torch.equal(got, want)
    assert products == []
    with torch.no_grad():  # a step of an optimizer goes through the views
        for m in (model, plain):
            torch.optim.SGD(m.parameters(), lr=0.1).step()
        close(model(x), plain(x))
    assert products == [QKV, GATED]


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_code_computes_alone(grad: bool, fresh_dynamo: None, products: list[Any]) -> None:
    bare, adapters, model = block()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 3, 24, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        for entries in (ENTRIES, ["b"] * 4, None):
            with lf.use_adapters(model, entries):
                close(fast(x), per_row(bare, adapters, entries if entries else [None] * 4, x))
    assert counter.frame_count == 1
    assert products == []
    lf.add_adapter(model, "c", adapter(bare, ["k_proj"], 2))
    with torch.no_grad(), lf.use_adapters(model, "c"):
        close(fast(x.detach()), model(x))
        assert not torch.equal(fast(x.detach()), bare(x))


def test_export(fresh_dynamo: None) -> None:
    _, _, model = block()
    x = torch.randn(4, 24)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        close(exported.module()(x), model(x))
