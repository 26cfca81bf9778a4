"""``merge``: several adapters into one, by exact weighted sums of their deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.merging.config import FACTOR_KEYS, lora_config
from lora_fuse.merging.elementwise import Divisor, MajoritySign
from lora_fuse.merging.fit import Patterns
from lora_fuse.merging.full import merge_models
from lora_fuse.merging.methods import method_of
from lora_fuse.merging.options import Density, Grams, Options
from lora_fuse.merging.progress import track
from lora_fuse.merging.terms import (
    LayerTerm,
    SavePolicy,
    Sources,
    Term,
    Weights,
    check_finite,
    combine_base_weights,
    combine_saved,
    layer_terms,
    make_terms,
    refuse_absolute,
    refuse_other_bases,
)
from lora_fuse.merging.weights import WeightSource

Models: TypeAlias = Sequence[WeightSource] | Mapping[str, WeightSource]


@overload
def merge(
    adapters: Sources,
    weights: Weights = ...,
    *,
    base: None = ...,
    method: str = ...,
    rank: int | None = ...,
    energy: float | None = ...,
    dtype: torch.dtype | None = ...,
    modules_to_save: SavePolicy = ...,
    scaling: float | None = ...,
    density: Density | None = ...,
    majority_sign: MajoritySign | None = ...,
    divisor: Divisor | None = ...,
    scope: Literal["tensor", "row", "global"] | None = ...,
    seed: int | None = ...,
    gamma: float | None = ...,
    epsilon: float | None = ...,
    mean_over: Literal["rank", "min_dim"] | None = ...,
    common_fraction: float | None = ...,
    grams: Grams | None = ...,
    off_diagonal: float | None = ...,
    ridge: float | None = ...,
    progress: bool = ...,
) -> LoraAdapter: ...
@overload
def merge(
    adapters: Models,
    weights: Weights = ...,
    *,
    base: WeightSource,
    method: str = ...,
    dtype: torch.dtype | None = ...,
    scaling: float | None = ...,
    density: Density | None = ...,
    majority_sign: MajoritySign | None = ...,
    divisor: Divisor | None = ...,
    scope: Literal["tensor", "row", "global"] | None = ...,
    seed: int | None = ...,
    gamma: float | None = ...,
    epsilon: float | None = ...,
    heads: Patterns = ...,
    prefix: str = ...,
    progress: bool = ...,
) -> dict[str, Tensor]: ...
def merge(
    adapters: Sources | Models,
    weights: Weights = None,
    *,
    method: str = "linear",
    base: WeightSource | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    modules_to_save: SavePolicy = "refuse",
    scaling: float | None = None,
    density: Density | None = None,
    majority_sign: MajoritySign | None = None,
    divisor: Divisor | None = None,
    scope: Literal["tensor", "row", "global"] | None = None,
    seed: int | None = None,
    gamma: float | None = None,
    epsilon: float | None = None,
    mean_over: Literal["rank", "min_dim"] | None = None,
    common_fraction: float | None = None,
    grams: Grams | None = None,
    off_diagonal: float | None = None,
    ridge: float | None = None,
    heads: Patterns = (),
    prefix: str = "",
    progress: bool = False,
) -> LoraAdapter | dict[str, Tensor]:
    """Combine adapters into one, layer by layer: by default the one whose delta is ``sum_i weights[i] * delta_i``.

    With ``base``, combine whole models: ``theta_0 + merge(theta_1 - theta_0, ...)``, tensor by tensor.

    Methods work on the PRODUCTS ``scaling_i * B_i A_i``, never on A's and B's apart, so there are no cross terms
    (PEFT's ``combination_type="linear"`` has them, and ``factor_average`` by definition). Ranks may differ, per adapter
    and per layer, and so may the sets of layers. docs/merging.md has each method's formula, defaults and source, and
    what weights and a single adapter mean to it.

    Methods:
        linear: exact. Concatenates the factors; where the ranks add up to more than ``min(in, out)`` the sum is
            rewritten with that rank. ``rank`` or ``energy`` truncates it, optimally in the Frobenius norm.
        uniform: linear with every weight 1 / N; takes no weights.
        cat: exact; concatenates the factors, whatever the rank that results.
        svd: truncated to ``rank`` (default: in each layer the largest rank of the adapters that have it) or ``energy``.
        factor_average: averages A's and B's apart, as LoraHub does.
        knots_ties: TIES in the basis that the adapters share (``density``, ``majority_sign``, ``scope``).
        tsv: the adapters' singular vectors, orthogonalised against each other (TSV-M).
        iso_c: the sum with all singular values equal (``mean_over``).
        iso_cts: the same with directions of single adapters added (``common_fraction``, ``mean_over``).
        regmean: least squares on the adapters' own outputs (``grams``, ``off_diagonal``, ``ridge``).
        ties, magnitude_prune, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, della, della_linear: each delta is
            pruned (``density``), the rest summed up, or averaged over those that have the elected sign. The merged
            delta is dense; it is truncated to ``rank`` (default: as for svd) or ``energy``, with an error at most 1.001
            times the smallest possible one.

    Whole models take the methods that work entry by entry: linear, uniform, and those that prune. They go by a block of
    rows of a tensor at a time, in fp64, and are rounded once to the base's dtypes; tensors that are not floating-point
    are the base's. Files are read a tensor at a time, unless a threshold is "global" (ties and magnitude_prune by
    default): then the base and one fine-tune are in memory.

    Truncated factors share the singular values evenly: ``lora_b = U sqrt(S)``, ``lora_a = sqrt(S) Vh``. Result layers
    have scaling 1. An adapter with weight 0 takes no part at all, heads included. One adapter with weight 1 comes back
    with its own factors, unless ``rank`` or ``energy`` asks for fewer, or the method trims or levels even one.

    Args:
        adapters: a list, or a dict name -> adapter; an entry may be a path. Names appear in errors. With ``base``:
            state dicts, modules, model folders or safetensors files.
        weights: a finite number per adapter, of any sign, in any sequence, or a dict by name. None: 1 each.
        method: one of the above.
        base: the model that all were fine-tuned from, as they; makes this a merge of whole models.
        rank: largest rank of a result layer (all methods but cat).
        energy: share of each layer's squared Frobenius norm to keep, ``0 < energy <= 1``, instead of ``rank``.
        dtype: of the result's factors and heads, by default fp32; computed in fp64, rounded once (where entries are
            pruned: in fp32, unless this or the factors are fp64). Of whole models: by default the base's dtypes.
        modules_to_save: for a module (a head) that several adapters replace: "refuse", "first", or "average" (by
            weight).
        scaling: factor on the merged deltas and biases (from knots_ties on, and for whole models; default 1).
        density: share of each adapter's entries that stays, ``0 < density <= 1``; a number, or one for each, in their
            order or by name. Default: 0.2 (ties, knots_ties), 0.5 (dare), 0.9 (breadcrumbs), 0.7 (della);
            magnitude_prune needs it.
        majority_sign: of an entry: that of the sum of values ("total", the default), of signs ("frequency") or of
            weighted values ("weighted").
        divisor: of the mean over the values that have the elected sign: their number ("count", the default), the sum of
            their weights ("weights") or 1 ("none").
        scope: whether ``density`` counts in each layer ("tensor"), in each row of a weight ("row"; ties and
            magnitude_prune) or over all of an adapter's layers ("global"; knots_ties, whose default it is). Whole
            models: for ties and magnitude_prune, "global" by default.
        seed: of dare and della (default 0): a draw hangs on the seed, the layer's path and the adapter's name or
            position, on nothing else.
        gamma: share of the largest entries that breadcrumbs leaves out (default 0.01).
        epsilon: della's entries stay with chances from ``density - epsilon`` to ``density + epsilon`` (default 0.07).
        mean_over: singular values are averaged over the directions there are ("rank") or over ``min(in, out)``.
        common_fraction: share of the directions that come from the sum (default 0.8).
        grams: for each adapter, in their order or by name, ``{module path: [in, in]}``, as ``collect_grams`` returns.
        off_diagonal: factor on the Gram matrices' off-diagonal entries, 0 to 1 (default 0.9).
        ridge: multiple of the mean diagonal entry that is added to the diagonal of each Gram matrix (default 0).
        heads: whole models: patterns of parameters that are each model's own and not merged; the result has the base's.
        prefix: whole models: put before the base's names, for an encoder whose fine-tunes are classifiers around it.
        progress: show a bar on stderr.

    Returns:
        With ``base`` a state dict: the base's names, new tensors; names that share memory there share one here. Else a
        new ``LoraAdapter``; ``lora_bias`` sums like the deltas, or is pruned and merged like them. Its config is that
        of a plain LoRA which PEFT loads.

    Raises:
        ValueError: unknown method; weights that are not finite, not one per adapter, or all 0; an option that is out of
            range or that the method does not take; layers of different shape; DoRA, replaced biases or replaced token
            rows in anything but a single adapter of weight 1; factors that are not finite; Gram matrices that are
            missing, do not fit, or add up to a singular one.
        TypeError: something that is no adapter or no number.
        RuntimeError: an SVD that converges in no way.

    Warns:
        UserWarning: the adapters' configs name one base model in two places.
    """
    options = Options(
        rank=rank,
        energy=energy,
        scaling=scaling,
        density=density,
        majority_sign=majority_sign,
        divisor=divisor,
        scope=scope,
        seed=seed,
        gamma=gamma,
        epsilon=epsilon,
        mean_over=mean_over,
        common_fraction=common_fraction,
        grams=grams,
        off_diagonal=off_diagonal,
        ridge=ridge,
        dtype=torch.float32 if dtype is None else dtype,
    )
    if base is not None:
        if modules_to_save != "refuse":
            raise ValueError("modules_to_save: is about adapters; name the heads of whole models in heads=")
        return merge_models(adapters, weights, method, base, options, heads, prefix, dtype, progress)
    if heads or prefix:
        raise ValueError("heads, prefix: are about whole models, which need base=")
    with torch.no_grad():
        return merge_adapters(adapters, weights, method, options, modules_to_save, progress)  # type: ignore[arg-type]


def merge_adapters(
    adapters: Sources, weights: Weights, method: str, options: Options, modules_to_save: SavePolicy, progress: bool
) -> LoraAdapter:
    """``merge`` of adapters with its keywords as ``options``, which say afterwards what truncation kept."""
    dtype, rank, energy, scaling = options.dtype, options.rank, options.energy, options.scaling
    how = method_of(method, options)
    if method == "uniform" and weights is not None:
        raise ValueError("weights: method 'uniform' weighs every adapter 1 / N; use 'linear' to choose weights")
    terms = make_terms(adapters, weights)
    if method == "uniform":
        terms = [replace(t, weight=1.0 / len(terms)) for t in terms]

    active = [t for t in terms if t.weight != 0.0]
    if not active:
        raise ValueError("weights: all are 0, which leaves nothing to merge")
    alone = len(active) == 1 and active[0].weight == 1.0
    keep = alone and scaling in (None, 1.0) and how.keeps_one(options)
    if not keep:
        refuse_absolute(active, f"merge(method={method!r})", alone=how.keeps_one(options))
    elif rank is not None or energy is not None:
        _refuse_truncated_dora(active[0])
    grouped = layer_terms(active)
    saved = combine_saved(active, modules_to_save)
    base_weights = combine_base_weights(active)
    check_finite(active)
    refuse_other_bases(active)
    if how.prepare is not None:
        options = how.prepare(terms, grouped, options)

    factor = 1.0 if scaling is None else scaling
    if how.averages:
        factor /= sum(t.weight for t in active)
    layers = {}
    for path, parts in track(grouped.items(), f"merge ({method})", progress):
        layer = _unchanged(parts, options) if keep else None
        if layer is None:
            bias = _summed_bias(parts, options, factor) if how.bias is None else how.bias(path, parts, options)
            layer = replace(how.combine(path, parts, options), lora_bias=bias)
        for t in layer.tensors():
            if not all_finite(t):
                raise ValueError(f"layer {path!r}: the merged factors overflow {dtype}; choose a wider dtype")
        layers[path] = layer
    heads = {path: {name: _cast(t, dtype) for name, t in module.items()} for path, module in saved.items()}
    if alone:
        return _with_layers(active[0].adapter, layers, heads)
    names = ", ".join(f"{t.weight:g} * {t.name}" for t in active)
    config = lora_config(layers, heads, [t.adapter.config for t in active])
    source = f"merge({names}, method={method!r})"
    return LoraAdapter(layers, heads, config=config, source=source, base_weights=base_weights)


def _unchanged(parts: Sequence[LayerTerm], options: Options) -> LoraLayer | None:
    """The only part's own factors in ``dtype``, if no truncation was asked that would change them."""
    (part,) = parts
    if options.energy is not None or (options.rank is not None and options.rank < part.layer.rank):
        return None
    layer, dtype = part.layer, options.dtype
    return replace(
        layer,
        lora_a=layer.lora_a.to(dtype),
        lora_b=layer.lora_b.to(dtype),
        lora_bias=None if layer.lora_bias is None else layer.lora_bias.to(dtype),
        magnitude=None if layer.magnitude is None else layer.magnitude.to(dtype),
    )


