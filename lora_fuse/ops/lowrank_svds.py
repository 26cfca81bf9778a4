"""``lowrank_svd`` of many sums of products at once, such as all layers of a model: on a GPU as batches of equal shapes.

There a single one is all waiting: its QRs and its core are small. A batch takes one Cholesky QR a side, one product and
one call for the eigenvectors of all Gram matrices of the cores, and the host waits twice. Sums whose factors are too
ill-conditioned for Cholesky, or not finite, are found by one flag each and go through ``lowrank_svd`` by themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fuse.ops import gpu
from lora_fuse.ops.factored import cholesky_qr
from lora_fuse.ops.lowrank_svd import lowrank_svd
from lora_fuse.ops.operands import SumOfProducts
from lora_fuse.ops.svd import LowRankSVD, check_rank, gram_svd, make_svd

_BYTES = 1 << 29  # of a batch's factors in fp64


@torch.no_grad()
def lowrank_svds(sums: Sequence[SumOfProducts], rank: int | Sequence[int | None] | None = None) -> list[LowRankSVD]:
    """``lowrank_svd`` of each sum, in their order.

    Args:
        sums: unbatched; shapes, ranks, dtypes and devices may differ.
        rank: directions to keep, for all or for each; None: all there are.
    Returns:
        As ``lowrank_svd``. On a GPU fp32 results come from Gram matrices in fp64: singular values below 1e-8 of the
        largest, and a ``residual`` below that share of ``norm``, drown in rounding.
    Raises:
        ValueError: as ``lowrank_svd``, of the first sum that is wrong.
    """
    ranks = [rank] * len(sums) if rank is None or isinstance(rank, int) else [*rank]
    if len(ranks) != len(sums):
        raise ValueError(f"rank: expected one for each of {len(sums)} sums, got {len(ranks)}")
    for each in ranks:
        check_rank(each, None)
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (x, k) in enumerate(zip(sums, ranks, strict=True)):
        if gpu.takes_kernels(x.device) and x.dtype == torch.float32 and len(x.shape) == 2:
            groups[x.device, x.shape, x.rank, k].append(i)
    found: list[LowRankSVD | None] = [None] * len(sums)
    for (_, (m, n), inner, k), members in groups.items():
        step = max(1, _BYTES // (8 * (m + n) * inner))
        for start in range(0, len(members), step):
            some = members[start : start + step]
            for i, svd in _batch([sums[i] for i in some], k).items():
                found[some[i]] = svd
    return [
        lowrank_svd(x.lora_bs, x.lora_as, x.weights, k) if svd is None else svd
        for svd, x, k in zip(found, sums, ranks, strict=True)
    ]


def _batch(sums: Sequence[SumOfProducts], rank: int | None) -> dict[int, LowRankSVD]:
    """Those of one shape and rank that Cholesky QR is exact enough for, by their place."""
    device, inner = sums[0].device, sums[0].rank
    left = torch.stack([torch.cat([b.detach() for b in x.lora_bs], dim=1) for x in sums]).to(torch.float64)
    right = torch.stack([torch.cat([a.detach() for a in x.lora_as], dim=0) for x in sums]).to(torch.float64).mT
    columns = [[w for b, w in zip(x.lora_bs, x.weights, strict=True) for _ in range(b.shape[1])] for x in sums]
    weights = torch.tensor(columns, dtype=torch.float64).to(device, non_blocking=True)
    left_core, left_inverse, good = _thin(left)
    right_core, right_inverse, also = _thin(right)
    core = (left_core * weights[:, None, :]) @ right_core.mT
    good = good & also & torch.isfinite(core).all(-1).all(-1)
    kept = [i for i, fine in enumerate(good.tolist()) if fine]
    if not kept:
        return {}
    if len(kept) < len(sums):
        at = torch.tensor(kept, device=device)
        left, right, core = left[at], right[at], core[at]
        left_inverse, right_inverse = (None if t is None else t[at] for t in (left_inverse, right_inverse))
    most = min(*sums[0].shape, inner)
    try:
        u, s, v, tail = gram_svd(core, most if rank is None else min(rank, most))
    except torch.linalg.LinAlgError:
        return {}
    u = u if left_inverse is None else left @ (left_inverse @ u)
    v = v if right_inverse is None else right @ (right_inverse @ v)
    norm = torch.linalg.vector_norm(core, dim=(-2, -1))
    made = make_svd(u, s, v, tail.sqrt(), norm, torch.float32)
    return {i: _one_of(made, at) for at, i in enumerate(kept)}


def _thin(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Core and inverse as ``cholesky_qr`` gives them, and whether they will do; a wide matrix is its own core."""
    if x.shape[-2] <= x.shape[-1]:
        return x, None, torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    return cholesky_qr(x)


def _one_of(batch: LowRankSVD, at: int) -> LowRankSVD:
    one = LowRankSVD(batch.U[at], batch.S[at], batch.Vh[at])
    one.residual, one.norm = batch.residual[at], batch.norm[at]
    return one
