"""Ranks of many layers chosen together: where a parameter more saves most error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_within(squares: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks with a small total squared error whose cost ``sum ranks[i] * costs[i]`` stays within ``budget``.

    Directions are taken in falling order of squared singular value per parameter, ties in the layers' order, as long as
    they fit: the least error for what is spent when the first one no longer fits; smaller ones then fill the rest.
    Where one rank for all layers (or what they have) leaves less error, which the last direction can bring about, it
    is taken instead, so that the result is never worse than that.

    Args:
        squares: per layer, squared singular values ``[r_i]``, fp64, descending.
        costs: per layer, parameters that a direction takes, ``out + in``.
        budget: parameters in all.
    """
    ranks, left = [0] * len(squares), budget
    for layer in _by_worth(squares, costs):
        if costs[layer] <= left:
            ranks[layer] += 1
            left -= costs[layer]
    longest = max((len(s) for s in squares), default=0)
    same = [[min(rank, len(s)) for s in squares] for rank in range(longest + 1)]
    affordable = [choice for choice in same if _cost(choice, costs) <= budget]
    return min([ranks, *affordable[-1:]], key=lambda choice: _error(squares, choice))


def ranks_keeping(squares: Sequence[Tensor], costs: Sequence[int], energy: float) -> list[int]:
    """Ranks of small total cost that keep the share ``energy`` of all squared singular values together.

    In the order of ``ranks_within``, until enough is kept; where the same share of each layer is cheaper, that.
    """
    layers = _by_worth(squares, costs)
    seen = [0] * len(squares)
    taken = []
    for layer in layers:
        taken.append(float(squares[layer][seen[layer]]))
        seen[layer] += 1
    tail = (
        torch.tensor(taken, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    )  # what is lost without these, or those after
    needed = int((tail > (1.0 - energy + 1e-14) * tail[:1]).sum())
    ranks = [0] * len(squares)
    for layer in layers[:needed]:
        ranks[layer] += 1
    each = [int((s.flip(0).cumsum(0).flip(0) > (1.0 - energy + 1e-14) * s.sum()).sum()) for s in squares]
    return min([ranks, each], key=lambda choice: _cost(choice, costs))


def _by_worth(squares: Sequence[Tensor], costs: Sequence[int]) -> list[int]:
    """Layer of each direction, the worthiest first; a layer's own come in their order, those of no size not at all."""
    if not squares:
        return []
    worth = torch.cat([s.to(torch.float64) / cost for s, cost in zip(squares, costs, strict=True)])
    layer = torch.repeat_interleave(torch.arange(len(squares)), torch.tensor([len(s) for s in squares]))
    order = worth.sort(descending=True, stable=True).indices
    return layer[order[worth[order] > 0]].tolist()


def _cost(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def _error(squares: Sequence[Tensor], ranks: Sequence[int]) -> float:
    return math.fsum(float(s[rank:].sum()) for s, rank in zip(squares, ranks, strict=True))
