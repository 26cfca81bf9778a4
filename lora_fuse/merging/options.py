"""What ``merge`` was told, checked; None stands for what the caller left to the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_fuse.merging.terms import check_dtype, check_truncation


@dataclass(frozen=True)
class Options:
    """The keywords of ``merge`` that methods read; ``state`` is what a method's ``prepare`` found out."""

    rank: int | None = None
    energy: float | None = None
    dtype: torch.dtype = torch.float32
    state: Any = None

    def __post_init__(self) -> None:
        check_truncation(self.rank, self.energy)
        check_dtype(self.dtype)
