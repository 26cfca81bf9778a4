"""merge(method="svd") against the ways of doing it densely: ``python -m benchmarks.bench_merge [--quick]``.

Eight rank-16 adapters on one square layer are merged into rank 16. Every result is checked against the optimum (the
tail of the dense sum's singular values, fp64) before any time is shown. "largest buffer" is the largest tensor that
any operation returned, as a multiple of the weight's size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer

NUM_ADAPTERS, RANK, SCALING = 8, 16, 2.0
WEIGHTS = [0.5, -0.25, 0.75, 0.3, 1.0, 0.4, -0.6, 0.2]


class _LargestBuffer(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def make_adapters(size: int) -> list[lf.LoraAdapter]:
    """Factors with decaying directions, as trained ones have, so that a truncation has something to find."""
    decay = torch.logspace(0, -1, RANK)
    layers = [
        LoraLayer(torch.randn(RANK, size) * decay[:, None] / size**0.5, torch.randn(size, RANK), SCALING)
        for _ in range(NUM_ADAPTERS)
    ]
    return [lf.LoraAdapter({"layer": layer}) for layer in layers]


def peft_model(adapters: list[lf.LoraAdapter], size: int) -> Any:
    """A one-layer PEFT model that holds the same factors under the names "0", "1", ..."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["layer"])
    base = nn.ModuleDict({"layer": nn.Linear(size, size, bias=False)})
    model: Any = get_peft_model(base, config, adapter_name="0")  # type: ignore[arg-type]
    for i, adapter in enumerate(adapters):
        if i:
            model.add_adapter(str(i), config)
        target = model.base_model.model["layer"]
        with torch.no_grad():
            target.lora_A[str(i)].weight.copy_(adapter.layers["layer"].lora_a)
            target.lora_B[str(i)].weight.copy_(adapter.layers["layer"].lora_b)
    return model


def dense_sum(adapters: list[lf.LoraAdapter], dtype: torch.dtype = torch.float32) -> Tensor:
    total = torch.zeros(adapters[0].layers["layer"].weight_shape, dtype=dtype)
    for adapter, w in zip(adapters, WEIGHTS, strict=True):
        layer = adapter.layers["layer"]
        total.addmm_(layer.lora_b.to(dtype), layer.lora_a.to(dtype), alpha=w * layer.scaling)
    return total


Factors = tuple[Tensor, Tensor]  # lora_b, lora_a of the result, scaling 1


def rivals(adapters: list[lf.LoraAdapter], size: int) -> dict[str, Callable[[], Factors]]:
    model = peft_model(adapters, size)
    names = [str(i) for i in range(NUM_ADAPTERS)]

    def peft(**options: Any) -> Factors:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(names, WEIGHTS, "merged", combination_type="svd", svd_rank=RANK, **options)
        target = model.base_model.model["layer"]
        return target.lora_B["merged"].weight.detach(), target.lora_A["merged"].weight.detach()

    def dense_svd() -> Factors:
        u, s, vh = torch.linalg.svd(dense_sum(adapters), full_matrices=False)
        return u[:, :RANK] * s[:RANK], vh[:RANK]

    def svd_lowrank() -> Factors:
        u, s, v = torch.svd_lowrank(dense_sum(adapters), q=RANK + 8, niter=4)
        return u[:, :RANK] * s[:RANK], v[:, :RANK].T

    return {
        "torch.svd_lowrank of the dense sum": svd_lowrank,
        "torch.linalg.svd of the dense sum": dense_svd,
        "PEFT svd, svd_full_matrices=False": lambda: peft(svd_full_matrices=False),
        "PEFT svd": peft,
    }


def timed(run: Callable[[], Factors]) -> tuple[float, Factors]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def excess(factors: Factors, exact: Tensor, optimal: float) -> float:
    """Frobenius error over the smallest possible one, minus 1."""
    b, a = factors
    return float((exact - b.double() @ a.double()).norm()) / optimal - 1.0


def bench(size: int, repeats: int) -> list[dict[str, Any]]:
    """Check, time, print; a row per way: name, seconds, ratio to ours, error over the optimum, largest buffer."""
    torch.manual_seed(0)
    adapters = make_adapters(size)

    def ours() -> Factors:
        layer = lf.merge(adapters, WEIGHTS, method="svd", rank=RANK).layers["layer"]
        return layer.lora_b, layer.lora_a

    exact = dense_sum(adapters, torch.float64)
    optimal = float(torch.linalg.svdvals(exact)[RANK:].norm())
    error = excess(ours(), exact, optimal)
    if not error <= 1e-5:
        raise SystemExit(f"merge(method='svd') misses the optimum by a factor 1 + {error:.1e}; no times are shown")

    own: list[float] = []
    rows = []
    for name, rival in rivals(adapters, size).items():
        own += [timed(ours)[0] for _ in range(repeats)]
        with _LargestBuffer() as buffers:
            seconds, factors = timed(rival)
        rows.append((name, seconds, excess(factors, exact, optimal), buffers.numel))
    own += [timed(ours)[0] for _ in range(repeats)]
    with _LargestBuffer() as buffers:
        ours()
    if buffers.numel >= size * size:
        raise SystemExit(f"merge(method='svd') made a tensor of {buffers.numel} elements; no times are shown")
    median = statistics.median(own)
    rows.append(("lora_fuse merge(method='svd')", median, error, buffers.numel))

    print(f"{NUM_ADAPTERS} rank-{RANK} adapters, one {size} x {size} layer, to rank {RANK}; fp32, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':36} {'time':>12} {'ratio':>9} {'error / optimal - 1':>20} {'largest buffer':>16}")
    for name, seconds, over, numel in rows:
        share = f"{numel / size**2:.3f} of W"
        print(f"{name:36} {seconds * 1e3:>9.1f} ms {seconds / median:>8.1f}x {over:>20.1e} {share:>16}")
    print(f"lora_fuse: median of {len(own)}, from {min(own) * 1e3:.1f} to {max(own) * 1e3:.1f} ms; the others: one run")
    keys = ("name", "seconds", "ratio", "excess", "largest_buffer")
    return [dict(zip(keys, (n, t, t / median, over, numel / size**2), strict=True)) for n, t, over, numel in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 1024 x 1024 layer instead of 4096 x 4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="timings of lora_fuse before each rival")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench(1024 if args.quick else 4096, args.repeats)


if __name__ == "__main__":
    main()
