"""Device time of calls: CUDA graphs over many copies of the data, interleaved, medians. Errors against fp64."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

COPIES = 32 if torch.cuda.is_available() else 2  # of the data that a call reads, so that no cache holds it
_CYCLES_OF_A_MS = 1_500_000


def device() -> torch.device:
    """The card, or the CPU, where Triton's interpreter stands in."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Budget:
    """Seconds that a part may take. What was left out when they ran out is kept, to be told."""

    seconds: float
    left_out: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def over(self, shape: str) -> bool:
        """Whether no time is left; if so, ``shape`` is noted as left out."""
        over = time.perf_counter() - self.started > self.seconds
        if over:
            self.left_out.append(shape)
        return over


@dataclass(frozen=True)
class Setting:
    """What a part runs with.

    Args:
        bandwidth: bytes per second, read and written, of a large copy on this device.
        budget: its time.
        quick: the few shapes that matter most.
    """

    bandwidth: float
    budget: Budget
    quick: bool = False


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying a gibibyte (16 MiB on a CPU)."""
    on = device()
    source = torch.ones(1 << (30 if on.type == "cuda" else 24), dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    us = device_us({"copy": lambda i: target.copy_(source)}, 1, rounds=10)["copy"]
    return 2 * source.nbytes / us * 1e6


def error(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest magnitude of ``want`` (fp64)."""
    return float((got.double() - want.double()).abs().max() / want.abs().max()) if want.numel() else 0.0


def require(name: str, got: Tensor, want: Tensor, limit: float) -> float:
    """``error``, at most ``limit``.

    Raises:
        SystemExit: it is larger, or NaN.
    """
    found = error(got, want)
    if not found <= limit:
        raise SystemExit(f"{name}: error {found:.1e}, accepted is {limit:.1e}; no times are shown")
    return found


def tell(name: str, problem: BaseException) -> None:
    """That a rival is left out, and why."""
    print(f"left out: {name}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}")


def captured(call: Callable[[int], Any], copies: int, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of ``call(0) ... call(copies - 1)``, each of which runs on the very stream before, to compile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)
        torch.cuda.synchronize()
        graph.capture_begin(pool)  # torch.cuda.graph() would empty the allocator's cache each time
        try:
            for i in range(copies):
                call(i)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def device_us(
    calls: Mapping[str, Callable[[int], Any]],
    copies: int = COPIES,
    rounds: int = 20,
    seconds: float = 2.0,
    eager: Collection[str] = (),
    may_fail: Collection[str] = (),
) -> dict[str, float]:
    """Microseconds a call: the median over rounds, in each of which every way runs once over all copies.

    Args:
        calls: ``fn(i)`` works on the i-th copy of the data.
        rounds: at most; at least 5, even if they take longer than ``seconds``.
        eager: names that cannot be captured (they wait for the host). Their time is that of calls queued behind a
            busy GPU, so host time shows only where they wait.
        may_fail: names that are told and left out if they raise; whatever else raises does.
    """
    if device().type == "cpu":
        return _host_us(calls, copies)
    pool = torch.cuda.graph_pool_handle()
    runs: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        try:
            if name in eager:
                call(0)
                runs[name] = lambda call=call: [call(i) for i in range(copies)]
            else:
                runs[name] = captured(call, copies, pool).replay
        except Exception as problem:
            if name not in may_fail:
                raise
            tell(name, problem)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in runs}
    started, done = time.perf_counter(), 0
    while done < 6 or (done <= rounds and time.perf_counter() - started < seconds):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in runs}
        torch.cuda._sleep(_CYCLES_OF_A_MS)  # what follows is queued by the time that it runs
        for name, run in runs.items():
            if name in eager:
                torch.cuda._sleep(_CYCLES_OF_A_MS)
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3 / copies)
        done += 1
    return {name: median(t[1:]) for name, t in times.items()}


def _host_us(calls: Mapping[str, Callable[[int], Any]], copies: int) -> dict[str, float]:
    """Wall time of one round, to see that everything runs where there is no card."""
    times = {}
    for name, call in calls.items():
        start = time.perf_counter()
        for i in range(copies):
            call(i)
        times[name] = (time.perf_counter() - start) * 1e6 / copies
    return times


def wall_us(calls: Mapping[str, Callable[[], Any]], rounds: int = 20) -> dict[str, float]:
    """Microseconds of eager calls by the host's clock, the device idle before and after; interleaved medians."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: median(t[2:]) for name, t in times.items()}


def busy_us(call: Callable[[int], Any], copies: int) -> float:
    """Microseconds that kernels and copies of an eager call keep the device busy, idle gaps not counted."""
    if device().type == "cpu":
        return _host_us({"": call}, copies)[""]
    from torch.profiler import ProfilerActivity, profile

    def every() -> None:
        for i in range(copies):
            call(i)
        torch.cuda.synchronize()

    every()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        every()
    return sum(event.self_device_time_total for event in seen.key_averages()) / copies


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
