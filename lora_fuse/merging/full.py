"""Merges of full fine-tunes: one set of weights from a base model and its fine-tunes, all given as state dicts.

The functions take any mapping from names to tensors, one that reads files at every access too; a tensor under two names
is two (``peru_fft`` passes each once). Floating-point tensors are merged, the others (step counters, position ids) are
the base's. Sums run in fp64, in pieces, and are rounded once to the base's dtype, so that ``task_arithmetic`` of one
fine-tune with scaling 1 gives that fine-tune back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.functional import topk_mask
from lora_fuse.merging.progress import track
from lora_fuse.merging.weights import Weights

StateDict: TypeAlias = Mapping[str, Tensor]
# (name, start, base, [fine-tune]) -> merged; all flat pieces in fp64
_Formula: TypeAlias = Callable[[str, int, Tensor, list[Tensor]], Tensor]
_PIECE = 1 << 17  # entries at a time: the pieces of five tasks stay in a cache


@torch.no_grad()
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
    factor = check_scaling(scaling)

    def formula(name: str, start: int, weight: Tensor, others: list[Tensor]) -> Tensor:
        total = torch.zeros_like(weight)
        for other in others:
            total.add_(other - weight)
        return total.mul_(factor).add_(weight)

    return _merge(base, finetuned, formula, progress)


@torch.no_grad()
def average(base: StateDict, finetuned: Sequence[StateDict], *, progress: bool = False) -> dict[str, Tensor]:
    """Average the fine-tunes: ``theta* = (1 / T) sum_t theta_t``.

    Args, Returns, Raises: as for ``task_arithmetic``; the base only says which tensors there are.
    """

    def formula(name: str, start: int, weight: Tensor, others: list[Tensor]) -> Tensor:
        total = torch.zeros_like(weight)
        for other in others:
            total.add_(other)
        return total.div_(len(others))

    return _merge(base, finetuned, formula, progress)


@torch.no_grad()
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
    factor = check_scaling(scaling)
    _check(base, finetuned)
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    weights = [base[name] for name in names]
    masks: list[dict[str, Tensor]] = []
    for state in track(finetuned, "trim", progress):
        kept = topk_mask([state[name] for name in names], trim, "global", minus=weights)
        masks.append(dict(zip(names, kept, strict=True)))

    def vectors(name: str, start: int, weight: Tensor, others: list[Tensor]) -> list[Tensor]:
        stop = start + weight.numel()
        return [
            torch.where(mask[name].reshape(-1)[start:stop], other - weight, 0.0)
            for mask, other in zip(masks, others, strict=True)
        ]

    balance = 0
    for name in names:
        for start, weight, others in _pieces(base[name], [state[name] for state in finetuned]):
            balance += int(sum(vectors(name, start, weight, others)).sign().sum())  # type: ignore[union-attr]
    majority = float((balance > 0) - (balance < 0))

    def formula(name: str, start: int, weight: Tensor, others: list[Tensor]) -> Tensor:
        stayed = torch.stack(vectors(name, start, weight, others))
        sign = stayed.sum(0).sign()
        sign[sign == 0] = majority
        agreeing = torch.where(stayed.sign() == sign, stayed, 0.0)
        mean = agreeing.sum(0).div_((agreeing != 0).sum(0).clamp_(min=1))
        return mean.mul_(factor).add_(weight)

    return _merge(base, finetuned, formula, progress)


def _merge(base: StateDict, finetuned: Sequence[StateDict], formula: _Formula, progress: bool) -> dict[str, Tensor]:
    _check(base, finetuned)
    merged = {}
    for name in track(list(base), "merge", progress):
        weight = base[name]
        if not weight.is_floating_point():
            merged[name] = weight.clone()
            continue
        result = torch.empty(weight.shape, dtype=weight.dtype)
        flat = result.view(-1)
        for start, piece, others in _pieces(weight, [state[name] for state in finetuned]):
            flat[start : start + piece.numel()] = formula(name, start, piece, others)
        if not all_finite(result):
            raise ValueError(f"merge: {name!r} has NaN or infinite entries, or overflows {weight.dtype}")
        merged[name] = result
    return merged


def _pieces(weight: Tensor, others: list[Tensor]) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    flat, *rest = (t.reshape(-1) for t in (weight, *others))
    for start in range(0, flat.numel(), _PIECE):
        stop = start + _PIECE
        yield start, flat[start:stop].double(), [t[start:stop].double() for t in rest]


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
