"""``multi_lora`` on the linear layers of an 8B decoder, beside vLLM's and SGLang's kernels, PEFT and plain torch.

The bare linear, what the LoRA part adds to it, and the part alone against the bytes that must move. Every way runs on
the same tensors; what a batch's adapters decide (routing, segments) is made once, as a model does for all its layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import measure, report, rivals
from benchmarks.gpu.own_ways import AHEAD, AUGMENTED, OVERLAP, own_ways, pool_of, routing_of
from benchmarks.gpu.rival_ways import Factors, Problem, Way, settle, ways

SITES = {
    "o": (4096, 4096),
    "qkv": (4096, 6144),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "tiny": (64, 96),
    "wide": (64, 400),
}
ROWS, ADAPTERS = (1, 4, 16, 64, 256, 1024, 4096), (1, 4, 16, 64)
SCALING = 0.5
ROOM = 24 << 30  # bytes that the copies may take
LIMIT = 4.0  # machine epsilons of the largest result: two roundings to the dtype, and some


@dataclass(frozen=True)
class Shape:
    """A batch on a layer.

    Args:
        mix: "even", rows fall to the adapters in equal runs; "zipf", in any order, the n-th adapter 1/n as often as the
            first; "half", every other row has none.
        mixed_ranks: a quarter, half and all of ``rank`` in turn.
    """

    site: str
    rank: int
    rows: int
    adapters: int
    mix: str = "even"
    mixed_ranks: bool = False

    def __str__(self) -> str:
        name = f"{self.site} r{self.rank} T{self.rows} N{self.adapters}"
        return name + f" {self.mix}" * (self.mix != "even") + " ranks mixed" * self.mixed_ranks

    def slots(self) -> list[int]:
        even = [row * self.adapters // self.rows for row in range(self.rows)]
        if self.mix == "zipf":
            odds = 1 / torch.arange(1, self.adapters + 1)
            return torch.multinomial(odds, self.rows, True, generator=torch.Generator().manual_seed(0)).tolist()
        return [slot if row % 2 else -1 for row, slot in enumerate(even)] if self.mix == "half" else even

    def ranks(self) -> list[int]:
        parts = (4, 2, 1) if self.mixed_ranks else (1,)
        return [max(1, self.rank // parts[slot % len(parts)]) for slot in range(self.adapters)]


# What the targets are about, then the grid, then the other layers.
DECODE = [Shape("o", 16, t, n) for t, n in ((1, 1), (4, 1), (4, 4), (16, 1), (16, 8), (64, 1), (64, 8))]
MANY, PREFILL = Shape("o", 16, 64, 64), Shape("o", 16, 4096, 8)
PEFT = [Shape("o", 16, 16, 8), Shape("o", 16, 64, 8), PREFILL]


def grid() -> list[Shape]:
    """The most telling first, for time may run out."""
    made = [*DECODE, MANY, PREFILL]
    for rank in (16, 64, 8, 256):
        made += [Shape("o", rank, t, n) for t, n in itertools.product(ROWS, ADAPTERS) if n <= t]
        if rank == 16:
            made += [Shape("o", rank, t, 16, "zipf") for t in ROWS[2:]]
            made += [Shape("o", rank, t, 8, "half") for t in (16, 64, 1024)]
            made += [Shape(s, 16, t, n) for s in ("qkv", "gate_up", "down") for t, n in ((1, 1), (16, 8), (64, 8))]
        if rank == 64:
            made += [Shape("o", rank, t, 16, "zipf", mixed_ranks=True) for t in ROWS[2:]]
    made += [Shape(s, 16, 4096, 8) for s in ("qkv", "gate_up", "down")]
    return list(dict.fromkeys(made))


TINY = [
    Shape("tiny", 16, 9, 3),
    Shape("tiny", 16, 1, 1),
    Shape("tiny", 32, 12, 2, "half"),
    Shape("tiny", 32, 10, 3, "zipf", mixed_ranks=True),
]


@dataclass
class Case:
    """A shape with its data, in as many copies as wanted, and the ways to run it."""

    shape: Shape
    copies: int = measure.COPIES
    problem: Problem = field(init=False)
    ways: dict[str, Way] = field(init=False)

    def __post_init__(self) -> None:
        device, shape = measure.device(), self.shape
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # bf16 is wrong in the interpreter
        (fan_in, fan_out), rank, ranks, slots = SITES[shape.site], shape.rank, shape.ranks(), shape.slots()
        of_factors = shape.adapters * rank * (2 * fan_in + 2 * fan_out)
        self.copies = max(2, min(self.copies, ROOM // ((2 * fan_in * fan_out + of_factors) * dtype.itemsize)))
        drawn = partial(torch.randn, device=device, dtype=dtype)
        made = []
        for _ in range(self.copies):
            a, b = drawn(shape.adapters, rank, fan_in) / fan_in**0.5, drawn(shape.adapters, fan_out, rank) / rank**0.5
            for slot, own in enumerate(ranks):
                a[slot, own:], b[slot, :, own:] = 0, 0
            made.append(Factors(drawn(fan_out, fan_in) / fan_in**0.5, [a], [b], a, b))
        self.x, self.y = drawn(shape.rows, fan_in), drawn(shape.rows, fan_out)
        self.problem = Problem(self.x, slots, ranks, SCALING, (fan_out,), made)
        self.pools = [pool_of(f.all_a, f.all_b, ranks, SCALING) for f in made]
        self.routing = routing_of(slots, shape.adapters, device)
        self.ways = {**own_ways(self.problem, self.pools, self.routing), **ways(self.problem)}
        used = sum(ranks[slot] for slot in set(slots) - {-1}) * (fan_in + fan_out) * dtype.itemsize
        live = sum(slot >= 0 for slot in slots) / shape.rows
        self.nbytes = used + live * (self.x.nbytes + 2 * self.y.nbytes)  # factors and x once, y read and written

    def want(self, y: Tensor) -> Tensor:
        """``y`` and the first copy's LoRA part, in fp64."""
        want, factors = y.double(), self.problem.copies[0]
        slots = torch.tensor(self.problem.slots)
        for slot in range(self.shape.adapters):
            index = (slots == slot).nonzero()[:, 0].to(y.device)
            h = self.x[index].double() @ factors.all_a[slot].double().t()
            want[index] += SCALING * (h @ factors.all_b[slot].double().t())
        return want

    def check(self) -> None:
        """Each way against fp64, alone and with the base; a rival that is wrong or fails is told and left out.

        Raises:
            SystemExit: ours is wrong.
        """
        limit = LIMIT * torch.finfo(self.x.dtype).eps
        want = self.want(self.y)
        whole = self.want(self.x.double() @ self.problem.copies[0].weight.double().t())
        for name, way in list(self.ways.items()):
            try:
                if way.alone is not None:
                    got = self.y.clone()
                    way.alone(got, 0)
                    measure.require(f"{self.shape}: {name}", got, want, limit)
                measure.require(f"{self.shape}: {name} with the base", way.with_base(self.problem, 0), whole, limit)
            except (Exception, SystemExit) as problem:
                if name.startswith(report.OURS):
                    raise
                measure.tell(f"{name} of {self.shape}", problem)
                del self.ways[name]

    def time(self) -> dict[str, Any]:
        """Microseconds of each way alone and with the base; of a rival's plans, its default and its fastest."""
        weights = [f.weight for f in self.problem.copies]
        calls: dict[str, Any] = {"linear": lambda i: linear(self.x, weights[i])}
        for name, way in self.ways.items():
            if way.alone is not None:
                calls[name] = lambda i, way=way: way.alone(self.y, i)
            calls[f"{name} + base"] = lambda i, way=way: way.with_base(self.problem, i)
        rivals_calls = [name for name in calls if not name.startswith((report.OURS, "linear"))]
        us = measure.device_us(calls, self.copies, seconds=0.4, may_fail=rivals_calls)
        chosen = {}
        for rival, kept in (("vllm", "vllm tuned"), ("sglang v2", "sglang v2")):
            if any(name.startswith(rival) for name in us):
                chosen[kept] = settle(us, rival, kept)
        if self.shape in PEFT:
            us |= peft_us(self)
        return {"us": us, "chosen": chosen}


