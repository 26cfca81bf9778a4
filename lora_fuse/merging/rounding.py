"""Rounding an fp32 or fp64 result into a weight's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Mantissa bits of fp32 that the narrower format lacks.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
_HALF_QUANTUM, _HALF_MIN_NORMAL = 2.0**-24, 2.0**-14


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, ties to even."""
    return x.to(dtype)


def round_stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """To one of the two neighbours in ``dtype``, the nearer one more likely, so that the expectation is ``x``.

    bf16 and fp16 only; other dtypes round to nearest. A value that ``dtype`` holds exactly stays, and rounding alone
    makes no finite value infinite.
    """
    dropped = _DROPPED_BITS.get(dtype)
    if dropped is None:
        return x.to(dtype)
    x = x.to(torch.float32)
    noise = torch.randint(0, 1 << dropped, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # Adding to the bits moves the magnitude up by a random part of one step; the mask then cuts back to the grid.
    rounded = ((x.view(torch.int32) + noise) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 the steps of fp16 no longer shrink with the exponent
        steps = torch.floor(x / _HALF_QUANTUM + noise / float(1 << dropped)) * _HALF_QUANTUM
        rounded = torch.where(x.abs() < _HALF_MIN_NORMAL, steps, rounded)
    largest = torch.finfo(dtype).max
    return torch.where(x.abs() <= largest, rounded.clamp(-largest, largest), x).to(dtype)
