"""Selections by magnitude over lists of tensors on a GPU: what is launched, in which order, on what memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fuse.kernels.launch import Launch, on_device
from lora_fuse.kernels.topk_plan import BINS, STATE, Plan, RowPlan, batches, key_shift, row_plan, settle_programs
from lora_fuse.kernels.topk_settle import _cut_kernel, _pick_kernel
from lora_fuse.kernels.topk_tables import Item, Table, Tables, classes, firsts, items_of
from lora_fuse.kernels.topk_threshold import _count_kernel, _sample_kernel
from lora_fuse.kernels.topk_write import _check_kernel, _rows_kernel, _write_kernel

FORMS = ("limits", "mask", "dense")
_ROUND = 1024  # collected keys of a tile that are counted into bins at once


@dataclass(frozen=True)
class Selection:
    """What a call launches, in order, and what it leaves on the device.

    Args:
        flags: ``[list + 1]`` int32, 1 for a tensor with NaN; the last one stands for all.
        limits: ``[groups, 2]`` int64: the threshold's key, and the place of the group before which its equals are kept.
        items: the tensors that are not empty.
        shift: low bits that the keys are without.
    """

    launches: list[Launch]
    flags: Tensor
    limits: Tensor
    items: list[Item]
    shift: int

    def run(self) -> None:
        run_all(self.launches, self.flags.device)

    def bad_input(self) -> int:
        """The first tensor with NaN, or -1. Waits for the device."""
        flags = self.flags.tolist()
        return flags.index(1) if flags[-1] else -1


def select(
    xs: Sequence[Tensor],
    minus: Sequence[Tensor] | None,
    shapes: Sequence[tuple[int, int]],
    scope: str,
    ks: Sequence[int],
    form: str = "limits",
    outs: Sequence[Tensor] | None = None,
    guarded: bool = False,
    backend: str = "",
    plan: Plan | None = None,
) -> Selection:
    """The launches of a call.

    Beyond the results there is room for collected keys (a 12th of the entries, and 100 MB at most unless a single group
    needs more), 1.2 KB per group and 16 bytes per tile of 4096 entries; none for what fits on chip.

    Args:
        xs, minus: contiguous, on one device, of one dtype each pair.
        shapes: of each tensor as rows.
        scope: ``tensor``, ``row`` or ``global``.
        ks: how many to keep of each tensor, of each row of each tensor, or (one number) of all.
        form: what ``outs`` get: ``mask`` or ``dense`` (the pruned tensors); ``limits``: the call ends with these.
        outs: contiguous; pruned ones may be ``xs`` or ``minus``.
        backend: Triton's name of the device kind; that of this torch if empty.
        guarded: ``outs`` are not touched if there is NaN; else they then mean nothing.
    """
    plan = plan or Plan()
    items = items_of(xs, minus, shapes, scope, ks, outs, plan)
    long, short = [i for i in items if not i.on_chip], [i for i in items if i.on_chip]
    on_hip = (backend or ("hip" if torch.version.hip else "cuda")) == "hip"
    making = _Making(items, len(xs), xs[0].device, minus is not None, scope == "global", on_hip, plan)
    making.find_thresholds(long)
    making.whole_rows(short, form, guarded)
    if form != "limits":
        making.write(long, form)
    fills = making.tables.send()
    return Selection([*fills, *making.launches()], making.flags, making.limits, items, making.shift)


class _Making:
    """The memory of a call, and its launches, whose tables are not on the device yet."""

    def __init__(
        self,
        items: list[Item],
        listed: int,
        device: torch.device,
        has_minus: bool,
        is_global: bool,
        on_hip: bool,
        plan: Plan,
    ) -> None:
        self.plan, self.listed, self.device, self.is_global = plan, listed, device, is_global
        self.tables = Tables(device, plan)
        self.shift = key_shift({i.dtype for i in items}, has_minus)
        self.shared = {"HAS_MINUS": has_minus, "KEY_SHIFT": self.shift, "HIP": on_hip}
        self.waiting: list[tuple[Any, int, Table, tuple[Any, ...], dict[str, Any], int, int | None]] = []
        groups = _groups([i for i in items if not i.on_chip])
        sizes = [groups * len(STATE), groups * BINS // 2, (listed + 2) // 2]  # int64; one fill for all that starts as 0
        sizes = [size + size % 2 for size in sizes]  # so that all begin at multiples of 16 bytes
        state, bins, flags = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
        self.state, self.bins = state, bins.view(torch.int32)
        self.flags = flags.view(torch.int32)[: listed + 1]
        self.limits = torch.empty(_groups(items), 2, dtype=torch.int64, device=device)

    def add(
        self,
        kernel: Any,
        grid: int,
        table: Table,
        args: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int,
        registers: int | None = None,
    ) -> None:
        known = self.shared | table.constants | constants
        own = {name: value for name, value in known.items() if name in kernel.arg_names}
        self.waiting.append((kernel, grid, table, args, own, warps, registers))

    def launches(self) -> list[Launch]:
        return [
            Launch(kernel, (grid,), (self.tables[table], *args), constants, warps, 1, registers)
            for kernel, grid, table, args, constants, warps, registers in self.waiting
        ]

    def tiled(self, items: Sequence[Item]) -> Table:
        return self.tables.add(items, [i.row["rows"] * i.row["tiles"] for i in items])

    def find_thresholds(self, items: list[Item]) -> None:
        """The passes over groups that do not fit on chip, as many groups at a time as there is room for."""
        if not items:
            return
        plan = self.plan
        if not self.is_global:
            items = [run for item in items for run in item.by_rows(max(1, plan.pool // item.row["room"]))]
        tiles = sum(i.row["rows"] * i.row["tiles"] for i in items)
        of_tiles = torch.empty(4, tiles, dtype=torch.int32, device=self.device)
        places, counts, at_ends = of_tiles[:3]
        rows = [1 if self.is_global else i.row["rows"] for i in items]
        rooms = [n * i.row["room"] for n, i in zip(rows, items, strict=True)]
        sampled = [n * i.row["samples"] for n, i in zip(rows, items, strict=True)]
        parts = [(0, len(items))] if self.is_global else batches(rooms, plan.pool, plan.tensors)
        dtype = torch.int16 if self.shift == 16 else torch.int32

        def most(sizes: Sequence[int]) -> Tensor:
            return torch.empty(max(sum(sizes[a:b]) for a, b in parts), dtype=dtype, device=self.device)

        found = most(rooms[:1] if self.is_global else rooms)
        samples, picked = most(sampled), most([plan.pick * n for n in rows])
        for begin, end in parts:
            part = items[begin:end]
            if not self.is_global:
                running = zip(part, firsts(rooms[begin:end]), firsts(sampled[begin:end]), strict=True)
                for item, buffer, base in running:
                    item.row |= {"buffer": buffer, "sample_base": base}
            size = 1 << max(max(i.row["group_samples"] for i in part) - 1, 0).bit_length()
            own: dict[str, Any] = {"DRAW": plan.draw, "SAMPLE": size}
            tables = [self.tiled(same) for same in classes(part, plan.tensors)]
            for table in tables:
                if table.draws:
                    args: tuple[Any, ...] = (self.state, samples, table.count, plan.margin)
                    self.add(_sample_kernel, table.draws, table, args, own, 8)
            own = {"TILE": plan.tile, "ROUND": _ROUND}
            # Four programs of a multiprocessor, so that there is always one that reads; with minus they would spill.
            registers = None if self.shared["HIP"] or self.shared["HAS_MINUS"] else 64
            for table in tables:
                args = (self.state, self.limits, self.bins, found, places, counts, at_ends, self.flags)
                args += (table.count, self.listed)
                self.add(_count_kernel, table.programs, table, args, own, 8, registers)
            table = self.tiled(part)
            registers = None if self.shared["HIP"] else 128  # or ptxas spills a few to reach the next step of occupancy
            programs = max(settle_programs(i.row["entries"], plan.tile) for i in part)
            grid = programs * _groups(part)
            args = (self.state, self.limits, found, picked, table.count, programs)
            own = {"PICK": plan.pick, "BLOCK": min(plan.pick, 2048)}
            self.add(_pick_kernel, grid, table, args, own, 8, registers)
            args = (self.state, self.limits, found, *of_tiles, table.count, programs)
            self.add(_cut_kernel, grid, table, args, {"TILE": plan.tile}, 8, registers)

    def whole_rows(self, items: list[Item], form: str, guarded: bool) -> None:
        """Rows that fit on chip: all in one pass, or, guarded, after one that looks for NaN."""
        cuts: list[tuple[Table, RowPlan]] = []
        for part in classes(items, self.plan.tensors, lambda i: row_plan(i.row["cols"])):
            cut = row_plan(part[0].row["cols"])
            cuts.append((self.tables.add(part, [-(-i.row["rows"] // cut.rows) for i in part]), cut))
        for table, cut in cuts if guarded else []:
            own: dict[str, Any] = {"R": cut.rows, "BLOCK": cut.block}
            self.add(_check_kernel, table.programs, table, (self.flags, table.count, self.listed), own, cut.num_warps)
        for table, cut in cuts:
            own = {"R": cut.rows, "BLOCK": cut.block, "FORM": FORMS.index(form)}
            args = (self.limits, self.flags, table.count, self.listed)
            self.add(_rows_kernel, table.programs, table, args, own, cut.num_warps)

    def write(self, items: list[Item], form: str) -> None:
        """From thresholds to results, of groups that do not fit on chip."""
        for table in [self.tiled(part) for part in classes(items, self.plan.tensors)]:
            args = (self.limits, self.flags, table.count, self.listed)
            own = {"FORM": FORMS.index(form), "TILE": self.plan.tile}
            self.add(_write_kernel, table.programs, table, args, own, 8)


def _groups(items: Sequence[Item]) -> int:
    if any(i.row["group_step"] == 0 for i in items):
        return 1
    return sum(i.row["rows"] for i in items)


def run_all(launches: Sequence[Launch], device: torch.device) -> None:
    with on_device(device):
        for launch in launches:
            launch.run()
