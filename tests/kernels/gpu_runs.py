"""What the tests on a device do with it: watch for waiting, warm up, capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def warm_up(model: Any, x: Tensor) -> None:
    """A forward on a side stream, as torch asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        model(x)
    torch.cuda.current_stream().wait_stream(side)


def capture(model: Any, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A forward's graph, and the output that its replays write."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    return graph, y
