"""Sparse deltas beside torch.sparse, dense residuals and the bare linear; switching a task beside copying weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import lora_fuse as lf
from benchmarks.gpu import measure, report
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint
from lora_fuse.adapters.sparse_runs import SlotTable, runs_of
from lora_fuse.sparse import SparseMatrix

DENSE, CSR = "dense residual", "torch.sparse CSR"
_LIMIT = 4.0  # roundings of the dtype, over the largest result
_MOST_SPARSE = 8  # copies: each is a slot's worth of tasks, more than a cache holds


@dataclass(frozen=True)
class Shape:
    rows: int
    tasks: int
    size: int = 4096
    density: float = 0.1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.size}x{self.size} density {self.density:g}, {self.rows} rows over {self.tasks} tasks, {dtype}"


SHAPES = [
    Shape(8, 4),
    Shape(1, 1),
    Shape(64, 8),
    Shape(8, 4, density=0.01),
    Shape(512, 4),
    Shape(2048, 4),
    Shape(16, 1),
    Shape(8, 4, dtype=torch.float32),
]
TINY = [Shape(5, 2, 48, 0.3, torch.float32), Shape(12, 1, 48, 0.3, torch.float16)]


class Case:
    """One shape's tasks, copied so that no cache holds them, and the ways to apply them."""

    def __init__(self, shape: Shape, copies: int) -> None:
        self.shape, self.copies, on = shape, copies, measure.device()
        size, dtype = shape.size, shape.dtype
        self.failed: set[str] = set()
        self.x = torch.randn(shape.rows, size, device=on).to(dtype)
        self.y = torch.zeros(shape.rows, size, dtype=dtype, device=on)
        which = torch.arange(shape.rows) * shape.tasks // shape.rows
        self.routing = Routing.from_slots(which.int().to(on), shape.tasks)
        self.starts = self.routing.segment_starts.tolist()
        self.weights = [(torch.randn(size, size, device=on) / size**0.5).to(dtype) for _ in range(copies)]
        self.deltas: list[list[Tensor]] = []
        self.tables: list[SlotTable] = []
        for _ in range(copies):
            deltas = []
            for _ in range(shape.tasks):
                delta = (torch.randn(size, size, device=on) / (shape.density * size) ** 0.5).to(dtype)
                deltas.append(delta.masked_fill(torch.rand(size, size, device=on) >= shape.density, 0.0))
            runs = [runs_of(SparseMatrix.from_mask(d, d != 0), dtype, None, on) for d in deltas]
            self.tables.append(SlotTable(runs, dtype, on))
            self.deltas.append(deltas)

    @property
    def nbytes(self) -> float:
        """Values and a bitmap of each task, and the activations."""
        matrix = self.shape.size**2 * (self.shape.density * self.shape.dtype.itemsize + 1 / 8)
        return self.shape.tasks * matrix + self.x.nbytes + 2 * self.y.nbytes

    @cached_property
    def _csr(self) -> list[list[Tensor]]:
        return [[delta.to_sparse_csr() for delta in deltas] for deltas in self.deltas]

    def _by_task(self, y: Tensor, matrices: list[Tensor]) -> None:
        for task, matrix in enumerate(matrices):  # rows of a task lie together here
            rows = slice(self.starts[task], self.starts[task + 1])
            y[rows] += (matrix @ self.x[rows].t()).t()

    def ours(self, y: Tensor, i: int) -> None:
        from lora_fuse.kernels.routing import build_tiles
        from lora_fuse.kernels.sparse_delta import launches

        if "tiles" not in self.__dict__:
            self.tiles = build_tiles(self.routing.rows, self.routing.segment_starts)
        for launch in launches(y, self.x, self.tables[i].tensor, self.routing.tensors, self.tiles, _backend()):
            launch.run()

    def ways(self) -> dict[str, Callable[[Tensor, int], None]]:
        return {
            report.OURS: self.ours,
            DENSE: lambda y, i: self._by_task(y, self.deltas[i]),
            CSR: lambda y, i: self._by_task(y, self._csr[i]),
        }

    def check(self) -> None:
        """Every way against fp64.

        Raises:
            SystemExit: ours is wrong.
        """
        want = torch.zeros_like(self.y, dtype=torch.float64)
        for task, delta in enumerate(self.deltas[0]):
            rows = slice(self.starts[task], self.starts[task + 1])
            want[rows] = self.x[rows].double() @ delta.double().t()
        for name, way in self.ways().items():
            y = torch.zeros_like(self.y)
            try:
                way(y, 0)
            except Exception as problem:
                if name == report.OURS:
                    raise
                measure.tell(name, problem)
                self.failed.add(name)
                continue
            limit = _LIMIT * torch.finfo(self.shape.dtype).eps
            measure.require(f"{self.shape}: {name}", y, want, limit if name == report.OURS else 10 * limit)

    def time(self, csr: bool) -> dict[str, float]:
        calls: dict[str, Callable[[int], Any]] = {"linear": lambda i: linear(self.x, self.weights[i])}
        for name, way in self.ways().items():
            if name not in self.failed and (name != CSR or csr):
                calls[name] = lambda i, way=way: way(self.y, i)  # type: ignore[misc]
        calls[f"{report.OURS} + base"] = lambda i: self.ours(linear(self.x, self.weights[i]), i)
        return measure.device_us(calls, self.copies, eager=(CSR,), may_fail=(DENSE, CSR))


