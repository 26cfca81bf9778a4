"""A routing of fixed size in one int32 tensor: what a CUDA graph, or compiled code, reads whatever is selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fuse.adapters.routing import Routing
from lora_fuse.ops.multi_lora import build_tiles

_ALIGN = 4  # pieces start at multiples of 16 bytes, as tensors of their own would: kernels are compiled for that
_TILE_ROWS = 16  # the fewest pairs of a full tile


@dataclass(frozen=True)
class SlabLayout:
    """Where the pieces lie. Sizes hang on these numbers alone, by sums and products, so that they may be symbols.

    Args:
        num_rows: rows of the flattened activation.
        max_pairs: most adapters of a row.
        num_slots: slots of the pools.
    """

    num_rows: int
    max_pairs: int
    num_slots: int

    @property
    def num_pairs(self) -> int:
        return self.num_rows * self.max_pairs

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of rows, weights, segment_starts, row_starts, row_pairs and tiles."""
        pairs, tiles = self.num_pairs, self.num_pairs // _TILE_ROWS + self.num_slots
        return pairs, pairs, self.num_slots + 1, self.num_rows + 1, pairs, 4 * tiles

    @property
    def size(self) -> int:
        return sum(_aligned(size) for size in self.sizes)

    def split(self, slab: Tensor) -> tuple[Tensor, ...]:
        """``(rows, weights, segment_starts, row_starts, row_pairs, tiles)``, views of ``slab [size]``."""
        pieces, at = [], 0
        for size in self.sizes:
            pieces.append(slab[at : at + size])
            at += _aligned(size)
        pieces[1] = pieces[1].view(torch.float32)
        pieces[5] = pieces[5].view(-1, 4)
        return tuple(pieces)

    def empty(self, device: torch.device) -> Tensor:
        """A slab in which no row has an adapter."""
        slab = torch.zeros(self.size, dtype=torch.int32, device=device)
        self.split(slab)[5].fill_(-1)
        return slab

    def routing(self, slab: Tensor, leases: tuple[Any, ...] = ()) -> Routing:
        """The slab as a routing, padded."""
        rows, weights, segment_starts, row_starts, row_pairs, tiles = self.split(slab)
        routing = Routing(rows, weights, segment_starts, row_starts, row_pairs, self.num_rows, leases, True)
        object.__setattr__(routing, "_tiles", tiles)
        return routing

    def write(self, slab: Tensor, routing: Routing) -> None:
        """Put a routing there, in the order of the current stream and without waiting for a device.

        Args:
            routing: of as many rows and slots and of at most ``num_pairs`` pairs; on the CPU, or on the slab's device
                with at most one pair a row.
        """
        on_gpu = slab.device.type == "cuda"
        if routing.device.type == "cpu" and not routing.padded:
            host = torch.zeros(slab.shape[0], dtype=torch.int32, pin_memory=on_gpu)
            pieces = self.split(host)
            for piece, tensor in zip(pieces, routing.explicit().tensors, strict=False):
                assert tensor is not None
                piece[: tensor.shape[0]] = tensor
            pieces[5].fill_(-1)
            slab.copy_(host, non_blocking=True)
        else:
            self._write_unread(slab, routing)
        if _has_kernels(slab.device):
            rows, _, segment_starts, _, _, tiles = self.split(slab)
            build_tiles(rows, segment_starts, tiles)

    def _write_unread(self, slab: Tensor, routing: Routing) -> None:
        rows, weights, segment_starts, row_starts, row_pairs, _ = self.split(slab)
        n = self.num_rows
        rows[:n] = routing.rows
        weights.fill_(1.0)
        segment_starts.copy_(routing.segment_starts)
        live = torch.arange(n, device=slab.device) < segment_starts[-1]
        of_row = torch.where(live, rows[:n].long(), n)  # n: there is no such pair
        counts = torch.zeros(n + 1, dtype=torch.int32, device=slab.device)
        counts.index_fill_(0, of_row, 1)
        torch.cumsum(counts[:n], 0, dtype=torch.int32, out=row_starts[1:])
        row_pairs[:n] = torch.argsort(of_row, stable=True)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _aligned(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN
