"""Pruning by magnitude beside torch.topk and scatter, torch.kthvalue and torch.sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import measure, report
from lora_fuse.functional import magnitude_prune

TOPK, KTH, SORT = "torch.topk + scatter", "torch.kthvalue", "torch.sort"
_MOST_BYTES = 4 << 30  # of the tensors of all copies


@dataclass(frozen=True)
class Shape:
    rows: int
    cols: int
    dtype: torch.dtype
    scope: str = "tensor"
    density: float = 0.1
    tensors: int = 1

    def __str__(self) -> str:
        many = f"{self.tensors} of " if self.tensors > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"prune {many}{self.rows}x{self.cols} {dtype}, by {self.scope}, density {self.density:g}"

    @property
    def nbytes(self) -> int:
        """Bytes of the passes: rows are read once, others twice, and the result is written."""
        one = self.tensors * self.rows * self.cols * self.dtype.itemsize
        return one * (2 if self.scope == "row" else 3)


SHAPES = [
    Shape(4096, 4096, torch.bfloat16),
    Shape(4096, 4096, torch.float32),
    Shape(4096, 4096, torch.bfloat16, tensors=64),
    Shape(4096, 4096, torch.float32, tensors=64),
    Shape(4096, 4096, torch.bfloat16, "row"),
    Shape(65536, 256, torch.float32, "row", 64 / 256),  # RTop-K's: 65,536 rows
    Shape(65536, 1024, torch.float32, "row", 64 / 1024),
    Shape(65536, 4096, torch.float32, "row", 64 / 4096),
    Shape(4096, 4096, torch.bfloat16, "global", tensors=8),
]
TINY = [
    Shape(20, 450, torch.float32),
    Shape(3, 4500, torch.float16, tensors=2),
    Shape(9, 70, torch.bfloat16, "row"),
]


class Case:
    """One shape's tensors, copied so that no cache holds them, and the ways to prune them."""

    def __init__(self, shape: Shape, copies: int) -> None:
        self.shape, self.copies, on = shape, copies, measure.device()
        size = shape.rows, shape.cols
        self.xs = [[torch.randn(size, device=on).to(shape.dtype) for _ in range(shape.tensors)] for _ in range(copies)]
        self.outs = [torch.empty_like(x) for x in self.xs[0]]
        n = shape.cols if shape.scope == "row" else shape.rows * shape.cols
        self.k = max(1, int(shape.density * n * (shape.tensors if shape.scope == "global" else 1)))
        self.failed: set[str] = set()

    def ours(self, i: int) -> list[Tensor]:
        from lora_fuse.kernels.topk import select

        shape = self.shape
        shapes = [(shape.rows, shape.cols)] * shape.tensors
        ks = [self.k] * (1 if shape.scope == "global" else shape.tensors)
        select(self.xs[i], None, shapes, shape.scope, ks, "dense", self.outs).run()
        return self.outs

    def _plain(self, i: int, prune: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """By a way that prunes rows, tensor by tensor or all at once."""
        shape = self.shape
        if shape.scope == "row":
            return [prune(x) for x in self.xs[i]]
        if shape.scope == "tensor":
            return [prune(x.view(1, -1)).view(x.shape) for x in self.xs[i]]
        whole = prune(torch.cat([x.view(-1) for x in self.xs[i]])[None])
        return [part.view(shape.rows, shape.cols) for part in whole[0].split(shape.rows * shape.cols)]

    def _topk(self, x: Tensor) -> Tensor:
        kept = x.abs().topk(self.k, dim=1, sorted=False).indices
        return torch.zeros_like(x).scatter_(1, kept, x.gather(1, kept))

    def _kth(self, x: Tensor) -> Tensor:
        size = x.abs()
        return torch.where(size >= size.kthvalue(x.shape[1] - self.k + 1, dim=1, keepdim=True).values, x, 0)

    def _sort(self, x: Tensor) -> Tensor:
        size = x.abs()
        return torch.where(size >= size.sort(dim=1, descending=True).values[:, self.k - 1 : self.k], x, 0)

    def ways(self) -> dict[str, Callable[[int], list[Tensor]]]:
        return {
            report.OURS: self.ours,
            TOPK: lambda i: self._plain(i, self._topk),
            SORT: lambda i: self._plain(i, self._sort),
            # a program a slice, and many passes: over lists or whole models it would take all the time there is
            **({KTH: lambda i: self._plain(i, self._kth)} if self.shape.tensors == 1 else {}),
        }

    def check(self) -> None:
        """Ours bit for bit against the CPU's kernels; the others by how many they keep (all ties, or as many as asked).

        Raises:
            SystemExit: ours is wrong.
        """
        shape = self.shape
        few = slice(None) if shape.scope == "global" else slice(2)  # the CPU is slow beside this
        host = [x.cpu() for x in self.xs[0][few]]
        want = magnitude_prune(host, shape.density, shape.scope)
        for name, way in self.ways().items():
            try:
                got = [y.cpu() for y in way(0)[few]]
            except Exception as problem:
                if name == report.OURS:
                    raise
                measure.tell(name, problem)
                self.failed.add(name)
                continue
            pairs = list(zip(got, want, strict=True))
            if name == report.OURS:
                if not all(torch.equal(y, w) for y, w in pairs):
                    raise SystemExit(f"{shape}: {name}: not the entries that the CPU keeps; no times are shown")
            elif any(int((y != 0).sum()) < 0.99 * int((w != 0).sum()) for y, w in pairs):
                measure.tell(name, ValueError("keeps too few entries"))
                self.failed.add(name)

    def time(self) -> dict[str, float]:
        calls = {name: way for name, way in self.ways().items() if name not in self.failed}
        return measure.device_us(calls, self.copies, may_fail=(TOPK, KTH, SORT))


def shapes() -> list[Shape]:
    return SHAPES if measure.device().type == "cuda" else TINY


def check() -> None:
    for shape in shapes():
        if shape.tensors * shape.rows * shape.cols <= 1 << 26:
            Case(shape, 1).check()


def run(at: measure.Setting) -> Iterator[dict[str, Any]]:
    for shape in shapes()[: 2 if at.quick else None]:
        if at.budget.over(str(shape)):
            continue
        one = shape.tensors * shape.rows * shape.cols * shape.dtype.itemsize
        case = Case(shape, max(1, min(measure.COPIES, 16, _MOST_BYTES // one)))
        case.check()
        found = report.row("topk", str(shape), case.time(), shape.nbytes, at.bandwidth)
        report.show(found)
        yield found
        del case


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for shape in SHAPES[:4]:
        found: dict[str, Any] = next(
            (row for row in rows if row["shape"] == str(shape)), {"us": {}, "of_bandwidth": {}}
        )
        ours, rival = found["us"].get(report.OURS), found["us"].get(TOPK)
        faster = rival / ours if ours and rival else None
        made.append(report.target(f"{shape}: times faster than {TOPK}", 20, faster, at_least=True))
        share = found["of_bandwidth"].get(report.OURS)
        made.append(report.target(f"{shape}: of the bandwidth floor of its passes", 0.6, share, at_least=True))
    return made
