"""The compact form of a sparse matrix: 16-bit columns or a bitmap, whichever is smaller, and the values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    def mask(self) -> Tensor:
        """``[num_rows, num_cols]`` bool, true where an entry is kept."""
        if self.bitmap is not None:
            shifts = torch.arange(8, dtype=torch.uint8, device=self.bitmap.device)
            bits = (self.bitmap[..., None] >> shifts) & 1
            return bits.view(self.num_rows, -1)[:, : self.num_cols].bool()
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
        return self.mask().nonzero()[:, 1]

    def flat_index(self) -> Tensor:
        """``[nnz]`` int64, each entry's place in the flattened dense matrix."""
        if self.columns is None:
            return self.mask().view(-1).nonzero()[:, 0]
        return self.row_index() * self.num_cols + self.column_index()

    def to_dense(self, base: Tensor | None = None) -> Tensor:
        """``[num_rows, num_cols]``: the entries in place, elsewhere zeros, or what ``base`` has there."""
        dense = self.values.new_zeros(self.shape) if base is None else base.clone()
        dense.view(-1)[self.flat_index()] = self.values.to(dense.dtype)
        return dense

    def to_csr(self) -> Tensor:
        """A ``torch.sparse_csr`` tensor with int64 indices."""
        return torch.sparse_csr_tensor(self.row_starts, self.column_index(), self.values, self.shape)

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

        if (self.columns is None) == (self.bitmap is None):
            refuse("expected either columns or a bitmap")
        if self.row_starts.dim() != 1 or self.row_starts.dtype != torch.int64 or self.num_rows < 0:
            refuse("row_starts is not a 1-d int64 tensor")
        if self.values.dim() != 1 or not self.values.dtype.is_floating_point:
            refuse("values is not a 1-d floating-point tensor")
        starts = self.row_starts
        if int(starts[0]) != 0 or int(starts[-1]) != self.nnz or bool((starts.diff() < 0).any()):
            refuse(f"row_starts does not rise from 0 to the {self.nnz} values")
        if self.bitmap is not None:
            want = (self.num_rows, -(-self.num_cols // _WORD) * 8)
            if self.bitmap.dtype != torch.uint8 or tuple(self.bitmap.shape) != want:
                refuse(f"bitmap has shape {list(self.bitmap.shape)}, expected {list(want)} of uint8")
            shifts = torch.arange(8, dtype=torch.uint8, device=self.bitmap.device)
            bits = ((self.bitmap[..., None] >> shifts) & 1).view(self.num_rows, -1)
            if bool(bits[:, self.num_cols :].any()) or not torch.equal(bits.sum(1, dtype=torch.int64), starts.diff()):
                refuse("the bitmap does not agree with row_starts")
        else:
            columns = self.columns
            assert columns is not None
            if columns.dtype != column_dtype(self.num_cols) or tuple(columns.shape) != (self.nnz,):
                refuse(f"columns is not a {column_dtype(self.num_cols)} tensor of {self.nnz}")
            index = columns.to(torch.int64)
            if self.nnz and (int(index.min()) < 0 or int(index.max()) >= self.num_cols):
                refuse(f"columns has values outside 0 to {self.num_cols - 1}")
            if bool((self.flat_index().diff() <= 0).any()):
                refuse("the columns of a row do not rise")


def bitmap_is_smaller(rows: int, cols: int, nnz: int) -> bool:
    """Whether a bitmap takes fewer bytes than the columns."""
    return rows * -(-cols // _WORD) * 8 < nnz * column_dtype(cols).itemsize


def column_dtype(cols: int) -> torch.dtype:
    return torch.uint16 if cols <= _SHORT_COLUMNS else torch.int32
