"""The methods of ``merge`` by name, and what each may be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging import knots, linear, regmean, sparsify, subspace
from lora_fuse.merging.options import Options
from lora_fuse.merging.rules import RULES, Rule
from lora_fuse.merging.terms import LayerTerm, Term
from lora_fuse.ops.topk_call import SCOPES

# (module path, the parts of that layer, options) -> the merged layer, without its bias
Combine: TypeAlias = Callable[[str, Sequence[LayerTerm], Options], LoraLayer]
Layers: TypeAlias = Mapping[str, Sequence[LayerTerm]]


@dataclass(frozen=True)
class Method:
    """How the layers of several adapters become one.

    Attributes:
        combine: called for each layer.
        takes: the options that it understands, beside ``dtype``.
        prepare: sees all adapters (those of weight 0 too) and layers first, for what they share (a threshold over the
            whole model) and for checks; returns the options to go on with, the shared things in ``state``.
        keeps_one: whether one adapter of weight 1 comes back with its own factors, as far as the options go (rank,
            energy and scaling need no thought here).
        averages: whether weights are shares of a mean; so biases are averaged too, not summed.
        scopes: what it takes as ``scope``.
        bias: merges the ``lora_bias`` of a layer; None: they are summed up with the weights.
    """

    combine: Combine
    takes: frozenset[str]
    prepare: Callable[[Sequence[Term], Layers, Options], Options] | None = None
    keeps_one: Callable[[Options], bool] = lambda options: True
    averages: bool = False
    scopes: tuple[str, ...] = ()
    bias: Callable[[str, Sequence[LayerTerm], Options], Tensor | None] | None = None


_TRUNCATION = frozenset({"rank", "energy"})
_SCALED = _TRUNCATION | {"scaling"}
METHODS: dict[str, Method] = {
    "linear": Method(linear.linear, _TRUNCATION),
    "uniform": Method(linear.linear, _TRUNCATION),
    "cat": Method(linear.cat, frozenset()),
    "svd": Method(linear.svd, _TRUNCATION, prepare=linear.prepare),
    "factor_average": Method(linear.factor_average, _TRUNCATION),
    "knots_ties": Method(
        knots.knots_ties,
        _SCALED | {"density", "majority_sign", "scope"},
        prepare=knots.prepare,
        keeps_one=lambda options: options.density == 1.0,
        scopes=("tensor", "global"),
    ),
    "tsv": Method(subspace.tsv, _SCALED),
    "iso_c": Method(subspace.iso_c, _SCALED | {"mean_over"}, keeps_one=lambda options: False),
    "iso_cts": Method(subspace.iso_cts, _SCALED | {"mean_over", "common_fraction"}, keeps_one=lambda options: False),
    "regmean": Method(
        regmean.regmean, _SCALED | {"grams", "off_diagonal", "ridge"}, prepare=regmean.prepare, averages=True
    ),
}


def _entry_by_entry(name: str, rule: Rule) -> Method:
    return Method(
        sparsify.sparsified,
        _TRUNCATION | rule.takes,
        prepare=lambda terms, layers, options: sparsify.prepare(name, terms, options),
        keeps_one=lambda options: sparsify.keeps_all(rule, options),
        scopes=("tensor", "row"),
        bias=sparsify.sparsified_bias,
    )


METHODS.update((name, _entry_by_entry(name, rule)) for name, rule in RULES.items() if name not in METHODS)


def method_of(name: str, options: Options) -> Method:
    """The method of that name, after checking that it takes every option that was given.

    Raises:
        ValueError: no such method, or an option that it does not take; both say what there is.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    _check_taken(name, options, {other: m.takes for other, m in METHODS.items()}, method.scopes)
    if name not in RULES and not isinstance(options.density, (int, float, type(None))):
        raise ValueError(f"density: method {name!r} takes one number for all adapters, got {options.density!r}")
    return method


def rule_of(name: str, options: Options) -> Rule:
    """The rule of that name, by which whole models are merged, after checking that it takes every option.

    Raises:
        ValueError: no such method, or an option that it does not take; both say what there is.
    """
    if not isinstance(name, str) or name not in RULES:
        known = "works on adapters only" if isinstance(name, str) and name in METHODS else "does not exist"
        raise ValueError(f"method: {name!r} {known}; whole models are merged by one of {', '.join(RULES)}")
    _check_taken(
        name, options, {other: rule.takes for other, rule in RULES.items()}, SCOPES, "no merge of whole models does"
    )
    return RULES[name]


def _check_taken(
    name: str, options: Options, takes: Mapping[str, frozenset[str]], scopes: tuple[str, ...], instead: str = ""
) -> None:
    for field in fields(options):
        if field.name in ("dtype", "state", "kept") or getattr(options, field.name) is None:
            continue
        if field.name not in takes[name]:
            able = ", ".join(other for other in takes if field.name in takes[other])
            raise ValueError(f"{field.name}: method {name!r} does not take it; {f'{able} do' if able else instead}")
    if options.scope is not None and options.scope not in scopes:
        raise ValueError(f"scope: method {name!r} takes {', '.join(scopes)}, got {options.scope!r}")
