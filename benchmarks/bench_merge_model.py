"""Merges of a whole model's adapters: ``python -m benchmarks.bench_merge_model [--quick]``.

Eight rank-16 adapters on all 224 linear layers of a 7B-shaped model (hidden size 4096, intermediate 11008, 32 blocks).
Every method is first checked against its dense definition in fp64 (``lora_fuse.reference``) on small layers of mixed
ranks. "beyond the inputs" is the process' largest resident size during the merge less its size before, the result
included. PEFT has nothing but ``svd``; it is timed on one layer of each shape, with ``svd_full_matrices=False``, its
faster form, and the model's time is that times the number of layers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import reference
from lora_fuse.adapters.lora import LoraLayer

NUM_ADAPTERS, RANK, SCALING = 8, 16, 2.0
METHODS = ("svd", "knots_ties", "tsv", "iso_c", "iso_cts")
_STATUS = Path("/proc/self/status")


def shapes(hidden: int, intermediate: int, blocks: int) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of a Llama-shaped model's linear layers."""
    block = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"} | {
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return {f"model.layers.{i}.{path}": shape for i in range(blocks) for path, shape in block.items()}


def make_adapter(layers: dict[str, tuple[int, int]], rank: int = RANK) -> lf.LoraAdapter:
    """Factors with decaying directions, as trained ones have."""
    decay = torch.logspace(0, -1, rank)[:, None]
    return lf.LoraAdapter({
        path: LoraLayer(torch.randn(rank, columns).mul_(decay / columns**0.5), torch.randn(rows, rank), SCALING)
        for path, (rows, columns) in layers.items()
    })  # fmt: skip


def dense_merge(method: str, adapters: list[lf.LoraAdapter]) -> dict[str, Tensor]:
    """What the method's definition gives for each layer, all weights 1."""
    paths = list(adapters[0].layers)
    deltas = {p: {str(i): a.layers[p].product(torch.float64) for i, a in enumerate(adapters)} for p in paths}
    if method == "knots_ties":
        merged = reference.knots_ties([*deltas.values()], {str(i): 1.0 for i in range(len(adapters))}, 0.2)
        return dict(zip(paths, merged, strict=True))
    if method == "svd":
        return {path: torch.stack([*d.values()]).sum(0) for path, d in deltas.items()}
    if method == "iso_cts":
        dims = {p: min(sum(a.layers[p].rank for a in adapters), *adapters[0].layers[p].weight_shape) for p in paths}
        return {path: reference.iso_cts([*d.values()], dims[path]) for path, d in deltas.items()}
    return {path: getattr(reference, method)([*d.values()]) for path, d in deltas.items()}


def check(method: str) -> float:
    """Largest relative error over some small layers; SystemExit if it is more than rounding to fp32 explains."""
    layers = {"wide": (96, 160), "tall": (200, 90), "square": (256, 256)}
    adapters = [make_adapter(layers, rank) for rank in (16, 5, 9, 16)]
    merged = lf.merge(adapters, method=method, **({"rank": 999} if method == "svd" else {}))
    error = 0.0
    for path, want in dense_merge(method, adapters).items():
        error = max(error, float((merged.layers[path].product(torch.float64) - want).norm() / want.norm()))
    if not error <= 1e-6:
        raise SystemExit(f"merge(method={method!r}) is off by {error:.1e}; no times are shown")
    return error


def resident_bytes(key: str) -> int | None:
    """VmRSS (now) or VmHWM (the largest since ``reset_peak``); None where the system does not tell."""
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Memory that was freed goes back to the system, so that it counts when it is used again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def timed(method: str, adapters: list[lf.LoraAdapter], rank: int | None) -> tuple[float, int | None]:
    """Seconds, and the peak of memory beyond what was there."""
    reset_peak()
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    merged = lf.merge(adapters, method=method, rank=rank)
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    assert merged.rank >= RANK
    return seconds, None if before is None or peak is None else peak - before


def peft_seconds(rows: int, columns: int) -> float:
    """PEFT's ``svd`` of one layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["layer"])
    base = nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=False)})
    model: Any = get_peft_model(base, config, adapter_name="0")  # type: ignore[arg-type]
    names = [str(i) for i in range(NUM_ADAPTERS)]
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        nn.init.normal_(model.base_model.model["layer"].lora_B[name].weight)
    start = time.perf_counter()
    model.add_weighted_adapter(
        names, [1.0] * NUM_ADAPTERS, "merged", combination_type="svd", svd_rank=RANK, svd_full_matrices=False
    )
    return time.perf_counter() - start


def run(quick: bool) -> dict[str, Any]:
    """Check, time, print.

    Returns:
        ``model``, ``layers``, and ``nbytes`` of the adapters; ``rows``: for each method and rank its seconds and peak
        bytes; ``peft``: shape -> seconds, and ``peft_model``: the model's seconds by PEFT, extrapolated.
    """
    torch.manual_seed(0)
    layers = shapes(512, 1376, 4) if quick else shapes(4096, 11008, 32)
    errors = {method: check(method) for method in METHODS}
    adapters = [make_adapter(layers) for _ in range(NUM_ADAPTERS)]
    nbytes = sum(a.nbytes for a in adapters)
    print(f"{NUM_ADAPTERS} rank-{RANK} adapters on {len(layers)} layers, {nbytes / 1e9:.2f} GB, ", end="")
    print(f"{torch.get_num_threads()} threads", flush=True)
    timed("svd", [lf.LoraAdapter(dict([*a.layers.items()][:7])) for a in adapters], RANK)  # threads, buffers of LAPACK
    rows = []
    for method in METHODS:
        for rank in (RANK, None) if method != "svd" else (RANK,):
            seconds, peak = timed(method, adapters, rank)
            rows.append({"method": method, "rank": rank, "seconds": seconds, "peak": peak, "error": errors[method]})
            room = "" if peak is None else f", {peak / 1e9:.2f} GB beyond the inputs"
            print(f"{method:10} rank {rank or 'all':>3}: {seconds:6.1f} s{room}", flush=True)
    del adapters
    peft = {}
    for shape, count in Counter(layers.values()).items():
        peft[shape] = peft_seconds(*shape)
        print(f"PEFT svd of one {shape[0]} x {shape[1]} layer ({count} of them): {peft[shape]:.2f} s", flush=True)
    whole = sum(peft[shape] for shape in layers.values())
    print(f"PEFT svd, all layers, extrapolated: {whole:.0f} s, {whole / rows[0]['seconds']:.0f}x")
    model = "a small model" if quick else "a 7B-shaped model"
    return {
        "model": model, "layers": len(layers), "nbytes": nbytes, "rows": rows, "peft": peft, "peft_model": whole
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="28 small layers instead of 224 large ones")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args.quick)


if __name__ == "__main__":
    main()
