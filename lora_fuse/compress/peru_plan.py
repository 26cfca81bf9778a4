"""Which parameter of a model gets which treatment under PERU-FFT, and whether the fine-tunes fit the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lora_fuse.merging.fit import Odd, Patterns, check_patterns, fit, matches, patterns_of
from lora_fuse.merging.weights import Entry, Weights

Treatment: TypeAlias = Literal["pruned", "dense", "shared", "head"]


@dataclass(frozen=True)
class Plan:
    """Names are canonical: where several share memory in the base, the first one.

    Args:
        treatments: name -> what becomes of it; the base's names in its order, then heads that it lacks.
        aliases: other name -> canonical name, the base's.
        tasks: task -> the fine-tune under canonical names, heads included; floats in the base's dtypes, heads as given.
        notes: what was left out, for the report.
    """

    treatments: Mapping[str, Treatment]
    aliases: Mapping[str, str]
    tasks: Mapping[str, Weights]
    notes: Sequence[str]

    def named(self, *treatments: Treatment) -> list[str]:
        return [name for name, treatment in self.treatments.items() if treatment in treatments]


def make_plan(
    base: Weights, finetuned: Mapping[str, Weights], exclude: Patterns, shared: Patterns, heads: Patterns
) -> Plan:
    """Sort every parameter by treatment, and fit the fine-tunes to the base.

    Raises:
        ValueError: a pattern matches nothing, a parameter matches two kinds of pattern, part of the names of one
            shared tensor are heads, or a fine-tune has other names or shapes than the base.
    """
    kinds: dict[Treatment, list[str]] = {
        "dense": patterns_of("exclude", exclude),
        "shared": patterns_of("shared", shared),
        "head": patterns_of("heads", heads),
    }
    for argument, patterns in zip(("exclude", "shared", "heads"), kinds.values(), strict=True):
        check_patterns(argument, patterns, [base, *finetuned.values()])

    def kind_of(name: str) -> Treatment | None:
        found = [kind for kind, patterns in kinds.items() if any(matches(name, p) for p in patterns)]
        if len(found) > 1:
            words = {"dense": "exclude", "shared": "shared", "head": "heads"}
            raise ValueError(f"{' and '.join(words[f] for f in found)}: both match {name!r}; a parameter is one thing")
        return found[0] if found else None

    treatments: dict[str, Treatment] = {}
    for name, entry in base.entries.items():
        names = [name, *(alias for alias, first in base.aliases.items() if first == name)]
        asked = {n: kind for n in names if (kind := kind_of(n)) is not None}
        if len(set(asked.values())) > 1 or ("head" in asked.values() and len(asked) < len(names)):
            raise ValueError(
                f"heads, shared, exclude: {', '.join(map(repr, names))} are one tensor in the base (tied weights), so "
                "the patterns have to treat them alike; untie them first if they are to differ"
            )
        treatments[name] = next(iter(asked.values()), "pruned" if _prunable(entry) else "dense")
    odd = Odd()
    own = {name for name, treatment in treatments.items() if treatment == "head"}
    tasks = {task: fit(base, weights, own, kinds["head"], odd) for task, weights in finetuned.items()}
    for weights in tasks.values():
        treatments.update(dict.fromkeys((name for name in weights if name not in treatments), "head"))
    return Plan(treatments, base.aliases, tasks, odd.notes())


def _prunable(entry: Entry) -> bool:
    return entry.dtype.is_floating_point and len(entry.shape) >= 2 and entry.numel > 0
