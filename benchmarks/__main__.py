"""Everything that the README's tables show: ``python -m benchmarks`` (``make bench``), about 40 minutes on two cores.

Writes docs/benchmarks.md, every shape of every table, and a summary between the README's benchmark markers. Each part
carries the day and the bandwidth of its run; ``--only svd,merging`` measures some anew and keeps the others' text.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import (
    bench_compose,
    bench_joint,
    bench_merge,
    bench_merge_model,
    bench_model,
    bench_multi_lora,
    bench_sparse,
    bench_sparsify,
    bench_svd,
    bench_topk,
    roofline,
    tables,
)
from benchmarks.bench_multi_lora import all_shapes
from benchmarks.rivals import RIVALS
from lora_fuse import _cpu

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin (make bench) -->", "<!-- benchmarks: end -->"
HEAD = "# Benchmarks\n\nWritten by `make bench`. Every variant is checked against fp64 or PEFT before it is timed.\n\n"


@dataclass(frozen=True)
class Setting:
    """What a part runs with: less of everything if ``quick``."""

    quick: bool
    machine: roofline.Machine

    def seconds(self, budget: float, quick: float) -> float:
        return quick if self.quick else budget

    @property
    def size(self) -> int:
        return 1024 if self.quick else 4096


Part = Callable[[Setting], tuple[str, str]]  # -> what the README shows, and what docs/benchmarks.md shows beside it


def serving(at: Setting) -> tuple[str, str]:
    rows = bench_model.run(at.seconds(8.0, 1.0))
    return (
        "A whole model, MiniLM-L6, rank 8 on query/key/value/dense (interleaved medians, checked against PEFT):\n\n"
        + tables.model(rows)
    ), ""


def multi_lora(at: Setting) -> tuple[str, str]:
    best, shapes, budget = _cpu.isa(), all_shapes(at.quick), at.seconds(0.8, 0.3)
    results, others = [], []
    with torch.no_grad():
        for isa in [best, *reversed([n for n in _cpu.available_isas() if n != best])]:
            _cpu.choose_isa(isa)
            print(f"[{isa}]", flush=True)
            if isa == best:
                results = bench_multi_lora.run(shapes, at.machine, isa, list(RIVALS), budget)
            else:
                some = shapes[:: 1 if at.quick else 3]
                others += bench_multi_lora.run(some, at.machine, isa, [], budget / 4)
        _cpu.choose_isa(best)
    summary = (
        f"The LoRA part alone, {len(results)} shapes, factors rotated over 128 MB: how many times slower others "
        "are.\n\n" + tables.summary(results)
    )
    full = "\n".join([
        "Time over the floor `max(bytes / bandwidth, flops / gemm peak of the arithmetic) + 3 us`, geometric means; "
        "the instruction sets below the best on every third shape:\n",
        tables.floor(results + others),
        "Every shape, microseconds:\n",
        tables.shapes(results),
    ])  # fmt: skip
    return summary, full


def merging(at: Setting) -> tuple[str, str]:
    whole = bench_merge_model.run(at.quick)
    summary = "\n".join([
        "One layer, merged:\n",
        tables.merge(bench_merge.bench(at.size, repeats=7)),
        f"All {whole['layers']} linear layers of {whole['model']}, {whole['nbytes'] / 1e9:.1f} GB of adapters; every "
        "method equals its dense definition within rounding to fp32. PEFT has `svd` alone; its time is that of one "
        f"layer of each shape ({tables.peft_layers(whole)}) times their number:\n",
        tables.merge_model(whole),
    ])  # fmt: skip
    return summary, ""


def sparsifying(at: Setting) -> tuple[str, str]:
    rows = bench_sparsify.bench(at.size, 1)
    return (
        f"Methods that prune full deltas, {bench_sparsify.NUM_ADAPTERS} rank-{bench_sparsify.RANK} adapters on a "
        f"{at.size} x {at.size} layer, against PEFT's `*_svd` types (`svd_full_matrices=False`):\n\n"
        + tables.sparsify(rows)
    ), ""


def svd(at: Setting) -> tuple[str, str]:
    rows = bench_svd.bench(at.size, at.seconds(15.0, 2.0))
    return (
        f"The {bench_svd.RANK} largest directions of a {at.size} x {at.size} matrix (the floor is its products alone, "
        f"all in fp32; torch.linalg.svd of the flat one: {rows[0]['full_us'] / 1e6:.1f} s, "
        f"{rows[0]['full_us'] / rows[0]['us']['lora_fuse, power_iters=2']:.0f}x ours):\n\n" + tables.svds(rows)
    ), ""


def joint(at: Setting) -> tuple[str, str]:
    rows = bench_joint.compression(at.quick)
    served = bench_joint.serving(at.size, at.seconds(5.0, 0.5))
    summary = "\n".join([
        f"{bench_joint.NUM_ADAPTERS} rank-{bench_joint.RANK} adapters compressed together, one layer ({at.size} x "
        f"{at.size}); the error beside that of converged dense least squares is of a layer a quarter as wide:\n",
        tables.joint(rows),
        f"The same layer served, {bench_joint.NUM_ADAPTERS} rows, each with an adapter of its own:\n",
        tables.joint_serving(served),
    ])  # fmt: skip
    return summary, ""


def composition(at: Setting) -> tuple[str, str]:
    rows = bench_compose.run(at.seconds(20.0, 1.0), at.quick)
    return (
        f"A training step of learn_composition, {bench_compose.NUM_ADAPTERS} adapters on MiniLM-L6, beside the bare "
        "model's forward and backward:\n\n" + tables.composition(rows)
    ), ""


def finetunes(at: Setting) -> tuple[str, str]:
    masks = bench_topk.run(at.quick, at.machine, at.seconds(12.0, 1.0))
    with torch.no_grad():
        products = bench_sparse.run_products(at.size, at.seconds(3.0, 0.3))
        switches = bench_sparse.run_switches(at.seconds(3.0, 0.3))
    summary = "\n".join([
        "Whole fine-tunes as sparse task vectors (PERU-FFT). Pruning to 10 %, exactly: how many times slower "
        "others are; the floor is two reads and one write\n"
        f"(one threshold for all {masks[1]['tensors']} tensors of MiniLM-L6, of {masks[1]['tasks']} tasks: "
        f"{masks[1]['over_floor']:.2f}x two reads and one write).\n",
        tables.prune(masks[0]),
        f"Rows of {bench_sparse.TASKS} tasks in one batch, one layer: the residuals' product beside the bare linear:\n",
        tables.products(products),
        "All of MiniLM-L6 made another task's model in place, and back, against copying weights over:\n",
        tables.switches(switches),
    ])  # fmt: skip
    return summary, ""


PARTS: dict[str, Part] = {
    "serving": serving,
    "multi_lora": multi_lora,
    "merging": merging,
    "sparsifying": sparsifying,
    "svd": svd,
    "joint": joint,
    "composition": composition,
    "finetunes": finetunes,
}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def marker(name: str) -> str:
    return f"<!-- part: {name} -->\n"


def parts_of(text: str) -> dict[str, str]:
    """What each part says in a file written before."""
    pieces = re.split(r"<!-- part: (\w+) -->\n", text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes and seconds; prints, writes nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, of %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    torch.set_num_threads(args.threads)
    readme, docs = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    for name in PARTS:
        if name not in names:
            continue
        torch.manual_seed(0)
        machine = roofline.measure()
        gemm = " and ".join(f"{f / 1e9:.0f} {str(d).removeprefix('torch.')}" for d, f in machine.flops_per_s.items())
        here = (
            f"_{datetime.date.today()}, {cpu_name()}, {_cpu.isa()}, {args.threads} threads, torch {torch.__version__}; "
            f"read bandwidth {machine.bytes_per_s / 1e9:.0f} GB/s, gemm peak {gemm} GFLOP/s._\n\n"
        )
        print(f"[{name}] {here}", flush=True)
        summary, full = PARTS[name](Setting(args.quick, machine))
        if args.quick:
            print(summary)
            continue
        write(readme, docs, name, here + summary, f"{here}{summary}\n{full}")


def write(readme: Path, docs: Path, name: str, summary: str, full: str) -> None:
    """Put one part's text into both files, the other parts as they were."""
    head, _, rest = readme.read_text().partition(BEGIN)
    body, _, tail = rest.partition(END)
    shown = {**parts_of(body), name: summary.rstrip() + "\n\n"}
    ours = "".join(marker(part) + shown[part] for part in PARTS if part in shown)
    readme.write_text(f"{head}{BEGIN}\n{ours.rstrip()}\n{END}{tail}")
    kept = {**parts_of(docs.read_text()), name: full.rstrip() + "\n\n"}
    docs.write_text(HEAD + "".join(marker(part) + kept[part] for part in PARTS if part in kept).rstrip() + "\n")


if __name__ == "__main__":
    main()
