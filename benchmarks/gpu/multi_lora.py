"""``multi_lora`` on the linear layers of an 8B decoder, beside what else a user would run.

The bare linear, what the LoRA part adds to it, and the part alone against the bytes that must move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import measure, report
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora

SITES = {"o": (4096, 4096), "qkv": (4096, 6144), "gate_up": (4096, 28672), "down": (14336, 4096)}
TINY = {"tiny": (48, 32)}  # for the interpreter
ROWS, ADAPTERS, RANKS = (1, 16, 64, 256, 4096), (1, 8, 64), (16, 64)
ROOM = 24 << 30  # bytes that the copies may take


def routing_of(slots: Tensor, num_slots: int, device: torch.device) -> Routing:
    """Made on the CPU, moved: a routing is built once a step and is no part of a call."""
    made = Routing.from_slots(slots, num_slots)
    return Routing(*(None if t is None else t.to(device) for t in made.tensors), made.num_rows)


def in_interpreter(y: Tensor, x: Tensor, pool: AdapterPool, routing: Routing) -> None:
    """What the op runs for CUDA tensors, on CPU tensors."""
    from lora_fuse.kernels.routing import build_tiles
    from lora_fuse.ops.multi_lora import _cuda_

    tiles = build_tiles(routing.segment_starts, routing.num_pairs)
    _cuda_(y, x, *pool.tensors, *routing.tensors, tiles)


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
        self.copies = max(2, min(measure.COPIES, ROOM // each)) if device.type == "cuda" else 2
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
        if device.type == "cpu":
            self.ways["lora_fuse"] = lambda y, pool: in_interpreter(y, self.x, pool, self.routing)
        if rows <= 64:
            self.ways["gathered bmm"] = lambda y, pool: gathered_bmm(self.x, y, pool, on_device)
        # x and the factors once, y read and written
        self.nbytes = self.x.nbytes + 2 * self.y.nbytes + adapters * rank * (fan_in + fan_out) * dtype.itemsize

    def want(self) -> Tensor:
        """In fp64."""
        pool, rank = self.pools[0], self.pools[0].max_rank
        want = self.y.double()
        for slot in range(pool.num_slots):
            index = (self.slots == slot).nonzero()[:, 0].to(want.device)
            used = slice(slot * rank, (slot + 1) * rank)
            h = self.x[index].double() @ pool.pool_a[used].double().t()
            want[index] += h @ pool.pool_b[used].double() * pool.slot_scaling[slot].double()
        return want

    def check(self) -> None:
        """Each way against fp64.

        Raises:
            SystemExit: one of them is wrong.
        """
        want = self.want()
        for name, way in self.ways.items():
            got = self.y.clone()
            way(got, self.pools[0])
            measure.require(name, got, want, 16 * torch.finfo(self.x.dtype).eps)

    def time(self) -> dict[str, float]:
        """Each way after the bare linear, and alone."""

        def bare(i: int) -> Tensor:
            return linear(self.x, self.weights[i])

        calls: dict[str, Callable[[int], Any]] = {"linear": bare}
        for name, way in self.ways.items():
            calls[f"{name} + base"] = lambda i, way=way: way(bare(i), self.pools[i])
            calls[name] = lambda i, way=way: way(self.y, self.pools[i])
        return measure.device_us(calls, self.copies)


def check() -> None:
    device = measure.device()
    if device.type == "cpu":
        return Case(TINY["tiny"], 4, 6, 3, torch.float32, device).check()
    for rows, adapters, rank in ((1, 1, 16), (64, 64, 16), (300, 8, 64)):
        Case(SITES["o"], rank, rows, adapters, torch.bfloat16, device).check()


def run(at: measure.Setting) -> list[dict[str, Any]]:
    device = measure.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = []
    for site, features in (SITES if device.type == "cuda" else TINY).items():
        for rank in RANKS[:1] if at.quick else RANKS:
            for rows in ROWS if device.type == "cuda" else (6,):
                for adapters in (n for n in ADAPTERS if n <= rows):
                    shape = f"{site} r{rank} T{rows} N{adapters}"
                    if at.budget.over(shape):
                        continue
                    case = Case(features, rank, rows, adapters, dtype, device)
                    case.check()
                    found = report.row("multi_lora", shape, case.time(), case.nbytes, at.bandwidth, base="linear")
                    report.show(found)
                    made.append(found)
    return made


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return []
