"""Public ops: documentation, argument checks, the eager fast path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_fuse.ops import multi_lora as _multi_lora_op  # noqa: F401  (registers the op)
from lora_fuse.ops.lowrank_svd import LowRankSVD, lowrank_svd  # noqa: F401  (public here)

if TYPE_CHECKING:
    from lora_fuse.adapters.pool import AdapterPool
    from lora_fuse.adapters.routing import Routing


def multi_lora(x: Tensor, pool: AdapterPool, routing: Routing, out: Tensor | None = None) -> Tensor:
    """Apply every row's adapters: ``out[row] += weight * scaling * B (A x[row])``."""
    args = (
        *pool.tensors, routing.rows, routing.weights, routing.segment_starts, routing.row_starts, routing.row_pairs,
    )
    if out is None:
        return torch.ops.lora_fuse.multi_lora(x, *args)
    torch.ops.lora_fuse.multi_lora_(out, x, *args)
    return out
