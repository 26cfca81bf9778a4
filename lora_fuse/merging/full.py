"""Merges of full fine-tunes: one set of weights from a base model and its fine-tunes, all given as state dicts.

``theta* = theta_0 + merge(theta_1 - theta_0, ...)`` by the rules that merge entry by entry (``merging.rules``). The
functions take any mapping from names to tensors, one that reads files at every access too; a tensor under two names
is two (``peru_fft`` passes each once). Floating-point tensors are merged, the others (step counters, position ids) are
the base's. Sums run in fp64, in pieces, and are rounded once to the base's dtype, so that ``task_arithmetic`` of one
fine-tune with scaling 1 gives that fine-tune back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_fuse.adapters._finite import all_finite
from lora_fuse.functional import topk_mask
from lora_fuse.merging.elementwise import PackedMask
from lora_fuse.merging.fit import Odd, Patterns, check_patterns, fit, matches, patterns_of
from lora_fuse.merging.methods import rule_of
from lora_fuse.merging.options import Options
from lora_fuse.merging.progress import track
from lora_fuse.merging.rules import Parts, Settings, choose, settle
from lora_fuse.merging.terms import Weights as GivenWeights
from lora_fuse.merging.terms import by_name, read_weights
from lora_fuse.merging.weights import Weights, WeightSource, open_weights
from lora_fuse.ops.topk_call import matrix_shape

StateDict: TypeAlias = Mapping[str, Tensor]


class MergedWeights(Mapping[str, Tensor]):
    """``theta*`` by the base's names; a tensor is merged when it is asked for, and not kept.

    Args:
        base, finetuned: parameter name -> tensor; fp32, fp64, bf16 or fp16, or not floating-point.
        weights: a number for each fine-tune.
        settings: with the fine-tunes' keys, in their order. With the scope "global" all fine-tunes are read here.
        dtypes: name -> dtype of the result, where it is not the base's.
        progress: show bars on stderr.
    Raises:
        ValueError: a name is missing, or shapes differ; the name is given. On access: the result overflows its dtype.
    """

    def __init__(
        self,
        base: StateDict,
        finetuned: Sequence[StateDict],
        weights: Sequence[float],
        settings: Settings,
        dtypes: Mapping[str, torch.dtype] | None = None,
        progress: bool = False,
    ) -> None:
        _check(base, finetuned)
        self.base, self.finetuned, self.weights, self.settings = base, finetuned, weights, settings
        self.dtypes = dtypes or {}
        self._keys = list(settings.densities)
        self._masks: Mapping[str, list[PackedMask]] = {}
        if settings.rule.keeps == "largest" and settings.scope == "global":
            self._masks = self._global_masks(progress)
            if settings.rule.elects:
                names = track(list(self._masks), "elect", progress)
                balance = sum(self._parts(name, self.base[name]).balance(settings) for name in names)
                self.settings = replace(settings, if_zero=float((balance > 0) - (balance < 0)))

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base[name]
        if not weight.is_floating_point():
            return weight.clone()
        dtype = self.dtypes.get(name, weight.dtype)
        result = torch.empty(weight.shape, dtype=dtype)
        rows, base = result.view(matrix_shape(weight)), weight.reshape(matrix_shape(weight))
        for start, piece in self._parts(name, weight).merged(self.settings):
            stop = start + piece.shape[0]
            rows[start:stop] = piece.add_(base[start:stop])
        if not all_finite(result):
            raise ValueError(f"merge: {name!r} has NaN or infinite entries, or overflows {dtype}")
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def _parts(self, name: str, weight: Tensor) -> Parts:
        shape = matrix_shape(weight)
        tuned = [state[name] for state in self.finetuned]
        base, others = weight.reshape(shape), [t.reshape(shape) for t in tuned]

        def block(i: int, start: int, stop: int) -> Tensor:
            return others[i][start:stop].to(torch.float64, copy=True).sub_(base[start:stop])

        masks: Sequence[PackedMask | None] = self._masks.get(name) or [
            choose(self.settings, key, other, weight) for key, other in zip(self._keys, tuned, strict=True)
        ]
        return Parts(name, shape, self._keys, self.weights, block, masks)

    def _global_masks(self, progress: bool) -> dict[str, list[PackedMask]]:
        names = [name for name, tensor in self.base.items() if tensor.is_floating_point()]
        weights = [self.base[name] for name in names]
        masks: dict[str, list[PackedMask]] = {name: [] for name in names}
        states = list(zip(self._keys, self.finetuned, strict=True))
        for key, state in track(states, "trim", progress):
            density = self.settings.densities[key]
            kept = topk_mask([state[name] for name in names], density, "global", minus=weights)
            for name, mask in zip(names, kept, strict=True):
                masks[name].append(PackedMask(mask.view(matrix_shape(mask))))
        return masks


def task_arithmetic(
    base: StateDict, finetuned: Sequence[StateDict], scaling: float = 0.3, *, progress: bool = False
) -> dict[str, Tensor]:
    """Add the sum of the task vectors: ``theta* = theta_0 + scaling * sum_t (theta_t - theta_0)``.

    Args:
        base: parameter name -> tensor; fp32, fp64, bf16 or fp16, or not floating-point.
        finetuned: each with the base's names and shapes.
        scaling: lambda.
        progress: show a bar on stderr.
    Returns:
        The base's names; new tensors in the base's dtypes.
    Raises:
        ValueError: a name is missing, shapes differ, or the result overflows the base's dtype; the name is given.
    Source: Ilharco et al., arXiv:2212.04089.
    """
    return _merged(base, finetuned, "linear", Options(scaling=check_scaling(scaling)), progress)


def average(base: StateDict, finetuned: Sequence[StateDict], *, progress: bool = False) -> dict[str, Tensor]:
    """Average the fine-tunes: ``theta* = (1 / T) sum_t theta_t``.

    Args, Returns, Raises: as for ``task_arithmetic``.
    """
    return _merged(base, finetuned, "uniform", Options(), progress)


def ties(
    base: StateDict,
    finetuned: Sequence[StateDict],
    scaling: float = 1.0,
    *,
    trim: float = 0.2,
    progress: bool = False,
) -> dict[str, Tensor]:
    """TIES: trim each task vector, elect a sign per entry, average those that agree, add ``scaling`` times that.

    All floating-point tensors count as one long vector. Of each task vector the ``int(trim * n)`` largest magnitudes
    stay (ties to the lowest index; the authors' code keeps one more and every tie). An entry's sign is that of the sum
    of what stayed; where the sum is zero, that of the sum of all entries' signs. The mean is over the tasks whose entry
    stayed and has that sign.

    Args:
        base, finetuned, progress: as for ``task_arithmetic``.
        scaling: lambda.
        trim: share of each task vector that stays, ``0 < trim <= 1``.
    Returns, Raises: as for ``task_arithmetic``.
    Source: Yadav et al., arXiv:2306.01708.
    """
    options = Options(scaling=check_scaling(scaling), density=trim, scope="global")
    return _merged(base, finetuned, "ties", options, progress)


@torch.no_grad()
def _merged(
    base: StateDict, finetuned: Sequence[StateDict], method: str, options: Options, progress: bool
) -> dict[str, Tensor]:
    settings = settle(method, options, [str(i) for i in range(len(finetuned))])
    weights = [1.0 / len(finetuned) if method == "uniform" else 1.0 for _ in finetuned]
    merged = MergedWeights(base, finetuned, weights, settings, progress=progress)
    return {name: merged[name] for name in track(list(merged), "merge", progress)}


@torch.no_grad()
def open_merge(
    models: Any,
    weights: GivenWeights,
    method: str,
    base: WeightSource,
    options: Options,
    heads: Patterns = (),
    prefix: str = "",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[MergedWeights, Weights]:
    """``merge`` of whole models, ready to be asked for tensors.

    Args:
        models, weights, method, base, heads, prefix, progress: as in ``merge``.
        options: ``merge``'s keywords.
        dtype: of the result's floating-point tensors; None: the base's.
    Returns:
        What to ask for tensors by canonical name, and the base, which knows the other names and has the heads.
    Raises:
        TypeError, ValueError: as ``merge``.
    """
    rule_of(method, options)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string such as 'bert.', got {type(prefix).__name__}")
    sources = _sources(models)
    named = isinstance(models, Mapping)
    keys = list(sources)
    if method == "uniform" and weights is not None:
        raise ValueError("weights: method 'uniform' weighs every model 1 / N; use 'linear' to choose weights")
    values = read_weights(keys, named, weights, 1.0 / len(keys) if method == "uniform" else 1.0, "model")
    if not any(values):
        raise ValueError("weights: all are 0, which leaves nothing to merge")
    scope = options.scope or ("global" if "scope" in rule_of(method, options).takes else None)
    settings = settle(method, replace(options, scope=scope), keys)
    active = [(key, value) for key, value in zip(keys, values, strict=True) if value]
    settings = replace(settings, densities={key: settings.densities[key] for key, _ in active})

    ours = open_weights("base", base).renamed(prefix)
    patterns = patterns_of("heads", heads)
    own = {name for name in ours if any(matches(name, pattern) for pattern in patterns)}
    label = "models[{!r}]" if named else "models[{}]"
    opened = [open_weights(label.format(key), sources[key]) for key, _ in active]
    check_patterns("heads", patterns, [ours, *opened])
    fitted = [fit(ours, model, own, patterns, Odd()) for model in opened]
    body = Weights(
        ours.label, {name: entry for name, entry in ours.entries.items() if name not in own}, {}, ours.source
    )
    dtypes = {} if dtype is None else {n: dtype for n, entry in body.entries.items() if entry.dtype.is_floating_point}
    return MergedWeights(body, fitted, [value for _, value in active], settings, dtypes, progress), ours


@torch.no_grad()
def merge_models(
    models: Any,
    weights: GivenWeights,
    method: str,
    base: WeightSource,
    options: Options,
    heads: Patterns,
    prefix: str,
    dtype: torch.dtype | None,
    progress: bool,
) -> dict[str, Tensor]:
    """``merge`` of whole models, as one state dict; arguments as in ``open_merge``."""
    merged, ours = open_merge(models, weights, method, base, options, heads, prefix, dtype, progress)
    found = {name: merged[name] for name in track(list(merged), "merge", progress)}
    for name in ours:
        if name not in found:
            head = ours[name]
            found[name] = head.to(dtype if dtype and head.is_floating_point() else head.dtype, copy=True)
    return {name: found[ours.aliases.get(name, name)] for name in ours.names}


def _sources(models: Any) -> dict[str, Any]:
    """Models by name, or by position."""
    if not isinstance(models, (Mapping, Sequence)) or isinstance(models, (str, nn.Module)):
        raise TypeError(f"models: with base=, expected a list or a dict of models, got {type(models).__name__}")
    if isinstance(models, Mapping) and any(isinstance(value, Tensor) for value in models.values()):
        raise TypeError("models: got one state dict; put the models in a list or a dict")
    found = by_name("models", models)
    if not found:
        raise ValueError("models: expected at least one model, got none")
    return found


def _check(base: StateDict, finetuned: Sequence[StateDict]) -> None:
    if not finetuned:
        raise ValueError("finetuned: expected at least one state dict, got none")
    if isinstance(base, Weights):
        return  # fitted to each other already, and every access reads a file
    for i, state in enumerate(finetuned):
        for name, weight in base.items():
            if not weight.is_floating_point():
                continue
            if name not in state:
                raise ValueError(f"finetuned[{i}]: lacks {name!r}")
            if state[name].shape != weight.shape:
                raise ValueError(
                    f"finetuned[{i}]: {name!r} has shape {list(state[name].shape)}, the base's is {list(weight.shape)}"
                )


def check_scaling(scaling: float) -> float:
    """The scaling as a float.

    Raises:
        ValueError: not a finite number.
    """
    if isinstance(scaling, (bool, str)) or not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling!r}")
    return float(scaling)
