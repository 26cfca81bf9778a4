"""How a selection by magnitude is cut up on a GPU: pure functions, with no GPU and no Triton in sight.

A group is what shares a threshold: a tensor, a row or the whole list. Tensors are seen as ``[rows, cols]`` where a row
lies within one group, and rows are cut into tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

FIELDS = (  # of a row of the table, one per tensor, int64
    "x",  # addresses
    "minus",
    "out",
    "rows",
    "cols",
    "tiles",  # of a row
    "first_tile",  # of the tensor; tiles are numbered through the list, so by group and by index
    "group",  # of its first row
    "group_step",  # 0: all rows share a group
    "start",  # place of its first entry in its group
    "entries",  # of the group
    "keep",  # of the group
    "group_tiles",
    "buffer",  # where its first group's collected keys lie
    "room",  # for collected keys of a group
    "samples",  # of a row
    "sample_base",  # where the samples of its first group lie
    "first_sample",  # place of a row's samples among those of its group
    "group_samples",
    "dtype",
    "tensor",  # place in the list
    "first_program",  # of the launch over tiles or rows
    "first_draw",  # program of the launch that samples
    "height",  # as a matrix of a sparse form
    "width",
    "first_part",  # of the parts that its rows are cut into, numbered through the list
    "values",  # addresses of a sparse form
    "row_starts",
    "columns",
    "bitmap",
)
STATE = (  # of a group, int64, all zero at first
    "above",  # counts of the pass over all entries, relative to the bracket
    "at_high",
    "at_low",
    "found",
    "drawn",  # programs that are through
    "counted",
    "gathered",
    "settled",
    "low",  # the bracket, so that zeros stand for all keys: low + 1
    "high",  # high - (the largest key + 1)
    "rank",  # of the threshold among the keys in question; later among its equals
    "status",
    "sub_low",  # among the found keys, those in question
    "sub_high",
    "picked",  # how many these are
    "most",  # largest of them - sub_low + 1
    "least",  # sub_high + 1 - smallest of them
)
BINS = 256  # of the keys inside a bracket
COUNTING, NARROW, CUT, FAILED, DONE = range(5)  # status
DTYPES = ("float32", "bfloat16", "float16")
KEY_SHIFT = {"float32": 0, "bfloat16": 16, "float16": 13}  # low bits of a key that are zero


@dataclass(frozen=True)
class Plan:
    """Sizes of a selection.

    Args:
        tile: entries of a program of the passes over all entries.
        row: longest row whose threshold is found on chip.
        samples: of a group at most; a power of two.
        draw: samples that a program draws.
        whole: entries of a group that are all collected, without a sample.
        margin: standard deviations of the sample's error on either side of the threshold.
        pick: collected keys among which one program finds the threshold.
        pool: collected keys for which there is room at once; more groups than fit, rows of one tensor too, go one batch
            after the other.
        tensors: that a launch serves at most, but for the last two steps of one group: each program looks for its own
            in the whole table.
    """

    tile: int = 4096
    row: int = 8192
    samples: int = 1 << 13
    draw: int = 512
    whole: int = 2048
    margin: float = 5.0
    pick: int = 4096
    pool: int = 1 << 24
    tensors: int = 512

    def sampled(self, entries: int) -> int:
        """Samples of a group: none, or from 256 on a 32nd of its entries."""
        return 0 if entries <= self.whole else min(max(256, entries // 32), self.samples)

    def room(self, entries: int) -> int:
        """Keys of a group that can be collected.

        A bracket of 5 standard deviations holds ``10 sqrt(p (1 - p) / samples)`` of the samples and a few more, 6 % at
        most for the full sample, which groups of 2^18 entries on have. Of the entries it is 0.3 % more or less.
        """
        return min(entries, max(1 << 16, entries // 12))


@dataclass(frozen=True)
class RowPlan:
    """Rows of a program whose entries stay in registers: ``rows x block``, ``block`` the padded length of a row."""

    rows: int
    block: int
    num_warps: int


def row_plan(cols: int) -> RowPlan:
    block = max(32, 1 << (cols - 1).bit_length())
    rows = max(1, 4096 // block)
    return RowPlan(rows, block, rows * block // 512)


def part_plan(width: int) -> RowPlan:
    """Rows and columns of a program that writes a sparse form; wider matrices' rows are cut into parts."""
    block = min(max(64, 1 << (width - 1).bit_length()), 4096)
    return RowPlan(4096 // block, block, 8)


def key_shift(dtypes: set[str], with_minus: bool) -> int:
    """Low bits that all keys of a call share: a 16-bit entry has them, a difference of two does not."""
    return 0 if with_minus else min((KEY_SHIFT[d] for d in dtypes), default=0)


def share(samples: int, sizes: list[int]) -> list[int]:
    """``samples`` over consecutive stretches, in proportion to their sizes."""
    total, seen, ends = sum(sizes), 0, [0]
    for size in sizes:
        seen += size
        ends.append(seen * samples // total)
    return [b - a for a, b in pairwise(ends)]


def batches(rooms: list[int], pool: int, most: int) -> list[tuple[int, int]]:
    """Parts of a list whose items take ``rooms``: of ``most`` items, and ``pool`` at most if an item takes that."""
    cuts, begin, used = [], 0, 0
    for i, room in enumerate(rooms):
        if i > begin and (used + room > pool or i - begin == most):
            cuts.append((begin, i))
            begin, used = i, 0
        used += room
    return [*cuts, (begin, len(rooms))] if rooms else []


def settle_programs(entries: int, tile: int) -> int:
    """Programs of a group that look through what was collected."""
    return min(64, math.ceil(entries / (16 * tile)))
