"""What goes into a weighted combination: adapters with names and weights, checked before anything is computed."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LayerKind, LoraAdapter, LoraLayer

Source: TypeAlias = LoraAdapter | str | os.PathLike[str]
Sources: TypeAlias = Source | Sequence[Source] | Mapping[str, Source]
Weights: TypeAlias = Sequence[float] | Mapping[str, float] | Tensor | None
SavePolicy: TypeAlias = Literal["refuse", "first", "average"]
_SAVE_POLICIES = ("refuse", "first", "average")
_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Term:
    """One adapter of a combination; ``name`` is what errors call it, ``key`` its key or position among those given."""

    name: str
    adapter: LoraAdapter
    weight: float
    key: str = ""


@dataclass(frozen=True)
class LayerTerm:
    """One adapter's part in one layer: ``coef * lora_b @ lora_a`` with ``coef = weight * scaling``."""

    name: str
    layer: LoraLayer
    weight: float
    key: str = ""

    @property
    def coef(self) -> float:
        return self.weight * self.layer.scaling


def load_sources(adapters: Sources) -> dict[str, LoraAdapter]:
    """Adapters by name: a dict's keys, or positions as strings; paths and hub ids are loaded."""
    if isinstance(adapters, (LoraAdapter, str, os.PathLike)):
        adapters = [adapters]
    if not isinstance(adapters, (Mapping, Sequence)):
        raise TypeError(f"adapters: expected a list or a dict of adapters, got {type(adapters).__name__}")
    named = by_name("adapters", adapters)
    if not named:
        raise ValueError("adapters: expected at least one adapter, got none")
    loaded = {}
    for key, source in named.items():
        if isinstance(source, (str, os.PathLike)):
            from lora_fuse.adapters.load import load_adapter

            source = load_adapter(source)
        if not isinstance(source, LoraAdapter):
            shown = repr(key) if isinstance(adapters, Mapping) else key
            raise TypeError(
                f"adapters[{shown}]: expected a LoraAdapter or a path, got {type(source).__name__}; whole models need "
                "base="
            )
        loaded[key] = source
    return loaded


def by_name(argument: str, given: Mapping[Any, Any] | Sequence[Any]) -> dict[str, Any]:
    """What was given by its names, or by positions, as strings.

    Raises:
        ValueError: two names are one as strings, such as 1 and "1"; one of the two would be lost.
    """
    keys = list(given) if isinstance(given, Mapping) else list(range(len(given)))
    found = {str(key): given[key] for key in keys}
    if len(found) < len(keys):
        raise ValueError(f"{argument}: names have to differ as strings, got {keys}")
    return found


def make_terms(adapters: Sources, weights: Weights, default: float = 1.0) -> list[Term]:
    """Pair adapters with weights.

    Args:
        adapters: one adapter, a list, or a dict name -> adapter; an entry may be a path.
        weights: a number per adapter, a dict with the same names, or None.
        default: the weight where ``weights`` is None.
    Raises:
        TypeError, ValueError: not adapters, not finite numbers, or not as many weights as adapters.
    """
    named = isinstance(adapters, Mapping)
    loaded = load_sources(adapters)
    terms = []
    for (key, adapter), value in zip(loaded.items(), read_weights(list(loaded), named, weights, default), strict=True):
        shown = f"{key!r}" if named else f"#{key}" if adapter.source == "<memory>" else f"#{key} ({adapter.source})"
        terms.append(Term(shown, adapter, value, key))
    return terms


def read_weights(
    keys: Sequence[str], named: bool, weights: Weights, default: float = 1.0, what: str = "adapter"
) -> list[float]:
    """A weight for each key.

    Args:
        keys: of the adapters or models.
        named: whether the keys are names, which ``weights`` may use.
        weights, default: as in ``make_terms``.
        what: what has weights, for messages.
    Raises:
        TypeError, ValueError: not finite numbers, or not as many as keys.
    """
    values: list[float]
    if weights is None:
        values = [default] * len(keys)
    elif isinstance(weights, Mapping):
        by_key = by_name("weights", weights)
        if not named or set(by_key) != set(keys):
            have = sorted(keys) if named else f"a list of {len(keys)}"
            raise ValueError(f"weights: a dict needs the {what}s' own names, got {sorted(by_key)} for {have}")
        values = [by_key[name] for name in keys]
    else:
        given = weights.tolist() if isinstance(weights, Tensor) else weights
        if not isinstance(given, Iterable):
            raise TypeError(f"weights: expected a sequence of numbers, one per {what}, got {type(weights).__name__}")
        values = list(given)
        if len(values) != len(keys):
            raise ValueError(f"weights: expected {len(keys)}, one per {what}, got {len(values)}")
    for key, value in zip(keys, values, strict=True):
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise TypeError(f"weights: expected numbers, got {value!r} for {what} {key!r}")
        if not math.isfinite(value):
            raise ValueError(f"weights: expected finite numbers, got {value} for {what} {key!r}")
    return [float(value) for value in values]


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _FLOAT_DTYPES))}, got {dtype}")


