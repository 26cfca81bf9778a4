"""NaN and infinity, looked for in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one of those makes the sum so too, and a sum needs no temporary."""
    t = t.float() if t.element_size() == 1 else t  # fp8 has no arithmetic
    total = float(t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32))
    return math.isfinite(total) or bool(torch.isfinite(t).all())  # finite entries may still overflow their sum
