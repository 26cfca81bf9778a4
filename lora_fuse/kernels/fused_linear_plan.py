"""How ``multi_lora_linear`` is launched: a pure function of shape, dtype and device kind, like ``configs``.

A program owns ``block_n`` columns of y, for all rows, and streams its rows of W once. What it keeps on the way is the
same for every shape: 16 KB of W a stage, about 96 KB of stages, so that two programs share a processor of an H100 and
each has enough loads on the way when the other waits. Every program reads x again, so columns grow with rows: its share
of x never weighs more than its share of W. Beyond 32 rows two programs share the reduced dimension of a tile.

W is cut into ``CUTS`` parts along the reduced dimension, summed apart and added up in order, whatever the splits: so a
row's bits depend on the layer, the pool and the device only.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 64
CUTS = 4  # of the reduced dimension, for W and for A
CUT_ALIGN = 256  # columns; the widest block_k
COUNTERS = 2  # before those of the tiles
_WAVE = 264  # programs that an H100 holds, two to a processor
_WIDE = 64 * _WAVE // 2  # columns that programs of 64 columns, two to a tile, cover at once
_STAGE = 12288  # elements of W and x that a program loads at a time
_SHRINKERS = 64  # programs at most


@dataclass(frozen=True)
class Plan:
    """One launch: ``shrinkers`` programs for ``h = A x``, then ``splits`` for every ``block_n`` columns of y.

    Args:
        block_m: rows of one accumulator, at most 32: wider ones would take another matrix instruction on sm_90.
        blocks_m: accumulators of a program, which share its loads of W; two only where ``splits`` is more than one.
        cut_len: columns of a cut.
        splits: programs of a tile.
        block_r: ranks whose rows of B a program has on the way at a time.
    """

    block_m: int
    blocks_m: int
    block_n: int
    block_k: int
    splits: int
    cut_len: int
    block_r: int
    shrinkers: int
    num_warps: int
    num_stages: int


def plan(num_rows: int, in_features: int, out_features: int, max_rank: int, num_tiles: int, dtype: str) -> Plan:
    """The launch for a shape of at most ``MAX_ROWS`` rows.

    Args:
        num_tiles: of pairs, ``tile_capacity``; 0: no row has an adapter.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """
    block_m, blocks_m = (16, 1) if num_rows <= 16 else (32, 1) if num_rows <= 32 else (32, 2)
    rows, splits = block_m * blocks_m, 1
    if rows <= 32:
        block_n = 16
        while block_n < 2048 // rows and -(-out_features // block_n) > (_WAVE if block_n > 16 else _WAVE // 4):
            block_n *= 2
    else:
        block_n, splits = 64, 2
    block_k = CUT_ALIGN
    while (block_n + rows) * block_k > _STAGE:
        block_k //= 2
    stage = (block_n + rows) * block_k * (4 if dtype == "float32" else 2)
    buffers = max(1, min(8, (104 << 10) // stage))
    return Plan(
        block_m,
        blocks_m,
        block_n,
        block_k,
        splits,
        _round_up(-(-in_features // CUTS), CUT_ALIGN),
        min(16, max(4, 8192 // rows // block_n)),
        min(_SHRINKERS, num_tiles * CUTS * -(-max_rank // 16)),
        num_warps=4,
        num_stages=1 + buffers,
    )


def serves(num_rows: int, in_features: int, out_features: int, max_rank: int, dtype: str) -> bool:
    """Whether one launch is worth trying, on NVIDIA's devices: elsewhere the base product and the LoRA part run apart.

    Rows read their own B, so rows times ranks must not grow to where that weighs against W. Columns of x that are no
    multiple of 16 would be read one by one. Many rows of very wide layers would not leave room for their sums.
    """
    if dtype not in ("bfloat16", "float16") or in_features % 16 or min(num_rows, in_features, out_features) <= 0:
        return False
    fits = num_rows <= 32 or (num_rows <= MAX_ROWS and out_features <= _WIDE)
    return fits and max_rank <= 64 and 4 * min(num_rows, 16) * max_rank <= max(in_features, 1024)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
