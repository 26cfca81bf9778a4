"""What ``merge`` was told, checked; None stands for what the caller left to the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lora_fuse.merging.elementwise import DIVISORS, MAJORITY_SIGNS, Divisor, MajoritySign
from lora_fuse.merging.terms import check_dtype, check_number, check_truncation

# For each adapter, in their order or by name: module path -> Gram matrix of that module's inputs
Grams: TypeAlias = Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]]
# One share for all task vectors, or one for each, in their order or by name
Density: TypeAlias = float | Sequence[float] | Mapping[str, float]
_CHOICES = {
    "majority_sign": MAJORITY_SIGNS,
    "divisor": DIVISORS,
    "scope": ("tensor", "row", "global"),
    "mean_over": ("rank", "min_dim"),
}


@dataclass(frozen=True)
class Options:
    """The keywords of ``merge`` that methods read.

    Attributes:
        state: what a method's ``prepare`` found out.
        kept: filled in by methods that truncate: module path -> Frobenius norms of the merged delta and of what the
            truncation left out.
    """

    rank: int | None = None
    energy: float | None = None
    scaling: float | None = None
    density: Density | None = None
    majority_sign: MajoritySign | None = None
    divisor: Divisor | None = None
    scope: Literal["tensor", "row", "global"] | None = None
    seed: int | None = None
    gamma: float | None = None
    epsilon: float | None = None
    mean_over: str | None = None
    common_fraction: float | None = None
    grams: Grams | None = None
    off_diagonal: float | None = None
    ridge: float | None = None
    dtype: torch.dtype = torch.float32
    state: Any = None
    kept: dict[str, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_truncation(self.rank, self.energy)
        check_dtype(self.dtype)
        _check_given("scaling", self.scaling, "a finite number", lambda x: True)
        for density in self.densities:
            check_number("density", density, "0 < density <= 1", lambda x: 0 < x <= 1)
        _check_given("gamma", self.gamma, "0 <= gamma < 1", lambda x: 0 <= x < 1)
        _check_given("epsilon", self.epsilon, "0 <= epsilon < 0.5", lambda x: 0 <= x < 0.5)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(f"seed: expected an integer of at least 0, got {self.seed!r}")
        _check_given("common_fraction", self.common_fraction, "0 <= common_fraction <= 1", lambda x: 0 <= x <= 1)
        _check_given("off_diagonal", self.off_diagonal, "0 <= off_diagonal <= 1", lambda x: 0 <= x <= 1)
        _check_given("ridge", self.ridge, "a number of at least 0", lambda x: x >= 0)
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in accepted:
                raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")

    @property
    def densities(self) -> list[float]:
        """Every density that was given."""
        if isinstance(self.density, Mapping):
            return [*self.density.values()]
        if isinstance(self.density, (list, tuple)):
            return [*self.density]
        return [] if self.density is None else [self.density]  # type: ignore[list-item]


def _check_given(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> None:
    if value is not None:
        check_number(name, value, expected, fits)
