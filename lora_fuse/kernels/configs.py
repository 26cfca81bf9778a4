"""How ``multi_lora`` is launched: a pure function of shape, dtype and device kind, with no GPU and no Triton in sight.

What decides a row's bits (where the reduced dimension is cut, which matrix instruction runs) depends on the layer, the
pool and the device only; how many rows there are decides tile widths and grids alone. So a row's result does not depend
on its batch. Tiles hold at most 32 rows: wider ones would take another matrix instruction on sm_90 (wgmma).
"""

from __future__ import annotations

from dataclasses import dataclass

SPLIT_ALIGN = 256  # columns; cuts lie at multiples, whatever the block
SLICES = 3  # layers of one launch at most: q, k, v
_FEW_PAIRS = 1024
PROCESSORS = 132  # of an H100; a program for each is one wave


@dataclass(frozen=True)
class Shrink:
    """``h[p] = A[slot] x[row]`` over tiles of pairs.

    Args:
        split_len: columns of x that are summed before they join the total.
        planes: how many partial sums are stored for the expand to add up; 1: one program adds up all of its own.
    """

    block_m: int
    block_r: int
    block_k: int
    split_len: int
    planes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Expand:
    """``y[row] += weight * scaling * h[p] B[slot]``.

    Args:
        steps: blocks of columns that a program goes over with the same h.
        ahead: start while the shrink runs, and wait for it (programmatic dependent launch). In no shipped plan.
    """

    block_m: int
    block_r: int
    block_n: int
    steps: int
    precision: str
    num_warps: int
    num_stages: int
    ahead: bool = False


@dataclass(frozen=True)
class Plan:
    """Both launches of one ``multi_lora``."""

    shrink: Shrink
    expand: Expand


def tile_rows(num_pairs: int) -> int:
    """Pairs of a tile, for all layers of a forward."""
    return 16 if num_pairs <= _FEW_PAIRS else 32


def tile_capacity(num_pairs: int, num_slots: int) -> int:
    """Tiles that ``num_pairs`` pairs can need: each slot in use may leave one part-filled."""
    rows = tile_rows(num_pairs)
    return min(num_pairs, num_pairs // rows + num_slots)


def mix_steps(num_rows: int, blocks: int, processors: int = PROCESSORS) -> int:
    """Blocks of columns that a program of a row with several pairs goes over.

    Most rows have no such program's work, and where the host cannot know, each has to be launched all the same.
    """
    steps = 1
    while steps < blocks and num_rows * -(-blocks // steps) > 2 * processors:
        steps *= 2
    return steps


def plan(
    in_features: int,
    out_features: int,
    max_rank: int,
    num_pairs: int,
    num_slots: int,
    dtype: str,
    backend: str,
    slices: int = 1,
    num_rows: int | None = None,
    processors: int = PROCESSORS,
) -> Plan:
    """The launches for a shape.

    Args:
        out_features: of all slices.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        backend: Triton's, ``"cuda"`` or ``"hip"``.
        slices: layers that share x.
        num_rows: where ``num_pairs`` counts padding, rows of x; None: as many as pairs.
        processors: of the card (SMs, CUs); what there is to do is cut into about half as many programs where it can
            be, and no further once there are two for each. No bit of a result hangs on it.
    """
    tiles, block_m = tile_capacity(num_pairs, num_slots), tile_rows(num_pairs)
    block_r = 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64
    wide = dtype == "float32"
    splits = min(max(in_features // 512, 1), 16 if block_r == 16 else 8)  # more planes of more ranks would spill
    split_len = _round_up(-(-in_features // splits), SPLIT_ALIGN)
    splits = -(-in_features // split_len)
    rank_blocks = -(-max_rank // block_r)
    planes = splits if tiles * rank_blocks * slices < 2 * processors else 1
    block_k = 128 if not wide else 64 if block_r < 64 else 32
    shrink = Shrink(block_m, block_r, block_k, split_len, planes, 4, 2 if wide else 3)
    # The fewest tiles are those of rows that all want one adapter; the most, whatever the batch may look like.
    fewest = -(-min(num_pairs, num_rows or num_pairs) // block_m)
    blocks, at_once = -(-out_features // 64), 1
    spread = 1 << (max(processors // 2, 1).bit_length() - 1)  # half, down to a power of two: blocks mostly are
    while at_once < 16 and (
        fewest * (blocks // (2 * at_once)) >= spread and tiles * (blocks // (2 * at_once)) >= 2 * processors
    ):
        at_once *= 2
    block_n = 128 if at_once > 1 and block_r <= 32 and not wide else 64
    precision = "bf16" if dtype == "bfloat16" else "tf32" if dtype == "float16" and backend == "cuda" else "ieee"
    steps = at_once * 64 // block_n
    return Plan(
        shrink, Expand(block_m, block_r if max_rank <= 64 else 32, block_n, steps, precision, 4, 1 if wide else 2)
    )


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
