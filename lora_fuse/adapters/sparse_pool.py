"""The sparse slots of one layer: every task's delta, packed as the kernel reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse import _cpu
from lora_fuse.adapters.sparse_runs import RunDelta, SlotTable, runs_of
from lora_fuse.ops.sparse_delta import register_pool
from lora_fuse.sparse import SparseMatrix, with_uint16, without_uint16

_LANES, _STRIP = _cpu.SPARSE_LANES, _cpu.SPARSE_STRIP


@dataclass(frozen=True, eq=False)
class PackedDelta:
    """One slot as CPU kernels read it: entries in the order of csrc/sparse.h, and a dense bias.

    Args:
        values: ``[steps * lanes]``, the pool's dtype; padding and the fillers of wide gaps hold 0.
        gaps: ``[steps * lanes]`` uint8 or uint16, columns since the lane's entry before (its first: since column 0).
        starts: ``[slices + 1]`` int64, in steps.
        order: ``[slices * lanes]`` uint8, each lane's output within its strip of 64, or 64 for none.
        bias: ``[out_features]``, fp32 (fp64 in a pool of fp64), or None. All others are None in a slot that is only a
            bias.
    """

    values: Tensor | None
    gaps: Tensor | None
    starts: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.gaps, self.starts, self.order, self.bias) if t is not None)

    def __getstate__(self) -> dict[str, Any]:
        return without_uint16(self.__dict__, "gaps")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(with_uint16(state, "gaps"))

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedDelta:
        """``fn`` of every tensor; the bias is moved, never cast."""
        parts = {
            name: None if t is None else fn(t)
            for name, t in (
                ("values", self.values),
                ("gaps", self.gaps),
                ("starts", self.starts),
                ("order", self.order),
            )
        }
        bias = self.bias
        if bias is not None:
            moved = fn(bias)
            bias = moved if moved.dtype == bias.dtype else bias.to(moved.device)
        return PackedDelta(**parts, bias=bias)

    def dense(self, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
        """``[out_features, in_features]``, any device."""
        if self.values is None or self.gaps is None or self.starts is None or self.order is None:
            assert self.bias is not None
            return self.bias.new_zeros(out_features, in_features, dtype=dtype)
        slices = torch.arange(self.starts.shape[0] - 1, device=self.starts.device)
        outputs = slices[:, None] // (_STRIP // _LANES) * _STRIP + self.order.view(-1, _LANES).long()  # [slices, lanes]
        rows = torch.repeat_interleave(outputs, self.starts.diff(), 0)  # [steps, lanes]
        whole = self.values.new_zeros(out_features + _STRIP + 1, in_features + 1, dtype=dtype)
        gaps = self.gaps.view(-1, _LANES).long()
        ends = torch.cat([gaps.new_zeros(1, _LANES), gaps.cumsum(0)])  # over all slices; each starts anew
        columns = ends[1:] - torch.repeat_interleave(ends[self.starts[:-1]], self.starts.diff(), 0)
        columns[(self.values == 0).view(-1, _LANES)] = in_features  # fillers and padding fall into the last column
        whole[rows.view(-1), columns.view(-1)] = self.values.to(dtype)
        return whole[:out_features, :in_features]


def pack(matrix: SparseMatrix, dtype: torch.dtype, bias: Tensor | None, device: torch.device) -> PackedDelta:
    """The packed form, on ``device``; packing itself runs on the CPU."""
    positions, rows = matrix.positions(), matrix.num_rows
    slices = rows // _STRIP * (_STRIP // _LANES) + -(-(rows % _STRIP) // _LANES)
    forms = []
    for gap_dtype in (torch.uint8, torch.uint16):  # short gaps need fillers where entries lie far apart
        starts = torch.empty(slices + 1, dtype=torch.int64)
        order = torch.empty(slices * _LANES, dtype=torch.uint8)
        entries = positions.order(starts, order, gap_dtype == torch.uint16) * _LANES
        forms.append((entries * (dtype.itemsize + gap_dtype.itemsize), entries, gap_dtype, starts, order))
    _, entries, gap_dtype, starts, order = min(forms, key=lambda form: form[0])
    values = torch.empty(entries, dtype=dtype)
    gaps = torch.empty(entries, dtype=gap_dtype)
    positions.pack(matrix.values.detach().to("cpu", dtype).contiguous(), starts, order, values, gaps)
    return PackedDelta(values, gaps, starts, order, bias).map(lambda t: t.to(device))


class SparsePool(nn.Module):
    """Slots for up to ``num_slots`` sparse task vectors of one layer.

    A slot holds the kept entries of ``[out_features, in_features]``, packed, and perhaps a dense bias delta. The slots
    follow ``.to()``, ``copy.deepcopy`` and pickling and stay out of the state dict. On a GPU they are packed for its
    kernels, and the other way round when they leave it; kernels find them by a table on the device, which is rewritten
    in the order of the stream, so captured graphs follow.

    Args:
        num_slots, in_features, out_features: positive.
        dtype: of the entries; the dtype of the activations.
    Raises:
        ValueError: a size that is not a positive integer, or a dtype that is not floating point.
    """

    anchor: Tensor

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        for name, size in {"num_slots": num_slots, "in_features": in_features, "out_features": out_features}.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, accepted is an integer from 1")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, accepted is a floating-point dtype")
        super().__init__()
        self.num_slots, self.in_features, self.out_features = num_slots, in_features, out_features
        self.packed: list[PackedDelta | RunDelta | None] = [None] * num_slots
        self.register_buffer("anchor", torch.empty(0, dtype=dtype, device=device), persistent=False)  # dtype, device
        self._rebuild()

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.packed if p is not None)

    @torch.no_grad()
    def write(self, slot: int, matrix: SparseMatrix | None, bias: Tensor | None = None) -> None:
        """Replace what a slot holds. Other slots are not touched, so forwards that use them may be running.

        Args:
            slot: index in ``[0, num_slots)``.
            matrix: entries of the weight's delta, ``[out_features, in_features]``, cast to the pool's dtype and copied;
                None: none.
            bias: ``[out_features]``, the bias's delta, kept in fp32 (fp64 in a pool of fp64), or None.
        Raises:
            ValueError: slot out of range, shapes that do not fit the layer, or a matrix with an index out of range;
                the slot stays as it was.
        """
        self._check_slot(slot)
        want = (self.out_features, self.in_features)
        if matrix is not None and matrix.shape != want:
            raise ValueError(f"matrix: expected shape {want}, got {matrix.shape}")
        if matrix is not None and matrix.values.shape[0] != int(matrix.row_starts[-1]):
            raise ValueError(f"matrix: {matrix.nnz} values, row_starts end at {int(matrix.row_starts[-1])}")
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias: expected shape ({self.out_features},), got {tuple(bias.shape)}")
        with torch.inference_mode(False):
            device = self.anchor.device
            wide = torch.promote_types(self.dtype, torch.float32)
            own = None if bias is None else bias.detach().to(device, wide, copy=True).contiguous()
            made: PackedDelta | RunDelta | None = None
            if matrix is not None:
                made = (runs_of if by_runs(device) else pack)(matrix, self.dtype, own, device)
            elif own is not None:
                made = (RunDelta if by_runs(device) else PackedDelta)(None, None, None, None, own)
            self._put(slot, made)

    def clear(self, slot: int) -> None:
        """Empty a slot.

        Raises:
            ValueError: slot out of range.
        """
        self._check_slot(slot)
        self._put(slot, None)

    def slots_as(self, dtype: torch.dtype) -> _cpu.SparseSlots | None:
        """The slots as the kernel reads them, entries cast to ``dtype``; None where it cannot."""
        if dtype == self.dtype or self.slots is None:
            return self.slots
        known = self._cast.get(dtype)
        if known is None:
            cast = [None if p is None else self._view(p.map(lambda t: _cast(t, dtype))) for p in self.packed]
            known = self._cast[dtype] = _cpu.SparseSlots(self.in_features, self.out_features, cast)
        return known

    def table_as(self, dtype: torch.dtype) -> Tensor | None:
        """The slots as GPU kernels find them, ``SlotTable.tensor``, values cast to ``dtype``; None on other devices."""
        if dtype not in self._tables and by_runs(self.anchor.device):
            with torch.no_grad(), torch.inference_mode(False):
                self._tables[dtype] = SlotTable(self._runs(), dtype, self.anchor.device)
        table = self._tables.get(dtype)
        return None if table is None else table.tensor

    def _runs(self) -> list[RunDelta | None]:
        return [p if isinstance(p, RunDelta) else None for p in self.packed]

    def dense(self, slot: int, dtype: torch.dtype) -> Tensor | None:
        """A slot's ``[out_features, in_features]``, for paths without a kernel; None if it holds no entries."""
        packed = self.packed[slot]
        if packed is None or packed.values is None:
            return None
        return packed.dense(self.out_features, self.in_features, dtype)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot: {slot} is out of range, this pool has slots 0 to {self.num_slots - 1}")

    def _put(self, slot: int, packed: PackedDelta | RunDelta | None) -> None:
        if packed is None or isinstance(packed, RunDelta):
            for table in self._tables.values():  # before the old content goes: what is queued may still read it
                table.put(slot, packed)
        views = list(self._views)
        views[slot] = self._view(packed)  # may refuse: nothing has changed yet
        self.packed[slot] = packed
        self._publish(views)

    def _view(self, p: PackedDelta | RunDelta | None) -> _cpu.SparseSlot | None:
        if not isinstance(p, PackedDelta) or self.anchor.device.type != "cpu":
            return None
        bias = None if p.bias is None else p.bias.float()
        return _cpu.SparseSlot(self.in_features, self.out_features, p.values, p.gaps, p.starts, p.order, bias)

    def _publish(self, views: list[_cpu.SparseSlot | None]) -> None:
        """A new set of slots for the CPU; a forward that runs keeps the set that it took."""
        self._views = views
        on_cpu = self.anchor.device.type == "cpu" and not by_runs(self.anchor.device)
        self.slots = _cpu.SparseSlots(self.in_features, self.out_features, views) if on_cpu else None
        self._cast: dict[torch.dtype, _cpu.SparseSlots] = {}

    def _rebuild(self) -> None:
        """All that is made from what the slots hold, where they now lie."""
        self._tables: dict[torch.dtype, SlotTable] = {}
        self.packed = [self._fitted(p) for p in self.packed]
        self._publish([self._view(p) for p in self.packed])
        self.table_as(self.dtype)  # now, since a capture could not make it
        if "handle" not in self.__dict__:
            self.handle = register_pool(self)

    def _fitted(self, p: PackedDelta | RunDelta | None) -> PackedDelta | RunDelta | None:
        """The same slot in the form that this device's kernels read."""
        device, runs = self.anchor.device, isinstance(p, RunDelta)
        if p is None or runs == by_runs(device) or (runs and device.type != "cpu"):
            return p
        if p.values is None:
            return (PackedDelta if runs else RunDelta)(None, None, None, None, p.bias)
        dense = p.dense(self.out_features, self.in_features, p.values.dtype)
        matrix = SparseMatrix.from_mask(dense, dense != 0)
        return (pack if runs else runs_of)(matrix, p.values.dtype, p.bias, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        with torch.no_grad(), torch.inference_mode(False):
            self.packed = [None if p is None else p.map(fn) for p in self.packed]
            self._rebuild()
        return self

    def __getstate__(self) -> dict[str, Any]:
        own = ("_views", "slots", "_cast", "_tables", "handle")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rebuild()

    def extra_repr(self) -> str:
        return f"slots={self.num_slots}, in={self.in_features}, out={self.out_features}"


def by_runs(device: torch.device) -> bool:
    """Whether a pool there holds ``RunDelta``."""
    return device.type == "cuda"


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t
