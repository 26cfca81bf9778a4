"""A stand-in for a CUDA graph: the op calls of a forward, made again on the very tensors that they had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_fuse.nn import capture


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """What a CUDA graph is to a GPU: no Python of the model runs in a replay, all tensors stay where they were.

    Args:
        run: the forward, captured here and now; it returns a tensor, ``output``.
        instead: op -> what to run in its place.
    """

    def __init__(self, run: Callable[[], Tensor], instead: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        self.instead = instead or {}
        with capture.simulate("capture"), _Recorder() as recorder:
            self.output = run()
        self.calls = recorder.calls

    def replay(self) -> Tensor:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                made = self.instead.get(func, func)(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        return self.output
