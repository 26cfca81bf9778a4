"""The compact form of a sparse matrix: 16-bit columns or a bitmap, whichever is smaller, and the values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fuse import _cpu

_WORD = 64  # columns that one word of the bitmap covers
_SHORT_COLUMNS = 1 << 16


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """Kept entries of a ``[num_rows, num_cols]`` matrix, row by row, columns rising.

    Either ``columns`` or ``bitmap`` says where they lie, the other is None.

    Args:
        values: ``[nnz]``, floating.
        row_starts: ``[num_rows + 1]`` int64; row ``r`` owns entries ``row_starts[r]:row_starts[r + 1]``.
        columns: ``[nnz]`` uint16, or int32 where ``num_cols`` exceeds 65,536.
        bitmap: ``[num_rows, ceil(num_cols / 64) * 8]`` uint8; bit ``j`` of byte ``b`` (least significant first) stands
            for column ``8 b + j``; bits beyond ``num_cols`` are 0.
        num_cols: columns of the dense matrix.
    """

    values: Tensor
    row_starts: Tensor
    columns: Tensor | None
    bitmap: Tensor | None
    num_cols: int

    @property
    def num_rows(self) -> int:
        return int(self.row_starts.shape[0]) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.num_cols

    @property
    def nnz(self) -> int:
        return int(self.values.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes held: values, positions and row starts."""
        return sum(t.nbytes for t in (self.values, self.row_starts, self.columns, self.bitmap) if t is not None)

    @classmethod
    def from_mask(cls, dense: Tensor, mask: Tensor) -> SparseMatrix:
        """Keep the entries of ``dense [num_rows, num_cols]`` where ``mask`` (bool, same shape) is true."""
        rows, cols = dense.shape
        row_starts = torch.zeros(rows + 1, dtype=torch.int64, device=dense.device)
        torch.cumsum(mask.sum(1), 0, out=row_starts[1:])
        values = dense[mask]
        columns = bitmap = None
        if bitmap_is_smaller(rows, cols, int(values.shape[0])):
            words = -(-cols // _WORD)
            bits = torch.zeros(rows, words * _WORD, dtype=torch.uint8, device=dense.device)
            bits[:, :cols] = mask
            powers = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=dense.device)
            bitmap = (bits.view(rows, -1, 8) * powers).sum(-1, dtype=torch.uint8)
        else:
            columns = mask.nonzero()[:, 1].to(column_dtype(cols))
        return cls(values, row_starts, columns, bitmap, cols)

    def positions(self) -> _cpu.SparsePositions:
        """Where the entries lie, as the kernels read it: checked, and kept until one of the tensors is written.

        Raises:
            ValueError: an index out of range, columns that do not rise within a row, or a bitmap that does not agree
                with ``row_starts``.
        """
        parts = [self.row_starts, self.columns, self.bitmap]
        versions = [-1 if t is None or t.is_inference() else t._version for t in parts]
        known: tuple[list[int], _cpu.SparsePositions] | None = self.__dict__.get("_positions")
        if known is None or known[0] != versions:
            columns, bitmap = (None if t is None else t.detach().cpu().contiguous() for t in parts[1:])
            starts = self.row_starts.detach().cpu().contiguous()
            known = versions, _cpu.SparsePositions(starts, columns, bitmap, self.num_cols)
            if self.row_starts.device.type == "cpu":  # else it would keep a copy alive
                object.__setattr__(self, "_positions", known)
        return known[1]

    def with_values(self, values: Tensor) -> SparseMatrix:
        """Other values ``[nnz]`` at the same places, which need not be checked again."""
        other = replace(self, values=values)
        if "_positions" in self.__dict__:
            object.__setattr__(other, "_positions", self.__dict__["_positions"])
        return other

    def __getstate__(self) -> dict[str, Any]:
        return without_uint16({name: value for name, value in self.__dict__.items() if name != "_positions"}, "columns")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(with_uint16(state, "columns"))

    def write_into(self, weight: Tensor, values: Tensor | None = None, saved: Tensor | None = None) -> Tensor:
        """Put the entries in place: ``weight[kept] = values``, in one pass over the kept places.

        Args:
            weight: ``[num_rows, num_cols]``, written in place (its version is bumped). A contiguous CPU tensor takes
                the kernel, any other plain torch.
            values: ``[nnz]``, cast to the dtype of ``weight``; ``self.values`` if None.
            saved: ``[nnz]``, dtype and device of ``weight``: gets the entries that were there, so that
                ``write_into(weight, saved)`` undoes the call bit for bit. May not be ``values``.
        Returns:
            ``weight``.
        Raises:
            ValueError: shapes, dtypes or devices disagree, or ``values`` and ``saved`` share memory; nothing
                is written.
        """
        write_all([Write(self, weight, self.values if values is None else values, saved)])
        return weight

    @torch.no_grad()
    def read_from(self, weight: Tensor) -> Tensor:
        """What a dense ``[num_rows, num_cols]`` holds at the kept places: ``[nnz]``, dtype and device of ``weight``.

        Raises:
            ValueError: ``weight`` has another shape.
        """
        _check_weight(self, weight)
        if not _kernel_writes(self, weight):
            return weight.detach().reshape(-1)[self.flat_index().to(weight.device)]
        there = torch.empty(self.nnz, dtype=weight.dtype)
        _cpu.sparse_write([(self.positions(), weight.detach(), None, there)], torch.get_num_threads())
        return there

    def mask(self) -> Tensor:
        """``[num_rows, num_cols]`` bool, true where an entry is kept."""
        if self.bitmap is not None:
            shifts = torch.arange(8, dtype=torch.uint8, device=self.bitmap.device)
            bits = (self.bitmap[..., None] >> shifts) & 1
            return bits.flatten(1)[:, : self.num_cols].bool()
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        mask.view(-1)[self.flat_index()] = True
        return mask

    def row_index(self) -> Tensor:
        """``[nnz]`` int64, the row of each entry."""
        rows = torch.arange(self.num_rows, device=self.row_starts.device)
        return torch.repeat_interleave(rows, self.row_starts.diff(), output_size=self.nnz)

    def column_index(self) -> Tensor:
        """``[nnz]`` int64, the column of each entry."""
        if self.columns is not None:
            return self.columns.to(torch.int64)
        if self.row_starts.device.type == "cpu":
            index = torch.empty(self.nnz, dtype=torch.int64)
            self.positions().column_index(index)
            return index
        return self.mask().nonzero()[:, 1]

    def flat_index(self) -> Tensor:
        """``[nnz]`` int64, each entry's place in the flattened dense matrix."""
        return self.row_index() * self.num_cols + self.column_index()

    def to_dense(self, base: Tensor | None = None) -> Tensor:
        """``[num_rows, num_cols]``: the entries in place, elsewhere zeros, or what ``base`` has there."""
        dense = self.values.new_zeros(self.shape) if base is None else base.clone(memory_format=torch.contiguous_format)
        return self.write_into(dense)

    def to_csr(self) -> Tensor:
        """A ``torch.sparse_csr`` tensor with int64 indices."""
        return torch.sparse_csr_tensor(
            self.row_starts, self.column_index(), self.values, self.shape, check_invariants=False
        )

    @classmethod
    def from_csr(cls, csr: Tensor) -> SparseMatrix:
        """The compact form of a two-dimensional ``torch.sparse_csr`` tensor; explicit zeros stay.

        Raises:
            ValueError: not a two-dimensional CSR tensor, or its columns do not rise within every row.
        """
        if csr.layout is not torch.sparse_csr or csr.dim() != 2:
            raise ValueError(
                f"csr: expected a 2-d torch.sparse_csr tensor, got {csr.layout} with {csr.dim()} dimensions"
            )
        starts, columns = csr.crow_indices().to(torch.int64), csr.col_indices().to(torch.int64)
        rows, cols = csr.shape
        plain = cls(csr.values(), starts, columns, None, cols)
        if bool((plain.flat_index().diff() <= 0).any()):
            raise ValueError("csr: the columns of every row must rise")
        if bitmap_is_smaller(rows, cols, plain.nnz):
            mask = torch.zeros(rows, cols, dtype=torch.bool, device=columns.device)
            mask.view(-1)[plain.flat_index()] = True
            positions = cls.from_mask(mask, mask)
            return replace(positions, values=plain.values)
        return replace(plain, columns=columns.to(column_dtype(cols)))

    def check(self, name: str) -> None:
        """Check everything that a kernel relies on; for matrices that come from files.

        Raises:
            ValueError: naming ``name`` and what is wrong.
        """

        def refuse(what: str) -> None:
            raise ValueError(f"{name}: {what}")

        if self.values.dim() != 1 or not self.values.dtype.is_floating_point:
            refuse("values is not a 1-d floating-point tensor")
        if self.columns is not None and self.columns.dtype != column_dtype(self.num_cols):
            refuse(f"columns is not a {column_dtype(self.num_cols)} tensor")
        try:
            self.positions()
        except (TypeError, ValueError) as error:
            refuse(str(error))
        if int(self.row_starts[-1]) != self.nnz:
            refuse(f"row_starts ends at {int(self.row_starts[-1])}, there are {self.nnz} values")


