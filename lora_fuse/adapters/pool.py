"""The slots of one layer: every adapter's factors, a row per rank, where the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse._cpu import STACK_WORKSPACE

ROW_ALIGN_BYTES = 64


def _padded(rows: int, cols: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Zeros ``[rows, cols]`` whose row stride is a multiple of 64 bytes."""
    per_line = max(1, ROW_ALIGN_BYTES // dtype.itemsize)
    stride = -(-cols // per_line) * per_line
    return torch.zeros(rows, stride, dtype=dtype, device=device)[:, :cols]


class AdapterPool(nn.Module):
    """Slots for up to ``num_slots`` adapters of one layer.

    ``pool_a [num_slots * max_rank, in_features]`` and ``pool_b [num_slots * max_rank, out_features]`` (B transposed):
    slot ``s`` owns rows ``s * max_rank`` to ``s * max_rank + slot_rank[s]``, one contiguous run. ``slot_rank`` (int32)
    and ``slot_scaling`` (float32) have an entry per slot. All four are non-persistent buffers: they follow ``.to()``,
    stay out of the state dict, and ``slot_scaling`` stays float32 whatever the pool's dtype.

    Raises:
        ValueError: a size that is not a positive integer, a max_rank above 16384, or a dtype not floating point.
    """

    pool_a: Tensor
    pool_b: Tensor
    slot_rank: Tensor
    slot_scaling: Tensor
    slot_bias: Tensor | None

    def __init__(
        self,
        num_slots: int,
        max_rank: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        sizes = {"num_slots": num_slots, "max_rank": max_rank, "in_features": in_features, "out_features": out_features}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, accepted is an integer from 1")
        if max_rank > STACK_WORKSPACE:
            raise ValueError(f"max_rank: got {max_rank}, accepted are at most {STACK_WORKSPACE}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, accepted is a floating-point dtype")
        super().__init__()
        self.num_slots, self.max_rank = num_slots, max_rank
        self.in_features, self.out_features = in_features, out_features
        rows = num_slots * max_rank
        self.register_buffer("pool_a", _padded(rows, in_features, dtype, device), persistent=False)
        self.register_buffer("pool_b", _padded(rows, out_features, dtype, device), persistent=False)
        self.register_buffer("slot_rank", torch.zeros(num_slots, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("slot_scaling", torch.zeros(num_slots, device=device), persistent=False)
        self.register_buffer("slot_bias", None, persistent=False)  # [num_slots, out_features] once an adapter has one

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(pool_a, pool_b, slot_rank, slot_scaling)``, as ``functional.multi_lora`` reads them."""
        buffers = self._buffers
        return buffers["pool_a"], buffers["pool_b"], buffers["slot_rank"], buffers["slot_scaling"]  # type: ignore[return-value]

    @torch.no_grad()
    def write(self, slot: int, lora_a: Tensor, lora_b: Tensor, scaling: float, lora_bias: Tensor | None = None) -> None:
        """Fill a slot. Other slots' bytes are not touched, so forwards that use them may be running.

        Args:
            slot: index in ``[0, num_slots)``.
            lora_a: ``[rank, in_features]``, rank at most ``max_rank``; cast to the pool's dtype.
            lora_b: ``[out_features, rank]``.
            scaling: multiplies the product.
            lora_bias: ``[out_features]``, added as ``scaling * lora_bias``, or None.
        Raises:
            ValueError: slot out of range, rank above ``max_rank``, or shapes that do not fit the layer.
        """
        rank = lora_a.shape[0]
        self._check_slot(slot)
        if rank > self.max_rank:
            raise ValueError(f"rank: {rank} exceeds this pool's max_rank {self.max_rank}")
        want = (rank, self.in_features), (self.out_features, rank)
        if (tuple(lora_a.shape), tuple(lora_b.shape)) != want:
            raise ValueError(
                f"lora_a, lora_b: expected shapes {want[0]} and {want[1]}, "
                f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
        if lora_bias is not None and tuple(lora_bias.shape) != (self.out_features,):
            raise ValueError(f"lora_bias: expected shape ({self.out_features},), got {tuple(lora_bias.shape)}")
        start = slot * self.max_rank
        # Through .data: a backward that saved these buffers holds the slots it needs, so it must not be told that they
        # changed.
        with torch.inference_mode(False):
            self.leave_inference_mode()
            self.slot_rank.data[slot] = 0  # a reader that came too early sees an empty slot, not half of one
            self._write_a(start, rank, lora_a)
            self.pool_b.data[start : start + rank].copy_(lora_b.t())
            self.slot_scaling.data[slot] = scaling
            self._write_bias(slot, lora_bias)
            self.slot_rank.data[slot] = rank

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot: {slot} is out of range, this pool has slots 0 to {self.num_slots - 1}")

    def _write_a(self, start: int, rank: int, lora_a: Tensor) -> None:
        self.pool_a.data[start : start + rank].copy_(lora_a)

    def _write_bias(self, slot: int, lora_bias: Tensor | None) -> None:
        if self.slot_bias is None:
            if lora_bias is None:
                return
            self.slot_bias = self.pool_b.new_zeros(self.num_slots, self.out_features)
        if lora_bias is None:
            self.slot_bias.data[slot] = 0
        else:
            self.slot_bias.data[slot].copy_(lora_bias)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot: rank 0, no work.

        Raises:
            ValueError: slot out of range.
        """
        self._check_slot(slot)
        with torch.inference_mode(False):
            self.leave_inference_mode()
            self.slot_rank.data[slot] = 0
            self.slot_scaling.data[slot] = 0.0
            self._write_bias(slot, None)

    def move_a(self, rows: Tensor) -> None:
        """Let A lie in ``rows [num_slots * max_rank, in_features]``, a part of somebody's memory, from now on."""
        self._buffers["pool_a"] = rows.copy_(self.pool_a)

    def leave_inference_mode(self) -> None:
        """Replace buffers that ``.to()`` made inside ``inference_mode`` by ordinary copies, which can be written."""
        with torch.inference_mode(False):
            for name, t in self._buffers.items():
                if t is not None and t.is_inference():
                    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                    self._buffers[name] = copy.copy_(t)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scaling = self.slot_scaling
        super()._apply(fn, recurse)
        self.slot_scaling = scaling.to(self.slot_rank.device)  # moved, never cast
        for name in ("pool_a", "pool_b"):  # a cast or a move may have dropped the padding of the rows
            t = getattr(self, name)
            if t.shape[0] > 1 and t.stride(0) * t.element_size() % ROW_ALIGN_BYTES and t.device.type != "meta":
                setattr(self, name, _padded(t.shape[0], t.shape[1], t.dtype, t.device).copy_(t))
        return self

    def extra_repr(self) -> str:
        return f"slots={self.num_slots}, max_rank={self.max_rank}, in={self.in_features}, out={self.out_features}"


class EmbeddingPool(AdapterPool):
    """Slots of an embedding: ``embedding_a [num_embeddings, num_slots * max_rank]`` holds A, a column per rank.

    A token's row of A *is* its shrink, so a lookup replaces the product; ``pool_a [num_slots * max_rank, max_rank]``
    is an identity per slot, which makes the expand a plain ``multi_lora`` over the gathered ``[num_pairs, max_rank]``.
    """

    embedding_a: Tensor

    def __init__(
        self,
        num_slots: int,
        max_rank: int,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_slots, max_rank, max_rank, embedding_dim, dtype, device)
        self.in_features = num_embeddings
        with torch.no_grad():
            self.pool_a.view(num_slots, max_rank, max_rank).diagonal(dim1=1, dim2=2).fill_(1)
        columns = torch.zeros(num_embeddings, num_slots * max_rank, dtype=dtype, device=device)
        self.register_buffer("embedding_a", columns, persistent=False)

    def _write_a(self, start: int, rank: int, lora_a: Tensor) -> None:
        self.embedding_a.data[:, start : start + rank].copy_(lora_a.t())
        # ranks above the new one still hold an earlier adapter's columns; slot_rank keeps them out of every product
