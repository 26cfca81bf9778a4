"""Whether a fine-tune fits its base model: the same names and shapes, as ``Weights`` under the base's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.sparse_adapter import same_bits
from lora_fuse.merging.weights import Entry, Weights

Patterns: TypeAlias = str | Sequence[str]
_SHOWN = 5


@dataclass(frozen=True)
class Odd:
    """What a report has to mention.

    Args:
        missing, extra: integer buffers (such as position ids, which some releases save and others do not) by name and
            fine-tune.
        rounded: fine-tune, its dtype and the base's, where the latter does not hold the former.
    """

    missing: list[tuple[str, str]] = field(default_factory=list)
    extra: list[tuple[str, str]] = field(default_factory=list)
    rounded: list[tuple[str, torch.dtype, torch.dtype]] = field(default_factory=list)

    def notes(self) -> list[str]:
        notes = []
        for pairs, text in (
            (self.missing, "{0!r}, not floating-point, is missing in {1}; the base's is used"),
            (self.extra, "{0!r}, not floating-point, is in {1} but not in the base; it is left out"),
        ):
            for name in dict.fromkeys(name for name, _ in pairs):
                notes.append(text.format(name, ", ".join(label for n, label in pairs if n == name)))
        for (label, theirs, ours), count in Counter(self.rounded).items():
            notes.append(
                f"{label}: {count} tensor{'s' if count > 1 else ''} rounded from {theirs} to the base's {ours}"
            )
        return notes


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern matches a parameter's name, or the path of a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def patterns_of(argument: str, given: Patterns) -> list[str]:
    """The patterns as a list.

    Raises:
        TypeError: something else than strings.
    """
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument}: expected patterns for parameter names, got {type(given).__name__}")
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected patterns for parameter names, got {type(pattern).__name__}")
    return patterns


def check_patterns(argument: str, patterns: Sequence[str], models: Sequence[Weights]) -> None:
    """Refuse a pattern that matches no name of any model; the first is the base.

    Raises:
        ValueError: as said.
    """
    everything = {name for weights in models for name in (*weights, *weights.aliases)}
    for pattern in patterns:
        if not any(matches(name, pattern) for name in everything):
            raise ValueError(f"{argument}: {pattern!r} matches no parameter; names look like {few(models[0])}")


def fit(base: Weights, task: Weights, own: Collection[str], heads: Sequence[str], odd: Odd) -> Weights:
    """The fine-tune under the base's canonical names, in the base's dtypes.

    Args:
        own: canonical names of the base's that are heads: the fine-tune may lack them or have other shapes and dtypes.
        heads: patterns of heads that the base lacks.
        odd: collects what a report should mention.
    Raises:
        ValueError: other names or shapes than the base's; tied weights that differ; values that overflow its dtype.
    """
    entries: dict[str, Entry] = {}
    missing: list[str] = []
    for name, ours in base.entries.items():
        names = [name, *(alias for alias, first in base.aliases.items() if first == name)]
        found = list(dict.fromkeys(task.aliases.get(n, n) for n in names if n in task.entries or n in task.aliases))
        if not found:
            if name in own:
                continue
            if ours.dtype.is_floating_point:
                missing.append(name)
            else:
                odd.missing.append((name, task.label))
            continue
        if any(not _equal(task, found[0], other) for other in found[1:]):
            raise ValueError(
                f"{task.label}: {', '.join(map(repr, names))} are one tensor in the base (tied weights), but differ "
                "here; untie them in the base first"
            )
        theirs = task.entries[found[0]]
        if name in own:
            entries[name] = theirs
            continue
        if theirs.shape != ours.shape:
            raise ValueError(
                f"{task.label}: {name!r} has shape {list(theirs.shape)}, the base's is {list(ours.shape)}; if every "
                f"task has its own, name it in heads="
            )
        entries[name] = _cast(task.label, name, theirs, ours)
        if torch.promote_types(theirs.dtype, ours.dtype) != ours.dtype:
            odd.rounded.append((task.label, theirs.dtype, ours.dtype))
    known = {*base.entries, *base.aliases}
    extra = []
    taken = {task.aliases.get(name, name) for name in known}
    for name in task.names:
        first = task.aliases.get(name, name)
        if name in known or first in taken:
            continue
        if any(matches(name, pattern) for pattern in heads):
            entries[name] = task.entries[first]  # tied heads under each of their names, as a state dict has them
        elif task.entries[first].dtype.is_floating_point:
            extra.append(name)
        else:
            odd.extra.append((name, task.label))
    if missing or extra:
        raise ValueError(_differences(task.label, missing, extra))
    return Weights(task.label, entries, {}, task.source)


def _equal(task: Weights, a: str, b: str) -> bool:
    return same_bits(task[a], task[b])


def _cast(label: str, name: str, theirs: Entry, ours: Entry) -> Entry:
    """``theirs`` in the base's dtype, as loading it into the base's model would round it."""
    if theirs.dtype == ours.dtype:
        return theirs
    if not (theirs.dtype.is_floating_point and ours.dtype.is_floating_point):
        raise ValueError(f"{label}: {name!r} is {theirs.dtype}, the base's is {ours.dtype}")

    def read() -> Tensor:
        tensor = theirs.read()
        rounded = tensor.to(ours.dtype)
        if all_finite(tensor) and not all_finite(rounded):
            raise ValueError(f"{label}: {name!r} overflows {ours.dtype}, the base's dtype")
        return rounded

    return replace(theirs, dtype=ours.dtype, read=read)


def _differences(label: str, missing: Sequence[str], extra: Sequence[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {few(missing)} of the base")
    if extra:
        parts.append(f"has {few(extra)}, which the base lacks")
    text = f"{label}: {' and '.join(parts)}"
    for names, others, advice in (
        (missing, extra, "the fine-tune's names start with {0!r}: give prefix={0!r}, and name heads in heads="),
        (extra, missing, "the base's names start with {0!r}: give models of the same class"),
    ):
        for name in names[:1]:
            if before := next((n.removesuffix(name) for n in others if n.endswith(f".{name}")), None):
                return f"{text}; {advice.format(before)}"
    if extra and not missing:
        text += "; if every task has its own, name them in heads="
    return text


def few(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    names = list(names)
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + rest
