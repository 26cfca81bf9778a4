"""Plans that a user puts in place of the shipped ones: rules, each with the shapes that it is for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any

from lora_fuse.kernels.configs import PROCESSORS, SPLIT_ALIGN, Plan, plan

Given = Sequence[Mapping[str, Any]]
_MOST_PLANES = 32  # each is unrolled in the expand
_DTYPES, _BACKENDS = ("float32", "bfloat16", "float16"), ("cuda", "hip")
_SIZES = ("in_features", "out_features", "max_rank", "slices")
_OF_LAYER = {"in_features", "max_rank", "dtype", "backend"}  # what a row's bits may hang on


@dataclass(frozen=True)
class Rule:
    """Fields of a plan that change, where everything that ``where`` names is among its values."""

    where: tuple[tuple[str, tuple[Any, ...]], ...]
    pairs: tuple[int, int]  # least and most
    shrink: tuple[tuple[str, Any], ...]
    expand: tuple[tuple[str, Any], ...]


_rules: tuple[Rule, ...] = ()


def use_rules(rules: Given | str | PathLike[str] | None) -> None:
    """``lora_fuse.override_plans``."""
    global _rules
    _rules = _parsed(rules)
    launch = sys.modules.get("lora_fuse.kernels.launch")  # imported with the first launch
    if launch is not None:
        launch.forget()


def bounds() -> list[int]:
    """Numbers of pairs at which rules begin to fit, or no longer do; in order."""
    return sorted({bound for rule in _rules for bound in (rule.pairs[0], rule.pairs[1] + 1)})


def plan_by_rules(
    in_features: int,
    out_features: int,
    max_rank: int,
    num_pairs: int,
    num_slots: int,
    dtype: str,
    backend: str,
    slices: int,
    num_rows: int,
    processors: int = PROCESSORS,
) -> Plan:
    """``configs.plan``, and what the rules say. Args: see there."""
    sizes = in_features, out_features, max_rank, num_pairs, num_slots
    made = plan(*sizes, dtype, backend, slices, num_rows, processors)
    if not _rules:
        return made
    of = {"in_features": in_features, "out_features": out_features, "max_rank": max_rank, "slices": slices}
    of |= {"dtype": dtype, "backend": backend}  # type: ignore[dict-item]
    for rule in _rules:
        least, most = rule.pairs
        if least <= num_pairs <= most and all(of[name] in accepted for name, accepted in rule.where):
            made = _applied(made, rule, in_features)
    return made


def _applied(made: Plan, rule: Rule, in_features: int) -> Plan:
    changes = dict(rule.shrink)
    all_planes = {None: made.shrink.planes > 1, 1: False, "all": True}[changes.pop("planes", None)]
    shrink = replace(made.shrink, **changes)
    least = -(-in_features // (_MOST_PLANES * SPLIT_ALIGN)) * SPLIT_ALIGN
    most = -(-in_features // SPLIT_ALIGN) * SPLIT_ALIGN  # beyond it there is one cut, and numbers that overflow
    split_len = min(max(shrink.split_len, least), most)
    planes = -(-in_features // split_len) if all_planes else 1
    return Plan(replace(shrink, split_len=split_len, planes=planes), replace(made.expand, **dict(rule.expand)))


def _parsed(rules: Given | str | PathLike[str] | None) -> tuple[Rule, ...]:
    if rules is None:
        return ()
    source = "rules"
    if isinstance(rules, str | PathLike):
        source = fspath(rules)
        with open(source, encoding="utf-8") as file:
            try:
                rules = json.load(file)
            except ValueError as error:
                raise ValueError(f"{source}: is no JSON file: {error}") from None
    if not isinstance(rules, Sequence) or isinstance(rules, str | bytes):
        raise TypeError(f"{source}: expected a list of rules, got {type(rules).__name__}")
    return tuple(_rule(f"{source}[{i}]", rule) for i, rule in enumerate(rules))


def _rule(at: str, given: Any) -> Rule:
    parts = _fields(at, given, ("where", "shrink", "expand"))
    where = _fields(f"{at}['where']", parts.get("where", {}), (*_SIZES, "dtype", "backend", "pairs"))
    shrink = _fields(f"{at}['shrink']", parts.get("shrink", {}), tuple(_SHRINK))
    expand = _fields(f"{at}['expand']", parts.get("expand", {}), tuple(_EXPAND))
    decide = [name for name in ("split_len", "block_k") if name in shrink]
    if decide and not where.keys() <= _OF_LAYER:
        raise ValueError(
            f"{at}['where']: names {sorted(where.keys() - _OF_LAYER)} and sets {decide[0]}, which decides a row's "
            f"bits; accepted beside it are {sorted(_OF_LAYER)}"
        )
    for part, values, known in (("shrink", shrink, _SHRINK), ("expand", expand, _EXPAND)):
        for name, value in values.items():
            accepted, fits = known[name]
            if not fits(value):
                raise ValueError(f"{at}[{part!r}][{name!r}]: got {value!r}, accepted is {accepted}")
    pairs = where.pop("pairs", [0, 2**31])
    if not (isinstance(pairs, list | tuple) and len(pairs) == 2 and all(map(_is_int, pairs)) and pairs[0] <= pairs[1]):
        raise ValueError(f"{at}['where']['pairs']: got {pairs!r}, accepted is [least, most]")
    return Rule(
        tuple((name, _values(f"{at}['where'][{name!r}]", name, value)) for name, value in where.items()),
        (pairs[0], pairs[1]),
        tuple(shrink.items()),
        tuple(expand.items()),
    )


def _fields(at: str, given: Any, accepted: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{at}: expected a dict, got {type(given).__name__}")
    if unknown := [name for name in given if name not in accepted]:
        raise ValueError(f"{at}: has {unknown}, accepted are {list(accepted)}")
    return dict(given)


def _values(at: str, name: str, given: Any) -> tuple[Any, ...]:
    values = tuple(given) if isinstance(given, list | tuple) else (given,)
    known = {"dtype": _DTYPES, "backend": _BACKENDS}.get(name)
    if not values or not all(isinstance(v, str) and v in known if known else _is_int(v) and v > 0 for v in values):
        raise ValueError(f"{at}: got {given!r}, accepted are {list(known) if known else 'whole numbers above 0'}")
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _power_of_two(least: int, most: int) -> tuple[str, Any]:
    fits = lambda v: _is_int(v) and least <= v <= most and v & (v - 1) == 0  # noqa: E731
    return f"a power of two from {least} to {most}", fits


def _between(least: int, most: int) -> tuple[str, Any]:
    return f"a whole number from {least} to {most}", lambda v: _is_int(v) and least <= v <= most


_COMMON = {"num_warps": _power_of_two(1, 8), "num_stages": _between(1, 8)}
_SHRINK = {
    "split_len": (
        f"a multiple of {SPLIT_ALIGN} above 0",
        lambda v: _is_int(v) and v > 0 and v % SPLIT_ALIGN == 0,
    ),
    "planes": ("1 or 'all'", lambda v: v == 1 if _is_int(v) else isinstance(v, str) and v == "all"),
    "block_k": _power_of_two(16, SPLIT_ALIGN),
    **_COMMON,
}
_EXPAND = {
    "block_n": _power_of_two(16, 256),
    "steps": _between(1, 64),
    "ahead": ("true or false", lambda v: isinstance(v, bool)),
    **_COMMON,
}
