"""One launch of a Triton kernel, as data: what runs it, and what compiles it ahead of time, read the same fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments in the kernel's order; constexprs by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True} | (
            {"maxnreg": self.max_registers} if self.max_registers else {}
        )

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.constexprs, **self.options)
