"""Sparse task vectors against plain torch: ``python -m benchmarks.bench_sparse [--quick]``.

Two things a server does with a fine-tune kept as a merged model and a sparse residual. The product: 8 rows over 4 tasks
on one square layer, each row plus its own residual. The switch: a whole encoder made a task's model in place and taken
back again, against copying all weights over, and its mixed batches. Every way is checked before any time is shown;
tensors are rotated so that no cache flatters anyone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import lora_fuse as lf
from benchmarks.timing import interleaved_us
from lora_fuse import _cpu, reference
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.demo.model import load_encoder
from lora_fuse.demo.packages import cache_folder
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.sparse import SparseMatrix

TASKS, ROWS = 4, 8
DENSITIES = (0.01, 0.05, 0.1)
WAYS = ("lora_fuse", "torch.sparse csr", "dense residuals", "bare linear")


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


def switch(encoder: nn.Module, density: float, budget_s: float) -> dict[str, Any]:
    """Check, then time, into a task and back, everything of the encoder: ``switch_task`` against copying weights."""
    tuned = copy.deepcopy(encoder)
    for p in tuned.parameters():
        p += 0.1 * p.std() * torch.randn_like(p)
    peru = lf.peru_fft(encoder.state_dict(), {"task": tuned.state_dict()}, merge=encoder.state_dict(), density=density)
    model = lf.attach(copy.deepcopy(encoder), peru.adapters)
    params = dict(model.named_parameters())
    task, merged = peru.state_dict("task"), encoder.state_dict()

    def ours(_: int) -> None:
        lf.switch_task(model, "task")
        lf.switch_task(model, None)

    def copies(_: int) -> None:
        for state in (task, merged):
            for name, p in params.items():
                p.copy_(state[name])

    lf.switch_task(model, "task")
    if not all(torch.equal(p, task[name]) for name, p in params.items()):
        raise SystemExit("switch_task: wrong entries; no times are shown")
    lf.switch_task(model, None)
    if not all(torch.equal(p, merged[name]) for name, p in params.items()):
        raise SystemExit("switch_task: not undone; no times are shown")
    us = interleaved_us({"lora_fuse": ours, "copies": copies}, budget_s)
    nbytes, whole = peru.adapters["task"].nbytes, sum(p.nbytes for p in params.values())
    return {"density": density, "dtype": encoder.dtype, "us": us, "nbytes": nbytes, "dense_nbytes": whole}


def run_products(size: int, budget_s: float) -> list[dict[str, Any]]:
    """Time the product of every dtype, density and number of rows."""
    print(f"{TASKS} tasks, one {size} x {size} layer; microseconds, medians, interleaved; {_cpu.isa()}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'dtype':10}{'density':>8}{'rows':>6}{'lora_fuse':>11}{'csr':>11}{'dense':>11}{'linear':>11}", end="")
    print(f"{'csr / us':>10}{'dense / us':>12}{'overhead':>10}{'MB a task':>11}")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    rows_out = []
    for dtype, density, rows in itertools.product((torch.bfloat16, torch.float32), DENSITIES, (ROWS, 64)):
        r = product(size, density, dtype, rows, budget_s)
        own, csr, dense, bare = (
            r["us"][k] for k in ("lora_fuse", "torch.sparse csr", "dense residuals", "bare linear")
        )
        name = str(dtype).removeprefix("torch.")
        print(f"{name:10}{density:>8.0%}{rows:>6}{own:>11.0f}{csr:>11.0f}{dense:>11.0f}{bare:>11.0f}", end="")
        print(f"{csr / own:>9.1f}x{dense / own:>11.1f}x{own / bare:>10.0%}{r['nbytes'] / 1e6:>11.2f}", flush=True)
        rows_out.append(r)
    return rows_out


def run_switches(budget_s: float) -> list[dict[str, Any]]:
    """Time the switch of MiniLM at every dtype and density."""
    encoder = load_encoder(cache_folder()).eval()
    print("\nswitch to a task and back, all of MiniLM-L6; milliseconds")
    print(f"{'dtype':10}{'density':>8}{'lora_fuse':>11}{'copies':>11}{'ours / copies':>15}", end="")
    print(f"{'MB a task':>11}{'MB dense':>10}")
    rows_out = []
    for dtype, density in itertools.product((torch.float32, torch.bfloat16), DENSITIES):
        r = switch(encoder.to(dtype), density, budget_s)
        own, copied, name = r["us"]["lora_fuse"], r["us"]["copies"], str(dtype).removeprefix("torch.")
        print(f"{name:10}{density:>8.0%}{own / 1e3:>11.2f}{copied / 1e3:>11.2f}{own / copied:>14.2f}x", end="")
        print(f"{r['nbytes'] / 1e6:>11.2f}{r['dense_nbytes'] / 1e6:>10.2f}", flush=True)
        rows_out.append(r)
    return rows_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 1024 x 1024 layer and shorter timings")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        run_products(1024 if args.quick else 4096, 0.3 if args.quick else 3.0)
        run_switches(0.3 if args.quick else 3.0)


if __name__ == "__main__":
    main()
