"""The methods of ``merge`` by name, and what each may be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging import knots, linear, regmean, subspace
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import LayerTerm, Term

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
    """

    combine: Combine
    takes: frozenset[str]
    prepare: Callable[[Sequence[Term], Layers, Options], Options] | None = None
    keeps_one: Callable[[Options], bool] = lambda options: True
    averages: bool = False


_TRUNCATION = frozenset({"rank", "energy"})
_SCALED = _TRUNCATION | {"scaling"}
METHODS: dict[str, Method] = {
    "linear": Method(linear.linear, _TRUNCATION),
    "uniform": Method(linear.linear, _TRUNCATION),
    "cat": Method(linear.cat, frozenset()),
    "svd": Method(linear.svd, _TRUNCATION),
    "factor_average": Method(linear.factor_average, _TRUNCATION),
    "knots_ties": Method(
        knots.knots_ties,
        _SCALED | {"density", "majority_sign", "scope"},
        prepare=knots.prepare,
        keeps_one=lambda options: options.density == 1.0,
    ),
    "tsv": Method(subspace.tsv, _SCALED),
    "iso_c": Method(subspace.iso_c, _SCALED | {"mean_over"}, keeps_one=lambda options: False),
    "iso_cts": Method(subspace.iso_cts, _SCALED | {"mean_over", "common_fraction"}, keeps_one=lambda options: False),
    "regmean": Method(
        regmean.regmean, _SCALED | {"grams", "off_diagonal", "ridge"}, prepare=regmean.prepare, averages=True
    ),
}


def method_of(name: str, options: Options) -> Method:
    """The method of that name, after checking that it takes every option that was given.

    Raises:
        ValueError: no such method, or an option that it does not take; both say what there is.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    for field in fields(options):
        if field.name in ("dtype", "state") or getattr(options, field.name) is None or field.name in method.takes:
            continue
        able = [other for other, m in METHODS.items() if field.name in m.takes]
        raise ValueError(f"{field.name}: method {name!r} does not take it; {', '.join(able)} do")
    return method
