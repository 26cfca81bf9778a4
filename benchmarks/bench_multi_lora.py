"""The LoRA part of a mixed batch, ``multi_lora(out=y)``, against what users run today and against the roofline.

    python -m benchmarks.bench_multi_lora [--quick] [--isa NAME ...] [--json FILE]

Every variant adds into ``out`` with its own copy of the same factors, rotated over at least 128 MB; results are checked
against fp64 first; variants are interleaved in one process; medians are reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from benchmarks.rivals import RIVALS, Plan
from benchmarks.timing import interleaved_us
from lora_fuse import _cpu, reference
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora

ROWS_ADAPTERS = [(r, a) for r, a in itertools.product((1, 8, 64, 512), (1, 8, 64)) if a <= r]
FEATURES, RANKS, DTYPES = (768, 4096), (8, 16, 64), (torch.float32, torch.bfloat16)
MAX_PEFT_ADAPTERS = 512  # a PEFT layer of thousands of adapters takes minutes to build; fewer only flatters it
SCALING = 0.5


@dataclass(frozen=True)
class Shape:
    features: int
    rows: int
    adapters: int
    rank: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{name} d={self.features} rows={self.rows} adapters={self.adapters} rank={self.rank}"

    @property
    def factor_bytes(self) -> int:
        return self.adapters * self.rank * 2 * self.features * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Factors and x read once, out read and written."""
        return self.factor_bytes + 3 * self.rows * self.features * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.rank * 2 * self.features


def all_shapes(quick: bool = False) -> list[Shape]:
    shapes = [
        Shape(d, rows, adapters, rank, dtype)
        for dtype, d, (rows, adapters), rank in itertools.product(DTYPES, FEATURES, ROWS_ADAPTERS, RANKS)
    ]
    return shapes[::7] if quick else shapes