def _backend() -> str:
    return "hip" if torch.version.hip else "cuda"


class Switching:
    """A model of equal layers and two fine-tunes: one task to the other and back, by ``switch_task`` and by copying."""

    def __init__(self, layers: int, size: int, density: float) -> None:
        on = measure.device()
        dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
        made = nn.Sequential(*[nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(layers)])
        base = made.requires_grad_(False).to(on)
        merged = base.state_dict()
        prints = {n: fingerprint(t) for n, t in merged.items()}
        shapes = {n: tuple(t.shape) for n, t in merged.items()}
        adapters = {}
        for name in ("a", "b"):
            own = {n: t + torch.randn_like(t) * 0.01 for n, t in merged.items()}
            kept = {n: SparseMatrix.from_mask(t, torch.rand(t.shape, device=on) < density) for n, t in own.items()}
            adapters[name] = SparseAdapter(kept, {}, {}, shapes, prints, density)
        self.states = {name: adapter.state_dict(merged) for name, adapter in adapters.items()}
        self.model = lf.attach(base, adapters)
        elements = layers * size * size
        # Undone and written: bitmaps, values out and in, and the weights' sectors that hold an entry, read and written.
        touched = 1 - (1 - density) ** (32 // dtype.itemsize)
        self.nbytes = 2 * (
            elements / 8 + 3 * density * elements * dtype.itemsize + 2 * touched * elements * dtype.itemsize
        )
        self.shape = f"switch_task, {layers} layers {size}x{size}, density {density:g}"
        self.last = "a"

    def switch(self) -> None:
        self.last = "b" if self.last == "a" else "a"
        lf.switch_task(self.model, self.last)

    def copy(self, together: bool) -> None:
        self.last = "b" if self.last == "a" else "a"
        own = dict(self.model.named_parameters())
        state = self.states[self.last]
        if together:
            torch._foreach_copy_([own[n].detach() for n in state], list(state.values()))
        else:
            for n, t in state.items():
                own[n].detach().copy_(t)

    def check(self) -> None:
        """Raises: SystemExit: a switch leaves other weights than the fine-tune's."""
        for _ in range(2):
            self.switch()
            own = dict(self.model.named_parameters())
            if not all(torch.equal(own[n], t) for n, t in self.states[self.last].items()):
                raise SystemExit(f"{self.shape}: the weights are not those of {self.last!r}; no times are shown")

    def time(self) -> dict[str, float]:
        ways = {report.OURS: self.switch, "copy_": lambda: self.copy(False), "foreach copy_": lambda: self.copy(True)}
        return {name: measure.wall_us({name: way})[name] for name, way in ways.items()}


def shapes() -> list[Shape]:
    return SHAPES if measure.device().type == "cuda" else TINY


def check() -> None:
    for shape in shapes()[:4]:
        Case(shape, 1).check()


def run(at: measure.Setting) -> Iterator[dict[str, Any]]:
    on_card = measure.device().type == "cuda"
    for shape in shapes()[: 2 if at.quick else None]:
        if at.budget.over(str(shape)):
            continue
        case = Case(shape, _MOST_SPARSE if on_card else 1)
        case.check()
        found = report.row("sparse", str(shape), case.time(shape.rows <= 64), case.nbytes, at.bandwidth, base="linear")
        report.show(found)
        yield found
        del case
    made = Switching(*((8, 4096, 0.1) if on_card else (2, 48, 0.2)))
    if not at.budget.over(made.shape):
        made.check()
        found = report.row("switch", made.shape, made.time(), made.nbytes, at.bandwidth)
        report.show(found)
        yield found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, Any] = next((row for row in rows if row["shape"] == str(SHAPES[0])), {"us": {}})
    us = first["us"]
    ours, csr = us.get(report.OURS), us.get(CSR)
    share = first.get("overhead", {}).get(report.OURS)
    what = f"sparse_delta_linear {SHAPES[0]}"
    return [
        report.target(f"{what}: times faster than {CSR}", 5, csr / ours if ours and csr else None, at_least=True),
        report.target(f"{what}: over its byte floor", 1.5, ours / first["floor_us"] if ours else None),
        report.target(f"{what}: over the bare linear", 1.0, share),
    ]
