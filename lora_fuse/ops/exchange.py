"""Entries of many weights exchanged for a fine-tune's own, and back: one launch per device and size of element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_fuse.sparse import SparseMatrix

PIECE = 1024  # elements of a tensor without a matrix that count as a row
# A table has for each entry: addresses of weight, own, row starts, bitmap and columns (0: none); columns; rows of the
# entries before; place in the arena.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Entry(NamedTuple):
    """One weight, and what a fine-tune has of its own there; all on one device.

    Args:
        matrix: where the values lie; None: they are the whole tensor.
        weight: contiguous.
        own: the values in the dtype of ``weight``, contiguous, at least one.
    """

    matrix: SparseMatrix | None
    weight: Tensor
    own: Tensor


def takes(weight: Tensor) -> bool:
    """Whether an exchange may have this weight."""
    if weight.device.type != "cuda" or not _fit(weight):
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _fit(weight: Tensor) -> bool:
    plain = weight.is_contiguous() and not (weight.is_neg() or weight.is_conj() or weight.is_inference())
    return plain and weight.element_size() in _BITS


class _Group:
    """The entries of one device and size of element; addresses of weights, but not the weights."""

    def __init__(self, indices: list[int], entries: Sequence[Entry]) -> None:
        self.indices = indices
        table, rows, before, self.size = [], [], 0, 0
        for i in indices:
            matrix, weight, own = entries[i]
            where: tuple[Tensor | None, ...] = (None, None, None)
            count, cols = -(-weight.numel() // PIECE), weight.numel()
            if matrix is not None:
                where = (matrix.row_starts, matrix.bitmap, matrix.columns)
                count, cols = matrix.num_rows, matrix.num_cols
            addresses = [0 if t is None else t.data_ptr() for t in (weight, own, *where)]
            table.append([*addresses, cols, before, self.size])
            rows.append(count)
            before, self.size = before + count, self.size + own.numel()
        if before >= 2**31:
            raise ValueError(f"weights: have {before} rows in all, accepted are fewer than 2**31")
        weight = entries[indices[0]].weight
        self.bits, self.device = _BITS[weight.element_size()], weight.device
        self.table = torch.tensor(table, dtype=torch.int64).to(self.device)
        owners = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(rows))
        self.owners = owners.to(self.device)

    def run(self, weights: Sequence[Tensor], room: Sequence[Tensor], back: bool) -> None:
        from lora_fuse.kernels.exchange import exchange_  # triton, only where there is a device for it

        first = room[self.indices[0]].view(self.bits)
        arena = torch.empty(0, dtype=self.bits, device=self.device)
        arena.set_(first.untyped_storage(), first.storage_offset(), (self.size,), (1,))
        exchange_(self.table, self.owners, arena, back, PIECE)
        torch.autograd.graph.increment_version([weights[i] for i in self.indices])


class Exchange:
    """One fine-tune's entries, ready to be written: tables on the device, made once, that hold for as long as the
    weights lie where they lie. The weights themselves are not kept.

    Args:
        entries: weights that ``takes`` takes; none share memory.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._alive = [(e.matrix, e.own) for e in entries]
        self._forms = [(e.weight.dtype, e.own.shape) for e in entries]
        self._places = [_place(e.weight) for e in entries]
        groups: dict[tuple[torch.device, int], list[int]] = {}
        for i, entry in enumerate(entries):
            groups.setdefault((entry.weight.device, entry.weight.element_size()), []).append(i)
        self._groups = [_Group(indices, entries) for indices in groups.values()]

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights it was made for, where they were."""
        return self._places == [_place(weight) for weight in weights]

    def make_room(self) -> list[Tensor]:
        """For what ``write`` overwrites: of each entry, in one piece of memory for each device and size of element."""
        room: dict[int, Tensor] = {}
        for group in self._groups:
            arena = torch.empty(group.size, dtype=group.bits, device=group.device)
            parts = arena.split([self._forms[i][1].numel() for i in group.indices])
            for i, part in zip(group.indices, parts, strict=True):
                dtype, shape = self._forms[i]
                room[i] = part.view(dtype).view(shape)
        return [room[i] for i in range(len(room))]

    def write(self, weights: Sequence[Tensor], room: Sequence[Tensor]) -> None:
        """``room = weight[kept]; weight[kept] = own`` of every entry; versions are bumped as groups are written."""
        for group in self._groups:
            group.run(weights, room, False)

    def undo(self, weights: Sequence[Tensor], room: Sequence[Tensor]) -> bool:
        """``weight[kept] = room`` of every entry. False, and nothing done, if the room is not as ``make_room`` makes
        it."""
        for group in self._groups:
            at = room[group.indices[0]].data_ptr()
            for i in group.indices:
                part, (dtype, shape) = room[i], self._forms[i]
                if (part.dtype, part.shape, part.device, part.data_ptr()) != (dtype, shape, group.device, at):
                    return False
                at += part.nbytes
            memory = room[group.indices[0]].untyped_storage()
            if at > memory.data_ptr() + memory.nbytes():
                return False
        for group in self._groups:
            group.run(weights, room, True)
        return True


class Exchanges:
    """The exchanges of a model, by fine-tune, for as long as that lives; copies and pickles have none."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[Any, Exchange] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Exchanges], tuple[()]]:
        return Exchanges, ()


def _place(weight: Tensor) -> tuple[int, torch.device, torch.dtype, torch.Size]:
    return weight.data_ptr(), weight.device, weight.dtype, weight.shape