def check_truncation(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ValueError(f"rank, energy: give one of the two, got rank={rank} and energy={energy}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected an integer of at least 1, got {rank!r}")
    if energy is not None:
        check_number("energy", energy, "0 < energy <= 1", lambda x: 0 < x <= 1)


def check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> None:
    """Refuse what is no finite number or does not fit.

    Raises:
        TypeError: no number.
        ValueError: not finite, or ``fits`` says no.
    """
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or getattr(value, "ndim", False):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_finite(terms: Iterable[Term]) -> None:
    """ValueError naming adapter, layer and tensor of the first one with NaN or inf."""
    for term in terms:
        for path, layer in term.adapter.layers.items():
            for what in ("lora_a", "lora_b", "lora_bias", "magnitude"):
                t = getattr(layer, what)
                if t is not None and not all_finite(t):
                    raise ValueError(f"adapter {term.name}, layer {path!r}: {what} has NaN or infinite entries")
            if not math.isfinite(layer.scaling):
                raise ValueError(f"adapter {term.name}, layer {path!r}: scaling is {layer.scaling}")


def refuse_other_bases(terms: Sequence[Term]) -> None:
    """ValueError if the adapters' configs name different base models; the same name in two places only warns."""
    first: tuple[str, Term] | None = None
    for term in terms:
        base = str(term.adapter.config.get("base_model_name_or_path") or "")
        if not base:
            continue
        if first is None:
            first = base, term
        elif _last_part(base) != _last_part(first[0]):
            raise ValueError(
                f"adapters {first[1].name} and {term.name} were made for different base models, {first[0]!r} and "
                f"{base!r}, so their deltas do not add up; if that is one model under two names, give both configs the "
                "same base_model_name_or_path"
            )
    warn_about_bases(terms)


def _last_part(base: str) -> str:
    return base.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def warn_about_bases(terms: Sequence[Term]) -> None:
    """Warn if the adapters name different base models: a copy under another name is common, so it is no error."""
    bases: dict[str, str] = {}
    for term in terms:
        base = term.adapter.config.get("base_model_name_or_path")
        if base:
            bases.setdefault(str(base), term.name)
    if len(bases) > 1:
        listed = ", ".join(f"{base!r} (adapter {name})" for base, name in bases.items())
        # Past merge and its no_grad wrapper, to the line that called it.
        warnings.warn(f"the adapters name different base models: {listed}", UserWarning, stacklevel=5)


def refuse_absolute(terms: Sequence[Term], what: str, alone: bool = True) -> None:
    """A combination is defined on deltas; DoRA and replaced values of the base are none.

    ``alone``: whether ``what`` would take such an adapter by itself, with weight 1.
    """
    takes = "takes such an adapter only alone and with weight 1" if alone else "takes no such adapter"
    for term in terms:
        a = term.adapter
        dora = next((path for path, layer in a.layers.items() if layer.magnitude is not None), None)
        if dora is not None:
            raise ValueError(
                f"adapter {term.name}: uses DoRA (layer {dora!r}), whose update is not linear in the factors; {what} "
                f"{takes}"
            )
        for field, label in (
            ("base_biases", "replaces biases of the base (PEFT's bias='all' or 'lora_only')"),
            ("trainable_tokens", "replaces rows of an embedding (PEFT's trainable_token_indices)"),
        ):
            if held := getattr(a, field):
                raise ValueError(
                    f"adapter {term.name}: {label} at {sorted(held)[0]!r}; a replaced value cannot be weighted, so "
                    f"{what} {takes}"
                )


def layer_terms(terms: Sequence[Term]) -> dict[str, list[LayerTerm]]:
    """Module path -> the adapters that have it, in order of first appearance, kinds and shapes checked."""
    grouped: dict[str, list[LayerTerm]] = {}
    for term in terms:
        for path, layer in term.adapter.layers.items():
            grouped.setdefault(path, []).append(LayerTerm(term.name, layer, term.weight, term.key))
    for path, parts in grouped.items():
        first = parts[0]
        for part in parts:
            a, b = part.layer.lora_a, part.layer.lora_b
            if a.ndim < 2 or b.ndim < 2 or b.shape[1] != a.shape[0]:
                raise ValueError(
                    f"adapter {part.name}, layer {path!r}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} do not "
                    "share a rank (a grouped convolution is not supported)"
                )
            if _shape(part.layer) != _shape(first.layer):
                raise ValueError(
                    f"layer {path!r}: adapter {part.name} is {_describe(part.layer)}, but adapter {first.name} is "
                    f"{_describe(first.layer)}; they belong to different models"
                )
            if a.device != first.layer.lora_a.device:
                raise ValueError(
                    f"layer {path!r}: adapter {part.name} is on {a.device}, adapter {first.name} on "
                    f"{first.layer.lora_a.device}; move them to one device with .to(device=)"
                )
    return grouped


def _shape(layer: LoraLayer) -> tuple[LayerKind, tuple[int, ...]]:
    return layer.kind, layer.weight_shape


def _describe(layer: LoraLayer) -> str:
    return f"for a {layer.kind} weight of shape {layer.weight_shape}"


def combine_base_weights(terms: Sequence[Term]) -> dict[str, Tensor]:
    """Base weights that PEFT saved beside adapted embeddings, as one set.

    They are the base's own, so all adapters that carry one must agree; ValueError where two do not.
    """
    combined: dict[str, Tensor] = {}
    holder: dict[str, str] = {}
    for term in terms:
        for path, weight in term.adapter.base_weights.items():
            other = combined.setdefault(path, weight)
            holder.setdefault(path, term.name)
            same = other.shape == weight.shape and (
                torch.equal(weight.to(other), other) or torch.equal(other.to(weight), weight)
            )
            if not same:
                raise ValueError(
                    f"layer {path!r}: adapters {holder[path]} and {term.name} bring different base weights along "
                    "(PEFT's save_embedding_layers), so they belong to different base models"
                )
    return combined


def combine_saved(terms: Sequence[Term], policy: SavePolicy) -> dict[str, dict[str, Tensor]]:
    """The module copies (heads) of a combination.

    Args:
        terms: adapters with weights.
        policy: what to do with a module that several adapters replace: "refuse", "first" (in the order given) or
            "average" (by weight, normalised; weights must be positive and shapes equal). A module that one adapter
            replaces is kept as it is.
    Raises:
        ValueError: the policy is unknown, refuses, or cannot average.
    """
    if policy not in _SAVE_POLICIES:
        raise ValueError(f"modules_to_save: expected one of {', '.join(_SAVE_POLICIES)}, got {policy!r}")
    owners: dict[str, list[Term]] = {}
    for term in terms:
        for path in term.adapter.modules_to_save:
            owners.setdefault(path, []).append(term)
    combined: dict[str, dict[str, Tensor]] = {}
    for path, group in owners.items():
        if len(group) > 1 and policy == "refuse":
            raise ValueError(
                f"modules_to_save: {path!r} is replaced by adapters {', '.join(t.name for t in group)}; "
                "choose modules_to_save='first' or 'average'"
            )
        if len(group) == 1 or policy == "first":
            combined[path] = dict(group[0].adapter.modules_to_save[path])
        else:
            combined[path] = _average(path, group)
    return combined


def _average(path: str, group: Sequence[Term]) -> dict[str, Tensor]:
    for term in group:
        if term.weight <= 0:
            raise ValueError(f"modules_to_save: cannot average {path!r}, adapter {term.name} has weight {term.weight}")
    total = sum(t.weight for t in group)
    first = group[0].adapter.modules_to_save[path]
    averaged = {}
    for name, tensor in first.items():
        acc = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        for term in group:
            saved = term.adapter.modules_to_save[path]
            other = saved.get(name)
            if saved.keys() != first.keys() or other is None or other.shape != tensor.shape:
                raise ValueError(
                    f"modules_to_save: cannot average {path!r}, adapters {group[0].name} and {term.name} differ in "
                    f"{name!r}: {tuple(tensor.shape)} and {'none' if other is None else tuple(other.shape)}"
                )
            if not tensor.is_floating_point() and not torch.equal(other, tensor):
                raise ValueError(f"modules_to_save: cannot average {path!r}, {name!r} is {tensor.dtype} and differs")
            acc += (term.weight / total) * other.to(torch.float64)
        averaged[name] = acc.to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
    return averaged
