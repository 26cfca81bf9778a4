"""PERU-FFT: one merged model, and per task the few weights that matter most of what the merge took away."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint, same_bits
from lora_fuse.compress.peru_plan import Plan, make_plan
from lora_fuse.compress.peru_report import PeruReport, report_task
from lora_fuse.functional import sparsify
from lora_fuse.merging import full
from lora_fuse.merging.fit import Patterns, matches
from lora_fuse.merging.progress import track
from lora_fuse.merging.weights import Weights, WeightSource, open_weights
from lora_fuse.sparse import SparseMatrix

StateDict: TypeAlias = Mapping[str, Tensor]
Merge: TypeAlias = (
    Literal["task_arithmetic", "average", "ties"] | StateDict | Callable[[StateDict, Sequence[StateDict]], StateDict]
)
Scope: TypeAlias = Literal["global", "tensor", "row"]
MERGES = ("task_arithmetic", "average", "ties")
SCOPES = ("global", "tensor", "row")
_DEFAULT_SCALING = {"task_arithmetic": 0.3, "ties": 1.0}
_PIECE = 1 << 14  # entries that torch sums in one thread, so that sums do not depend on how many there are
# Task names are folders on disk, on file systems that know no case and reserve some characters.
_TASK_NAME = re.compile(r"[^\W_][\w .+@-]*(?<![ .])")


@dataclass(frozen=True, eq=False)
class Peru:
    """A merged model, and adapters that bring each fine-tune back.

    Args:
        merged: the base's names -> ``theta*``, new tensors in the base's dtypes; for ``model.load_state_dict``. Names
            that share storage in the base share one tensor here.
        adapters: task -> what turns ``merged`` into that task's model; for ``attach`` and ``switch_task``.
        report: entries, bytes and energy kept per task, and which parameter was treated how.
        aliases: other name -> name under which ``adapters`` and ``report`` speak of a shared tensor.
        settings: density, merge, scaling, trim and scope, as used.
    """

    merged: dict[str, Tensor]
    adapters: dict[str, SparseAdapter]
    report: PeruReport
    aliases: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def state_dict(self, task: str | None) -> dict[str, Tensor]:
        """A whole model: the merged one for None, else ``theta*`` with the task's values written in.

        Raises:
            ValueError: no such task (those there are get named), or ``merged`` was changed.
        """
        if task is None:
            return dict(self.merged)
        if task not in self.adapters:
            raise ValueError(f"task: no {task!r}; there are {', '.join(map(repr, self.adapters))}")
        return self.adapters[task].state_dict(self.merged)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``peru.json``, ``merged.safetensors`` and a folder per task; all of it appears or nothing.

        Args:
            directory: created if need be. What it holds of a PERU already is replaced; other files stay.
        Raises:
            ValueError: ``directory`` is a file; an adapter is not sound, or does not belong to ``merged``.
        """
        from lora_fuse.compress.peru_files import save_peru  # the writer imports this module

        save_peru(self, directory)

    def __repr__(self) -> str:
        return f"Peru({len(self.merged)} merged tensors, tasks {', '.join(self.adapters)}, {dict(self.settings)})"


