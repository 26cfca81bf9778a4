"""Everything that the README's table shows: ``python -m benchmarks`` (``make bench``), about 25 minutes on two cores.

Writes docs/benchmarks.md, every shape of every table, and the summary between the README's benchmark markers.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_merge, bench_model, bench_multi_lora, roofline
from benchmarks.bench_multi_lora import all_shapes, geomean
from benchmarks.rivals import RIVALS
from lora_fuse import _cpu

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin (make bench) -->", "<!-- benchmarks: end -->"
NAMES = {
    "peft": "PEFT mixed batch",
    "mm loop": "per-adapter mm loop",
    "bmm": "gathered bmm",
    "vllm cpu": "vLLM CPU formula",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def model_table(rows: list[dict[str, Any]]) -> str:
    def over(r: dict[str, Any], name: str) -> str:
        us = r["us"]
        return f"{us[name] / 1e3:.2f} ms ({us[name] / us['bare model'] - 1:+.0%})"

    body = [
        [f"{r['rows']} x {r['tokens']}", str(r["adapters"]), f"{r['us']['bare model'] / 1e3:.2f} ms",
         over(r, "PEFT mixed batch"), over(r, "lora_fuse")]
        for r in rows
    ]  # fmt: skip
    return table(["rows x tokens", "adapters", "bare model", "PEFT mixed batch", "lora_fuse"], body)


def summary_table(results: list[dict[str, Any]]) -> str:
    body = []
    for dtype in ("float32", "bfloat16"):
        part = [r for r in results if r["dtype"] == dtype]
        if not part:
            continue
        ratios = {n: [r["us"][n] / r["us"]["lora_fuse"] for r in part] for n in RIVALS}
        best = [min(values) for values in zip(*ratios.values(), strict=True)]
        for name, values in [("best rival of each shape", best), *((NAMES[n], v) for n, v in ratios.items())]:
            lost = sum(v < 1 for v in values)
            body.append([dtype, name, f"{geomean(values):.1f}x", f"{min(values):.2f}x", f"{lost} of {len(values)}"])
    return table(["dtype", "against", "geometric mean", "worst shape", "shapes lost"], body)


def floor_table(results: list[dict[str, Any]]) -> str:
    body = []
    for isa in dict.fromkeys(r["isa"] for r in results):
        cells = []
        for dtype in ("float32", "bfloat16"):
            part = [r["us"]["lora_fuse"] / r["floor_us"] for r in results if (r["isa"], r["dtype"]) == (isa, dtype)]
            cells.append(f"{geomean(part):.2f}x" if part else "")
        body.append([isa, *cells])
    return table(["instruction set", "fp32: time / floor", "bf16: time / floor"], body)


def shapes_table(results: list[dict[str, Any]]) -> str:
    body = [
        [r["id"], f"{r['us']['lora_fuse']:.1f}", f"{r['floor_us']:.1f}", f"{r['floor_us'] / r['us']['lora_fuse']:.0%}"]
        + [f"{r['us'][n]:.1f}" for n in RIVALS] + [f"{r['us']['linear']:.1f}", f"{r['us']['layer']:.1f}"]
        for r in results
    ]  # fmt: skip
    head = ["shape", "lora_fuse", "floor", "of roofline", *(NAMES[n] for n in RIVALS), "bare linear", "whole layer"]
    return table(head, body)


def merge_table(rows: list[dict[str, Any]]) -> str:
    body = [
        [r["name"], f"{r['seconds'] * 1e3:.1f} ms", f"{r['ratio']:.0f}x", f"{r['excess']:.0e}",
         f"{r['largest_buffer']:.2f} of W"]
        for r in rows
    ]  # fmt: skip
    return table(["merge of 8 rank-16 adapters", "time", "ratio", "error / optimal - 1", "largest buffer"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes and seconds; prints, writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine, best = roofline.measure(), _cpu.isa()
    here = (
        f"{cpu_name()}, {best}, {args.threads} threads, torch {torch.__version__}; read bandwidth "
        f"{machine.bytes_per_s / 1e9:.0f} GB/s, gemm peak "
        + " and ".join(f"{f / 1e9:.0f} GFLOP/s {str(d).removeprefix('torch.')}" for d, f in machine.flops_per_s.items())
    )
    print(here, flush=True)
    model = bench_model.run(1.0 if args.quick else 8.0)
    merge = bench_merge.bench(1024 if args.quick else 4096, repeats=7)
    shapes, budget = all_shapes(args.quick), 0.3 if args.quick else 0.8
    results, others = [], []
    with torch.no_grad():
        for isa in [best, *reversed([n for n in _cpu.available_isas() if n != best])]:
            _cpu.choose_isa(isa)
            print(f"[{isa}]", flush=True)
            if isa == best:
                results = bench_multi_lora.run(shapes, machine, isa, list(RIVALS), budget)
            else:
                others += bench_multi_lora.run(shapes[:: 1 if args.quick else 3], machine, isa, [], budget / 4)
        _cpu.choose_isa(best)
    summary = "\n".join([
        f"Measured on {here}.\n",
        "A whole model, MiniLM-L6, rank 8 on query/key/value/dense (interleaved medians, checked against PEFT):\n",
        model_table(model),
        f"The LoRA part alone, {len(results)} shapes, factors rotated over 128 MB: how many times slower others are.\n",
        summary_table(results),
        merge_table(merge),
    ])  # fmt: skip
    if args.quick:
        print(summary)
        return
    full = "\n".join([
        "# Benchmarks\n",
        "Written by `make bench`. Every variant is checked against fp64 or PEFT before it is timed.\n",
        summary,
        "Time over the floor `max(bytes / bandwidth, flops / gemm peak of the arithmetic) + 3 us`, geometric means; "
        "the instruction sets below the best on every third shape:\n",
        floor_table(results + others),
        "Every shape, microseconds:\n",
        shapes_table(results),
    ])  # fmt: skip
    (ROOT / "docs" / "benchmarks.md").write_text(full)
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    readme.write_text(f"{head}{BEGIN}\n{summary}{END}{tail}")


if __name__ == "__main__":
    main()
