"""What a sparse adapter is: one task's own weights at the places that a magnitude mask kept, and the rest in full."""

from __future__ import annotations

import difflib
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import _size
from lora_fuse.sparse import SparseMatrix


def fingerprint(tensor: Tensor) -> str:
    """Eight hex digits of the CRC-32 of dtype, shape and bytes (row-major, little-endian): equal for equal tensors."""
    flat = tensor.detach().to("cpu").contiguous()
    start = zlib.crc32(f"{flat.dtype} {list(flat.shape)}".encode())
    if not flat.numel():
        return f"{start:08x}"
    return f"{zlib.crc32(flat.reshape(-1).view(torch.uint8).numpy().data, start):08x}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; -0.0 and 0.0 differ, NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat_a, flat_b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(flat_a, flat_b)


@dataclass(frozen=True, eq=False)
class SparseAdapter:
    """One full fine-tune ``theta_t`` in compact form, relative to merged weights ``theta*`` that all tasks share.

    Task ``t`` runs ``theta*`` with ``theta_t``'s own values written in: at the kept places of the pruned parameters,
    and whole for everything else. Values are the fine-tune's, not differences, so nothing is rounded twice and density
    1 is the fine-tune bit for bit. What equals ``theta*`` in every bit (a frozen embedding) is left out.

    Args:
        matrices: parameter name -> ``theta_t``'s values at the kept places, in the weight's dtype; the weight is
            viewed as ``[shape[0], product of the rest]``.
        dense: parameter or buffer name -> ``theta_t``'s own, whole: biases, norms, whatever was not pruned.
        heads: parameter name -> the task's own; ``theta*`` may lack the parameter or have it in another shape.
        shapes: the original shape of each of ``matrices``.
        fingerprint: parameter name -> ``fingerprint`` of ``theta*``'s tensor, for every floating-point parameter of
            ``theta*`` but heads, and whatever else ``dense`` replaces.
        density: the share of entries that was asked for.
        source: where the fine-tune came from, for messages.
        squares: pruned parameter name -> sums of squares of ``theta_t - theta*``: over the kept places, and over all.
        aliases: other names of ``theta*``'s tensors (tied weights) -> the name used here.
    """

    matrices: Mapping[str, SparseMatrix]
    dense: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    fingerprint: Mapping[str, str]
    density: float
    source: str = "<memory>"
    squares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor the adapter holds."""
        for name in (*self.matrices, *self.dense, *self.heads):
            yield from self._held(name)

    def _held(self, name: str) -> list[Tensor]:
        matrix = self.matrices.get(name)
        if matrix is None:
            return [group[name] for group in (self.dense, self.heads) if name in group]
        parts = (matrix.values, matrix.row_starts, matrix.columns, matrix.bitmap)
        return [t for t in parts if t is not None]

    def agrees(self, a: str, b: str) -> bool:
        """Whether the task has the same of its own under two names: the same values at the same places, or nothing."""
        ours, theirs = self._held(a), self._held(b)
        return a == b or (len(ours) == len(theirs) and all(map(same_bits, ours, theirs)))

    @property
    def nnz(self) -> int:
        """Entries kept of the pruned parameters."""
        return sum(matrix.nnz for matrix in self.matrices.values())

    def num_parameters(self) -> int:
        """The task's own scalars: kept entries, dense parameters and heads; positions are not counted."""
        return self.nnz + sum(t.numel() for t in (*self.dense.values(), *self.heads.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, positions included."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def energy(self) -> float:
        """Share of the squared norm of ``theta_t - theta*`` that the kept places hold, over the pruned parameters.

        Computed in fp64 from the stored weights; 1 where the residual is zero.
        """
        total = math.fsum(whole for _, whole in self.squares.values())
        return min(1.0, math.fsum(kept for kept, _ in self.squares.values()) / total) if total > 0 else 1.0

    def residual(self, name: str, merged_weight: Tensor) -> SparseMatrix:
        """``theta_t - theta*`` at the kept places of one pruned parameter; what a mixed batch adds to ``theta*``.

        Args:
            name: one of ``matrices``.
            merged_weight: ``theta*``'s tensor, of shape ``shapes[name]``, on the matrix's device.
        Returns:
            The same places; differences formed in fp32 (fp64 for fp64) and rounded once to ``merged_weight``'s dtype.
        Raises:
            ValueError: no such matrix (close matches are named), or ``merged_weight`` has another shape.
        """
        matrix = self.matrices.get(name)
        if matrix is None:
            close = difflib.get_close_matches(name, self.matrices, n=3)
            advice = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"name: {self.source} has {len(self.matrices)} sparse matrices, but not {name!r}{advice}")
        if tuple(merged_weight.shape) != tuple(self.shapes[name]):
            raise ValueError(
                f"merged_weight: {name!r} has shape {list(self.shapes[name])}, got {list(merged_weight.shape)}"
            )
        wide = torch.float64 if torch.float64 in (matrix.values.dtype, merged_weight.dtype) else torch.float32
        there = matrix.read_from(merged_weight.detach().reshape(matrix.shape)).to(wide)
        return matrix.with_values((matrix.values.to(wide) - there).to(merged_weight.dtype))

    def check_merged(self, merged: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not the ``theta*`` this adapter belongs to.

        Raises:
            ValueError: naming the first parameter that is missing or differs.
        """
        for name, expected in self.fingerprint.items():
            tensor = merged.get(name)
            if tensor is None:
                raise ValueError(
                    f"merged: has no {name!r}; the sparse adapter from {self.source} belongs to other merged weights"
                )
            if fingerprint(tensor) != expected:
                raise ValueError(
                    f"merged: {name!r} ({tensor.dtype}, shape {list(tensor.shape)}) is not what the sparse adapter "
                    f"from {self.source} was made against; load the merged weights that belong to it first"
                )

    def state_dict(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's whole model: ``theta*`` with the task's values written in.

        Args:
            merged: ``theta*``. Names of one tensor (tied weights, ``aliases``) share the task's too.
        Returns:
            ``merged``'s names, then heads that it lacks. What the task changes is new; the rest is ``merged``'s own.
        Raises:
            ValueError: ``merged`` is not the ``theta*`` this adapter belongs to.
        """
        self.check_merged(merged)
        state = {name: t.detach() for name, t in merged.items()}
        for name, value in self._changed(merged).items():
            old = merged.get(name)
            for other, tensor in merged.items():
                if self.aliases.get(other) == name or (old is not None and _same_memory(tensor, old)):
                    state[other] = value
            state[name] = value
        return state

    def _changed(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        for name, matrix in self.matrices.items():
            weight = merged[name].detach()
            changed[name] = matrix.to_dense(weight.reshape(matrix.shape)).reshape(weight.shape)
        for name, tensor in (*self.dense.items(), *self.heads.items()):
            changed[name] = tensor.clone()
        return changed

    def check(self) -> None:
        """Check everything that readers and kernels rely on; for adapters that come from files.

        Raises:
            ValueError: naming the source, the parameter and what is wrong with it.
        """

        def refuse(name: str, what: str) -> None:
            raise ValueError(f"{self.source}: {name!r} {what}")

        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"{self.source}: density {self.density} is not in (0, 1]")
        groups = (self.matrices, self.dense, self.heads)
        for name, times in Counter(name for group in groups for name in group).items():
            if times > 1:
                refuse(name, "is held in two ways")
        if self.shapes.keys() != self.matrices.keys():
            refuse(min(self.shapes.keys() ^ self.matrices.keys()), "has a shape or a matrix, not both")
        for name, matrix in self.matrices.items():
            matrix.check(f"{self.source}: {name!r}")
            rows, *rest = self.shapes[name] or (0,)
            if matrix.shape != (rows, math.prod(rest)):
                refuse(name, f"is a {list(matrix.shape)} matrix for a weight of shape {list(self.shapes[name])}")
        for name in (*self.matrices, *self.dense):
            if name not in self.fingerprint:
                refuse(name, "has no fingerprint of the merged weights")
        for name, tensor in (
            *((name, matrix.values) for name, matrix in self.matrices.items()),
            *self.dense.items(),
            *self.heads.items(),
        ):
            if tensor.is_floating_point() and not all_finite(tensor):
                refuse(name, "has NaN or infinite entries")
        for name, (kept, whole) in self.squares.items():
            if not (0.0 <= kept <= whole * (1 + 1e-9) and math.isfinite(whole)):
                refuse(name, f"has sums of squares {kept} of {whole}")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``sparse_adapter.json`` and ``sparse_adapter.safetensors``; see ``adapters.sparse_files``.

        Args:
            directory: created if need be. A sparse adapter already in it is replaced; other files stay.
        Raises:
            ValueError: ``directory`` is a file, or the adapter is not sound.
        """
        from lora_fuse.adapters.sparse_files import save_sparse_adapter  # the writer imports this module

        save_sparse_adapter(self, directory)

    def __repr__(self) -> str:
        entries = sum(math.prod(shape) for shape in self.shapes.values())
        dtypes = Counter(str(m.values.dtype).removeprefix("torch.") for m in self.matrices.values())
        parts = [
            f"{self.nnz:,} of {entries:,} entries of {len(self.matrices)} matrices",
            f"{len(self.dense)} dense",
            *([f"heads {', '.join(self.heads)}"] if self.heads else []),
            f"density {self.density:g}",
            f"energy {self.energy:.4f}",
            f"{_size(self.nbytes)} {'/'.join(dtypes)}".rstrip(),
            f"from {self.source!r}",
        ]
        return f"SparseAdapter({', '.join(parts)})"


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.numel() > 0
        and a.data_ptr() == b.data_ptr()
        and (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
    )