def peft_us(case: Case) -> dict[str, float]:
    """The time that PEFT's mixed batch keeps the device busy, its base layer free of charge.

    It indexes by Python lists, so it cannot be captured: its gaps are left out, in its favour.
    """
    from benchmarks.rivals import peft_layer

    copies, names = case.problem.copies[:8], [str(slot) for slot in case.problem.slots]
    try:
        layers = [peft_layer(f.all_a, f.all_b, SCALING) for f in copies]
    except ImportError as problem:
        measure.tell("peft", problem)
        return {}
    for _, given in layers:
        given.out = case.y
    got = layers[0][0](case.x, adapter_names=names)
    measure.require("peft", got, case.want(case.y), LIMIT * torch.finfo(case.x.dtype).eps)
    return {"peft": measure.busy_us(lambda i: layers[i][0](case.x, adapter_names=names), len(layers))}


def shapes(quick: bool) -> list[Shape]:
    if measure.device().type == "cpu":
        return TINY[: 1 if quick else None]
    return [*DECODE, MANY, PREFILL] if quick else grid()


def compile_share(share: slice) -> Iterator[None]:
    """Run every way of some of the shapes once: a process of several that fill Triton's cache together."""
    for shape in shapes(False)[share]:
        Case(shape, 1).check()
        yield