class Write(NamedTuple):
    """One ``SparseMatrix.write_into``."""

    matrix: SparseMatrix
    weight: Tensor
    values: Tensor
    saved: Tensor | None = None


@torch.no_grad()
def write_all(writes: Iterable[Write]) -> None:
    """Many ``SparseMatrix.write_into`` at once, on all threads.

    Raises:
        ValueError: as ``write_into``, or a tensor that is written shares memory with another; nothing is written.
    """
    together: list[tuple[_cpu.SparsePositions, Tensor, Tensor | None, Tensor | None]] = []
    apart: list[Write] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for matrix, weight, values, saved in writes:
        _check_weight(matrix, weight)
        if values.shape != (matrix.nnz,):
            raise ValueError(f"values: expected shape [{matrix.nnz}], got {list(values.shape)}")
        if saved is not None:
            _check_saved(matrix, weight, values, saved)
        values = values.to(device=weight.device, dtype=weight.dtype)
        if _kernel_writes(matrix, weight):
            target = saved
            if saved is not None and not saved.is_contiguous():
                target = torch.empty_like(values)
                copies.append((saved, target))
            together.append((matrix.positions(), weight.detach(), values.contiguous(), target))
        else:
            apart.append(Write(matrix, weight, values, saved))
    _cpu.sparse_write(together, torch.get_num_threads())
    for saved, target in copies:
        saved.copy_(target)
    for matrix, weight, values, saved in apart:
        index = matrix.flat_index().to(weight.device)
        at = torch.div(index, max(matrix.num_cols, 1), rounding_mode="floor"), index % max(matrix.num_cols, 1)
        if saved is not None:
            saved.copy_(weight[at])
        weight[at] = values


