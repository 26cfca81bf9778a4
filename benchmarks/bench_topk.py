"""Magnitude pruning, exact, against sorting-based rivals and against the roofline.

    python -m benchmarks.bench_topk [--quick] [--threads N] [--isa NAME] [--json FILE]

Results are checked against the reference before anything is timed; variants are interleaved in one process; medians are
reported. The floor is what must move at this machine's measured read bandwidth: for one tensor two reads (find the
threshold, apply it) and one write; for the list of a model one read of every input and one write of every output.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.timing import interleaved_us
from lora_fuse import _cpu, reference
from lora_fuse.functional import magnitude_prune, sparsify, topk_mask
from lora_fuse.ops.topk_call import Call

DENSITY = 0.1


def topk_scatter(x: Tensor, density: float) -> Tensor:
    """As PEFT prunes: topk of the magnitudes, a mask scattered from its indices, a product."""
    mask = torch.zeros_like(x).view(-1)
    mask[torch.topk(x.abs().view(-1), int(density * x.numel())).indices] = 1
    return x * mask.view(x.shape)


def kthvalue(x: Tensor, density: float) -> Tensor:
    size = x.abs().view(-1)
    threshold = torch.kthvalue(size, size.numel() - int(density * size.numel()) + 1).values
    return torch.where(x.abs() >= threshold, x, 0.0)


def numpy_partition(x: Tensor, density: float) -> Tensor:
    """np.partition of the magnitudes; NumPy has no bf16, so fp32."""
    size = x.abs().float().numpy()
    at = size.size - int(density * size.size)
    return torch.where(torch.from_numpy(size >= np.partition(size.reshape(-1), at)[at]), x, 0.0)


def numpy_partition_bits(x: Tensor, density: float) -> Tensor:
    """np.partition of the magnitudes' bits, which order as integers."""
    kind, most = (torch.int32, 0x7FFFFFFF) if x.dtype == torch.float32 else (torch.int16, 0x7FFF)
    keys = x.view(kind).numpy() & most
    flat = keys.reshape(-1).copy()
    at = flat.size - int(density * flat.size)
    flat.partition(at)
    return torch.where(torch.from_numpy(keys >= flat[at]), x, 0.0)


RIVALS = {
    "topk + scatter": topk_scatter,
    "kthvalue": kthvalue,
    "numpy.partition": numpy_partition,
    "numpy, integer keys": numpy_partition_bits,
}


def select_only(x: Tensor, histogram: bool) -> Callable[[int], Any]:
    call = Call(x, None, DENSITY, "tensor")
    return lambda _: call.select(histogram)


def one_tensor(size: int, dtype: torch.dtype, machine: roofline.Machine, budget_s: float) -> dict[str, Any]:
    """A ``size x size`` tensor: all outputs, both ways to find the threshold, the rivals."""
    x, minus = torch.randn(size, size).to(dtype), (torch.randn(size, size) * 0.3).to(dtype)
    out = torch.empty_like(x)
    want = reference.topk_mask([x], DENSITY)[0]
    pruned = torch.where(want, x, torch.zeros((), dtype=dtype))
    if not torch.equal(magnitude_prune(x, DENSITY, out=out), pruned) or not torch.equal(topk_mask(x, DENSITY), want):
        raise AssertionError("magnitude_prune, topk_mask: not the reference's set")
    if not torch.equal(sparsify(x, DENSITY).to_dense(), pruned):
        raise AssertionError("sparsify: not the reference's entries")
    if not torch.equal(magnitude_prune(x, DENSITY, minus=minus), magnitude_prune(x - minus, DENSITY)) and (
        dtype == torch.float32
    ):
        raise AssertionError("minus: differs from the difference's own")
    ours = {
        "prune, out=": lambda _: magnitude_prune(x, DENSITY, out=out),
        "prune, fresh": lambda _: magnitude_prune(x, DENSITY),
        "prune, minus, out=": lambda _: magnitude_prune(x, DENSITY, minus=minus, out=out),
        "prune, rows, out=": lambda _: magnitude_prune(x, DENSITY, "row", out=out),
        "mask": lambda _: topk_mask(x, DENSITY),
        "sparse": lambda _: sparsify(x, DENSITY),
        "select, sampled bracket": select_only(x, False),
        "select, histograms": select_only(x, True),
        "copy": lambda _: out.copy_(x),
    }
    us = interleaved_us(ours, budget_s)
    rivals = {name: lambda _, fn=fn: fn(x, DENSITY) for name, fn in RIVALS.items()}
    slow = interleaved_us({"prune, out=": ours["prune, out="], **rivals}, budget_s, min_rounds=3)
    mine = slow.pop("prune, out=")
    floor = 3e6 * x.nbytes / machine.bytes_per_s
    return {
        "shape": [size, size],
        "dtype": str(dtype).removeprefix("torch."),
        "us": us,
        "rival_us": slow,
        "times_ours": {name: t / mine for name, t in slow.items()},
        "floor_us": floor,
        "over_floor": us["prune, out="] / floor,
    }


