"""Routing on the device: a stable counting sort of a batch's slots, and the tile list that all layers share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.kernels.configs import tile_capacity, tile_rows
from lora_fuse.kernels.launch import Launch, on_device

# Slot (-1: no tile), first pair, pairs, and the row of the first pair where the others' follow it (else -1): rows that
# all want one adapter, or each its own, are known once the tile is, with no look-up of their own.
TILE_FIELDS = 4


# Sizes of a batch are not specialised: every one of them would be compiled for.
@triton.jit(do_not_specialize=["num_rows"])
def _sort_kernel(slots, rows, starts, flag, num_rows, num_slots, BLOCK: tl.constexpr):
    """Program ``s``: where slot ``s`` starts, and its rows in order. Slots out of range are -1 and raise the flag."""
    slot = tl.program_id(0)
    before = 0
    mine = 0
    for at in range(0, num_rows, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        got = tl.load(slots + offs, mask=offs < num_rows, other=-1)
        before += tl.sum(((got >= 0) & (got < slot)).to(tl.int32))
        mine += tl.sum((got == slot).to(tl.int32))
        if slot == 0:
            wrong = tl.sum(((got < -1) | (got >= num_slots)).to(tl.int32))
            if wrong > 0:
                tl.store(flag, 1)
    tl.store(starts + slot, before)
    if slot == num_slots - 1:
        tl.store(starts + num_slots, before + mine)
    if mine > 0:
        place = before
        for at in range(0, num_rows, BLOCK):
            offs = at + tl.arange(0, BLOCK)
            hit = tl.load(slots + offs, mask=offs < num_rows, other=-1) == slot
            rank = tl.cumsum(hit.to(tl.int32), 0)
            tl.store(rows + place + rank - 1, offs, mask=hit)
            place += tl.sum(hit.to(tl.int32))


@triton.jit(do_not_specialize=["capacity"])
def _tiles_kernel(
    rows, starts, tiles, num_slots, capacity, ROWS: tl.constexpr, FIELDS: tl.constexpr, SLOTS: tl.constexpr
):
    """Program ``s`` writes the tiles of slot ``s``; the last one clears what is left."""
    slot = tl.program_id(0)
    offs = tl.arange(0, SLOTS)
    offs_p = tl.arange(0, ROWS)
    first = tl.load(starts + offs, mask=offs < num_slots, other=0)
    last = tl.load(starts + 1 + offs, mask=offs < num_slots, other=0)
    needed = (last - first + ROWS - 1) // ROWS
    place = tl.sum(tl.where(offs < slot, needed, 0))
    if slot < num_slots:
        begin = tl.load(starts + slot)
        end = tl.load(starts + slot + 1)
        for at in range(begin, end, ROWS):
            to = tiles + place * FIELDS
            tl.store(to, slot)
            tl.store(to + 1, at)
            count = tl.minimum(end - at, ROWS)
            tl.store(to + 2, count)
            row = tl.load(rows + at)
            own = tl.load(rows + at + offs_p, mask=offs_p < count, other=0)
            breaks = tl.sum(((offs_p < count) & (own != row + offs_p)).to(tl.int32))
            tl.store(to + 3, tl.where(breaks == 0, row, -1))
            place += 1
    else:
        for left in range(place, capacity):
            tl.store(tiles + left * FIELDS, -1)


def sort_slots(slots: Tensor, num_slots: int, flag: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows, segment_starts)`` of one slot per row, without a host sync.

    Args:
        slots: ``[num_rows]`` int32, -1 for none.
        flag: ``[1]`` int32, set to 1 if a slot is out of range; such rows have none.
    Returns:
        rows: ``[num_rows]`` int32, sorted by slot, then row; what lies beyond ``segment_starts[-1]`` is zero.
        segment_starts: ``[num_slots + 1]`` int32.
    """
    rows = torch.zeros_like(slots)
    starts = torch.zeros(num_slots + 1, dtype=torch.int32, device=slots.device)
    if slots.shape[0]:
        with on_device(slots.device):
            sort_launch(slots, rows, starts, flag).run()
    return rows, starts


def sort_launch(slots: Tensor, rows: Tensor, starts: Tensor, flag: Tensor) -> Launch:
    """What ``sort_slots`` launches."""
    num_rows, num_slots = slots.shape[0], starts.shape[0] - 1
    block = 128 if num_rows <= 128 else 1024
    args = (slots, rows, starts, flag, num_rows, num_slots)
    return Launch(_sort_kernel, (num_slots,), args, {"BLOCK": block}, 4, 3)


def build_tiles(rows: Tensor, segment_starts: Tensor, out: Tensor | None = None) -> Tensor:
    """The tiles of at most ``tile_rows(num_pairs)`` pairs that each slot's pairs are cut into.

    Args:
        rows: ``[num_pairs]`` int32, the row of each pair; those from ``segment_starts[-1]`` on are not read.
        segment_starts: ``[num_slots + 1]`` int32.
        out: where to write them, ``[tile_capacity or more, 4]`` int32.
    Returns:
        ``[tile_capacity, 4]`` int32: slot, first pair, pairs, and the first pair's row if the others' rows follow it
        one by one, else -1; slot -1 where there is no tile.
    """
    tiles = out
    if tiles is None:
        capacity = tile_capacity(rows.shape[0], segment_starts.shape[0] - 1)
        tiles = torch.empty(capacity, TILE_FIELDS, dtype=torch.int32, device=segment_starts.device)
    if tiles.shape[0]:
        with on_device(tiles.device):
            tiles_launch(rows, segment_starts, tiles).run()
    return tiles


def tiles_launch(rows: Tensor, segment_starts: Tensor, tiles: Tensor) -> Launch:
    """What ``build_tiles`` launches."""
    num_slots = segment_starts.shape[0] - 1
    constexprs = {"ROWS": tile_rows(rows.shape[0]), "FIELDS": TILE_FIELDS, "SLOTS": triton.next_power_of_2(num_slots)}
    args = (rows, segment_starts, tiles, num_slots, tiles.shape[0])
    return Launch(_tiles_kernel, (num_slots + 1,), args, constexprs, 1, 3)
