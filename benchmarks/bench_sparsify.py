"""merge(method="ties"), "dare_ties" ... against PEFT's types on full deltas: ``python -m benchmarks.bench_sparsify``.

Eight rank-16 adapters on one square layer are merged into rank 16. First the results are checked: our merged delta
against PEFT's own (for DARE its norm and its share of zeros, since draws differ), and the truncation against the
optimum, from the singular values of the dense delta. PEFT runs once each, with its faster setting,
``svd_full_matrices=False``.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor

import lora_fuse as lf
from benchmarks.bench_merge import NUM_ADAPTERS, RANK, WEIGHTS, make_adapters, peft_model, timed
from lora_fuse.merging import sparsify
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import layer_terms, make_terms

METHODS = {"ties": 0.2, "dare_ties": 0.5, "dare_linear": 0.5, "magnitude_prune": 0.2}
MOST_EXCESS = 1e-3


def merged_delta(adapters: list[lf.LoraAdapter], method: str) -> Tensor:
    terms = make_terms(adapters, WEIGHTS)
    options = sparsify.prepare(method, terms, Options(density=METHODS[method]))
    return sparsify.merged_delta("layer", layer_terms(terms)["layer"], options.state, torch.float32)


def peft_delta(adapters: list[lf.LoraAdapter], method: str) -> Tensor:
    from peft.utils import merge_utils

    deltas = [adapter.delta("layer") for adapter in adapters]
    return getattr(merge_utils, method)(deltas, torch.tensor(WEIGHTS), METHODS[method])


def check(adapters: list[lf.LoraAdapter], method: str, result: tuple[Tensor, Tensor]) -> float:
    """Frobenius error of the truncation over the smallest possible one, minus 1; exits if anything is wrong."""
    ours, theirs = merged_delta(adapters, method), peft_delta(adapters, method)
    if method.startswith("dare"):
        zeros = [float((t == 0).double().mean()) for t in (ours, theirs)]
        norms = [float(t.double().norm()) for t in (ours, theirs)]
        fits = abs(zeros[0] - zeros[1]) < 1e-3 and abs(norms[0] / norms[1] - 1) < 1e-2
    else:  # a few entries at the threshold may differ by the last bit of a product
        fits = float(((ours - theirs).abs() > 1e-5 * theirs.abs().max()).double().mean()) < 1e-5
    exact = ours.double()
    optimal = float(torch.linalg.eigvalsh(exact @ exact.T).clamp_min(0)[:-RANK].sum().sqrt())
    excess = float((exact - result[0].double() @ result[1].double()).norm()) / optimal - 1.0
    if not fits or excess > MOST_EXCESS:
        raise SystemExit(f"{method}: differs from PEFT, or misses the optimum by 1 + {excess:.1e}; no times are shown")
    return excess


def bench(size: int, repeats: int) -> list[dict[str, Any]]:
    """Check, time, print; a row per method: name, seconds, PEFT's seconds, error over the optimum."""
    torch.manual_seed(0)
    adapters = make_adapters(size)
    model = peft_model(adapters, size)
    names = [str(i) for i in range(NUM_ADAPTERS)]
    print(f"{NUM_ADAPTERS} rank-{RANK} adapters, one {size} x {size} layer, to rank {RANK}; fp32, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':16} {'lora_fuse':>12} {'PEFT':>12} {'ratio':>8} {'error / optimal - 1':>20}", flush=True)
    rows = []
    for method, density in METHODS.items():

        def ours(method: str = method, density: float = density) -> tuple[Tensor, Tensor]:
            layer = lf.merge(adapters, WEIGHTS, method=method, density=density, rank=RANK).layers["layer"]
            return layer.lora_b, layer.lora_a

        def peft(method: str = method, density: float = density) -> tuple[Tensor, Tensor]:
            if "merged" in model.peft_config:
                model.delete_adapter("merged")
            kind = f"{method}_svd"
            model.add_weighted_adapter(names, WEIGHTS, "merged", kind, RANK, density=density, svd_full_matrices=False)
            target = model.base_model.model["layer"]
            return target.lora_B["merged"].weight.detach(), target.lora_A["merged"].weight.detach()

        excess = check(adapters, method, ours())
        seconds = [timed(ours)[0] for _ in range(repeats)]
        theirs = timed(peft)[0]
        seconds += [timed(ours)[0] for _ in range(repeats)]
        median = statistics.median(seconds)
        print(f"{method:16} {median:>10.2f} s {theirs:>10.2f} s {theirs / median:>7.1f}x {excess:>20.1e}", flush=True)
        rows.append({"name": method, "seconds": median, "peft": theirs, "ratio": theirs / median, "excess": excess})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 1024 x 1024 layer instead of 4096 x 4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timings of lora_fuse before and after PEFT's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench(1024 if args.quick else 4096, args.repeats)


if __name__ == "__main__":
    main()
