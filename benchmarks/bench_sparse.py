"""Sparse task vectors against plain torch: ``python -m benchmarks.bench_sparse [--quick]``.

Two things a server does with a fine-tune kept as a merged model and a sparse residual. The product: 8 rows over 4 tasks
on one square layer, each row plus its own residual. The switch: the task's values written over the merged weights
of a whole encoder and taken back again. Every way is checked before any time is shown; tensors are rotated so that no
cache flatters anyone.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.timing import interleaved_us
from lora_fuse import _cpu, reference
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.sparse import SparseMatrix

TASKS, ROWS = 4, 8
MINILM = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]  # an encoder layer of all-MiniLM-L6, six times


def kept(rows: int, cols: int, density: float, dtype: torch.dtype) -> SparseMatrix:
    dense = torch.randn(rows, cols)
    return SparseMatrix.from_mask(dense.to(dtype), torch.rand(rows, cols) < density)


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{name}: error {error:.1e} exceeds {tolerance:.1e}; no times are shown")


def product(size: int, density: float, dtype: torch.dtype, rows: int, budget_s: float) -> dict[str, Any]:
    """Check, then time, ``y[row] += U[task(row)] x[row]`` in several ways; times in microseconds."""
    matrices = [kept(size, size, density, dtype) for _ in range(TASKS)]
    pool = SparsePool(TASKS, size, size, dtype)
    for slot, matrix in enumerate(matrices):
        pool.write(slot, matrix)
    x, y = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype)
    weight = torch.randn(size, size).to(dtype)
    slots = torch.arange(rows) * TASKS // rows
    routing = Routing.from_slots(slots, TASKS)
    groups = [(slots == s).nonzero()[:, 0] for s in range(TASKS)]
    dense = [m.to_dense() for m in matrices]
    # MKL multiplies sparse matrices in fp32 only, which holds bf16 values exactly
    csr = [
        torch.sparse_csr_tensor(
            m.row_starts.int(), m.column_index().int(), m.values.float(), m.shape, check_invariants=False
        )
        for m in matrices
    ]
    of_task = [x[g] for g in groups]
    transposed = [t.t().float().contiguous() for t in of_task]

    def by_csr(_: int = 0) -> Tensor:
        out = y.clone()
        for s, g in enumerate(groups):
            out[g] += (csr[s] @ transposed[s]).t().to(dtype)
        return out

    def by_dense(_: int = 0) -> Tensor:
        out = y.clone()
        for s, g in enumerate(groups):
            out[g] += linear(of_task[s], dense[s])
        return out

    def ours(_: int = 0) -> Tensor:
        return sparse_delta_linear(x, pool, routing, out=y.clone())

    pairs = [(row, int(slot), 1.0) for row, slot in enumerate(slots)]
    want = reference.sparse_delta_linear(x, dense, [None] * TASKS, pairs, y)
    eps = torch.finfo(dtype).eps
    check("dense residuals", by_dense(), want, 64 * eps)  # the rivals: right at all
    check("torch.sparse csr", by_csr(), want, 64 * eps)
    check("lora_fuse", ours(), want, 4 * eps)
    bare = [weight, *(weight.clone() for _ in range(3))]
    ways: dict[str, Callable[[int], Any]] = {
        "torch.sparse csr": by_csr,
        "dense residuals": by_dense,
        "lora_fuse": ours,
        "bare linear": lambda i: linear(x, bare[i % 4]),
    }
    us = interleaved_us(ways, budget_s)
    return {"density": density, "dtype": dtype, "rows": rows, "us": us, "nbytes": pool.nbytes // TASKS}


def switch(density: float, dtype: torch.dtype, budget_s: float) -> dict[str, Any]:
    """Into a task and back, all matrices of the encoder: sparse writes against copying whole weights over."""
    shapes = MINILM * 6
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    merged = [w.clone() for w in weights]
    matrices = [kept(*shape, density, dtype) for shape in shapes]
    saved = [torch.empty(m.nnz, dtype=dtype) for m in matrices]
    tasks = [m.to_dense(w) for m, w in zip(matrices, weights, strict=True)]  # what a copy would bring

    def there() -> None:
        for matrix, weight, kept_back in zip(matrices, weights, saved, strict=True):
            matrix.write_into(weight, saved=kept_back)

    def back() -> None:
        for matrix, weight, kept_back in zip(matrices, weights, saved, strict=True):
            matrix.write_into(weight, kept_back)

    there()
    if not all(map(torch.equal, weights, tasks)):
        raise SystemExit("write_into: wrong entries; no times are shown")
    back()
    if not all(map(torch.equal, weights, merged)):
        raise SystemExit("write_into: not undone; no times are shown")

    def sparse(_: int) -> None:
        there()
        back()

    def copies(_: int) -> None:
        for weight, task in zip(weights, tasks, strict=True):
            weight.copy_(task)
        for weight, base in zip(weights, merged, strict=True):
            weight.copy_(base)

    us = interleaved_us({"lora_fuse": sparse, "copies": copies}, budget_s)
    held = sum(m.nbytes for m in matrices)
    return {
        "density": density,
        "dtype": dtype,
        "us": us,
        "nbytes": held,
        "dense_nbytes": sum(w.nbytes for w in weights),
    }


def run(size: int, budget_s: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    print(f"{TASKS} tasks, one {size} x {size} layer; microseconds, medians, interleaved; {_cpu.isa()}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'dtype':10}{'density':>8}{'rows':>6}{'lora_fuse':>11}{'csr':>11}{'dense':>11}{'linear':>11}", end="")
    print(f"{'csr / us':>10}{'dense / us':>12}{'overhead':>10}{'MB a task':>11}")
    products = []
    for dtype in (torch.bfloat16, torch.float32):
        for density in (0.01, 0.05, 0.1):
            for rows in (ROWS, 64):
                r = product(size, density, dtype, rows, budget_s)
                us, name = r["us"], str(dtype).removeprefix("torch.")
                own, csr, dense, bare = (
                    us[k] for k in ("lora_fuse", "torch.sparse csr", "dense residuals", "bare linear")
                )
                print(f"{name:10}{density:>8.0%}{rows:>6}{own:>11.0f}{csr:>11.0f}{dense:>11.0f}{bare:>11.0f}", end="")
                print(
                    f"{csr / own:>9.1f}x{dense / own:>11.1f}x{own / bare:>10.0%}{r['nbytes'] / 1e6:>11.2f}", flush=True
                )
                products.append(r)
    print("\nswitch to a task and back, MiniLM-L6's encoder matrices")
    print(f"{'dtype':10}{'density':>8}{'lora_fuse':>11}{'copies':>11}{'ours / copies':>15}", end="")
    print(f"{'MB a task':>11}{'MB dense':>10}")
    switches = []
    for dtype in (torch.float32, torch.bfloat16):
        for density in (0.01, 0.05, 0.1):
            r = switch(density, dtype, budget_s)
            own, copy, name = r["us"]["lora_fuse"], r["us"]["copies"], str(dtype).removeprefix("torch.")
            print(f"{name:10}{density:>8.0%}{own:>11.0f}{copy:>11.0f}{own / copy:>14.2f}x", end="")
            print(f"{r['nbytes'] / 1e6:>11.2f}{r['dense_nbytes'] / 1e6:>10.2f}", flush=True)
            switches.append(r)
    return products, switches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 1024 x 1024 layer and shorter timings")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    with torch.no_grad():
        run(1024 if args.quick else 4096, 0.3 if args.quick else 3.0)


if __name__ == "__main__":
    main()
