"""``multi_lora_`` in two halves, so that something else may be launched between them; CUDA only, no dispatcher.

The same kernels, in the same plan: the same bits as the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops.routed import KERNEL_DTYPES, PoolTensors, RoutingTensors

_MOST_SLICES = 3  # of one launch
_READY_SHRINK: dict[bytes, Any] = {}  # see ops/multi_lora.py
_READY_EXPAND: dict[bytes, Any] = {}


class Split:
    """One call in halves: ``shrink`` when x is there, ``expand_`` when the output is.

    Args:
        x: ``[..., in_features]``, which ``can_take`` takes.
        parts: each slice's pool, and the first column of its output.
        routing: of at least one pair.
        tiles: ``Routing.tiles``.
    """

    def __init__(
        self, x: Tensor, parts: Sequence[tuple[PoolTensors, int]], routing: RoutingTensors, tiles: Tensor
    ) -> None:
        from lora_fuse.kernels.multi_lora import Slice, backend_of_torch, plan_of, scratch

        flat = x.reshape(-1, x.shape[-1])
        self.x = flat if flat.stride(1) == 1 or flat.shape[1] < 2 else flat.contiguous()
        self.slices = [Slice(*pool, start) for pool, start in parts]
        self.routing, self.tiles = routing, tiles
        num_pairs = routing[0].shape[0]
        self.plan = plan_of(self.x, self.slices, num_pairs, backend_of_torch())
        self.h = scratch(self.x, self.slices, num_pairs, self.plan)

    @staticmethod
    def can_take(x: Tensor, pools: Sequence[PoolTensors]) -> bool:
        """Whether there is a kernel for all at once."""
        kinds = {(a.dtype, a.device, a.shape, a.stride(), b.dtype, b.stride(1), r.shape) for a, b, r, _ in pools}
        first = pools[0][0]
        return (
            len(kinds) == 1
            and len(pools) <= _MOST_SLICES
            and x.dtype in KERNEL_DTYPES
            and (x.dtype, x.device, 1) == (first.dtype, first.device, first.stride(1))
            and not x.is_neg()
        )

    def shrink(self) -> None:
        """Launch the first half on the current stream."""
        a, ranks = [s.pool_a for s in self.slices], [s.slot_rank for s in self.slices]
        operands = (self.h, self.x, *a, *ranks, self.routing[0], self.tiles)
        if not _cpu.launch_again(_READY_SHRINK, operands):
            from lora_fuse.kernels.multi_lora import shrink_

            given = (self.h, self.x, self.slices, self.routing, self.tiles, self.plan)
            shrink_(*given, operands, _READY_SHRINK)

    def expand_(self, out: Tensor) -> None:
        """Launch the second half: ``out [..., columns]``, dense, is added to."""
        flat = out.view(-1, out.shape[-1])
        parts = [t for s in self.slices for t in s]
        operands = (flat, self.h, self.x, *parts, *self.routing, self.tiles)
        if not _cpu.launch_again(_READY_EXPAND, operands):
            from lora_fuse.kernels.multi_lora import expand_pairs_

            given = (flat, self.h, self.slices, self.routing, self.tiles, self.plan)
            expand_pairs_(*given, operands, _READY_EXPAND)
