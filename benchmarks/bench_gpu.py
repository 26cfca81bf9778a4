"""Multi-LoRA on a GPU: ``make bench-gpu``, one run of under 8 minutes.

Every way is checked against fp64, then timed under a CUDA graph that calls it once for each of many copies of the
weights (so that no cache holds them), interleaved, medians. Columns: microseconds a call of the bare linear, what the
LoRA part adds to it, and the part alone against its floor, the bytes that must move at this card's measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_fuse import reference
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora

SITES = {"o": (4096, 4096), "qkv": (4096, 6144), "gate_up": (4096, 28672), "down": (14336, 4096)}  # of an 8B decoder
ROWS, ADAPTERS, RANKS = (1, 16, 64, 256, 4096), (1, 8, 64), (16, 64)
COPIES, ROOM = 32, 24 << 30  # of the weights; bytes that they may take
RESULTS = Path(__file__).resolve().parent / "results"


def routing_of(slots: Tensor, num_slots: int, device: torch.device) -> Routing:
    """Made on the CPU, moved: a routing is built once a step and is no part of a call."""
    made = Routing.from_slots(slots, num_slots)
    return Routing(*(None if t is None else t.to(device) for t in made.tensors), made.num_rows)


def mm_loop(x: Tensor, y: Tensor, pool: AdapterPool, groups: list[Tensor]) -> None:
    """Two matmuls for each adapter present, as PEFT's mixed batch does, rows gathered by index."""
    rank = pool.max_rank
    for slot, index in enumerate(groups):
        if len(index):
            used = slice(slot * rank, (slot + 1) * rank)
            y.index_add_(0, index, (x[index] @ pool.pool_a[used].t()) @ pool.pool_b[used])


def gathered_bmm(x: Tensor, y: Tensor, pool: AdapterPool, slots: Tensor) -> None:
    """A copy of the row's factors for every row."""
    a = pool.pool_a.view(pool.num_slots, pool.max_rank, -1)[slots]
    b = pool.pool_b.view(pool.num_slots, pool.max_rank, -1)[slots]
    y += torch.bmm(torch.bmm(x[:, None], a.mT), b)[:, 0]


