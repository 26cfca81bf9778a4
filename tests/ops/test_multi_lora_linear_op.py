"""The op of a linear layer and its LoRA part: registration, gradients, compile, transforms, bad input."""

from __future__ import annotations

import pytest
import torch
from cases import make_pool, routing_of
from torch.nn.functional import linear

from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora, multi_lora_linear

PAIRS = [(0, 1, 0.5), (0, 2, -1.0), (2, 0, 2.0), (3, 1, 1.0)]


def made(dtype, mixed):
    pool = make_pool(3, 4, 20, 12, dtype)
    pool.pool_a.nan_to_num_(), pool.pool_b.nan_to_num_()
    routing = routing_of(PAIRS, 5, 3) if mixed else Routing.from_slots(torch.tensor([1, -1, 0, 2, 2]), 3)
    return torch.randn(5, 20).to(dtype), torch.randn(12, 20).to(dtype), torch.randn(12).to(dtype), pool, routing


def in_turn(x, weight, bias, pool, routing):
    return linear(x, weight, bias) + multi_lora(x, pool, routing)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_and_result(dtype, mixed):
    x, weight, bias, pool, routing = made(dtype, mixed)
    for b in (bias, None):
        want = linear(x, weight, b)
        multi_lora(x, pool, routing, out=want)
        assert torch.equal(multi_lora_linear(x, weight, b, pool, routing), want)
    args = (*pool.tensors, *routing.tensors)
    torch.library.opcheck(torch.ops.lora_fuse.multi_lora_linear.default, (x, weight, bias, *args))
    if dtype != torch.bfloat16:
        needs = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
        torch.library.opcheck(torch.ops.lora_fuse.multi_lora_linear.default, (*needs, *args))


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients(mixed):
    x, weight, bias, pool, routing = made(torch.float64, mixed)
    needs = [t.requires_grad_() for t in (x, weight, bias)]
    if mixed:
        needs.append(routing.weights.requires_grad_())
    grad = torch.randn(5, 12, dtype=torch.float64)
    want = torch.autograd.grad(in_turn(x, weight, bias, pool, routing), needs, grad)
    got = torch.autograd.grad(multi_lora_linear(x, weight, bias, pool, routing), needs, grad)
    torch.testing.assert_close(got, want)


def test_compiled_and_transformed():
    x, weight, bias, pool, routing = made(torch.float32, True)
    want = in_turn(x, weight, bias, pool, routing)
    compiled = torch.compile(lambda x: multi_lora_linear(x, weight, bias, pool, routing), fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    _, tangent = torch.func.jvp(lambda x: multi_lora_linear(x, weight, bias, pool, routing), (x,), (x,))
    torch.testing.assert_close(tangent, want - bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert multi_lora_linear(x, weight, bias, pool, routing).dtype == torch.bfloat16


def test_bad_input():
    x, weight, bias, pool, routing = made(torch.float32, False)
    for match, given in [
        ("x: shape .* has 4 rows, the routing is for 5", (x[:4], weight, bias)),
        ("x, weight: shapes", (x, weight[:, :19], bias)),
        ("bias: shape", (x, weight, bias[:5])),
        ("11 features, pool_b has 12|20 and 11 features", (x, weight[:11], bias[:11])),
    ]:
        with pytest.raises(ValueError, match=match):
            multi_lora_linear(*given, pool, routing)
