"""Orthonormal columns that span with those before them what a block does, by Cholesky QR in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fuse.ops import gpu
from lora_fuse.ops.normals import Normals

# Added to the diagonal of a Gram matrix, over its trace: Cholesky then succeeds for whatever the block is. Directions
# down to the square root of it, 3e-7, keep enough of their length for the next round to make them whole.
_SHIFT = 1e-13
# At most, where a block lies within those before it: what is left of it is rounding errors, which lie there too.
_ROUNDS = 5


def orthonormal(w: Tensor, before: list[Tensor], random: Normals) -> Tensor:
    """Orthonormal columns, orthogonal to the blocks ``before``, that span with them what ``w [..., m, l]`` does.

    Projecting leaves rounding errors of the size of ``w``, and dividing by R enlarges them: where that loses more than
    a digit, or Cholesky QR does, there is another round, and noise for what rounding alone does not make up: of equal
    entries rounding errors are equal too. On a GPU, for fp32 blocks, there are always two, of the kind that asks
    nothing of the block and so never waits for the host.
    """
    if gpu.takes_kernels(w.device) and w.dtype == torch.float32:
        return without_branches(w, before, random)
    for done in range(_ROUNDS):
        if done and before:
            w = w + _noise(w, w.dtype, random).to(w.dtype)
        size = torch.linalg.vector_norm(w, dim=-2, dtype=torch.float64).amax(-1) if before else 0.0
        for q in before:
            w = w - q @ (q.mT @ w)
        w, smallest = orthonormalize(w, random)
        if bool(((smallest > 0) & (size <= 10.0 * smallest)).all()):
            break
    return w


def orthonormalize(w: Tensor, random: Normals) -> tuple[Tensor, Tensor]:
    """QR of ``w [..., m, l]`` by Cholesky with the Gram matrix in fp64, by Householder where that is ill-conditioned.

    Columns that depend on others are replaced by random directions.

    Returns:
        Q in the dtype of ``w``, and ``[...]``, fp64: about the smallest singular value of R where Q is orthonormal to
        that dtype's precision, 0 where it takes another round.
    """
    wide = w.to(torch.float64)
    lower, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    eye = torch.eye(w.shape[-1], dtype=torch.float64, device=w.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    condition = torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(inverse)  # at least the true one
    if bool(((info == 0) & (condition < 1e7)).all()):
        eps = torch.finfo(torch.float64).eps
        loss = eps * condition.square()
        accepted = 10.0 * max(torch.finfo(w.dtype).eps, eps * w.shape[-1] ** 2)  # the latter: of orthonormal columns
        smallest = w.shape[-1] ** 0.5 / torch.linalg.matrix_norm(inverse)  # R's diagonal may not show it
        return (wide @ inverse.mT).to(w.dtype), smallest.where(loss <= accepted, 0.0)
    return torch.linalg.qr(wide + _noise(wide, w.dtype, random)).Q.to(w.dtype), torch.zeros_like(condition)


def without_branches(w: Tensor, before: list[Tensor], random: Normals) -> Tensor:
    """``orthonormal`` for fp32 blocks of any condition, by a fixed sequence of operations: the host never waits.

    A rounding error's worth of noise takes the place of what a block lacks, so that its condition is at most about 1e7;
    the first round shifts the Gram matrix, which leaves a condition of about ten to the second.
    """
    wide = w.to(torch.float64)
    wide = wide + _noise(wide, w.dtype, random)
    return cholesky_rounds(wide, torch.cat(before, dim=-1).to(torch.float64) if before else None).to(w.dtype)


def cholesky_rounds(w: Tensor, basis: Tensor | None = None) -> Tensor:
    """Two rounds of shifted Cholesky QR of ``w [..., m, l]``, fp64, each after projecting on ``basis [..., m, d]``."""
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    for _ in range(2):
        if basis is not None:
            w = w - basis @ (basis.mT @ w)
        gram = w.mT @ w
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        lower, _ = torch.linalg.cholesky_ex(gram + _SHIFT * trace * eye)
        w = torch.linalg.solve_triangular(lower, w.mT, upper=False).mT
    return w


def _noise(wide: Tensor, dtype: torch.dtype, random: Normals) -> Tensor:
    """Noise of the size of a rounding error of ``dtype`` changes nothing that is resolved, and makes up what lacks."""
    size = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    scale = torch.where(size > 0, torch.finfo(dtype).eps * size / wide.shape[-2] ** 0.5, 1.0)
    return random.draw(wide.shape, wide.device).to(torch.float64) * scale
