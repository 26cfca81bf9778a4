"""randomized_svd against torch's SVDs: ``python -m benchmarks.bench_svd [--quick]``.

The 64 largest directions of a square matrix, on three spectra: flat (independent normal entries), decaying (1 / i, 512
of them) and low rank plus noise. Errors are over the smallest possible one, from the eigenvalues of the fp64 Gram
matrix; no time is shown unless ours is at most ``torch.svd_lowrank``'s with as many products. The floor is the time of
the products with X alone, ``2 (power_iters + 1)`` of them, half with its transpose, in the faster of torch's two ways.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved_us
from lora_fuse.functional import randomized_svd

RANK, OVERSAMPLE = 64, 8


def spectra(size: int) -> dict[str, Tensor]:
    def orthonormal(columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, columns)).Q

    decay = 1.0 / torch.arange(1, size // 8 + 1)
    noise = torch.randn(size, size)
    return {
        "flat": noise,
        "decaying": (orthonormal(size // 8) * decay) @ orthonormal(size // 8).T,
        "low rank + noise": torch.randn(size, 48) @ torch.randn(48, size) / 64 + 0.02 * noise,
    }


def ours(x: Tensor, power_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = randomized_svd(x, RANK, OVERSAMPLE, power_iters)
    return u, s, vh


def lowrank(x: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(x, q=RANK, niter=niter)
    return u, s, v.T


def products(x: Tensor, power_iters: int) -> None:
    q = torch.empty(x.shape[1], RANK + OVERSAMPLE).normal_()
    for _ in range(power_iters + 1):
        q = (x @ q).T.contiguous().T
        q = (q.T @ x).T


def variants(x: Tensor) -> dict[str, Callable[[int], Any]]:
    return {
        "lora_fuse, power_iters=2": lambda i: ours(x, 2),
        "lora_fuse, power_iters=1": lambda i: ours(x, 1),
        "torch.svd_lowrank": lambda i: lowrank(x, 2),  # its default niter
        "torch.svd_lowrank, niter=1": lambda i: lowrank(x, 1),
    }


def bench(size: int, budget_s: float, exact: bool = True) -> list[dict[str, Any]]:
    """Check, time, print; a row per spectrum: microseconds, error over the optimum, floor.

    Args:
        size: rows and columns.
        budget_s: seconds per spectrum.
        exact: time ``torch.linalg.svd`` too, once.
    """
    rows: list[dict[str, Any]] = []
    full_us = None
    for name, x in spectra(size).items():
        squares = torch.linalg.eigvalsh(x.double() @ x.double().T).flip(0).clamp_min(0)
        optimal = float(squares[RANK:].sum().sqrt())
        runs = variants(x)
        excess = {}
        for label, run in runs.items():
            u, s, vh = (t.double() for t in run(0))
            excess[label] = float((x.double() - u * s @ vh).norm()) / optimal - 1.0
        for iters, rival in ((2, "torch.svd_lowrank"), (1, "torch.svd_lowrank, niter=1")):
            if excess[f"lora_fuse, power_iters={iters}"] > excess[rival] + 1e-6:
                raise SystemExit(f"{name}: randomized_svd is less exact than {rival}: {excess}; no times are shown")
        floors = {f"floor {iters}": lambda i, x=x, iters=iters: products(x, iters) for iters in (2, 1)}
        us = interleaved_us({**runs, **floors}, budget_s)
        if exact and full_us is None:
            start = time.perf_counter()
            torch.linalg.svd(x, full_matrices=False)
            full_us = (time.perf_counter() - start) * 1e6
        floor_us = {iters: us.pop(f"floor {iters}") for iters in (2, 1)}
        rows.append({"spectrum": name, "us": us, "excess": excess, "floor_us": floor_us, "full_us": full_us})

    print(f"rank {RANK} of {size} x {size}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'spectrum':18} {'':28} {'time':>10} {'over ours':>10} {'error / optimal - 1':>20}")
    for row in rows:
        own = row["us"]["lora_fuse, power_iters=2"]
        for label, us in row["us"].items():
            print(
                f"{row['spectrum']:18} {label:28} {us / 1e3:>7.1f} ms {us / own:>9.2f}x {row['excess'][label]:>20.1e}"
            )
        for iters, us in row["floor_us"].items():
            print(f"{'':18} {f'products alone, {2 * iters + 2}':28} {us / 1e3:>7.1f} ms {us / own:>9.2f}x")
    if full_us is not None:
        times = full_us / rows[0]["us"]["lora_fuse, power_iters=2"]
        print(f"{rows[0]['spectrum']:18} {'torch.linalg.svd, one run':28} {full_us / 1e3:>7.0f} ms {times:>9.0f}x")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 x 1024 instead of 4096 x 4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="per spectrum")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench(1024 if args.quick else 4096, 2.0 if args.quick else args.seconds)


if __name__ == "__main__":
    main()
