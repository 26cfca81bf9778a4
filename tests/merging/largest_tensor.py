"""Proof that nothing of a product's size was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sizes(TorchDispatchMode):
    """Records the largest tensor that any op returns, but for views of ``ignored``."""

    largest = 0

    def __init__(self, ignored: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.ignored = {t.untyped_storage().data_ptr() for t in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.ignored:
                self.largest = max(self.largest, t.numel())
        return out
