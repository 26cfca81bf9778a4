"""The torch.library ops around magnitude selection: registration, autograd, compile, modes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fuse.functional import magnitude_prune, sparsify, topk_mask

OPS = torch.ops.lora_fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_minus", [False, True])
def test_opcheck(dtype, with_minus):
    x = torch.randn(6, 9).to(dtype)
    minus = torch.randn(6, 9).to(dtype) if with_minus else None
    for scope in ("tensor", "row"):
        torch.library.opcheck(OPS.topk_mask.default, (x, 0.3, scope, minus))
        torch.library.opcheck(OPS.magnitude_prune.default, (x, 0.3, scope, minus))
        torch.library.opcheck(OPS.magnitude_prune_.default, (torch.zeros_like(x), x, 0.3, scope, minus))
    torch.library.opcheck(OPS.magnitude_prune.default, (x.clone().requires_grad_(), 0.3, "row", minus))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_flow_to_what_is_kept(compiled):
    x = torch.randn(5, 8)
    x[0] = 0
    minus = torch.randn(5, 8)
    minus[0] = 0
    x.requires_grad_(), minus.requires_grad_()
    fn = torch.compile(magnitude_prune, fullgraph=True) if compiled else magnitude_prune
    for density in (0.25, 0.95):  # the second keeps some of the zeros
        for via in (lambda d: fn(x, d, "row", minus), lambda d: OPS.magnitude_prune(x, d, "row", minus)):
            y = via(density)
            cotangent = torch.randn(5, 8)
            got = torch.autograd.grad(y, (x, minus), cotangent)
            mask = topk_mask(x, density, "row", minus=minus)
            assert torch.equal(got[0], cotangent * mask)
            assert torch.equal(got[1], -cotangent * mask)
            assert torch.equal(y.detach(), magnitude_prune(x.detach(), density, "row", minus.detach()))


def test_lists_under_autograd():
    xs = [torch.randn(4, 4, requires_grad=True), torch.randn(3, 5, requires_grad=True)]
    ys = magnitude_prune(xs, 0.5, "global")
    sum(y.sum() for y in ys).backward()
    for x, mask in zip(xs, topk_mask(xs, 0.5, "global"), strict=True):
        assert torch.equal(x.grad, mask.float())
    assert not sparsify(xs[0], 0.5).values.requires_grad
    for out in ([torch.zeros(4, 4), torch.zeros(3, 5)],):
        with pytest.raises(ValueError, match="out: cannot be given where a gradient is needed"):
            magnitude_prune(xs, 0.5, out=out)
        with torch.no_grad():
            magnitude_prune(xs, 0.5, out=out)


def test_functorch_gradient():
    x = torch.randn(6, 7)
    got = torch.func.grad(lambda t: magnitude_prune(t, 0.4).square().sum())(x)
    assert torch.equal(got, 2 * magnitude_prune(x, 0.4))


def test_compiles_without_breaks_at_changing_sizes():
    def call(x, minus):
        return topk_mask(x * 2, 0.25, minus=minus), magnitude_prune(x, 0.25, "row", minus) + 1

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (3, 8, 21):
        x, minus = torch.randn(rows, 16), torch.randn(rows, 16)
        for got, want in zip(compiled(x, minus), call(x, minus), strict=True):
            assert torch.equal(got, want)


def test_compiled_with_out():
    def call(x):
        out = torch.zeros_like(x)
        magnitude_prune(x, 0.5, out=out)
        return out + 1

    x = torch.randn(8, 8)
    assert torch.equal(torch.compile(call, fullgraph=True)(x), call(x))


def test_lists_are_left_to_eager_code():
    def call(xs):
        return [y + 1 for y in magnitude_prune(xs, 0.5, "global")]

    xs = [torch.randn(8, 8), torch.randn(5)]
    for got, want in zip(torch.compile(call)(xs), call(xs), strict=True):
        assert torch.equal(got, want)


def test_modes_see_the_op():
    class Seen(TorchDispatchMode):
        names: list = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, 6)
    with Seen() as seen:
        mask, pruned = topk_mask(x, 0.5), magnitude_prune(x, 0.5)
    assert {"lora_fuse.topk_mask.default", "lora_fuse.magnitude_prune.default"} <= set(seen.names)
    assert torch.equal(mask, topk_mask(x, 0.5))
    assert torch.equal(pruned, magnitude_prune(x, 0.5))


def test_tensors_are_read_without_the_exchange_api_too():
    from lora_fuse import _cpu

    x = torch.randn(30, 40).bfloat16()
    wide = torch.randn(2, 70_000)
    want = [
        topk_mask(x, 0.5),
        sparsify(x, 0.5).to_dense(),
        sparsify(x, 0.01).to_dense(),
        sparsify(wide, 0.001).to_dense(),
    ]
    try:
        assert _cpu.use_exchange_api(None) is False
        got = [
            topk_mask(x, 0.5),
            sparsify(x, 0.5).to_dense(),
            sparsify(x, 0.01).to_dense(),
            sparsify(wide, 0.001).to_dense(),
        ]
    finally:
        _cpu.use_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
