"""A linear layer and its LoRA part in one launch, beside the linear alone and the two in turn: decoding, rank 16.

"no adapter" is the same launch for a batch of base rows: what the kernel is worth as a product, against cuBLAS. Other
plans are timed too, since the shipped ones were drawn up without a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import measure, report
from benchmarks.gpu.multi_lora import LIMIT, TINY, Case, Shape
from benchmarks.gpu.own_ways import routing_of

SHAPES = [Shape("o", 16, t, n) for t, n in ((16, 8), (1, 1), (64, 8), (32, 8), (4, 4), (16, 1))]
WIDER = [Shape(site, 16, t, min(t, 8)) for site in ("qkv", "down", "gate_up") for t in (16, 1)]
MOST = 0.05  # over the linear


class Fused:
    """A shape of ``multi_lora``, and its launches: by plan."""

    def __init__(self, shape: Shape, copies: int = measure.COPIES) -> None:
        from lora_fuse.kernels.configs import tile_capacity
        from lora_fuse.kernels.fused_linear import num_counters
        from lora_fuse.kernels.fused_linear_plan import plan
        from lora_fuse.kernels.routing import build_tiles

        self.case = Case(shape, copies)
        x, fan_out, slots = self.case.x, self.case.y.shape[1], shape.adapters
        self.counters = torch.zeros(num_counters(fan_out), dtype=torch.int32, device=x.device)
        self.routings = {"": self.case.routing, "none": routing_of([-1] * shape.rows, slots, x.device)}
        self.tiles = {name: build_tiles(r.rows, r.segment_starts) for name, r in self.routings.items()}
        dtype = str(x.dtype).removeprefix("torch.")
        made = plan(*x.shape, fan_out, shape.rank, tile_capacity(self.case.routing.num_pairs, slots), dtype)
        self.plans = {report.OURS: made, "32 shrinkers": replace(made, shrinkers=min(made.shrinkers, 32))}
        if made.splits == 1 and made.block_n >= 32:
            half = made.block_n // 2
            self.plans["half as wide"] = replace(made, block_n=half, num_stages=min(made.num_stages, 4))
            self.plans["a tile for two"] = replace(made, splits=2)
        self.plans["two stages fewer"] = replace(made, num_stages=max(2, made.num_stages - 2))
        self.base = replace(made, shrinkers=0)
        weight = self.case.problem.copies[0].weight
        self.nbytes = weight.nbytes + self.case.nbytes - self.case.y.nbytes  # y is not read

    def run(self, chosen: Any, i: int, routing: str = "") -> Tensor:
        from lora_fuse.kernels.fused_linear import launch

        case, out = self.case, torch.empty_like(self.case.y)
        lists, tiles = self.routings[routing].tensors, self.tiles[routing]
        weight = case.problem.copies[i].weight
        launch(out, case.x, weight, None, case.pools[i].tensors, lists, tiles, self.counters, chosen).run()
        return out

    def check(self) -> None:
        """Every plan against fp64.

        Raises:
            SystemExit: one of them is wrong, or left its counters other than it found them.
        """
        base = self.case.x.double() @ self.case.problem.copies[0].weight.double().t()
        limit, want = LIMIT * torch.finfo(self.case.x.dtype).eps, self.case.want(base.clone())
        for name, chosen in self.plans.items() if self.case.x.is_cuda else [*self.plans.items()][:1]:
            measure.require(f"{self.case.shape}: {name}", self.run(chosen, 0), want, limit)
        measure.require(f"{self.case.shape}: no adapter", self.run(self.base, 0, "none"), base, limit)
        if self.counters.any():
            raise SystemExit(f"{self.case.shape}: counters are {self.counters.tolist()}, should be zeros")

    def time(self, quick: bool) -> dict[str, float]:
        case = self.case
        weights = [f.weight for f in case.problem.copies]

        def in_turn(i: int) -> None:
            case.ways[report.OURS].with_base(case.problem, i)

        calls: dict[str, Any] = {"linear": lambda i: linear(case.x, weights[i]), "in turn + base": in_turn}
        calls["no adapter + base"] = lambda i: self.run(self.base, i, "none")
        for name, chosen in self.plans.items():
            if name == report.OURS or not quick:
                calls[f"{name} + base"] = partial(self.run, chosen)
        return measure.device_us(calls, case.copies)


def shapes() -> list[Shape]:
    return [*SHAPES, *WIDER] if measure.device().type == "cuda" else TINY[:1]


def check() -> None:
    for shape in shapes()[:4]:
        Fused(shape, 1).check()


def run(at: measure.Setting) -> Iterator[dict[str, Any]]:
    for shape in shapes()[: 4 if at.quick else None]:
        if at.budget.over(str(shape)):
            continue
        made = Fused(shape, measure.COPIES if measure.device().type == "cuda" else 1)
        made.check()
        found = report.row("fused", str(shape), made.time(at.quick), made.nbytes, at.bandwidth, base="linear")
        report.show(found)
        yield found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = {str(shape) for shape in SHAPES}
    found = [row["overhead"] for row in rows if row["shape"] in wanted]
    ours = max((over[report.OURS] for over in found), default=None)
    base = max((over["no adapter"] for over in found), default=None)
    return [
        report.target("one launch over the linear, worst of o_proj at 1 to 64 rows", MOST, ours),
        report.target("its product alone over cuBLAS, worst of these", 0.03, base),
    ]
