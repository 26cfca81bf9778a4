"""What PERU-FFT kept, in entries, bytes and energy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.compress.peru_plan import Treatment


@dataclass(frozen=True)
class ParameterReport:
    """One pruned parameter of one task: entries, and sums of squares of ``theta_t - theta*`` in fp64."""

    entries: int
    kept: int
    squared_norm: float
    squared_kept: float

    @property
    def energy(self) -> float:
        """Share of the squared norm that was kept; 1 for a residual that is zero."""
        return min(1.0, self.squared_kept / self.squared_norm) if self.squared_norm > 0 else 1.0


@dataclass(frozen=True)
class TaskReport:
    """One task.

    Args:
        parameters: pruned parameter name -> what was kept. One that equals the merged model's in every bit has 0 kept.
        unchanged: names of pruned or dense parameters that equal the merged model's, so that nothing is held of them.
        nbytes_finetuned: bytes of the fine-tune's tensors, shared storage counted once.
        nbytes_values, nbytes_positions: of the sparse matrices.
        nbytes_dense, nbytes_heads: of the parameters that are held whole.
    """

    parameters: Mapping[str, ParameterReport]
    unchanged: Sequence[str]
    nbytes_finetuned: int
    nbytes_values: int
    nbytes_positions: int
    nbytes_dense: int
    nbytes_heads: int

    @property
    def entries(self) -> int:
        """Entries of all pruned parameters."""
        return sum(p.entries for p in self.parameters.values())

    @property
    def kept(self) -> int:
        """Entries kept of them."""
        return sum(p.kept for p in self.parameters.values())

    @property
    def energy(self) -> float:
        """Share of the squared norm of ``theta_t - theta*`` that was kept, over the pruned parameters."""
        total = math.fsum(p.squared_norm for p in self.parameters.values())
        return min(1.0, math.fsum(p.squared_kept for p in self.parameters.values()) / total) if total > 0 else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of everything the task's adapter holds."""
        return self.nbytes_values + self.nbytes_positions + self.nbytes_dense + self.nbytes_heads


@dataclass(frozen=True)
class PeruReport:
    """What ``peru_fft`` did; ``str()`` gives a table with a line per task, and what was treated how.

    Args:
        tasks: by name.
        treatments: parameter name -> "pruned", "dense" (each task's own, whole), "shared" (the merged model's) or
            "head" (each task's own, not merged).
        nbytes_merged: bytes of the merged model, shared storage counted once.
        notes: what was left out.
    """

    tasks: Mapping[str, TaskReport]
    treatments: Mapping[str, Treatment]
    nbytes_merged: int
    notes: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the merged model and all tasks."""
        return self.nbytes_merged + sum(task.nbytes for task in self.tasks.values())

    @property
    def nbytes_finetuned(self) -> int:
        """Bytes of the fine-tunes that these replace."""
        return sum(task.nbytes_finetuned for task in self.tasks.values())

    def __str__(self) -> str:
        width = max(map(len, (*self.tasks, "merged")))
        titles = f"{'task':{width}}  {'kept':>12}  {'of':>14}  {'energy kept':>11}  {'bytes':>14}  {'fine-tune':>14}"
        lines = [titles, f"{'merged':{width}}  {'':>12}  {'':>14}  {'':>11}  {self.nbytes_merged:>14,}"]
        for name, t in self.tasks.items():
            lines.append(
                f"{name:{width}}  {t.kept:>12,}  {t.entries:>14,}  {t.energy:>11.4f}  {t.nbytes:>14,}  "
                f"{t.nbytes_finetuned:>14,}"
            )
        lines.append(f"{'all':{width}}  {'':>12}  {'':>14}  {'':>11}  {self.nbytes:>14,}  {self.nbytes_finetuned:>14,}")
        lines.append(treatment_text(self.treatments))
        return "\n".join([*lines, *self.notes])


def treatment_text(treatments: Mapping[str, Treatment]) -> str:
    """Such as ``parameters: 40 pruned, 63 dense, 2 head (classifier.weight, classifier.bias)``."""
    parts = []
    for kind, count in Counter(treatments.values()).items():
        names = [name for name, treatment in treatments.items() if treatment == kind]
        few = f" ({', '.join(names)})" if kind in ("shared", "head") and count <= 4 else ""
        parts.append(f"{count} {kind}{few}")
    return f"parameters: {', '.join(parts)}"


def report_task(
    adapter: SparseAdapter, treatments: Mapping[str, Treatment], merged: Mapping[str, Tensor], nbytes_finetuned: int
) -> TaskReport:
    """The figures of one adapter; ``treatments`` under canonical names."""
    parameters = {}
    for name, treatment in treatments.items():
        if treatment == "pruned":
            kept, norm = adapter.squares.get(name, (0.0, 0.0))
            nnz = adapter.matrices[name].nnz if name in adapter.matrices else 0
            parameters[name] = ParameterReport(merged[name].numel(), nnz, norm, kept)
    unchanged = [
        name
        for name, treatment in treatments.items()
        if treatment in ("pruned", "dense") and name not in adapter.matrices and name not in adapter.dense
    ]
    values = sum(matrix.values.nbytes for matrix in adapter.matrices.values())
    return TaskReport(
        parameters,
        unchanged,
        nbytes_finetuned,
        values,
        sum(matrix.nbytes for matrix in adapter.matrices.values()) - values,
        sum(t.nbytes for t in adapter.dense.values()),
        sum(t.nbytes for t in adapter.heads.values()),
    )