def _check_weight(matrix: SparseMatrix, weight: Tensor) -> None:
    if weight.shape != matrix.shape:
        raise ValueError(f"weight: expected shape {list(matrix.shape)}, got {list(weight.shape)}")


def _kernel_writes(matrix: SparseMatrix, weight: Tensor) -> bool:
    """Whether the kernel may read and write this weight."""
    if weight.device.type != "cpu" or matrix.row_starts.device.type != "cpu" or weight.is_neg():
        return False
    return weight.is_contiguous() and weight.element_size() in (2, 4, 8) and not weight.is_complex()


def _check_saved(matrix: SparseMatrix, weight: Tensor, values: Tensor, saved: Tensor) -> None:
    if saved.shape != (matrix.nnz,) or saved.dtype != weight.dtype or saved.device != weight.device:
        raise ValueError(
            f"saved: expected shape [{matrix.nnz}], {weight.dtype} on {weight.device}, "
            f"got {list(saved.shape)}, {saved.dtype} on {saved.device}"
        )
    if matrix.nnz and saved.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
        raise ValueError("values, saved: share memory")


def bitmap_is_smaller(rows: int, cols: int, nnz: int) -> bool:
    """Whether a bitmap takes fewer bytes than the columns."""
    return rows * -(-cols // _WORD) * 8 < nnz * column_dtype(cols).itemsize


def column_dtype(cols: int) -> torch.dtype:
    return torch.uint16 if cols <= _SHORT_COLUMNS else torch.int32


def without_uint16(state: dict[str, Any], name: str) -> dict[str, Any]:
    """For pickle, which does not take uint16 tensors: ``state[name]`` as int16, the same bits."""
    short = state[name] is not None and state[name].dtype == torch.uint16
    return state | {name: state[name].view(torch.int16)} if short else state


def with_uint16(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The inverse of ``without_uint16``."""
    short = state[name] is not None and state[name].dtype == torch.int16
    return state | {name: state[name].view(torch.uint16)} if short else state
