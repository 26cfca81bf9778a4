"""How the thin products of ``kernels/sketch.py`` are launched: a pure function of shape, kind and device kind."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32  # rows of a sketch between those that share a call of Philox; csrc/normals.h
CHUNK = 4 * GROUP
_COLUMNS = 64  # of the thin matrix that a program takes: 32 at a time, so that no target takes wgmma
_WAVE = 132  # programs that fill a large GPU once
_SEGMENT = 512  # terms that a matrix instruction's accumulator adds up before fp32 additions go on


@dataclass(frozen=True)
class Thin:
    """``out = Q^T X`` or ``Q^T X^T`` for a thin Q.

    Args:
        groups: how many programs share the columns of Q, ``head + tail`` each.
        split_len: terms of a partial sum; ``splits`` of them are stored.
        step: terms of a turn of the loop, ``block_k`` at a time.
        precision: "bf16" (X is bf16: Q as three of them), "tf32" (X is exact in tf32: Q as two), "tf32x3" or "ieee".
    """

    block_n: int
    block_k: int
    step: int
    segment: int
    head: int
    tail: int
    groups: int
    split_len: int
    splits: int
    precision: str
    num_warps: int
    num_stages: int


def plan(reduced: int, width: int, columns: int, batch: int, kind: str, random: bool, backend: str) -> Thin:
    """The launch for a shape.

    Args:
        reduced: side of X that is summed over; ``width`` is the other.
        columns: of Q.
        kind: "bfloat16" or "float16", of an X that is one tensor of these; "sparse"; "float32" for all others.
        random: whether Q is drawn.
        backend: Triton's, ``"cuda"`` or ``"hip"``.
    """
    sparse = kind == "sparse"  # its tiles take registers to form: narrow ones, and few columns, or they spill
    most = _COLUMNS // 4 if random and sparse else _COLUMNS
    groups = -(-columns // most)
    each = -(-columns // groups)
    head = 32 if each > 32 else 0
    tail = 16 if each - head <= 16 else 32
    block_n = 128 if backend == "cuda" and not (sparse or random) and width > 64 else 32 if sparse and random else 64
    programs = -(-width // block_n) * groups * batch
    # Waves of the device over their share of the work; each more sum that is stored costs a little.
    splits = min(range(1, min(-(-reduced // _SEGMENT), 32) + 1), key=lambda s: -(-programs * s // _WAVE) / s + 0.02 * s)
    split_len = _up(_up(reduced, splits) // splits, CHUNK)
    if backend == "cuda":
        precision = {"bfloat16": "bf16", "float16": "tf32"}.get(kind, "tf32x3")
    else:
        precision = "bf16" if kind == "bfloat16" else "ieee"
    stages = 1 if random and sparse else 2 if random or backend == "hip" else 3
    step = CHUNK if random else GROUP
    splits = -(-reduced // split_len)
    return Thin(
        block_n,
        GROUP,
        step,
        _SEGMENT,
        head,
        tail,
        groups,
        split_len,
        splits,
        precision,
        8 if backend == "cuda" else 4,
        stages,
    )


def _up(n: int, to: int) -> int:
    return -(-n // to) * to
