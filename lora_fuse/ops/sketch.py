"""Where to start: the dominant right singular space of a matrix, roughly, from bf16 products that read it once a round.

On CPUs with AMX a bf16 product takes a quarter of the time of an fp32 one. Tiles of rows are rounded as they pass and
both products of a round trip ``X^T (X q)`` are done with a tile while it is in a cache. Rounding X to bf16 perturbs it
by noise of spectral norm about 3e-5 ||X||_F: directions weaker than that are not found, which the caller has to see to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops.normals import Normals
from lora_fuse.ops.thin_products import Dense, Operand

_TILE = 1 << 21  # entries; 4 MB in bf16
_SMALLEST = 1024  # of a matrix's sides; below, calls cost more than they save


def worthwhile(x: Operand, block: int) -> bool:
    """Whether a start from bf16 products pays."""
    return (
        isinstance(x, Dense)
        and x.dtype == torch.float32
        and len(x.shape) == 2
        and x.device.type == "cpu"
        and min(x.shape) >= max(_SMALLEST, 8 * block)
        and _cpu.isa() == "amx_bf16"
    )


def start_block(x: Operand, norm: float, block: int, rounds: int, random: Normals) -> Tensor:
    """``[n, block]`` fp32, about the leading right singular vectors of ``x [m, n]``.

    Args:
        norm: Frobenius norm of ``x``.
        rounds: of ``q <- orthonormal basis of X^T X q``.
    """
    m, n = x.shape
    scale = 1.0 / norm if norm > 0 else 0.0
    q = random.draw((n, block), x.device)
    step = max(1, _TILE // n)
    tile = torch.empty(min(step, m), n, dtype=torch.bfloat16)
    for _ in range(rounds):
        narrow, total = q.to(torch.bfloat16), torch.zeros(block, n)
        for start in range(0, m, step):
            stop = min(start + step, m)
            part = tile[: stop - start].copy_(x.rows(start, stop, torch.float32))
            total += (((part @ narrow) * scale).mT.contiguous() @ part).float()
        total *= scale
        values, vectors = torch.linalg.eigh((total @ total.mT).double())
        kept = values.clamp_min(values[-1] * 1e-12 + torch.finfo(torch.float32).tiny).sqrt()
        q = total.mT @ (vectors.flip(1) / kept.flip(0)).float()  # descending
    return q
