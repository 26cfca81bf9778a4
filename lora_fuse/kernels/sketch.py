"""Products of a large matrix with a thin one, ``X Q`` and ``X^T Q``; Q may be drawn, X may be formed, as they are read.

A program computes up to 64 columns of Q times a strip of X. Tiles of X pass through as the right operand of ``Q^T X``;
where Q has more columns, neighbours share what a cache holds of the strip. X is a tensor, a weighted sum of two (a
difference is formed in fp32, as on the CPU), or a ``SparseMatrix``, whose entries are put in place by counting the bits
before them. Q is kept as ``[columns, rows]``; a random Q is drawn by every program that needs it and stored nowhere.
Other kinds (products of factors, which are never formed; sums of three tensors and more; operators; fp64) are plain
torch's, with a Q that is drawn once and stored.

Products are those of fp32 on matrix instructions: operands are cut into parts that bf16 or tf32 hold exactly, and what
the parts' products leave out is below fp32's rounding. Sums of 512 terms are added up in fp32, partial sums of programs
in a fixed order: equal bits in every run. 32 columns of Q at a time keep every target to the warps' own instructions:
wgmma with a left operand from registers has been miscompiled (triton issue 9433). A batch's matrices are told apart by
the grid's first dimension, the only one that may be longer than 65535.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.bits import popcount
from lora_fuse.kernels.launch import Launch, on_device
from lora_fuse.kernels.normals import four_normals, halves
from lora_fuse.kernels.svd_plan import Thin, plan

_SQUARES_ROWS = 8  # whose squares a program adds up


@dataclass(frozen=True)
class Source:
    """X as the kernels read it: ``weights[0] * first + weights[1] * second``, or values by a bitmap.

    Args:
        shape: batch, m, n.
        first: ``[batch, m, n]``, any strides, fp32, fp16 or bf16; with ``words``: ``[nnz]``.
        second: another one, or None.
        words: ``[m, ceil(n / 32)]`` int32, a bit for each entry that is there, or None.
        starts: of the same shape: entries before each word.
    """

    shape: tuple[int, int, int]
    first: Tensor
    second: Tensor | None = None
    weights: tuple[float, float] = (1.0, 0.0)
    words: Tensor | None = None
    starts: Tensor | None = None

    @property
    def kind(self) -> str:
        """The dtype of a tensor that is X as it stands; else "sparse" or fp32."""
        if self.words is not None:
            return "sparse"
        own = self.second is None and self.weights[0] == 1.0
        return str(self.first.dtype).removeprefix("torch.") if own else "float32"

    def arguments(self) -> tuple[Any, ...]:
        """``_load``'s, from ``first`` to ``second_weight``."""
        if self.words is not None:
            strides: tuple[int, ...] = (0, self.words.stride(0), 0, 0, 0, 0)
        else:
            strides = (*self.first.stride(), *(self.first if self.second is None else self.second).stride())
        return self.first, self.second, self.words, self.starts, *strides, *self.weights

    def constexprs(self) -> dict[str, bool]:
        weighted = self.second is not None or self.weights[0] != 1.0
        return {"TWO": self.second is not None, "WEIGHTED": weighted, "SPARSE": self.words is not None}


