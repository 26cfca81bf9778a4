"""Augmented base: a pool's A rows lie behind the weight's, so that one product yields y and every slot's shrink.

``[y | h] = x [W; A of slot 0; A of slot 1; ...]^T + [bias | 0]``, and what is left is the expand, which reads h beside
y. The product is wider, by as many columns as the pool has rows; for that, x is read once, and the shrink is no launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lora_fuse.adapters.pool import ROW_ALIGN_BYTES, AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.nn.linear import add_biases, add_lora
from lora_fuse.ops.expand import expand_fresh_

MOST_ROWS = 256  # of x: beyond, the product is bound by arithmetic, of which most slots' shrink of a row is waste
_SHARE = 8  # A's rows are at most this part of the weight's


def has_room(in_features: int, out_features: int, pool_rows: int, itemsize: int) -> bool:
    """Whether A's rows may lie behind a weight.

    Args:
        out_features: rows of the weight, or of all weights of a pack.
        pool_rows: rows of all pools behind them.
        itemsize: bytes of an element; rows of a pool begin at multiples of 64 bytes, so the weight's rows have to.
    """
    return 0 < _SHARE * pool_rows <= out_features and in_features * itemsize % ROW_ALIGN_BYTES == 0


class Beside(NamedTuple):
    """Weights with A behind them.

    Args:
        weight: ``[sum of sizes + A's rows, in_features]``.
        inside: the layers whose A is there, in its order; others with slots have to shrink by themselves.
        starts: the first column of each one's y.
        shrunk: the first column of all h, and how many there are.
    """

    weight: Tensor
    bias: Tensor | None
    inside: tuple[int, ...]
    starts: list[int]
    shrunk: tuple[int, int]


def linear_with_lora(
    x: Tensor, beside: Beside, sizes: Sequence[int], pools: Sequence[AdapterPool | None], routing: Routing
) -> tuple[Tensor, ...]:
    """Each layer's output, adapters included: views of one tensor, in plain inference."""
    wide = F.linear(x, beside.weight, beside.bias)
    tensors = [t for i in beside.inside for t in pools[i].tensors[1:]]  # type: ignore[union-attr]
    expand_fresh_(wide, wide.narrow(-1, *beside.shrunk), tensors, beside.starts, *routing.tensors, routing.tiles)
    *outputs, _ = wide.split_with_sizes([*sizes, wide.shape[-1] - sum(sizes)], -1)
    for i, (y, pool) in enumerate(zip(outputs, pools, strict=True)):
        if pool is not None:
            outputs[i] = add_biases(y, pool, routing) if i in beside.inside else add_lora(y, x, pool, routing, True)
    return tuple(outputs)
