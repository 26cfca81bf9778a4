"""What ``merge`` was told, checked; None stands for what the caller left to the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_fuse.merging.elementwise import MAJORITY_SIGNS, MajoritySign
from lora_fuse.merging.terms import check_dtype, check_truncation

# For each adapter, in their order or by name: module path -> Gram matrix of that module's inputs
Grams: TypeAlias = Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]]
_CHOICES = {
    "majority_sign": MAJORITY_SIGNS,
    "scope": ("global", "layer"),
    "mean_over": ("rank", "min_dim"),
}


@dataclass(frozen=True)
class Options:
    """The keywords of ``merge`` that methods read; ``state`` is what a method's ``prepare`` found out."""

    rank: int | None = None
    energy: float | None = None
    scaling: float | None = None
    density: float | None = None
    majority_sign: MajoritySign | None = None
    scope: str | None = None
    mean_over: str | None = None
    common_fraction: float | None = None
    grams: Grams | None = None
    off_diagonal: float | None = None
    ridge: float | None = None
    dtype: torch.dtype = torch.float32
    state: Any = None

    def __post_init__(self) -> None:
        check_truncation(self.rank, self.energy)
        check_dtype(self.dtype)
        _check_number("scaling", self.scaling, "a finite number", lambda x: True)
        _check_number("density", self.density, "0 < density <= 1", lambda x: 0 < x <= 1)
        _check_number("common_fraction", self.common_fraction, "0 <= common_fraction <= 1", lambda x: 0 <= x <= 1)
        _check_number("off_diagonal", self.off_diagonal, "0 <= off_diagonal <= 1", lambda x: 0 <= x <= 1)
        _check_number("ridge", self.ridge, "a number of at least 0", lambda x: x >= 0)
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in accepted:
                raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")


def _check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> None:
    if value is None:
        return
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
