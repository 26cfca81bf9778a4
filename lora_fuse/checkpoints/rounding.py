"""From the accumulation dtype to the stored one, once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]


def round_to(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """``x`` in ``dtype``: the nearest value, or one of the two neighbours at random so that the mean is ``x``.

    Args:
        x: any shape, fp32 or fp64 where rounding is stochastic.
        dtype: what to round to.
        generator: None rounds to nearest, ties to even; else the source of stochastic rounding's randomness.
    Returns:
        A tensor of ``dtype``; ``x`` itself where it has that dtype.
    """
    nearest = x.to(dtype)
    if generator is None or nearest is x:
        return nearest
    error = x - nearest.to(x.dtype)
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, toward)
    chance = error / (other.to(x.dtype) - nearest.to(x.dtype))  # 0 where x is representable
    draw = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return torch.where(draw < chance, other, nearest)