def minilm_shapes() -> list[tuple[int, ...]]:
    """all-MiniLM-L6-v2's 103 parameters."""
    d, wide = 384, 1536
    layer: list[tuple[int, ...]] = [(d, d), (d,)] * 4 + [(d,), (d,), (wide, d), (wide,), (d, wide), (d,), (d,), (d,)]
    return [(30522, d), (512, d), (2, d), (d,), (d,), *(layer * 6), (d, d), (d,)]


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def whole_model(tasks: int, machine: roofline.Machine, budget_s: float) -> dict[str, Any]:
    """One threshold per task over a model's tensors, ``tasks`` fine-tunes against one merged model, fp32."""
    merged = [torch.randn(s) * 0.05 for s in minilm_shapes()]
    tuned = [[m + torch.randn(m.shape) * 0.002 for m in merged] for _ in range(tasks)]
    outs = [[torch.zeros_like(m) for m in merged] for _ in range(tasks)]

    def prune(_: int) -> None:
        for t, out in zip(tuned, outs, strict=True):
            magnitude_prune(t, DENSITY, "global", merged, out)

    def compact(_: int) -> list[Any]:
        return [sparsify(t, DENSITY, "global", minus=m2, values="x") for t in matrices]

    rows = [i for i, m in enumerate(merged) if m.dim() > 1]
    m2, matrices = [merged[i] for i in rows], [[t[i] for i in rows] for t in tuned]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = torch.ones(max(0, peak - resident()) // 4 + 1)  # memory that earlier tables have given back hides no growth
    before = resident()
    prune(0)
    extra = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - max(peak, before))
    del held
    want = reference.topk_mask(tuned[0], DENSITY, "global", merged)
    for x, m, mask, out in zip(tuned[0], merged, want, outs[0], strict=True):
        if not torch.equal(out, torch.where(mask, x - m, 0.0)):
            raise AssertionError("global: not the reference's set")
    us = interleaved_us({"prune, out=": prune, "sparse, values=x": compact}, budget_s)
    nbytes = sum(m.nbytes for m in merged)
    floor = 1e6 * tasks * 3 * nbytes / machine.bytes_per_s  # x and minus read, out written
    return {
        "tensors": len(merged),
        "entries": sum(m.numel() for m in merged),
        "tasks": tasks,
        "us": us,
        "floor_us": floor,
        "over_floor": us["prune, out="] / floor,
        "extra_bytes": extra,
    }


def show_tensor(r: dict[str, Any]) -> None:
    print(f"\n{r['shape'][0]} x {r['shape'][1]} {r['dtype']}, density {DENSITY}; floor {r['floor_us'] / 1e3:.2f} ms")
    for name, t in r["us"].items():
        print(f"  {name:<26} {t / 1e3:8.2f} ms  {t / r['floor_us']:6.2f} x floor")
    for name, t in r["rival_us"].items():
        print(f"  {name:<26} {t / 1e3:8.2f} ms  {r['times_ours'][name]:6.1f} x prune, out=")


def run(quick: bool, machine: roofline.Machine, budget: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Both tables: one tensor of each dtype, and a whole model."""
    tensors = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors.append(one_tensor(1024 if quick else 4096, dtype, machine, budget))
        show_tensor(tensors[-1])
    model = whole_model(2 if quick else 5, machine, budget)
    print(
        f"\n{model['tasks']} tasks, {model['tensors']} tensors of {model['entries'] / 1e6:.1f} M entries, global, minus"
    )
    for name, t in model["us"].items():
        print(f"  {name:<26} {t / 1e3:8.2f} ms  {t / model['floor_us']:6.2f} x floor")
    print(f"  extra memory {model['extra_bytes'] / 1e6:.0f} MB")
    return tensors, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 x 1024, two tasks, less time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="", help="an instruction set (default: the best)")
    parser.add_argument("--budget", type=float, default=None, help="seconds a table")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    _cpu.choose_isa(args.isa)
    machine = roofline.measure()
    print(f"{args.threads} threads, {_cpu.isa()}; read bandwidth {machine.bytes_per_s / 1e9:.1f} GB/s")
    tensors, model = run(args.quick, machine, args.budget or (1.0 if args.quick else 12.0))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"bytes_per_s": machine.bytes_per_s, "tensors": tensors, "model": model}, f, indent=1)


if __name__ == "__main__":
    main()
