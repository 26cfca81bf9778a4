"""Truncated SVD of a large matrix from a few products with thin ones: randomised block Krylov.

A random block is multiplied by ``X`` and ``X^T`` in turns. Each product is orthogonalised against all blocks before it
on its side, and all are kept: after q returns ``Q [m, D]`` and ``P [n, D]``, ``D = (q + 1) l``, span a Krylov space,
and the SVD of the core ``Q^T X P`` gives the best approximation of X within it. Subspace iteration, which
``torch.svd_lowrank`` and others use, reads X as often but keeps the last block alone; its error is never smaller.

Blocks are orthonormalised by Cholesky QR with the Gram matrix in fp64: 1.2 ms for 4096 x 72, against 11 to 25 for
Householder QR and 32 for the product with X itself (Sapphire Rapids, two threads). For fp32 blocks of condition up to
1e5 one round is as orthogonal as fp32 can tell; a second one (CholeskyQR2) follows where it is not, or where projecting
on earlier blocks has cancelled most of the block. Beyond 1e6 Householder QR takes over.

On CPUs with AMX the ``power_iters`` returns of a large fp32 matrix, if two or more, are made in bf16 (``ops.sketch``):
the start is then so good that one product with X and one with X^T in fp32 give an error between those of subspace
iteration and of the whole Krylov space, in less time than either. Where the remainder is fainter than bf16 can tell,
the Krylov space grows as if the start had been random.

On a GPU the steps are the same. X is read by the kernels of ``kernels/sketch.py``, which form a difference or a pruned
delta as they read it and draw the first block themselves; blocks become orthonormal without the host waiting
(``ops.orthonormal``); thin products are in fp64, out of TF32's reach. The host waits for the norm, for the eigenvectors
of the core's Gram matrix and for one flag after it, and at each step where ``energy`` or ``tolerance`` decides.

Where the Krylov space would fill much of the matrix, the SVD is exact, from the fp64 Gram matrix of the shorter side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fuse.ops import gpu
from lora_fuse.ops.lowrank_svd import lowrank_svd
from lora_fuse.ops.normals import Normals
from lora_fuse.ops.operands import Custom, Matrix, SumOfProducts, as_operand
from lora_fuse.ops.orthonormal import orthonormal
from lora_fuse.ops.sketch import start_block, worthwhile
from lora_fuse.ops.svd import LowRankSVD, check_rank, core_svd, directions_for, gram_svd, make_svd, robust_svd
from lora_fuse.ops.thin_products import Operand

_SMALL = 128  # the exact SVD of anything this narrow takes no longer than the steps' overhead
_WIDER = 24  # columns that a start from bf16 products has beyond the block
_FAINT = 1e-2  # share of the norm below which a remainder may hold directions that such a start did not see
_ENERGY_BLOCK = 48  # directions that each step adds where ``energy`` decides about the rank
_PROBES = 16  # Gaussian vectors w for an Operator, of which only products are known: E ||X w||^2 = ||X||_F^2


@torch.no_grad()
def randomized_svd(
    x: Matrix,
    rank: int | None = None,
    oversample: int = 8,
    power_iters: int = 2,
    generator: torch.Generator | int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
) -> LowRankSVD:
    """Rank-k approximation ``U S Vh`` of ``x``, close to the best, from ``2 (power_iters + 1)`` thin products.

    Args:
        x: ``[..., m, n]``: a tensor of any floating dtype and strides, a ``SparseMatrix``, a ``Difference``, a
            ``SumOfProducts``, a ``Sum`` of those (none is formed as a whole), or any object with ``shape``,
            ``matmul(q)`` and ``rmatmul(q)`` (``Operator``). 16-bit values are widened tile by tile; sums are in fp32,
            in fp64 if ``x`` holds fp64.
        rank: directions to keep; ``k = min(rank, m, n)``.
        oversample: further columns of each block.
        power_iters: returns to the other side, each of which adds a block of ``rank + oversample`` directions; for a
            large fp32 matrix on a CPU with AMX and ``power_iters >= 2``, so many in bf16 before the one in fp32.
        generator: of the random block: a seed, of which 64 bits count, or a ``torch.Generator``, of which one is drawn.
            None: seed 0. Equal seeds give equal bits on one machine with one number of threads, and on every device the
            same block up to the rounding of logarithm and sine, so the same subspace (but for a start in bf16, above,
            which finds another of about that error); torch's global generator is not touched.
        energy: instead of ``rank``: as few directions as keep this share of the squared Frobenius norm,
            ``0 < energy <= 1``. Blocks are added until they do and one more block does not lower their number;
            unbatched only.
        tolerance: go on beyond ``power_iters`` until a step lowers the error by less than a quarter of this share: the
            error is then at most about ``1 + tolerance`` times the smallest possible one.

    Returns:
        ``LowRankSVD`` with U, S, Vh in fp32 (fp64 if ``x`` holds fp64). ``norm`` is summed in fp64; ``residual`` is the
        approximation's own error, from ``||x||^2 - sum S^2`` where that loses no digits, else from one more pass over
        ``x - U S Vh``. For an ``Operator`` both are estimates from 16 random probes (about 10 % off). Signs as in
        ``lowrank_svd``. Exact where ``2 (rank + oversample)`` or the whole Krylov space reaches ``min(m, n)``, and for
        narrow matrices and sums of few products, which ``lowrank_svd`` does. Not differentiable.

    Raises:
        TypeError: ``x`` is no matrix, or ``generator`` neither a generator nor a seed.
        ValueError: an argument is out of range, ``x`` is empty, or has NaN or infinite entries (the tensor is named).
        RuntimeError: LAPACK converges in no way.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061; Musco and Musco, arXiv:1504.05477 (block Krylov).
    """
    check_rank(rank, energy)
    if rank is None and energy is None:
        raise ValueError("rank, energy: give one of the two, for example rank=64 or energy=0.9")
    for label, value in (("oversample", oversample), ("power_iters", power_iters)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{label}: expected an integer of at least 0, got {value!r}")
    if isinstance(tolerance, str):
        raise TypeError(f"tolerance: expected 0 < tolerance < 1, got {tolerance!r}")
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance: expected 0 < tolerance < 1, got {tolerance}")
    if generator is not None and (isinstance(generator, bool) or not isinstance(generator, (int, torch.Generator))):
        raise TypeError(f"generator: expected a torch.Generator, a seed or None, got {generator!r}")
    operand = as_operand(x, "x")
    m, n = operand.shape[-2:]
    if operand.shape.numel() == 0:
        raise ValueError(f"x: shape {tuple(operand.shape)} has no entries")
    if energy is not None and len(operand.shape) > 2:
        raise ValueError(f"energy: needs one matrix, got x of shape {tuple(operand.shape)}")
    if (energy is not None or tolerance is not None) and isinstance(operand, Custom) and operand.squared_norm() is None:
        raise ValueError("energy, tolerance: need the norm of x; give the operator a method squared_norm()")

    block = _ENERGY_BLOCK if rank is None else min(rank, m, n) + oversample
    if isinstance(operand, SumOfProducts) and (rank is None or operand.rank <= 4 * block):
        return lowrank_svd(operand.lora_bs, operand.lora_as, operand.weights, rank, energy=energy)
    dtype, norm = _norm(operand)
    if min(m, n) > max(_SMALL, 2 * block, (power_iters + 1) * block if rank is not None else 0):
        found = _krylov(operand, norm, dtype, block, rank, energy, power_iters, tolerance, Normals(generator))
        if found is not None:
            return found
    return _exact(operand, norm, dtype, rank, energy)


def _krylov(
    x: Operand,
    norm: Tensor,
    dtype: torch.dtype,
    block: int,
    rank: int | None,
    energy: float | None,
    power_iters: int,
    tolerance: float | None,
    random: Normals,
) -> LowRankSVD | None:
    """The approximation from a Krylov space, or None if that would have to fill more than half of the matrix."""
    most = min(x.shape[-2:]) // 2
    wide = torch.float64 if gpu.takes_kernels(x.device) else dtype  # of thin products, which TF32 must not reach
    total = norm.square()
    left: list[Tensor] = []  # [..., m, block]
    right: list[Tensor] = []  # [..., n, block]
    core = norm.new_zeros(*norm.shape, 0, 0)  # Q^T X P, fp64; zero above the diagonal blocks
    k, steps = rank, 0
    last: int | Tensor | None = None
    rounds = power_iters
    if rank is not None and power_iters > 1 and dtype == torch.float32 and worthwhile(x, block + _WIDER):
        y, rounds = x.matmul(start_block(x, float(norm), block + _WIDER, power_iters, random)[:, :block]), 0
    else:
        y = x.sketch(block, random, dtype)
    while True:
        left.append(orthonormal(y, left, random))
        z = x.rmatmul(left[-1])
        right.append(orthonormal(z, right, random))
        row = torch.cat([z.mT.to(wide) @ q.to(wide) for q in right], dim=-1)
        core = _with_block_row(core, row.to(torch.float64))
        steps += 1
        if energy is not None:
            captured = core.square().sum()
            gain = core[-block:].square().sum()
            room = max(0, most - core.shape[-1]) / block
            if captured + gain * room < energy * total:
                return None  # no later block keeps more than this one
            if captured >= energy * total:
                k = directions_for(_squares(core), energy, beyond=float((total - captured).clamp_min(0)))
                if k == last:
                    break
                last = k
        elif steps > rounds:
            if tolerance is None:
                if rounds == power_iters or float(total - _squares(core)[:rank].sum()) > _FAINT**2 * float(total):
                    break
                rounds = power_iters  # what is left is fainter than the start could tell
                y = x.matmul(right[-1])
                continue
            residual = (total - _squares(core)[..., :rank].sum(-1)).clamp_min(1e-6 * total)
            if isinstance(last, Tensor) and bool((last <= residual * (1.0 + tolerance / 4) ** 2).all()):
                break
            last = residual
        if core.shape[-1] + block > most and (energy is not None or tolerance is not None):
            return None
        y = x.matmul(right[-1])

    u, s, v = core_svd(core, k, "x: its core")
    u = (torch.cat(left, dim=-1).to(wide) @ u.to(wide)).to(dtype)
    v = (torch.cat(right, dim=-1).to(wide) @ v.to(wide)).to(dtype)
    squared = total - s.square().sum(-1)
    guessed = isinstance(x, Custom) and x.squared_norm() is None
    if guessed or bool((squared < 1e-3 * total).any()):
        squared = _squared_error(x, dtype, u * s.to(dtype)[..., None, :], v)
    if guessed:  # what was found is known better than the whole
        norm = (squared + s.square().sum(-1)).sqrt()
    return make_svd(u, s, v, squared.clamp_min(0).sqrt(), norm, x.dtype)


def _with_block_row(core: Tensor, row: Tensor) -> Tensor:
    """``core [..., d, d]`` with ``row [..., l, d + l]`` below it and zeros beside it."""
    return torch.cat([torch.nn.functional.pad(core, (0, row.shape[-2])), row], dim=-2)


def _squares(core: Tensor) -> Tensor:
    """Squared singular values of the core, descending."""
    return torch.linalg.eigvalsh(core @ core.mT).flip(-1).clamp_min(0)


def _exact(
    x: Operand,
    norm: Tensor,
    dtype: torch.dtype,
    rank: int | None,
    energy: float | None,
) -> LowRankSVD:
    """Optimal truncation: Gram matrix in fp64 for fp32 results, LAPACK's SVD for fp64 ones."""
    dense = x.dense(dtype)
    most = min(dense.shape[-2:])
    k = most if rank is None else min(rank, most)
    if dtype == torch.float64:
        u, s, vh = robust_svd(dense, "x")
        v, tail = vh.mT, s[..., k:].square().sum(-1)
    else:
        try:
            u, s, v, tail = gram_svd(dense, k)
        except torch.linalg.LinAlgError:
            u, s, vh = robust_svd(dense.to(torch.float64), "x")
            v, tail = vh.mT, s[..., k:].square().sum(-1)
    if energy is not None:
        squares = s.square()
        k = directions_for(squares, energy, noise=float(1e-14 * squares[0]))
        tail = squares[k:].sum()
    u, s, v = u[..., :k], s[..., :k], v[..., :k]
    if dtype == torch.float32 and bool((tail < 1e-12 * norm.square()).any()):  # below what the Gram matrix resolves
        tail = _squared_error(x, dtype, u * s[..., None, :], v)
    return make_svd(u, s, v, tail.sqrt(), norm, x.dtype)