class Case:
    """One shape's tensors: ``variants`` maps a name to ``fn(set index)``, each adding into its own ``out``."""

    def __init__(self, shape: Shape, rivals: list[str], rotation_bytes: int = roofline.ROTATION_BYTES) -> None:
        self.shape = s = shape
        self.sets = max(2, -(-rotation_bytes // s.factor_bytes))
        slots = [i % s.adapters for i in range(s.rows)]
        self.plan, self.routing = Plan(slots), Routing.from_slots(torch.tensor(slots), s.adapters)
        self.x = torch.randn(s.rows, s.features).to(s.dtype)
        self.lora_a = (torch.randn(self.sets, s.adapters, s.rank, s.features) / s.features**0.5).to(s.dtype)
        self.lora_b = (torch.randn(self.sets, s.adapters, s.features, s.rank) / s.rank**0.5).to(s.dtype)
        self.pools = [AdapterPool(s.adapters, s.rank, s.features, s.features, s.dtype) for _ in range(self.sets)]
        for pool, a, b in zip(self.pools, self.lora_a, self.lora_b, strict=True):
            for slot in range(s.adapters):
                pool.write(slot, a[slot], b[slot], SCALING)
        self.variants = {"lora_fuse": self._ours()} | {name: self._rival(name) for name in rivals}
        if rivals:  # the whole layer beside its LoRA part
            x, weight, pools = self.x, torch.randn(s.features, s.features).to(s.dtype), self.pools
            self.whole = {
                "linear": lambda i: F.linear(x, weight),
                "layer": lambda i: multi_lora(x, pools[i], self.routing, out=F.linear(x, weight)),
            }
        else:
            self.whole = {}

    def _ours(self) -> Any:
        out, x, routing, pools = self.new_out(), self.x, self.routing, self.pools
        return lambda i: multi_lora(x, pools[i], routing, out=out)

    def _rival(self, name: str) -> Any:
        sets = self.sets if name != "peft" else max(1, min(self.sets, MAX_PEFT_ADAPTERS // self.shape.adapters))
        make, out, x, plan = RIVALS[name], self.new_out(), self.x, self.plan
        fns = [make(self.lora_a[i], self.lora_b[i], SCALING) for i in range(sets)]
        return lambda i: fns[i % sets](out, x, plan)

    def new_out(self) -> Tensor:
        return torch.zeros(self.shape.rows, self.shape.features, dtype=self.shape.dtype)

    def check(self) -> dict[str, float]:
        """Relative error of every variant against fp64 on set 0; ours at most twice torch's own (the mm loop)."""
        pairs = [(row, row % self.shape.adapters, 1.0) for row in range(self.shape.rows)]
        want = reference.multi_lora(self.x, *self.pools[0].tensors, pairs)
        errors = {n: float((fn(0).double() - want).norm() / want.norm()) for n, fn in self.variants.items()}
        if "mm loop" not in errors:
            plain = RIVALS["mm loop"](self.lora_a[0], self.lora_b[0], SCALING)(self.new_out(), self.x, self.plan)
            errors["mm loop"] = float((plain.double() - want).norm() / want.norm())
        limit = 2 * errors["mm loop"] + 1e-6
        if not errors["lora_fuse"] <= limit:
            raise AssertionError(f"{self.shape.id}: error {errors['lora_fuse']:.2e} exceeds {limit:.2e}")
        return errors

    def time_us(self, budget_s: float) -> dict[str, float]:
        """Medians over calls that walk through the factor sets, each variant elsewhere: the rivals share their copy."""
        variants = self.variants | self.whole
        apart = max(1, self.sets // len(variants))
        timed = {
            name: lambda i, fn=fn, first=k * apart: fn((i + first) % self.sets)
            for k, (name, fn) in enumerate(variants.items())
        }
        return interleaved_us(timed, budget_s)


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def arithmetic_of(dtype: torch.dtype, isa: str) -> torch.dtype:
    """The dtype whose gemm peak bounds this kernel: bf16 only where the bf16 dot or tile instructions are used."""
    return dtype if isa in ("avx512_bf16", "amx_bf16") else torch.float32


def run(
    shapes: list[Shape], machine: roofline.Machine, isa: str, rivals: list[str], budget_s: float
) -> list[dict[str, Any]]:
    """A row per shape: microseconds of every variant, the floor, and the fraction of the roofline that ours reaches."""
    results = []
    for shape in shapes:
        case = Case(shape, rivals)
        case.check()
        us = case.time_us(budget_s)
        floor = machine.floor_us(shape.nbytes, shape.flops, arithmetic_of(shape.dtype, isa))
        row = asdict(shape) | {
            "dtype": str(shape.dtype).removeprefix("torch."),
            "isa": isa,
            "us": us,
            "floor_us": floor,
        }
        row["id"] = shape.id
        row["gb_per_s"] = shape.nbytes / us["lora_fuse"] / 1e3
        row["gflop_per_s"] = shape.flops / us["lora_fuse"] / 1e3
        results.append(row)
        others = {n: us[n] for n in rivals}
        whole = f" | layer {us['layer']:9.1f} = linear {us['linear']:9.1f} + LoRA" if rivals else ""
        print(
            f"{shape.id:<52} {us['lora_fuse']:9.1f} {floor:9.1f} {us['lora_fuse'] / floor:5.2f}x | "
            + "  ".join(f"{n} {t:9.1f} ({t / us['lora_fuse']:5.1f}x)" for n, t in others.items())
            + whole,
            flush=True,
        )
    return results


def summarise(results: list[dict[str, Any]], rivals: list[str]) -> None:
    ours = [r["us"]["lora_fuse"] for r in results]
    over_floor = geomean([o / r["floor_us"] for o, r in zip(ours, results, strict=True)])
    print(f"\n{len(results)} shapes; time / floor: geometric mean {over_floor:.2f}x")
    if not rivals:
        return
    best = [min(r["us"][n] for n in rivals) / o for o, r in zip(ours, results, strict=True)]
    print(f"against the best rival of each shape: geometric mean {geomean(best):.2f}x, worst {min(best):.2f}x")
    for name in rivals:
        ratios = [r["us"][name] / o for o, r in zip(ours, results, strict=True)]
        print(f"against {name:<9}: geometric mean {geomean(ratios):.2f}x, worst {min(ratios):.2f}x")
    for r, ratio in zip(results, best, strict=True):
        if ratio < 1:
            print(f"slower than the best rival ({ratio:.2f}x): {r['id']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every seventh shape, less time on each")
    parser.add_argument(
        "--isa",
        nargs="*",
        default=None,
        help="instruction sets to time (default: the best, then the others without rivals)",
    )
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--filter", default="", help="only shapes whose id contains this")
    parser.add_argument("--budget", type=float, default=None, help="seconds a shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    machine = roofline.measure()
    peaks = ", ".join(f"{str(d).removeprefix('torch.')} {f / 1e9:.0f} GFLOP/s" for d, f in machine.flops_per_s.items())
    print(f"{args.threads} threads; read bandwidth {machine.bytes_per_s / 1e9:.1f} GB/s; gemm peak {peaks}")
    shapes = [s for s in all_shapes(args.quick) if args.filter in s.id]
    budget = args.budget or (0.3 if args.quick else 1.0)
    best = _cpu.isa()
    isas = args.isa or [best, *reversed([n for n in _cpu.available_isas() if n != best])]
    results = []
    for isa in isas:
        _cpu.choose_isa(isa)
        rivals = args.rivals if isa == isas[0] else []
        print(f"\n[{isa}] microseconds: lora_fuse, floor, ratio | rivals (times ours)")
        part = run(shapes, machine, isa, rivals, budget if rivals else budget / 4)
        summarise(part, rivals)
        results += part
    if args.json:
        with open(args.json, "w") as f:
            json.dump(
                {
                    "machine": {
                        "bytes_per_s": machine.bytes_per_s,
                        "flops_per_s": {str(k): v for k, v in machine.flops_per_s.items()},
                    },
                    "results": results,
                },
                f,
                indent=1,
            )


if __name__ == "__main__":
    main()
