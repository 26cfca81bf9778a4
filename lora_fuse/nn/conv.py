"""Conv2d with slots: the kernel's delta is low-rank too, so every output position is a row of ``multi_lora``."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse.functional import multi_lora
from lora_fuse.nn.linear import AdaptedModule, add_bias, input_of, pair_slots, rebuildable
from lora_fuse.nn.traced import traced_routing
from lora_fuse.ops.eager import autocasts


def columns_of(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that each output position sees: ``[batch, positions, in_channels * kh * kw]``."""
    if conv.kernel_size == (1, 1) and not any(conv._reversed_padding_repeated_twice):
        sh, sw = conv.stride
        return x[:, :, ::sh, ::sw].flatten(2).transpose(1, 2)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2)


def _add_positions(layer: AdaptedModule, y: Tensor, x: Tensor) -> Tensor:
    """``y + B (A * x)`` position by position; samples without an adapter keep their bits."""
    pool, serving = layer.lora_pool, layer.lora_serving
    if x.dim() == 3:  # one unbatched image
        return _add_positions(layer, y.unsqueeze(0), x.unsqueeze(0)).squeeze(0)
    height, width = y.shape[-2:]
    routing = None
    if not torch.compiler.is_compiling():
        routing = serving.routing((x.shape[0], height * width), pool.pool_a.device, layer.lora_path)
        if routing is None:
            return y
    columns = columns_of(cast(nn.Conv2d, layer), x).contiguous().neg()  # y - (-delta), see linear._negated
    if not autocasts(x):
        columns = columns.to(pool.pool_a.device, pool.pool_a.dtype)
    weights: Tensor | None
    if routing is None:
        rows, weights, segment_starts, *_ = fields = traced_routing(serving, columns)
        factors = (pool.pool_a, pool.pool_b, pool.slot_rank, pool.slot_scaling)
        delta = torch.ops.lora_fuse.multi_lora(columns, *factors, *fields)
    else:
        rows, weights, segment_starts = routing.rows, routing.weights, routing.segment_starts
        delta = multi_lora(columns, pool, routing)
    delta = delta.to(y.device, y.dtype).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    y = y - delta
    if pool.slot_bias is not None:
        y = add_bias(y.permute(0, 2, 3, 1), pool, rows, weights, pair_slots(segment_starts, rows)).permute(0, 3, 1, 2)
    return y


class MultiLoRAConv2d(AdaptedModule, nn.Conv2d):
    """An ``nn.Conv2d`` whose samples may each use adapters of their own. Made by ``lora_fuse.attach``."""

    lora_base = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return _add_positions(self, nn.Conv2d.forward(cast(nn.Conv2d, self), input), input)


class WrappedConv2d(AdaptedModule):
    """A convolution of another class, or one whose instance has a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base_forward = self.__dict__.get("lora_base_forward")
        x = input_of(args, kwargs)
        y = super().forward(*args, **kwargs) if base_forward is None else base_forward(*args, **kwargs)
        return _add_positions(self, y, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuildable(type(self), super().__reduce_ex__(protocol))
