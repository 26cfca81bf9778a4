"""Everything that the README's table shows: ``python -m benchmarks`` (``make bench``), about 25 minutes on two cores.

Writes docs/benchmarks.md, every shape of every table, and the summary between the README's benchmark markers.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from benchmarks import (
    bench_compose,
    bench_merge,
    bench_merge_model,
    bench_model,
    bench_multi_lora,
    bench_sparse,
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


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
    composition = bench_compose.run(1.0 if args.quick else 20.0, args.quick)
    merge = bench_merge.bench(1024 if args.quick else 4096, repeats=7)
    svds = bench_svd.bench(1024 if args.quick else 4096, 2.0 if args.quick else 15.0)
    whole = bench_merge_model.run(args.quick)
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
        masks = bench_topk.run(args.quick, machine, 1.0 if args.quick else 12.0)
        products = bench_sparse.run_products(1024 if args.quick else 4096, 0.3 if args.quick else 3.0)
        switches = bench_sparse.run_switches(0.3 if args.quick else 3.0)
    summary = "\n".join([
        f"Measured on {here}.\n",
        "A whole model, MiniLM-L6, rank 8 on query/key/value/dense (interleaved medians, checked against PEFT):\n",
        tables.model(model),
        f"The LoRA part alone, {len(results)} shapes, factors rotated over 128 MB: how many times slower others are.\n",
        tables.summary(results),
        tables.merge(merge),
        f"The {bench_svd.RANK} largest directions of a 4096 x 4096 matrix (the floor is its products alone; "
        f"torch.linalg.svd of the flat one: {svds[0]['full_us'] / 1e6:.1f} s, "
        f"{svds[0]['full_us'] / svds[0]['us']['lora_fuse, power_iters=2']:.0f}x ours):\n",
        tables.svds(svds),
        f"All {whole['layers']} linear layers of {whole['model']}, {whole['nbytes'] / 1e9:.1f} GB of adapters; every "
        "method equals its dense definition within rounding to fp32. PEFT has `svd` alone; its time is that of one "
        f"layer of each shape ({tables.peft_layers(whole)}) times their number:\n",
        tables.merge_model(whole),
        f"A training step of learn_composition, {bench_compose.NUM_ADAPTERS} adapters on MiniLM-L6, beside the bare "
        "model's forward and backward:\n",
        tables.composition(composition),
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
    if args.quick:
        print(summary)
        return
    full = "\n".join([
        "# Benchmarks\n",
        "Written by `make bench`. Every variant is checked against fp64 or PEFT before it is timed.\n",
        summary,
        "Time over the floor `max(bytes / bandwidth, flops / gemm peak of the arithmetic) + 3 us`, geometric means; "
        "the instruction sets below the best on every third shape:\n",
        tables.floor(results + others),
        "Every shape, microseconds:\n",
        tables.shapes(results),
    ])  # fmt: skip
    (ROOT / "docs" / "benchmarks.md").write_text(full)
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    readme.write_text(f"{head}{BEGIN}\n{summary}{END}{tail}")


if __name__ == "__main__":
    main()
