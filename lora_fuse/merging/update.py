"""The update of one weight from several adapters' factors, for fusing a block of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fuse.merging.terms import LayerTerm


def accumulation_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """fp32; fp64 for an fp64 weight, and where torch may compute fp32 products in less than fp32."""
    lowered = torch.get_float32_matmul_precision() != "highest"
    return torch.float64 if weight_dtype == torch.float64 or lowered else torch.float32


def stacked_factors(
    parts: Sequence[LayerTerm], dtype: torch.dtype, transposed: bool, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """``left [rows, R]`` and ``right [R, columns]`` with ``left @ right = sum_i coef_i * B_i A_i``, as W lies.

    Args:
        parts: one layer's terms, at least one, all of one shape; R is the sum of their ranks.
        dtype: of the result; the coefficients are applied in fp64.
        transposed: the weight's rows are input features (Conv1D, an embedding).
        device: of the result.
    """
    b = torch.cat([p.layer.lora_b.flatten(1).to(device, torch.float64) * p.coef for p in parts], 1).to(dtype)
    a = torch.cat([p.layer.lora_a.flatten(1).to(device, dtype) for p in parts], 0)
    return (a.t(), b.t()) if transposed else (b, a)


def dora_scale(magnitude: Tensor, squares: Tensor) -> Tensor:
    """DoRA's ``magnitude / ||W + delta||`` per output feature, fp64.

    Args:
        magnitude: ``[out_features]``.
        squares: ``[out_features]``, fp64, the squared norms of the updated weight.
    Returns:
        ``[out_features]``; 0 where the norm is 0: a row of zeros has no direction, and stays zero.
    Source: DoRA, arXiv:2402.09353, equation 5.
    """
    return torch.where(squares > 0, magnitude.to(squares) / squares.sqrt(), 0.0)