def check() -> None:
    for shape in TINY[:2] if measure.device().type == "cpu" else (DECODE[0], MANY, PREFILL):
        Case(shape, 1).check()


def run(at: measure.Setting) -> Iterator[dict[str, Any]]:
    for line in rivals.missing():
        print(line)
    for shape in shapes(at.quick):
        if at.budget.over(str(shape)):
            continue
        case = Case(shape)
        case.check()
        timed = case.time()
        about = {"rank": shape.rank, "rows": shape.rows, "adapters": shape.adapters, "chosen": timed["chosen"]}
        found = report.row("multi_lora", str(shape), timed["us"], case.nbytes, at.bandwidth, "linear", **about)
        report.show(found)
        yield found
        del case
        if measure.device().type == "cuda":
            torch.cuda.empty_cache()


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the shapes that were measured; ours the default way, and with each of ``attach``'s options."""
    by = {r["shape"]: r for r in rows}
    many, prefill, peft = by.get(str(MANY)), by.get(str(PREFILL)), [r for r in rows if "peft" in r["us"]]
    decode = [by[str(s)] for s in DECODE if str(s) in by]
    ours, aim = report.OURS, report.target
    made = []
    for way in _OWN:
        most, shape = max(((_of(r, way), r["shape"]) for r in decode), default=(None, ""))
        what = "o_proj, rank 16, 1-64 rows, up to 8 adapters: most over the linear"
        made.append(aim(f"{way}: {what}", 0.22, most, note=shape))
    made += [
        aim("64 rows, 64 adapters: times its byte floor", 1.8, many and many["us"][ours] / many["floor_us"]),
        aim("o_proj, 4096 rows, 8 adapters: over the linear", 0.22, prefill and prefill["overhead"][ours]),
    ]
    for way in _OWN:
        for rival, limit in (("vllm tuned", 1.5), ("sglang v2", 1.15)):
            made.append(_against(rows, rival, way, limit))
        raced = [(_against_best(r, way), r["shape"]) for r in rows if any(n not in _OWN for n in r["overhead"])]
        least, shape = min(raced, default=(None, ""))
        made.append(aim(f"{way}: base and LoRA, the best rival's time over ours, worst", 0.95, least, True, shape))
    made += [_against(rows, rival, ours, 1.0) for rival in ("vllm", "sglang triton", "sglang csgmv")]
    ratio = geometric_mean(r["us"]["peft"] / r["us"][ours] for r in peft) if peft else None
    return [*made, aim("LoRA part: PEFT's time over ours", 5.0, ratio, True, f"{len(peft)} shapes")]


_OWN = (report.OURS, OVERLAP, AUGMENTED, AHEAD)


def _of(row: dict[str, Any], way: str) -> float:
    """Its overhead; the default way's where an option does not apply, as ``attach`` has it."""
    return float(row["overhead"].get(way, row["overhead"][report.OURS]))


def _against(rows: list[dict[str, Any]], rival: str, way: str, limit: float) -> dict[str, Any]:
    both = [r for r in rows if rival in r["overhead"]]
    # at least 0.1 %: less is within the noise
    ratios = [max(_of(r, rival), 1e-3) / max(_of(r, way), 1e-3) for r in both]
    ratio = geometric_mean(ratios) if both else None
    return report.target(f"{rival}'s overhead over {way}'s, geometric mean", limit, ratio, True, f"{len(both)} shapes")


def _against_best(row: dict[str, Any], way: str) -> float:
    best = min(over for name, over in row["overhead"].items() if name not in _OWN)
    return (1 + best) / (1 + _of(row, way))
