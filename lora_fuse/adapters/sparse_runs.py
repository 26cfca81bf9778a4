"""One slot of a sparse pool as GPU kernels read it, and the table of addresses by which they find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lora_fuse.sparse import SparseMatrix

CHUNK = 4096  # columns of x that a program holds at a time; entries are cut there
ALIGN = 16  # entries: what a thread loads at once
WORD = 64  # columns of a word of the bitmap
WIDEST = 255  # the widest gap
TABLE_FIELDS = 8  # addresses of values, gaps, starts, bitmap and bias (0: none); the rest pads a slot to 64 bytes


@dataclass(frozen=True, eq=False)
class RunDelta:
    """Entries by runs: output after output, each cut into runs of ``CHUNK`` columns, each padded to ``ALIGN`` entries.

    Few rows read values and gaps, 3 bytes an entry in bf16; many rows read values and the bitmap, which tells every
    element of a dense tile by itself where its value lies. Where a gap is wider than a byte holds, entries of value 0
    bridge it; they have bits in the bitmap too, padding has none.

    Args:
        values: ``[entries]``, the pool's dtype.
        gaps: ``[entries]`` uint8, columns since the run's entry before (its first: since the run's first column).
        starts: ``[out_features * chunks + 1]`` int32, where each run starts, in units of ``ALIGN`` entries.
        bitmap: ``[out_features, ceil(in_features / WORD)]`` int64, bit ``j`` of word ``w`` for column ``64 w + j``.
        bias: ``[out_features]``, fp32 (fp64 in a pool of fp64), or None. All others are None in a slot that is only a
            bias.
    """

    values: Tensor | None
    gaps: Tensor | None
    starts: Tensor | None
    bitmap: Tensor | None
    bias: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t is not None)

    def map(self, fn: Callable[[Tensor], Tensor]) -> RunDelta:
        """``fn`` of every tensor; the bias is moved, never cast."""
        made = RunDelta(*(None if t is None else fn(t) for t in self.tensors))
        if self.bias is None or made.bias is None or made.bias.dtype == self.bias.dtype:
            return made
        return replace(made, bias=self.bias.to(made.bias.device))

    def cast(self, dtype: torch.dtype) -> RunDelta:
        """The same entries with values of another dtype."""
        return self if self.values is None else replace(self, values=self.values.to(dtype))

    def dense(self, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
        """``[out_features, in_features]``, any device; without a wait for it."""
        if self.values is None or self.gaps is None or self.starts is None:
            assert self.bias is not None
            return self.bias.new_zeros(out_features, in_features, dtype=dtype)
        starts, entries = self.starts.long() * ALIGN, self.values.shape[0]
        runs = torch.repeat_interleave(starts.diff(), output_size=entries)
        ends = torch.cat([starts.new_zeros(1), self.gaps.long().cumsum(0)])
        chunks = -(-in_features // CHUNK)
        columns = ends[1:] - ends[starts[:-1]][runs] + runs % chunks * CHUNK
        columns = columns.masked_fill(self.values == 0, in_features)  # fillers and padding: a column to throw away
        whole = self.values.new_zeros(out_features, in_features + 1, dtype=dtype)
        whole[runs // chunks, columns] = self.values.to(dtype)
        return whole[:, :in_features]


def runs_of(matrix: SparseMatrix, dtype: torch.dtype, bias: Tensor | None, device: torch.device) -> RunDelta:
    """A matrix by runs, on ``device``, where it is made.

    Raises:
        ValueError: an index out of range, or columns that do not rise.
    """
    matrix.positions()  # checks them
    rows, cols = matrix.shape
    chunks = -(-cols // CHUNK)
    column, row = matrix.column_index().to(device), matrix.row_index().to(device)
    run = row * chunks + column // CHUNK
    first = torch.ones_like(run, dtype=torch.bool)
    first[1:] = run[1:] != run[:-1]
    before = torch.where(first, column // CHUNK * CHUNK, column.roll(1))
    fillers = (column - before - 1).clamp_min(0) // WIDEST
    ends = (fillers + 1).cumsum(0)  # of each entry and its fillers, were there no padding
    counts = torch.zeros(rows * chunks, dtype=torch.int64, device=device).index_add_(0, run, fillers + 1)
    blocks = (counts + ALIGN - 1) // ALIGN
    if matrix.nnz == 0:
        blocks[-1] = 1  # of padding: not an empty slot
    starts = torch.zeros(rows * chunks + 1, dtype=torch.int64, device=device)
    torch.cumsum(blocks, 0, out=starts[1:])
    entries = int(starts[-1]) * ALIGN
    if entries >= 2**31:
        raise ValueError(f"matrix: {entries} entries with padding, accepted are fewer than 2**31 on a GPU")
    place = ends - 1 + (starts[:-1] * ALIGN - (counts.cumsum(0) - counts))[run]
    values = torch.zeros(entries, dtype=dtype, device=device)
    values[place] = matrix.values.detach().to(device, dtype)
    gaps = torch.zeros(entries, dtype=torch.uint8, device=device)
    gaps[place] = (column - before - fillers * WIDEST).to(torch.uint8)
    of = torch.repeat_interleave(fillers)  # each filler's entry
    nth = torch.arange(of.shape[0], device=device) - (fillers.cumsum(0) - fillers)[of]  # among that entry's
    gaps[place[of] - 1 - nth] = WIDEST
    mask = torch.zeros(rows, -(-cols // WORD) * WORD, dtype=torch.uint8, device=device)
    mask[row, column] = 1
    mask[row[of], before[of] + WIDEST * (nth + 1)] = 1
    powers = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=device)
    bitmap = (mask.view(rows, -1, 8) * powers).sum(-1, dtype=torch.uint8).view(torch.int64)
    return RunDelta(values, gaps, starts.int(), bitmap, bias)


class SlotTable:
    """Where the slots of a pool lie, on the device itself: kernels look it up, so captured graphs follow every swap.

    Args:
        slots: what each holds.
        dtype: of the values that kernels will read; slots of another are cast.
        device: of the table.
    """

    def __init__(self, slots: Sequence[RunDelta | None], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.slots: list[RunDelta | None] = [None if slot is None else slot.cast(dtype) for slot in slots]
        rows = [_addresses(slot) for slot in self.slots]
        self.tensor = torch.tensor(rows, dtype=torch.int64).to(device)  # [num_slots, TABLE_FIELDS]

    def put(self, slot: int, delta: RunDelta | None) -> None:
        """Publish a slot's new content, in the order of the current stream; what it held must live until then."""
        made = None if delta is None else delta.cast(self.dtype)
        row = torch.tensor(_addresses(made), dtype=torch.int64)
        if self.tensor.device.type == "cuda":
            row = row.pin_memory()
        self.tensor.data[slot].copy_(row, non_blocking=True)
        self.slots[slot] = made


def _addresses(slot: RunDelta | None) -> list[int]:
    addresses = [] if slot is None else [0 if t is None else t.data_ptr() for t in slot.tensors]
    return addresses + [0] * (TABLE_FIELDS - len(addresses))