def _summed_bias(parts: Sequence[LayerTerm], options: Options, factor: float) -> Tensor | None:
    """``factor * sum coef * lora_bias`` over the parts that have one, or None."""
    biases = [factor * p.coef * p.layer.lora_bias.to(torch.float64) for p in parts if p.layer.lora_bias is not None]
    return torch.stack(biases).sum(0).to(options.dtype) if biases else None


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t


def _refuse_truncated_dora(term: Term) -> None:
    path = next((path for path, layer in term.adapter.layers.items() if layer.magnitude is not None), None)
    if path is not None:
        raise ValueError(
            f"adapter {term.name}: uses DoRA (layer {path!r}); its magnitudes belong to the product as it is, so "
            "rank and energy cannot be applied"
        )


def _with_layers(
    adapter: LoraAdapter, layers: dict[str, LoraLayer], heads: dict[str, dict[str, Tensor]]
) -> LoraAdapter:
    """``adapter`` with these layers and heads, keeping what only an adapter that stands alone can keep."""
    config = adapter.config
    if any(layers[p].rank != old.rank or layers[p].scaling != old.scaling for p, old in adapter.layers.items()):
        computed = lora_config(layers, heads, [config])
        config = {**config, **{key: computed[key] for key in FACTOR_KEYS}}
    return replace(adapter, layers=layers, modules_to_save=heads, config=config)
