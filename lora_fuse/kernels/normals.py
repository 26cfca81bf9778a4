"""Normal numbers drawn on the device, those of csrc/normals.h: stored, or made by a kernel where it needs them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.launch import Launch, on_device
from lora_fuse.kernels.svd_plan import CHUNK

_BLOCK = 32  # columns of a stored draw that a program writes


@triton.jit
def _radius(word):
    """``sqrt(-2 ln u)``, ``u = (23 bits + 1/2) 2^-23``."""
    u = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))


@triton.jit
def _cos_sin(word):
    """Of ``int32(word) pi 2^-31``: whole quarter turns apart, the rest by its series; ``tl.cos`` would spill."""
    quarter = (word + 0x20000000).to(tl.int32, bitcast=True) >> 30
    rest = word - (quarter.to(tl.uint32, bitcast=True) << 30)
    x = rest.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi 2^-31
    t = x * x
    s = x * (1.0 - t * (1.0 / 6 - t * (1.0 / 120 - t * (1.0 / 5040 - t * (1.0 / 362880)))))
    c = 1.0 - t * (1.0 / 2 - t * (1.0 / 24 - t * (1.0 / 720 - t * (1.0 / 40320 - t * (1.0 / 3628800)))))
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def four_normals(row, col, matrix, draw, seed_low, seed_high):
    """Entries at ``row`` (of the first 32 rows of a chunk), + 32, + 64 and + 96, and ``col``, as in csrc/normals.h."""
    quad = (row // 128) * 32 + row % 32
    c0 = (quad + col * 0).to(tl.uint32)
    c1 = (col + quad * 0).to(tl.uint32)
    c2 = c0 * 0 + matrix.to(tl.uint32)
    c3 = c0 * 0 + draw.to(tl.uint32)
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, c3, k0, k1)
    r0, r1 = _radius(w0), _radius(w2)
    cos0, sin0 = _cos_sin(w1)
    cos1, sin1 = _cos_sin(w3)
    return r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1


@triton.jit(do_not_specialize=["draw", "seed_low", "seed_high"])
def _normals_kernel(out, rows, columns, draw, seed_low, seed_high, BLOCK: tl.constexpr):
    """A draw ``[matrices, rows, columns]``, stored."""
    chunks = tl.cdiv(rows, 128)
    matrix = (tl.program_id(0) // chunks).to(tl.int64)
    row = tl.program_id(0) % chunks * 128 + tl.arange(0, 32)[:, None]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    n0, n1, n2, n3 = four_normals(row, col, matrix, draw, seed_low, seed_high)
    to = out + matrix * rows * columns + row.to(tl.int64) * columns + col
    inside = col < columns
    tl.store(to, n0, mask=inside & (row < rows))
    tl.store(to + 32 * columns, n1, mask=inside & (row + 32 < rows))
    tl.store(to + 64 * columns, n2, mask=inside & (row + 64 < rows))
    tl.store(to + 96 * columns, n3, mask=inside & (row + 96 < rows))


def halves(seed: int) -> tuple[int, int]:
    """Low and high half as int32: arguments of one type whatever the seed."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def normals_launch(out: Tensor, seed: int, draw: int) -> Launch:
    matrices, rows, columns = out.shape
    grid = -(-rows // CHUNK) * matrices, -(-columns // _BLOCK)
    args = (out, rows, columns, draw, *halves(seed))
    return Launch(_normals_kernel, grid, args, {"BLOCK": _BLOCK}, 4, 1)


def normals(seed: int, draw: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """``[matrices, rows, columns]`` fp32, those of ``_cpu.normals``."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    if out.numel():
        with on_device(out.device):
            normals_launch(out, seed, draw).run()
    return out