@torch.no_grad()
def peru_fft(
    base: WeightSource,
    finetuned: Mapping[str, WeightSource],
    *,
    density: float = 0.1,
    merge: Merge = "task_arithmetic",
    scaling: float | None = None,
    scope: Scope = "global",
    exclude: Patterns = (),
    shared: Patterns = (),
    heads: Patterns = (),
    trim: float = 0.2,
    prefix: str = "",
    progress: bool = False,
) -> Peru:
    """Merge full fine-tunes, and keep of each the largest differences to the merge.

    ``theta* = theta_0 + scaling * sum_t (theta_t - theta_0)``; task ``t`` then runs ``theta*`` with ``theta_t``'s own
    values at the ``density`` largest ``|theta_t - theta*|``, and with its own biases and norms.

    *Pruned* are floating-point parameters with two dimensions or more (matrices, convolutions, embeddings). All others
    are *dense*: each task keeps its own whole. Patterns are shell-style and match a parameter's name or the path of a
    module that holds it; each has to match something. Parameters that share storage in the base count once.

    Magnitudes are those of the difference in fp32; exactly ``int(density * n)`` entries are kept per group (``scope``),
    ties to the lowest index. Nothing depends on the number of threads. Everything runs and ends up on the CPU.

    Args:
        base: ``theta_0``: a state dict, a module, a model folder or a safetensors file.
        finetuned: task -> ``theta_t``, as ``base``. Files are read a tensor at a time. Dtypes other than the base's are
            rounded to it, heads apart.
        density: share of the pruned entries to keep, ``0 < density <= 1``.
        merge: how to get ``theta*``: "task_arithmetic", "average", "ties", a function of the base's and the list of the
            fine-tunes' state dicts (canonical names, no heads) that returns one, or ``theta*`` itself as a state dict.
        scaling: lambda. None: 0.3 for "task_arithmetic", 1 for "ties"; the other merges take none.
        scope: what competes: "global", all of a task's pruned parameters; "tensor", each alone; "row", each row of
            ``[shape[0], rest]`` alone.
        exclude: patterns of parameters to hold dense, instead of pruned.
        shared: patterns of parameters that all tasks take from the merged model.
        heads: patterns of parameters that are each task's own and not merged. The base may lack them or have other
            shapes; where it has them, ``merged`` has the base's.
        trim: for "ties": share of each task vector that takes part.
        prefix: put before each of the base's names, for an encoder whose fine-tunes are classifiers around it: "bert."
            makes its ``encoder.layer.0...`` their ``bert.encoder.layer.0...``. ``merged`` has the longer names.
        progress: show bars on stderr.

    Returns:
        A ``Peru``.

    Raises:
        TypeError: a source or a merge of a kind that is not accepted.
        ValueError: no fine-tunes; unusable options; names or shapes that differ from the base's (close hints are
            given); NaN or infinite weights; tied weights that a fine-tune unties; a merge that overflows.

    Source: Jiang et al., arXiv:2310.01886, PERU-FFT (BYOM-FFT in its third version).
    """
    scaling = _check_options(finetuned, density, merge, scaling, scope, trim)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string such as 'bert.', got {type(prefix).__name__}")
    weights = open_weights("base", base).renamed(prefix)
    sources = {task: open_weights(f"finetuned[{task!r}]", source) for task, source in finetuned.items()}
    plan = make_plan(weights, sources, exclude, shared, heads)
    merged = _merged(weights, plan, merge, scaling, trim, heads, progress)
    prints = {
        name: fingerprint(merged[name])
        for name, treatment in plan.treatments.items()
        if treatment != "head" and merged[name].is_floating_point()
    }
    adapters = {}
    for name, task in track(list(plan.tasks.items()), "prune", progress):
        adapters[name] = _adapter(plan, task, merged, prints, density, scope)
    tasks = {
        name: report_task(adapter, plan.treatments, merged, plan.tasks[name].nbytes)
        for name, adapter in adapters.items()
    }
    report = PeruReport(tasks, plan.treatments, sum(merged[name].nbytes for name in weights), plan.notes)
    merged = {name: merged[plan.aliases.get(name, name)] for name in weights.names}
    kind = merge if isinstance(merge, str) else "given"
    settings = {"density": density, "merge": kind, "scaling": scaling, "scope": scope}
    return Peru(merged, adapters, report, plan.aliases, settings | ({"trim": trim} if merge == "ties" else {}))


def check_task_name(name: object) -> str:
    """A task's name, which is a folder's name on disk.

    Raises:
        TypeError, ValueError: not a string, or not usable as a folder's name everywhere.
    """
    if not isinstance(name, str):
        raise TypeError(f"finetuned: expected task names, got {name!r}")
    if not _TASK_NAME.fullmatch(name):
        raise ValueError(
            f"finetuned: {name!r} cannot be a task's name, which becomes a folder's; start with a letter or digit, and "
            "use letters, digits, blanks and any of _ . + @ -"
        )
    if name.casefold() in ("peru.json", "merged.safetensors"):
        raise ValueError(f"finetuned: {name!r} cannot be a task's name, a file of a PERU folder is called so")
    return name