class Case:
    """One shape: weights in many copies, a batch, and the ways to run it."""

    def __init__(
        self, features: tuple[int, int], rank: int, rows: int, adapters: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        fan_in, fan_out = features
        each = (fan_in * fan_out + adapters * rank * (fan_in + fan_out)) * dtype.itemsize
        self.copies = max(2, min(COPIES, ROOM // each)) if device.type == "cuda" else 1
        self.x, self.y = (torch.randn(rows, n, dtype=dtype, device=device) for n in features)
        self.slots = torch.arange(rows) * adapters // rows
        self.routing = routing_of(self.slots, adapters, device)
        self.weights, self.pools = [], []
        for _ in range(self.copies):
            self.weights.append(torch.randn(fan_out, fan_in, dtype=dtype, device=device) / fan_in**0.5)
            pool = AdapterPool(adapters, rank, fan_in, fan_out, dtype, device)
            pool.pool_a.copy_(torch.randn(pool.pool_a.shape, device=device) / fan_in**0.5)
            pool.pool_b.copy_(torch.randn(pool.pool_b.shape, device=device) / rank**0.5)
            pool.slot_rank.fill_(rank), pool.slot_scaling.fill_(1.0)
            self.pools.append(pool)
        groups = [(self.slots == s).nonzero()[:, 0].to(device) for s in range(adapters)]
        on_device = self.slots.to(device)
        self.ways: dict[str, Callable[[Tensor, AdapterPool], Any]] = {
            "lora_fuse": lambda y, pool: multi_lora(self.x, pool, self.routing, out=y),
            "mm loop": lambda y, pool: mm_loop(self.x, y, pool, groups),
        }
        if rows <= 64:
            self.ways["gathered bmm"] = lambda y, pool: gathered_bmm(self.x, y, pool, on_device)
        # x and the factors once, y read and written
        self.nbytes = self.x.nbytes + 2 * self.y.nbytes + adapters * rank * (fan_in + fan_out) * dtype.itemsize

    def check(self) -> dict[str, float]:
        """Largest error over the largest result, for each way, against fp64.

        Raises:
            SystemExit: one of them is wrong.
        """
        pool, errors = self.pools[0], {}
        pairs = [(row, int(slot), 1.0) for row, slot in enumerate(self.slots)]
        want = reference.multi_lora(self.x, *pool.tensors, pairs, out=self.y)
        for name, way in self.ways.items():
            got = self.y.clone()
            way(got, pool)
            errors[name] = float((got.double() - want).abs().max() / want.abs().max())
            if not errors[name] <= 16 * torch.finfo(self.x.dtype).eps:
                raise SystemExit(f"{name}: error {errors[name]:.1e}; no times are shown")
        return errors

    def graphs(self) -> dict[str, torch.cuda.CUDAGraph]:
        """Each way after the bare linear, and alone; one call for each copy of the weights."""

        def bare(i: int) -> Tensor:
            return linear(self.x, self.weights[i])

        calls: dict[str, Callable[[int], Any]] = {"bare linear": bare}
        for name, way in self.ways.items():
            calls[f"{name}, with the linear"] = lambda i, way=way: way(bare(i), self.pools[i])
            calls[name] = lambda i, way=way: way(self.y, self.pools[i])
        made = {}
        for name, call in calls.items():
            call(0)  # compiles, outside of the capture
            torch.cuda.synchronize()
            made[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(made[name]):
                for i in range(self.copies):
                    call(i)
        return made

    def time(self, rounds: int) -> dict[str, float]:
        """Microseconds a call."""
        graphs = self.graphs()
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds + 2):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(), graph.replay(), end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) * 1e3 / self.copies)
        return {name: median(t[2:]) for name, t in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a gibibyte."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(), target.copy_(source), end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / median(seconds)


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Every case; prints a line each."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at {bandwidth / 1e12:.2f} TB/s, bf16")
    print(f"{'site':>8}{'rank':>6}{'rows':>6}{'adapters':>9}{'linear us':>11}{'lora_fuse':>11}{'mm loop':>10}", end="")
    print(f"{'bmm':>8}{'alone us':>10}{'floor us':>10}{'of floor':>10}")
    rows_out = []
    for site, features in SITES.items():
        for rank in RANKS[: 1 if quick else None]:
            for rows in ROWS:
                for adapters in (n for n in ADAPTERS if n <= rows):
                    case = Case(features, rank, rows, adapters, dtype, device)
                    errors, us = case.check(), case.time(rounds)
                    bare, floor = us["bare linear"], case.nbytes / bandwidth * 1e6
                    added = {n: us[f"{n}, with the linear"] / bare - 1 for n in case.ways}
                    print(f"{site:>8}{rank:>6}{rows:>6}{adapters:>9}{bare:>11.1f}{added['lora_fuse']:>+11.1%}", end="")
                    print(f"{added['mm loop']:>+10.0%}", end="")
                    print(f"{added['gathered bmm']:>+8.0%}" if "gathered bmm" in added else f"{'-':>8}", end="")
                    print(f"{us['lora_fuse']:>10.1f}{floor:>10.1f}{floor / us['lora_fuse']:>10.0%}", flush=True)
                    shape = {"site": site, "rank": rank, "rows": rows, "adapters": adapters}
                    rows_out.append({**shape, "us": us, "errors": errors, "floor_us": floor})
                    del case
                    torch.cuda.empty_cache()
    return {"copy_bytes_per_s": bandwidth, "rows": rows_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rank 16 only")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is at hand")
    import triton

    torch.manual_seed(0)
    with torch.no_grad():
        made = run(args.rounds, args.quick)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    made |= {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{made['device'].replace(' ', '_')}.json"
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
