"""Whether a forward is being captured into a CUDA graph, or may be a warm-up for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Mode = Literal["", "gpu", "warm", "capture"]

simulated: Mode = ""  # what the CPU passes for; for tests
simulating = False  # compiled code reads this one: it does not tell one mode from another


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU, by number; 0: the default one, or no GPU."""
    # Every layer asks, so this makes no Stream objects.
    return torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0


def mode_of(device: torch.device) -> Mode:
    """``capture``: a graph is being captured. ``warm``: the stream is not the default one, so that a capture may
    follow: torch asks for a warm-up on a side stream. ``gpu``: neither. Nothing for a CPU.
    """
    if device.type != "cuda":
        return simulated if device.type == "cpu" else ""
    if not stream_of(device):
        return "gpu"
    return "capture" if torch.cuda.is_current_stream_capturing() else "warm"


def capturing() -> bool:
    """Whether the current stream's work is being captured into a graph."""
    if simulated == "capture":
        return True
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


@contextmanager
def simulate(mode: Mode) -> Iterator[None]:
    """Let the CPU pass for a GPU."""
    global simulated, simulating
    before, simulated, simulating = (simulated, simulating), mode, True
    try:
        yield
    finally:
        simulated, simulating = before
