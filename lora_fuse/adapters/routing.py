"""Routing: which rows of a batch use which slots, with which weights. Built once per forward, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops.multi_lora import build_tiles, sort_slots
from lora_fuse.ops.routed import without_padding


@dataclass(frozen=True, eq=False)
class Routing:
    """(row, slot, weight) triples sorted by slot, then row.

    A *pair* is one (row, slot); a row may have several (a weighted mix) or none (base).

    Args:
        rows: ``[num_pairs]`` int32, the row of each pair.
        weights: ``[num_pairs]`` float32, or None when every weight is 1.
        segment_starts: ``[num_slots + 1]`` int32; slot ``s`` owns pairs ``segment_starts[s]:segment_starts[s + 1]``.
        row_starts: ``[num_rows + 1]`` int32 and
        row_pairs: ``[num_pairs]`` int32: the pairs of each row; both None when no row has more than one pair.
        num_rows: rows of the flattened activation ``[num_rows, features]``.
        tensors: the five above in this order, as the op takes them.
        leases: whatever must stay alive while this routing is in use (slots are reused when nothing holds them).
        padded: pairs from ``segment_starts[-1]`` on are not there, so that sizes tell nothing about the selection: what
            is never read back from a device, and what a CUDA graph reads again after it was rewritten.
    """

    rows: Tensor
    weights: Tensor | None
    segment_starts: Tensor
    row_starts: Tensor | None
    row_pairs: Tensor | None
    num_rows: int
    leases: tuple[Any, ...] = ()
    padded: bool = False
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Built once: every layer of a forward reads it. ``(rows, weights, segment_starts, row_starts, row_pairs)``.
        tensors = (self.rows, self.weights, self.segment_starts, self.row_starts, self.row_pairs)
        object.__setattr__(self, "tensors", tensors)

    @property
    def tiles(self) -> Tensor | None:
        """``[num_tiles, 4]`` int32, ``kernels.routing.build_tiles``: what CUDA kernels work on; elsewhere None, or
        not empty where the routing is padded, which is all that the op goes by there.

        Built on the device, once, by the first layer that asks.
        """
        if "_tiles" not in self.__dict__:
            if self.rows.device.type != "cuda":
                return self.rows.new_full((1, 4), -1) if self.padded else None
            object.__setattr__(self, "_tiles", build_tiles(self.rows, self.segment_starts))
        return self.__dict__["_tiles"]  # type: ignore[no-any-return]

    @property
    def num_pairs(self) -> int:
        return int(self.rows.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.segment_starts.shape[0]) - 1

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def pair_slots(self) -> Tensor:
        """``[num_pairs]`` int64, the slot of each pair."""
        counts = self.segment_starts.diff()
        slots = torch.arange(self.num_slots, device=self.device)
        return torch.repeat_interleave(slots, counts, output_size=self.num_pairs)

    @classmethod
    def from_slots(
        cls, slots: Tensor, num_slots: int, leases: tuple[Any, ...] = (), flag: Tensor | None = None
    ) -> Routing:
        """One slot per row; -1 means none.

        Args:
            slots: ``[num_rows]``, any integer dtype; values in ``[-1, num_slots)``.
            num_slots: slots of the pools this will be used with.
            flag: ``[1]`` int32 on the same device. With it nothing is read back: a value out of range is -1 and sets
                the flag to 1, and the routing is padded.
        Raises:
            ValueError: a value out of range (the first offender is named), if there is no flag.
        """
        if slots.dim() != 1 or slots.dtype.is_floating_point or slots.dtype in (torch.bool, torch.complex64):
            raise ValueError(f"slots: expected a 1-d integer tensor, got {slots.dtype} with shape {tuple(slots.shape)}")
        num_rows = slots.shape[0]
        if flag is not None:
            return cls(*_sorted_unread(slots, num_slots, flag), None, None, num_rows, leases, True)
        if slots.device.type == "cuda" and (sorted_ := sort_slots(slots, num_slots)) is not None:
            return cls(sorted_[0], None, sorted_[1], None, None, num_rows, leases)
        slots = slots.long()
        if num_rows:
            low, high = torch.aminmax(slots)
            if int(low) < -1 or int(high) >= num_slots:
                bad = int(((slots < -1) | (slots >= num_slots)).nonzero()[0])
                raise ValueError(
                    f"slots: row {bad} asks for slot {int(slots[bad])}, accepted are -1 (base) to {num_slots - 1}"
                )
        order = torch.argsort(slots, stable=True)
        num_base = (slots < 0).sum() if num_rows else 0
        rows = order[int(num_base) :].int()
        counts = torch.bincount(slots[rows.long()], minlength=num_slots)
        return cls(rows, None, _starts(counts), None, None, num_rows, leases)

    @classmethod
    def from_pairs(
        cls,
        rows: Tensor,
        slots: Tensor,
        weights: Tensor | None,
        num_rows: int,
        num_slots: int,
        leases: tuple[Any, ...] = (),
    ) -> Routing:
        """Any set of (row, slot, weight) triples; a row may appear several times.

        Args:
            rows, slots: ``[num_pairs]`` integers in ``[0, num_rows)`` and ``[0, num_slots)``.
            weights: ``[num_pairs]`` floating, or None for ones.
        Raises:
            ValueError: lengths differ, or a value is out of range.
        """
        rows, slots = rows.long(), slots.long()
        if rows.shape != slots.shape or rows.dim() != 1 or (weights is not None and weights.shape != rows.shape):
            shapes = [tuple(t.shape) for t in (rows, slots, weights) if t is not None]
            raise ValueError(f"rows, slots, weights: expected one length, got shapes {shapes}")
        if rows.numel():
            if int(rows.min()) < 0 or int(rows.max()) >= num_rows:
                raise ValueError(f"rows: values must be in [0, {num_rows}), got {int(rows.min())} to {int(rows.max())}")
            if int(slots.min()) < 0 or int(slots.max()) >= num_slots:
                raise ValueError(
                    f"slots: values must be in [0, {num_slots}), got {int(slots.min())} to {int(slots.max())}"
                )
        order = torch.argsort(slots * max(num_rows, 1) + rows, stable=True)
        rows, slots = rows[order], slots[order]
        per_row = torch.bincount(rows, minlength=num_rows)
        row_starts = row_pairs = None
        if rows.numel() and int(per_row.max()) > 1:
            row_starts, row_pairs = _starts(per_row), torch.argsort(rows, stable=True).int()
        return cls(
            rows.int(),
            None if weights is None else weights[order].float(),
            _starts(torch.bincount(slots, minlength=num_slots)),
            row_starts,
            row_pairs,
            num_rows,
            leases,
        )

    @classmethod
    def from_samples(
        cls,
        entries: Sequence[Sequence[tuple[int, float]]],
        which: Sequence[int],
        lead: tuple[int, int],
        num_slots: int,
        device: torch.device | None = None,
        leases: tuple[Any, ...] = (),
    ) -> Routing:
        """An entry per sample, for all rows of that sample; laid out by one pass in C++, then moved.

        Args:
            entries: the distinct entries, each the (slot, weight) pairs of an adapter, a mix, or none.
            which: per sample, the index of its entry.
            lead: ``(outer, inner)``, the sizes of the activation's leading dimensions before and after the batch axis:
                row ``(o, s, i)`` belongs to sample ``s``.
            num_slots: slots of the pools this will be used with.
            device: where the routing goes (default: CPU).
        Raises:
            ValueError: an index out of range, a slot twice in one entry, or 2**31 rows or pairs and more.
        """
        outer, inner = lead
        lengths = [len(entry) for entry in entries]
        try:
            num_pairs = sum([lengths[k] for k in which]) * outer * inner
        except IndexError:
            raise ValueError(f"which: got {list(which)}, accepted are 0 to {len(entries) - 1}") from None
        num_rows = len(which) * outer * inner
        if min(lead) < 0 or max(num_pairs, num_rows) >= 2**31:
            raise ValueError(
                f"lead: {lead} makes {num_rows} rows and {num_pairs} pairs, accepted are 0 to 2**31 - 1 of each"
            )
        weighted = [1 for entry in entries for _, weight in entry if weight != 1.0]
        mixed = max(lengths, default=0) > 1
        arrays = (
            np.empty(num_pairs, np.int32),
            np.empty(num_pairs, np.float32) if weighted else None,
            np.empty(num_slots + 1, np.int32),
            np.empty(num_rows + 1, np.int32) if mixed else None,
            np.empty(num_pairs, np.int32) if mixed else None,
        )
        _cpu.fill_routing(arrays, entries, which, outer, inner)
        fields: list[Any] = [None if array is None else torch.from_numpy(array).to(device) for array in arrays]
        rows, weights, starts, row_starts, row_pairs = fields
        return cls(rows, weights, starts, row_starts, row_pairs, num_rows, leases)

    def explicit(self) -> Routing:
        """The same routing with no field None: weights of one and the pairs of each row are spelled out."""
        if self.padded:
            return self.exact().explicit()
        if self.weights is not None and self.row_starts is not None:
            return self
        weights = torch.ones(self.num_pairs, device=self.device) if self.weights is None else self.weights
        row_starts, row_pairs = self.row_starts, self.row_pairs
        if row_starts is None:
            row_starts = _starts(torch.bincount(self.rows.long(), minlength=self.num_rows))
            row_pairs = torch.argsort(self.rows, stable=True).int()
        return replace(self, weights=weights, row_starts=row_starts, row_pairs=row_pairs)

    def exact(self) -> Routing:
        """The same routing without padding, which takes a wait for the device; made once."""
        if not self.padded:
            return self
        if "_exact" not in self.__dict__:
            rows, weights, _, _, row_pairs = without_padding(self.tensors)
            made = replace(self, rows=rows, weights=weights, row_pairs=row_pairs, padded=False)
            made.rows.lora_leases = self.leases  # type: ignore[attr-defined]
            object.__setattr__(self, "_exact", made)
        return self.__dict__["_exact"]  # type: ignore[no-any-return]


def _sorted_unread(slots: Tensor, num_slots: int, flag: Tensor) -> tuple[Tensor, None, Tensor]:
    """``(rows, no weights, segment_starts)`` of ``from_slots`` without a wait; rows without a slot come last."""
    if slots.device.type == "cuda" and (sorted_ := sort_slots(slots, num_slots, flag)) is not None:
        return sorted_[0], None, sorted_[1]
    slots = slots.long()
    wrong = (slots < -1) | (slots >= num_slots)
    flag.logical_or_(wrong.any())
    key = torch.where(wrong | (slots < 0), num_slots, slots)
    counts = torch.zeros(num_slots + 1, dtype=torch.int32, device=slots.device)
    counts.index_add_(0, key, torch.ones_like(key, dtype=torch.int32))  # bincount would wait
    return torch.argsort(key, stable=True).int(), None, _starts(counts[:-1])


def _starts(counts: Tensor) -> Tensor:
    """Exclusive prefix sum with the total appended, int32."""
    starts = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:], dtype=torch.int32) if counts.shape[0] else None
    return starts
