"""Interleaved timing: every variant once a round, medians over rounds, so that slow spells hit all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def interleaved_us(
    variants: Mapping[str, Callable[[int], Any]], budget_s: float, min_rounds: int = 5, max_rounds: int = 400
) -> dict[str, float]:
    """Median microseconds of ``fn(round)`` per variant; the first round warms up and is not counted."""
    times: dict[str, list[int]] = {name: [] for name in variants}
    deadline, i = time.perf_counter() + budget_s, 0
    while i <= min_rounds or (time.perf_counter() < deadline and i < max_rounds):
        for name, fn in variants.items():
            start = time.perf_counter_ns()
            fn(i)
            times[name].append(time.perf_counter_ns() - start)
        i += 1
    return {name: median(t[1:]) / 1e3 for name, t in times.items()}
