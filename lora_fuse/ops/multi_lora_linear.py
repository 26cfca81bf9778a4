"""The op ``lora_fuse::multi_lora_linear``, a linear layer and its LoRA part: schema, fake, CPU, CUDA, autograd.

On the CPU, and wherever one launch does not serve (``kernels.fused_linear_plan.serves``), it is the two of them in
turn, with a rounding between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops.multi_lora import _POOL, _ROUTING, _TILES
from lora_fuse.ops.multi_lora import _weights_grad as weights_grad
from lora_fuse.ops.routed import PoolTensors, RoutingTensors, check_shapes, check_vectors

# counters: int32 zeros, zeros again afterwards, so the op changes nothing that another could see
LIBRARY.define(
    f"multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, {_POOL}, {_ROUTING}, {_TILES}, "
    "Tensor? counters=None) -> Tensor"
)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        shapes = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"x, weight: shapes {shapes}, accepted are [..., in_features] and [out_features, in_features]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {list(bias.shape)}, accepted is [{weight.shape[0]}]")


def _in_turn(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """The base product, then what ``multi_lora_`` adds to it; ``args``: pool, routing, tiles, counters."""
    _check(x, weight, bias)
    out = linear(x, weight, bias)
    torch.ops.lora_fuse.multi_lora_(out, x, *args[:10])
    return out


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    _check(x, weight, bias)
    pool, routing, (tiles, counters) = args[:4], args[4:9], (*args[9:], None, None)[:2]
    if tiles is None or not _one_launch(x, weight, bias, pool, routing, tiles):
        return _in_turn(x, weight, bias, *args)
    from lora_fuse.kernels.fused_linear import multi_lora_linear_, num_counters  # triton, only where it has a device

    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    check_shapes(out, x, pool, routing, tiles)
    check_vectors(x, x.shape[:-1].numel(), routing, tiles, [pool[2:]])
    needed = num_counters(weight.shape[0])
    if counters is None:
        counters = torch.zeros(needed, dtype=torch.int32, device=x.device)
    elif counters.dtype != torch.int32 or counters.dim() != 1 or counters.shape[0] < needed:
        got = f"{list(counters.shape)} {counters.dtype}"
        raise ValueError(f"counters: got {got}, accepted are {needed} or more int32 zeros in one dimension")
    elif counters.device != x.device:
        raise ValueError(f"counters: is on {counters.device}, x is on {x.device}; accepted is one device for all")
    flat = x.reshape(-1, x.shape[-1])
    rows = flat if _in_16s(flat) else flat.clone(memory_format=torch.contiguous_format)
    multi_lora_linear_(out.view(-1, weight.shape[0]), rows, weight, bias, pool, routing, tiles, counters)
    return out


def _one_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, pool: PoolTensors, routing: RoutingTensors, tiles: Tensor
) -> bool:
    if torch.version.hip:
        return False
    dtype, num_slots, num_rows = x.dtype, max(pool[2].shape[0], 1), x.shape[:-1].numel()
    operands = (weight, pool[0], pool[1])
    if any(t.dtype != dtype or t.is_neg() for t in (x, *operands, *([] if bias is None else [bias]))):
        return False
    if not (_in_16s(weight) and _in_16s(pool[0]) and pool[1].stride(1) == 1):
        return False
    from lora_fuse.kernels.fused_linear_plan import serves

    num_pairs, max_rank = routing[0].shape[0], pool[0].shape[0] // num_slots
    if (tiles.shape[0] == 0) != (num_pairs == 0) or (routing[3] is None and num_pairs > num_rows):
        return False
    return serves(num_rows, x.shape[-1], weight.shape[0], max_rank, str(dtype).removeprefix("torch."))


def _in_16s(t: Tensor) -> bool:
    """Whether every row starts where wide loads can, and runs on from there."""
    return t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LIBRARY.impl("multi_lora_linear", _cuda, "CUDA")
LIBRARY.impl("multi_lora_linear", _in_turn, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::multi_lora_linear", _fake, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:13])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, _, pool_a, pool_b, slot_rank, slot_scaling, *routing, tiles = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 14
    flat, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if needs[0]:
        lora = torch.ops.lora_fuse.multi_lora(grad, pool_b, pool_a, slot_rank, slot_scaling, *routing, tiles)
        grads[0] = grad @ weight + lora
    if needs[1]:
        grads[1] = flat_grad.t() @ flat
    if needs[2]:
        grads[2] = flat_grad.sum(0)
    if needs[8]:
        rows, weights, starts = routing[:3]
        part = weights_grad(flat, flat_grad, pool_a, pool_b, slot_rank, slot_scaling, rows, starts)
        grads[8] = part.to(weights.dtype)
    return tuple(grads)


torch.library.register_autograd("lora_fuse::multi_lora_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
