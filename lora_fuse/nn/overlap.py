"""The shrink on a stream of its own, under the base layer's product: where A cannot lie behind the weight.

A decode's product streams the weight and leaves most of the arithmetic idle, and the shrink needs only x. So it is
forked off before the product and joined after it, and the expand goes on where both are done. CUDA graphs record
the fork and the join as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_fuse._cpu import may_bypass as _may_bypass
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.nn.serving import Serving
from lora_fuse.ops.split import Split

MOST_ROWS = 256  # beyond, the product leaves nothing idle
LEAST_WEIGHT = 1 << 22  # elements: a smaller product is over before a fork and a join have paid


def overlaps(num_rows: int, in_features: int, out_features: int) -> bool:
    """Whether a shrink runs beside its layer's product."""
    return 0 < num_rows <= MOST_ROWS and in_features * out_features >= LEAST_WEIGHT


class SideStream:
    """The side stream of one device, for one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def fork(self) -> AbstractContextManager[Any]:
        """A block whose work waits for what the current stream has been given so far, and for nothing later."""
        self.main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(self.main)
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        """What the forking stream gets from now on waits for that block."""
        self.main.wait_stream(self.stream)


class _Sides(threading.local):
    """Not shared by threads: one may capture while another does not."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, SideStream] = {}


_sides = _Sides()


def side_of(device: torch.device) -> SideStream | None:
    """The calling thread's side stream, where there are streams."""
    if device.type != "cuda":
        return None
    found = _sides.by_device.get(device)
    if found is None:
        found = _sides.by_device[device] = SideStream(device)
    return found


class SideShrink:
    """The shrink of one input, under way inside the ``with`` block around the layer's own product.

    Memory: all tensors were made by the forking stream and are held until the join, also when the product raises; what
    that stream does with their memory afterwards comes after the join, so the allocator need not be told.
    """

    def __init__(
        self, x: Tensor, pools: Sequence[AdapterPool | None], sizes: Sequence[int], routing: Routing, side: SideStream
    ) -> None:
        self.x, self.pools, self.sizes, self.routing, self.side = x, pools, sizes, routing, side
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [(pool.tensors, start) for pool, start in zip(pools, starts, strict=True) if pool is not None]
        assert routing.tiles is not None
        self.split = Split(x, parts, routing.tensors, routing.tiles)

    def __enter__(self) -> None:
        try:
            with self.side.fork():
                self.split.shrink()
        except BaseException:
            self.side.join()
            raise

    def __exit__(self, *exc: Any) -> None:
        self.side.join()

    def expand_(self, y: Tensor, fresh: bool) -> Tensor | None:
        """The product's result with the adapters added, but for their biases; None: it does not fit, nothing was done.

        Args:
            y: ``[..., sum of sizes]``.
            fresh: nobody else sees ``y``, so it may be written into.
        """
        if y.dtype is not self.x.dtype or y.device != self.x.device or y.requires_grad:
            return None
        if y.shape != (*self.x.shape[:-1], sum(self.sizes)):
            return None
        if not (fresh and y.is_contiguous()):
            y = y.clone(memory_format=torch.contiguous_format)
        self.split.expand_(y)
        return y


def begin(
    x: Tensor, pools: Sequence[AdapterPool | None], sizes: Sequence[int], serving: Serving, path: str
) -> SideShrink | None:
    """What a ``with`` block around the product and ``expand_`` finish, or None: the layers compute as usual.

    Args:
        pools: of layers that share x.
        sizes: their output features.
    """
    first = next((pool for pool in pools if pool is not None), None)
    # Plain inference only, as for packed siblings.
    if first is None or torch.is_grad_enabled() or not _may_bypass(x, None) or x.dim() == 0:
        return None
    if not overlaps(x.shape[:-1].numel(), x.shape[-1], sum(sizes)) or x.shape[-1] != first.in_features:
        return None
    side = side_of(x.device)
    if side is None or not Split.can_take(x, [pool.tensors for pool in pools if pool is not None]):
        return None
    routing = serving.routing(tuple(x.shape[:-1]), x.device, path)
    if routing is None or routing.tiles is None or routing.num_pairs == 0:
        return None
    return SideShrink(x, pools, sizes, routing, side)