@triton.jit
def _load(
    first,
    second,
    words,
    starts,
    batch_stride,
    row_stride,
    col_stride,
    batch_stride2,
    row_stride2,
    col_stride2,
    first_weight,
    second_weight,
    batch,
    row,
    col,
    mask,
    TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """A tile of X at ``row`` and ``col``, which broadcast to its shape: as it lies, or formed in fp32."""
    if SPARSE:
        at = row.to(tl.int64) * row_stride + (col >> 5)
        word = tl.load(words + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
        bit = (col & 31).to(tl.uint32)
        mask = mask & (((word >> bit) & 1) != 0)
        before = tl.load(starts + at, mask=mask, other=0)
        one = tl.full([1, 1], 1, tl.uint32)
        place = before + popcount(word & ((one << bit) - 1))
        x = tl.load(first + place, mask=mask, other=0.0)
    else:
        x = tl.load(
            first + batch * batch_stride + row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride,
            mask=mask,
            other=0.0,
        )
    if WEIGHTED or SPARSE:
        x = x.to(tl.float32)
    if WEIGHTED:
        x = x * first_weight
    if TWO:
        at = batch * batch_stride2 + row.to(tl.int64) * row_stride2 + col.to(tl.int64) * col_stride2
        x += second_weight * tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _high(x):
    """The part of fp32 that tf32 holds."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _dot(q, x, acc, PRECISION: tl.constexpr):
    """``acc + q @ x`` for an fp32 q; the smallest products first."""
    if PRECISION == "bf16":
        high = q.to(tl.bfloat16)
        rest = q - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        acc = tl.dot((rest - middle.to(tl.float32)).to(tl.bfloat16), x, acc)
        acc = tl.dot(middle, x, acc)
        return tl.dot(high, x, acc)
    elif PRECISION == "ieee":
        return tl.dot(q, x.to(tl.float32), acc, input_precision="ieee")
    else:
        wide = x.to(tl.float32)
        high = _high(q)
        if PRECISION == "tf32x3":
            high_x = _high(wide)
            acc = tl.dot(high, wide - high_x, acc, input_precision="tf32")
            wide = high_x
        acc = tl.dot(q - high, wide, acc, input_precision="tf32")
        return tl.dot(high, wide, acc, input_precision="tf32")


@triton.jit
def _columns(q, offs_l, k, columns, reduced, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile ``[SIZE, BLOCK_K]`` of Q^T from column ``offs_l`` of Q and its row ``k`` on."""
    row = offs_l + tl.arange(0, SIZE)[:, None]
    at = k + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(q + row.to(tl.int64) * reduced + at, mask=(row < columns) & (at < reduced), other=0.0)


@triton.jit
def _drawn(first_column, k, matrix, draw, seed_low, seed_high, SIZE: tl.constexpr):
    col = first_column + tl.arange(0, SIZE)[:, None]
    row = k + tl.arange(0, 32)[None, :]
    return four_normals(row, col, matrix, draw, seed_low, seed_high)


@triton.jit
def _one_of(n0, n1, n2, n3, T: tl.constexpr):
    if T < 2:
        return n0 if T == 0 else n1
    else:
        return n2 if T == 2 else n3


@triton.jit
def _add(to, values, again, first_column, columns, offs_n, width, SIZE: tl.constexpr):
    """Sums of segments live in memory, and so in a cache: in registers they would spill."""
    row = first_column + tl.arange(0, SIZE)[:, None]
    at = to + row.to(tl.int64) * width + offs_n[None, :]
    inside = (row < columns) & (offs_n[None, :] < width)
    tl.store(at, values + tl.load(at, mask=inside & again, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["draw", "seed_low", "seed_high"])
def _product_kernel(
    out,  # [splits, batch, columns, width] fp32
    q,  # [batch, columns, reduced] fp32, or None: drawn
    first,
    second,
    words,
    starts,
    reduced,
    width,
    columns,
    draw,
    seed_low,
    seed_high,
    batch_stride,
    row_stride,
    col_stride,
    batch_stride2,
    row_stride2,
    col_stride2,
    first_weight,
    second_weight,
    TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPARSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # X^T Q: X's rows are summed over
    SPLIT_LEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,  # columns of Q: 32 or none, and
    TAIL: tl.constexpr,  # 32 or 16 more
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbours read the same strip of X, for other columns of Q.
    programs = tl.cdiv(width, BLOCK_N) * GROUPS  # of a matrix
    program = tl.program_id(0) % programs
    offs_n = (program // GROUPS) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = (program % GROUPS) * (HEAD + TAIL)
    tail = first_column + HEAD
    split = tl.program_id(1)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    to = out + (split.to(tl.int64) * (tl.num_programs(0) // programs) + batch) * columns * width
    end = tl.minimum(split * SPLIT_LEN + SPLIT_LEN, reduced)
    for begin in range(split * SPLIT_LEN, end, SEGMENT):
        acc = tl.zeros([HEAD if HEAD > 0 else 16, BLOCK_N], tl.float32)
        acc_tail = tl.zeros([TAIL, BLOCK_N], tl.float32)
        for k in range(begin, tl.minimum(begin + SEGMENT, end), STEP):
            if q is None:
                if HEAD > 0:
                    n0, n1, n2, n3 = _drawn(first_column, k, batch, draw, seed_low, seed_high, HEAD)
                t0, t1, t2, t3 = _drawn(tail, k, batch, draw, seed_low, seed_high, TAIL)
            for t in tl.static_range(STEP // BLOCK_K):
                at = k + t * BLOCK_K
                offs_k = at + tl.arange(0, BLOCK_K)
                inside = (offs_k[:, None] < end) & (offs_n[None, :] < width)
                if TRANSPOSED:
                    row, col = offs_k[:, None], offs_n[None, :]
                else:
                    row, col = offs_n[None, :], offs_k[:, None]
                x = _load(
                    first, second, words, starts,
                    batch_stride, row_stride, col_stride, batch_stride2, row_stride2, col_stride2,
                    first_weight, second_weight, batch, row, col, inside, TWO, WEIGHTED, SPARSE,
                )  # fmt: skip
                if q is None:
                    if HEAD > 0:
                        acc = _dot(_one_of(n0, n1, n2, n3, t), x, acc, PRECISION)
                    acc_tail = _dot(_one_of(t0, t1, t2, t3, t), x, acc_tail, PRECISION)
                else:
                    own = q + batch * columns * reduced
                    if HEAD > 0:
                        acc = _dot(_columns(own, first_column, at, columns, reduced, HEAD, BLOCK_K), x, acc, PRECISION)
                    acc_tail = _dot(_columns(own, tail, at, columns, reduced, TAIL, BLOCK_K), x, acc_tail, PRECISION)
        again = begin > split * SPLIT_LEN
        if HEAD > 0:
            _add(to, acc, again, first_column, columns, offs_n, width, HEAD)
        _add(to, acc_tail, again, tail, columns, offs_n, width, TAIL)
        tl.debug_barrier()  # the next segment may read with other threads than wrote


@triton.jit
def _squares_kernel(
    out,  # [batch, rows] fp32
    first,
    second,
    words,
    starts,
    rows,
    cols,
    batch_stride,
    row_stride,
    col_stride,
    batch_stride2,
    row_stride2,
    col_stride2,
    first_weight,
    second_weight,
    TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPARSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the squares of rows."""
    programs = tl.cdiv(rows, ROWS)  # of a matrix
    batch = (tl.program_id(0) // programs).to(tl.int64)
    first_row = tl.program_id(0) % programs * ROWS
    row = first_row + tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(0, cols, BLOCK):
        col = at + tl.arange(0, BLOCK)[None, :]
        x = _load(
            first, second, words, starts,
            batch_stride, row_stride, col_stride, batch_stride2, row_stride2, col_stride2,
            first_weight, second_weight, batch, row, col, (row < rows) & (col < cols), TWO, WEIGHTED, SPARSE,
        ).to(tl.float32)  # fmt: skip
        total += x * x
    own = first_row + tl.arange(0, ROWS)
    tl.store(out + batch * rows + own, tl.sum(total, 1), mask=own < rows)


def _run(launch: Launch, out: Tensor) -> None:
    with on_device(out.device):
        launch.run()


def product_launch(
    x: Source, q: Tensor | None, columns: int, transposed: bool, drawn: tuple[int, int], backend: str
) -> tuple[Launch, Tensor]:
    """The launch of ``product``, and where it puts its partial sums: ``[splits, batch, columns, width]``."""
    batch, rows, cols = x.shape
    reduced, width = (rows, cols) if transposed else (cols, rows)
    made: Thin = plan(reduced, width, columns, batch, x.kind, q is None, backend)
    out = torch.empty(made.splits, batch, columns, width, dtype=torch.float32, device=x.first.device)
    first, second, words, starts, *rest = x.arguments()
    seed, draw = drawn
    launch = Launch(
        _product_kernel,
        (-(-width // made.block_n) * made.groups * batch, made.splits),
        (out, q, first, second, words, starts, reduced, width, columns, draw, *halves(seed), *rest),
        {
            **x.constexprs(),
            "TRANSPOSED": transposed,
            "SPLIT_LEN": made.split_len,
            "SEGMENT": made.segment,
            "STEP": made.step,
            "BLOCK_K": made.block_k,
            "BLOCK_N": made.block_n,
            "HEAD": made.head,
            "TAIL": made.tail,
            "GROUPS": made.groups,
            "PRECISION": made.precision,
        },
        made.num_warps,
        made.num_stages,
        255 if backend == "cuda" else None,  # or ptxas spills a few to reach the next step of occupancy
    )
    return launch, out


def product(
    x: Source, q: Tensor | None, columns: int, transposed: bool = False, drawn: tuple[int, int] = (0, 0)
) -> Tensor:
    """``Q^T X^T`` (``Q^T X`` if ``transposed``), that is ``X Q`` and ``X^T Q`` with columns as rows.

    Args:
        x: batch, m, n.
        q: ``[batch, columns, n]`` (``m`` if transposed) contiguous fp32: the columns of Q. None: Q is drawn.
        drawn: seed and number of the draw of ``[batch, n, columns]``.
    Returns:
        ``[batch, columns, m]`` (``n`` if transposed), fp32.
    """
    launch, out = product_launch(x, q, columns, transposed, drawn, "hip" if torch.version.hip else "cuda")
    _run(launch, out)
    return out[0] if out.shape[0] == 1 else out.sum(0)


def squares_launch(x: Source) -> tuple[Launch, Tensor]:
    if x.words is None and x.first.stride(-1) != 1 and x.first.stride(-2) == 1:  # columns lie side by side
        turned = x.first.mT, None if x.second is None else x.second.mT
        x = replace(x, shape=(x.shape[0], x.shape[2], x.shape[1]), first=turned[0], second=turned[1])
    batch, rows, cols = x.shape
    out = torch.empty(batch, rows, dtype=torch.float32, device=x.first.device)
    first, second, words, starts, *rest = x.arguments()
    args = (out, first, second, words, starts, rows, cols, *rest)
    block = min(512, max(16, triton.next_power_of_2(cols)))
    constexprs = {**x.constexprs(), "ROWS": _SQUARES_ROWS, "BLOCK": block}
    return Launch(_squares_kernel, (-(-rows // _SQUARES_ROWS) * batch,), args, constexprs, 4, 3), out


def squares(x: Source) -> Tensor:
    """``||X||_F^2 [batch]``: rows in fp32, their sum in fp64."""
    launch, out = squares_launch(x)
    _run(launch, out)
    return out.to(torch.float64).sum(-1)
