"""Exact magnitude selection in plain torch, until the compiled one takes over; same signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fuse.sparse import SparseMatrix


def topk_mask(x: Sequence[Tensor], density: float, scope: str, *, minus: Sequence[Tensor]) -> list[Tensor]:
    keys = [(a.float() - b.float() if a.dtype != torch.float64 else a - b).abs() for a, b in zip(x, minus, strict=True)]
    if scope == "global":
        flat = _keep(torch.cat([key.reshape(-1) for key in keys]), density)
        parts = flat.split([key.numel() for key in keys])
        return [part.reshape(key.shape) for part, key in zip(parts, keys, strict=True)]
    if scope == "tensor":
        return [_keep(key.reshape(-1), density).reshape(key.shape) for key in keys]
    return [
        torch.stack([_keep(row, density) for row in key.reshape(key.shape[0], -1)]).reshape(key.shape) for key in keys
    ]


def sparsify(
    x: Sequence[Tensor], density: float, scope: str, *, minus: Sequence[Tensor], values: str
) -> list[SparseMatrix]:
    assert values == "x"
    masks = topk_mask(x, density, scope, minus=minus)
    return [
        SparseMatrix.from_mask(t.reshape(t.shape[0], -1), mask.reshape(t.shape[0], -1))
        for t, mask in zip(x, masks, strict=True)
    ]


def _keep(key: Tensor, density: float) -> Tensor:
    k = int(density * key.numel())
    if k == 0:
        return torch.zeros_like(key, dtype=torch.bool)
    threshold = key.kthvalue(key.numel() - k + 1).values
    mask = key > threshold
    ties = (key == threshold).nonzero()[:, 0]
    mask[ties[: k - int(mask.sum())]] = True
    return mask