def _norm(x: Operand) -> tuple[torch.dtype, Tensor]:
    """The dtype to compute in, and the Frobenius norm ``[...]`` in fp64; fp64 where squares leave fp32's range.

    Raises:
        ValueError: something in ``x`` is not finite.
    """
    low = torch.finfo(torch.float32).tiny * 1e10
    squared = _squared_error(x, x.dtype)
    fine = torch.isfinite(squared) & (squared > low)
    if bool(fine.all()):
        cancels = isinstance(x, SumOfProducts) and x.cancels(squared)
        return torch.float64 if cancels else x.dtype, squared.sqrt()
    for name, tensor in x.tensors("x"):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: has NaN or infinite entries")
    squared = _squared_error(x, torch.float64)
    if not bool(torch.isfinite(squared).all()):
        raise ValueError("x: has NaN or infinite entries, or its squared norm overflows fp64")
    return (x.dtype if bool((fine | (squared == 0)).all()) else torch.float64), squared.sqrt()


def _squared_error(x: Operand, dtype: torch.dtype, u: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    """``||x - u v^T||^2 [...]``, fp64 (``||x||^2`` without u and v), from tiles in ``dtype``; see ``_PROBES``."""
    known = x.squared_norm() if u is None else None
    if known is not None:
        return known
    if u is None and dtype == torch.float32 and gpu.takes_kernels(x.device):
        squares = x.squares_by_kernel()
        if squares is not None:
            return squares
    total = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
    wide = torch.float64 if gpu.takes_kernels(x.device) else dtype
    if isinstance(x, Custom):
        random = torch.Generator().manual_seed(1)
        probes = torch.randn(*x.shape[:-2], x.shape[-1], _PROBES, generator=random, dtype=dtype).to(x.device)
        seen = x.matmul(probes)
        if u is not None and v is not None:
            seen = seen - u.to(dtype) @ (v.mT.to(dtype) @ probes)
        return torch.linalg.vector_norm(seen.to(torch.float64), dim=(-2, -1)).square() / _PROBES
    for tile in x.tiles():
        rows = x.rows(tile.start, tile.stop, dtype)
        if u is not None and v is not None:
            rows = rows - (u[..., tile, :].to(wide) @ v.mT.to(wide)).to(dtype)
        total += torch.linalg.vector_norm(rows, dim=-1).to(torch.float64).square().sum(-1)
    return total
