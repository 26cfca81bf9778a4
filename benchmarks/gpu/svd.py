"""randomized_svd against torch's SVDs, and lowrank_svds of a whole model.

Wall time of calls, the device idle before and after: all of them wait for the host somewhere. No time is shown unless
ours is as close to the smallest possible error as ``torch.svd_lowrank`` with as many products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_svd import spectra
from benchmarks.gpu import measure, report
from lora_fuse.functional import Difference, SumOfProducts, lowrank_svd, lowrank_svds, randomized_svd

LOWRANK, FULL = "torch.svd_lowrank", "torch.linalg.svd"
ITERS, OVERSAMPLE = 2, 8
LLAMA_8B = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}  # out, in: how many


@dataclass(frozen=True)
class Sizes:
    side: int
    rank: int
    batch: int
    layers: dict[tuple[int, int], int]
    adapters: int = 8
    adapter_rank: int = 16


CARD = Sizes(4096, 64, 8, LLAMA_8B)
TINY = Sizes(192, 6, 2, {(40, 30): 2, (30, 40): 1}, 3, 2)


def sizes() -> Sizes:
    return CARD if measure.device().type == "cuda" else TINY


def ours(x: Any, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = randomized_svd(x, rank, OVERSAMPLE, ITERS)
    return u, s, vh


def lowrank(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(x.float(), q=rank, niter=ITERS)
    return u, s, v.mT


def excess(found: tuple[Tensor, Tensor, Tensor], x: Tensor, rank: int) -> float:
    """The error over the smallest possible one, less 1; the largest of a batch."""
    exact = x.double()
    squares = torch.linalg.eigvalsh(exact @ exact.mT).flip(-1).clamp_min(0)
    u, s, vh = (t.double() for t in found)
    error = torch.linalg.matrix_norm(exact - u * s[..., None, :] @ vh)
    return float((error / squares[..., rank:].sum(-1).sqrt() - 1.0).max())


def matrices(of: Sizes) -> dict[str, tuple[Any, Tensor]]:
    """What is decomposed, and the same as a tensor."""
    made: dict[str, tuple[Any, Tensor]] = {}
    given = {name: x.to(measure.device()) for name, x in spectra(of.side).items()}
    for name, x in given.items():
        made[f"{name} fp32"] = x, x
    half = given["flat"].bfloat16()
    made["flat bf16"] = half, half
    base = torch.randn_like(given["flat"]).bfloat16()
    tuned = (base.float() + 0.02 * given["decaying"]).bfloat16()
    made["bf16 difference"] = Difference(tuned, base), tuned.float() - base.float()
    several = torch.stack([torch.randn_like(given["flat"]) for _ in range(of.batch)])
    made[f"{of.batch} at once, flat fp32"] = several, several
    return made


def check_one(name: str, x: Any, dense: Tensor, rank: int) -> dict[str, float]:
    found = {report.OURS: excess(ours(x, rank), dense, rank), LOWRANK: excess(lowrank(dense, rank), dense, rank)}
    if not found[report.OURS] <= found[LOWRANK] + 1e-6:
        raise SystemExit(f"{name}: randomized_svd is less exact than {LOWRANK}: {found}; no times are shown")
    return found


def model_sums(of: Sizes) -> list[SumOfProducts]:
    dtype = torch.bfloat16 if measure.device().type == "cuda" else torch.float32

    def factors(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, device=measure.device()) for _ in range(of.adapters)]

    weights, rank = [1.0 / of.adapters] * of.adapters, of.adapter_rank
    return [
        SumOfProducts(factors(out, rank), factors(rank, inner), weights)
        for (out, inner), count in of.layers.items()
        for _ in range(count)
    ]


def check() -> None:
    of = sizes()
    for name, (x, dense) in matrices(of).items():
        check_one(name, x, dense, of.rank)
    sums = model_sums(of)
    sums = sums[:: max(1, len(sums) // 8)]
    for x, (u, s, vh) in zip(sums, lowrank_svds(sums, of.adapter_rank), strict=True):
        _, a = x.factors(torch.float64)
        want = lowrank_svd(x.lora_bs, x.lora_as, x.weights, of.adapter_rank)
        got = (u.double() * s.double()) @ (vh.double() @ a.mT)  # as thin as the factors
        exact = (want.U.double() * want.S.double()) @ (want.Vh.double() @ a.mT)
        measure.require(f"lowrank_svds of {tuple(x.shape)}", got, exact, 1e-5)


def run(at: measure.Setting) -> Iterator[dict[str, Any]]:
    of = sizes()
    given = matrices(of)
    order = [next(reversed(given)), *list(given)[:-1]]  # the batch first
    for name in order[: 2 if at.quick else None]:
        if at.budget.over(name):
            continue
        x, dense = given[name]
        found = check_one(name, x, dense, of.rank)
        calls: dict[str, Callable[[], Any]] = {report.OURS: lambda x=x: ours(x, of.rank)}
        calls[LOWRANK] = lambda dense=dense: lowrank(dense, of.rank)
        us = measure.wall_us(calls, rounds=10)
        if name == "flat fp32":
            us |= measure.wall_us({FULL: lambda dense=dense: torch.linalg.svd(dense, full_matrices=False)}, rounds=1)
        terms = [t for _, t in x.tensors("x")] if isinstance(x, Difference) else [x]
        nbytes = 2 * (ITERS + 1) * sum(t.nbytes for t in terms)
        shape = f"{of.side}x{of.side} rank {of.rank}, {name}"
        row = report.row(
            "randomized_svd", shape, us, nbytes, at.bandwidth, excess=found, matrices=dense.shape[:-2].numel()
        )
        report.show(row)
        yield row
    if not at.budget.over("lowrank_svds"):
        sums = model_sums(of)
        us = measure.wall_us({report.OURS: lambda: lowrank_svds(sums, of.adapter_rank)}, rounds=5)
        some = sums[:4]
        alone = {"": lambda: [lowrank_svd(x.lora_bs, x.lora_as, x.weights, of.adapter_rank) for x in some]}
        one = measure.wall_us(alone, rounds=1)
        us["lowrank_svd one by one (from 4)"] = one[""] * len(sums) / len(some)
        nbytes = sum(t.nbytes for x in sums for t in (*x.lora_bs, *x.lora_as))
        shape = f"{len(sums)} layers x {of.adapters} adapters r{of.adapter_rank}"
        row = report.row("lowrank_svds", shape, us, nbytes, at.bandwidth)
        report.show(row)
        yield row


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def ratios(rival: str, several: bool) -> list[float]:
        some = [r for r in rows if r["op"] == "randomized_svd" and rival in r["us"]]
        return [r["us"][rival] / r["us"][report.OURS] for r in some if (r["matrices"] > 1) == several]

    model = [r["us"][report.OURS] / 1e6 for r in rows if r["op"] == "lowrank_svds"]
    return [
        report.target(f"{LOWRANK} over ours, least", 3.0, min(ratios(LOWRANK, False), default=None), at_least=True),
        report.target(f"{LOWRANK} over ours, 8 at once", 6.0, min(ratios(LOWRANK, True), default=None), at_least=True),
        report.target(f"{FULL} over ours", 50.0, min(ratios(FULL, False), default=None), at_least=True),
        report.target("lowrank_svds of 224 layers x 8 adapters, seconds", 0.5, min(model, default=None)),
    ]
