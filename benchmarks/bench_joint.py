"""Joint compression of 64 rank-16 adapters, and serving it: ``python -m benchmarks.bench_joint [--quick]``.

The error is compared with dense alternating least squares of the same form, run to convergence with exact eigenvectors
on the products themselves; the time is that of all adapters of one layer. Serving is one Linear, a row per adapter,
against the bare layer and against the same adapters as LoRA slots; every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lora_fuse as lf
from benchmarks.timing import interleaved_us
from lora_fuse.adapters.lora import LoraLayer

NUM_ADAPTERS, RANK = 64, 16
SHARED = 48  # directions that related adapters share; the rest of each is its own
SPECTRA = ("related", "unrelated")


def make_adapters(kind: str, size: int, seed: int = 0) -> dict[str, lf.LoraAdapter]:
    """Adapters whose factors lie half in common directions (related), or not at all (unrelated: nothing to share)."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, SHARED)[:, None]
    left, right = scale * torch.randn(SHARED, size, generator=g), scale * torch.randn(SHARED, size, generator=g)
    adapters = {}
    for i in range(NUM_ADAPTERS):
        b, a = torch.randn(size, RANK, generator=g), torch.randn(RANK, size, generator=g)
        if kind == "related":
            b = 0.2 * b + left.t() @ torch.randn(SHARED, RANK, generator=g) / 3
            a = 0.2 * a + torch.randn(RANK, SHARED, generator=g) @ right / 3
        adapters[f"t{i}"] = lf.LoraAdapter({"layer": LoraLayer(a / size**0.5, b, 0.25)})
    return adapters


def dense_error(adapters: dict[str, lf.LoraAdapter], rank: int, tolerance: float = 1e-7) -> float:
    """Root mean square relative error of converged dense alternating least squares, full form."""
    units = torch.stack([a.delta("layer") for a in adapters.values()])
    units /= torch.linalg.vector_norm(units, dim=(1, 2), keepdim=True)
    v = torch.linalg.eigh(sum((m.mT @ m).double() for m in units))[1][:, -rank:].float()
    caught, before = 0.0, -1.0
    while caught - before > tolerance * NUM_ADAPTERS:
        before = caught
        u = _leading([m @ v for m in units], rank)
        projected = [m.mT @ u for m in units]
        v = _leading(projected, rank)
        caught = sum(float((p.mT @ v).square().sum()) for p in projected)
    return float(max(0.0, 1 - caught / NUM_ADAPTERS)) ** 0.5


def _leading(parts: list[Tensor], rank: int) -> Tensor:
    gram = sum((p @ p.mT).double() for p in parts)
    return torch.linalg.eigh(gram)[1][:, -rank:].float()


def compression(quick: bool) -> list[dict[str, Any]]:
    """One row per kind of adapters and rank: error against the dense optimum at a small size, time at the full one."""
    small, size = (256, 512) if quick else (1024, 4096)
    rows = []
    for kind in SPECTRA:
        for form, ranks in (("full", (16, 64)), ("diagonal", (64,))):
            for rank in ranks:
                row: dict[str, Any] = {"kind": kind, "form": form, "rank": rank, "size": size}
                if form == "full":
                    adapters = make_adapters(kind, small)
                    ours = lf.joint_compress(adapters, rank=rank).report.error
                    row["over_dense"] = ours / dense_error(adapters, rank)
                adapters = make_adapters(kind, size)
                start = time.perf_counter()
                bank = lf.joint_compress(adapters, rank=rank, form=form)  # type: ignore[arg-type]
                row["seconds"] = time.perf_counter() - start
                row["error"] = bank.report.error
                row["fewer_bytes"] = bank.report.nbytes_before / bank.report.nbytes_after
                rows.append(row)
                print(row, flush=True)
    return rows


@torch.no_grad()
def serving(size: int, budget_s: float) -> list[dict[str, Any]]:
    """One Linear, a row per adapter: bare, LoRA slots of rank 16, joint slots of rank 64."""
    adapters = make_adapters("related", size)
    bank = lf.joint_compress(adapters, rank=64)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(size, size) / size**0.5).to(dtype)
        x = torch.randn(NUM_ADAPTERS, size).to(dtype)
        models = {name: _layer(weight) for name in ("bare linear", "LoRA slots", "joint slots")}
        for name, held in (("LoRA slots", adapters), ("joint slots", bank.adapters)):
            lf.attach(models[name], held)
            lf.set_adapters(models[name], list(held))
            _check(models[name](x), x, weight, held)
        us = interleaved_us({name: (lambda i, m=m, x=x: m(x)) for name, m in models.items()}, budget_s)
        nbytes = {
            "LoRA slots": sum(a.nbytes for a in adapters.values()) * dtype.itemsize // 4,
            "joint slots": bank.nbytes * dtype.itemsize // 4,
        }
        rows.append({"dtype": dtype, "us": us, "nbytes": nbytes})
        print(rows[-1], flush=True)
    return rows


def _layer(weight: Tensor) -> nn.Sequential:
    model = nn.Sequential(OrderedDict(layer=nn.Linear(*weight.shape[::-1], bias=False)))
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _check(got: Tensor, x: Tensor, weight: Tensor, adapters: Mapping[str, Any]) -> None:
    """Every row against its adapter's own delta, fp64."""
    for i, adapter in enumerate(adapters.values()):
        want = (weight.double() + adapter.delta("layer").double()) @ x[i].double()
        error = float((got[i] - want).norm() / want.norm())
        if error > 64 * torch.finfo(got.dtype).eps:
            raise AssertionError(f"row {i}: relative error {error:.1e} in {got.dtype}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller layers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compression(args.quick)
    serving(1024 if args.quick else 4096, 0.5 if args.quick else 5.0)


if __name__ == "__main__":
    main()
