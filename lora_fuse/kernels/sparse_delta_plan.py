"""How ``sparse_delta_linear`` is launched: a pure function of shape, dtype and device kind.

Two ways, told apart by how many rows of the batch a slot has. All that decides a row's bits but this (where sums are
cut, the order in which they are added, the matrix instruction) hangs on the layer alone.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_GATHERED = 8  # rows of a slot that are gathered; more take matrix instructions
_FEW_PAIRS = 256


@dataclass(frozen=True)
class Gather:
    """``x`` gathered by column, one multiply-add per entry: a program's outputs, and entries of each at a time.

    Args:
        max_registers: of a thread. Left alone, ptxas spills a few to reach the next step of occupancy.
    """

    block_n: int
    block_e: int
    num_warps: int
    max_registers: int


@dataclass(frozen=True)
class Expand:
    """Entries spread into dense tiles for matrix instructions: a program's rows and outputs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 255


@dataclass(frozen=True)
class Plan:
    gather: Gather
    expand: Expand


def plan(out_features: int, num_pairs: int, dtype: str, backend: str) -> Plan:
    """The launches for a layer and a batch.

    Args:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        backend: Triton's, ``"cuda"`` or ``"hip"``.
    """
    gather = Gather(16, 256, 8, 128)
    if dtype == "float32":  # more rows would take tcgen05 on sm_100, which rounds to tf32 whatever it is told
        return Plan(gather, Expand(32, 64, 4, 1))
    if out_features % 16:  # wide tiles of it would be more addresses than registers
        return Plan(gather, Expand(64, 64, 4, 2))
    # 64 rows or 128: both take the same instruction (wgmma on sm_90), fewer rows would not.
    block_m = 64 if num_pairs <= _FEW_PAIRS or backend == "hip" else 128
    return Plan(gather, Expand(block_m, 128, 8, 2))