def _check_options(
    finetuned: Any, density: Any, merge: Any, scaling: float | None, scope: Any, trim: float
) -> float | None:
    """Refuse options that cannot be used; the scaling that goes with the merge."""
    if not isinstance(finetuned, Mapping):
        raise TypeError(f"finetuned: expected a dict of fine-tunes by task, got {type(finetuned).__name__}")
    if not finetuned:
        raise ValueError("finetuned: expected at least one fine-tune, got none")
    folded: dict[str, str] = {}
    for name in map(check_task_name, finetuned):
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"finetuned: {other!r} and {name!r} differ in case only, and some file systems know none")
    for what, value in (("density", density), ("trim", trim)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
            raise ValueError(f"{what}: expected 0 < {what} <= 1, got {value!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if isinstance(merge, str):
        if merge not in MERGES:
            raise ValueError(f"merge: expected one of {', '.join(MERGES)}, a function or a state dict, got {merge!r}")
    elif not isinstance(merge, Mapping) and not callable(merge):
        raise TypeError(
            f"merge: expected one of {', '.join(MERGES)}, a function or a state dict, got {type(merge).__name__}"
        )
    default = _DEFAULT_SCALING.get(merge) if isinstance(merge, str) else None
    if scaling is None:
        return default
    if default is None:
        raise ValueError(
            f"scaling: {scaling} has no meaning for merge={merge if isinstance(merge, str) else 'given'!r}; "
            f"leave it out, or use {' or '.join(_DEFAULT_SCALING)}"
        )
    return full.check_scaling(scaling)


def _merged(
    base: Weights, plan: Plan, merge: Merge, scaling: float | None, trim: float, heads: Patterns, progress: bool
) -> dict[str, Tensor]:
    """``theta*`` under canonical names; heads are the base's."""
    body = {name: entry for name, entry in base.entries.items() if plan.treatments[name] != "head"}
    ours = Weights(base.label, body, {}, base.source)
    others = list(plan.tasks.values())
    if merge == "task_arithmetic":
        merged = full.task_arithmetic(ours, others, scaling or 0.0, progress=progress)
    elif merge == "average":
        merged = full.average(ours, others, progress=progress)
    elif merge == "ties":
        merged = full.ties(ours, others, scaling or 0.0, trim=trim, progress=progress)
    else:
        given = merge
        if not isinstance(merge, Mapping):
            given = merge(_copies(ours, ours), [_copies(other, ours) for other in others])
            if not isinstance(given, Mapping):
                raise TypeError(f"merge: the function returned {type(given).__name__}, expected a state dict")
        merged = _given(open_weights("merge", given), base, plan, heads)
    return merged | {name: base[name].clone() for name in base if name not in merged}


def _copies(weights: Weights, names: Weights) -> dict[str, Tensor]:
    """Copies, so that a caller's function may work in place."""
    return {name: weights[name].clone() for name in names if name in weights}


def _given(given: Weights, base: Weights, plan: Plan, heads: Patterns) -> dict[str, Tensor]:
    """A caller's ``theta*``, fitted to the base; what is not floating-point may be left out and is the base's then."""
    own = [heads] if isinstance(heads, str) else list(heads)
    merged = {}
    for name, ours in base.entries.items():
        names = [name, *(alias for alias, first in base.aliases.items() if first == name)]
        found = [given.aliases.get(n, n) for n in names if n in given.entries or n in given.aliases]
        if not found:
            if ours.dtype.is_floating_point and plan.treatments[name] != "head":
                raise ValueError(f"merge: lacks {name!r} of the base")
            merged[name] = base[name].clone()
            continue
        tensor = given[found[0]]
        if not all(same_bits(given[other], tensor) for other in found[1:]):
            raise ValueError(f"merge: {', '.join(map(repr, names))} are one tensor in the base, but differ here")
        if tuple(tensor.shape) != ours.shape or tensor.is_floating_point() != ours.dtype.is_floating_point:
            raise ValueError(
                f"merge: {name!r} is {tensor.dtype} of shape {list(tensor.shape)}, the base's is {ours.dtype} of shape "
                f"{list(ours.shape)}"
            )
        merged[name] = tensor.to(ours.dtype, copy=True).contiguous()
        if ours.dtype.is_floating_point and not all_finite(merged[name]):
            raise ValueError(f"merge: {name!r} overflows {ours.dtype}")
    known = {*base.entries, *base.aliases}
    extra = [n for n in (*given, *given.aliases) if n not in known and not any(matches(n, pattern) for pattern in own)]
    if extra:
        raise ValueError(f"merge: has {extra[0]!r}, which the base lacks")
    return merged


def _adapter(
    plan: Plan, task: Weights, merged: Mapping[str, Tensor], prints: Mapping[str, str], density: float, scope: Scope
) -> SparseAdapter:
    names = plan.named("pruned")
    own = [task[name] for name in names]
    targets = [merged[name] for name in names]
    found = sparsify(own, density, scope, minus=targets, values="x")
    matrices: dict[str, SparseMatrix] = {}
    squares: dict[str, tuple[float, float]] = {}
    for name, ours, target, matrix in zip(names, own, targets, found, strict=True):
        if not same_bits(ours, target):
            matrices[name] = matrix
            squares[name] = _squares(ours, target, matrix)
    dense = {name: task[name].clone() for name in plan.named("dense") if name in task}
    dense = {name: t.contiguous() for name, t in dense.items() if not same_bits(t, merged[name])}
    heads = {name: task[name].clone().contiguous() for name in plan.named("head") if name in task}
    prints = {**prints, **{name: fingerprint(merged[name]) for name in dense if name not in prints}}
    shapes = {name: tuple(merged[name].shape) for name in matrices}
    return SparseAdapter(matrices, dense, heads, shapes, prints, density, task.source, squares, plan.aliases)


def _squares(ours: Tensor, target: Tensor, matrix: SparseMatrix) -> tuple[float, float]:
    """Sums of squares of ``ours - target`` over the kept places and over all, in fp64."""
    kept = matrix.read_from(target.reshape(matrix.shape))
    return _square_sum(matrix.values, kept), _square_sum(ours.reshape(-1), target.reshape(-1))


def _square_sum(a: Tensor, b: Tensor) -> float:
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return math.fsum(float((x.double() - y.double()).square_().sum()) for x, y in pieces)
