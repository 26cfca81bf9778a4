"""What this machine can do: memory bandwidth and matrix-multiply peak, measured in this process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

ROTATION_BYTES = 128 << 20  # factors are rotated over at least this much, so that no cache flatters anyone
LAUNCH_US = 3.0  # what a call may cost beside its bytes and flops


@dataclass(frozen=True)
class Machine:
    """``bytes_per_s`` of a read of 128 MB that was read before; ``flops_per_s`` of a square torch.mm by dtype."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]

    def floor_us(self, nbytes: float, flops: float, arithmetic: torch.dtype) -> float:
        """``max(bytes / bandwidth, flops / peak) + 3 us``."""
        return 1e6 * max(nbytes / self.bytes_per_s, flops / self.flops_per_s[arithmetic]) + LAUNCH_US


def _best(fn, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return median(sorted(times)[: max(1, repeats // 2)])


def measure() -> Machine:
    """Medians of the faster half of the repeats; takes about two seconds."""
    buffer = torch.ones(ROTATION_BYTES // 4)
    bandwidth = buffer.nbytes / _best(buffer.sum, 12)
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        peaks[dtype] = 2 * 2048**3 / _best(lambda a=a, b=b: a @ b, 10)
    return Machine(bandwidth, peaks)
