"""Routings at fixed addresses: what a captured forward reads, rewritten in place when the selection changes.

A CUDA graph replays the launches that it recorded, on the tensors that these had. So a context (the model's default, or
a ``use_adapters`` block) owns a slab for each input layout that its captured forwards have, and every change of what it
selects, or of where that lies, is one copy into each slab, in the order of the stream. A capture cannot make slabs: a
forward on a side stream, the warm-up that torch asks for before a capture, takes private ones and leaves a wish, which
is granted when the forward has ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.nn.capture import stream_of
from lora_fuse.nn.selection import Selection, Snapshot, adapters_of, without_gone

if TYPE_CHECKING:
    from lora_fuse.nn.serving import Serving

Where = tuple[tuple[int, ...], torch.device]  # an input's leading dimensions, and where its routing has to be
Forward = tuple[int | None, int | None, int]  # samples and sequence length of the outermost input, repeats per sample
BASE = Selection("uniform", ((),), (0,))


@dataclass
class Slab:
    """A routing of fixed size, and the tensor that it is views of."""

    layout: SlabLayout
    tensor: Tensor
    routing: Routing


@dataclass
class _Group:
    """The layouts of one kind of forward."""

    slabs: dict[Where, Slab] = field(default_factory=dict)
    structure: int | None = None  # of the model when a forward was last captured; None: none was


class FixedRoutings:
    """The slabs of one context."""

    def __init__(self) -> None:
        self.selection = BASE
        self.groups: dict[Forward, _Group] = {}
        self._held: dict[Forward, Any] = {}  # leases of the slots that the slabs name

    @property
    def captured(self) -> bool:
        return any(group.structure is not None for group in self.groups.values())

    def grant(self, serving: Serving, selection: Selection, forward: Forward, wishes: list[Where]) -> None:
        """Make slabs for a kind of forward; those of the last one that was never captured are let go."""
        if all(where in self.groups.get(forward, _Group()).slabs for where in wishes):
            return
        self.groups = {f: g for f, g in self.groups.items() if g.structure is not None or f == forward}
        group = self.groups.setdefault(forward, _Group())
        with torch.inference_mode(False), torch.no_grad():
            for shape, device in wishes:
                if (shape, device) not in group.slabs:
                    layout = serving.slab_layout(shape)
                    slab = layout.empty(device)
                    group.slabs[shape, device] = Slab(layout, slab, layout.routing(slab))
        self._write(*self._plan(serving, selection, {forward: group}))
        self.selection = selection

    def slab(self, serving: Serving, forward: Forward, where: Where, path: str) -> Slab:
        """What a forward that is being captured reads.

        Raises:
            RuntimeError: no forward like it was run before.
        """
        group = self.groups.get(forward, _Group())
        found = group.slabs.get(where)
        if found is None:
            raise RuntimeError(
                f"{path}: no buffers lie ready for a captured input with leading dimensions {list(where[0])}; run the "
                "same forward once before the capture, on a side stream and under the same selection context"
            )
        if group.structure != serving.structure:
            refuse_unfit(serving, self.selection, serving.structure)
            group.structure = serving.structure
            serving.keep(self)
        return found

    def select(self, serving: Serving, selection: Selection) -> dict[int, Snapshot]:
        """Change what the slabs say; returns the snapshots taken, by repeats per sample.

        Captured forwards of other sizes than the selection's get base rows, as long as it fits some.

        Raises:
            ValueError: it fits none of them, or it has more adapters for a row than there is room for, or an adapter
                with parts that the captured forward does not have; nothing is changed.
        """
        if not self.groups:
            return {}
        writes, snapshots, refusals = self._plan(serving, selection, self.groups)
        captured = [f for f, g in self.groups.items() if g.structure is not None]
        if captured and all(f in refusals for f in captured):
            raise ValueError(f"{refusals[captured[0]]} (a CUDA graph was captured under this selection context)")
        for forward in captured:
            if forward not in refusals:
                refuse_unfit(serving, selection, self.groups[forward].structure or 0)
        self._write(writes, snapshots, refusals)
        self.selection = selection
        return snapshots

    def refresh(self, serving: Serving) -> None:
        """Follow what was swapped or removed: rows whose adapter is gone become base rows."""
        if not self.groups:
            return
        try:
            writes = self._plan(serving, without_gone(self.selection, serving.published), self.groups)
        except ValueError:  # what no graph may select, so none was captured; the next forward says what is wrong
            self.groups = {}
            return
        self._write(*writes)

    def selects(self, serving: Serving, name: str) -> bool:
        """Whether a captured forward may have rows with this adapter."""
        return self.captured and name in adapters_of(self.selection, serving.published)

    def _plan(
        self, serving: Serving, selection: Selection, groups: dict[Forward, _Group]
    ) -> tuple[list[tuple[Forward, Slab, Snapshot, tuple[int, int]]], dict[int, Snapshot], dict[Forward, str]]:
        """What to write where; the snapshots it takes; why forwards that get base rows do not fit."""
        writes = []
        snapshots: dict[int, Snapshot] = {}
        refusals: dict[Forward, str] = {}
        base = Snapshot(BASE, serving.published, serving.physical_slots)
        for forward, group in groups.items():
            batch, seq, expand = forward
            if expand not in snapshots:
                snapshots[expand] = serving.snapshot(selection, expand)
            snapshot = snapshots[expand]
            try:
                leads = self._leads(serving, snapshot, batch, seq, group)
            except ValueError as error:
                refusals[forward], snapshot = str(error), base
                leads = [(1, slab.layout.num_rows) for slab in group.slabs.values()]
            for slab, lead in zip(group.slabs.values(), leads, strict=True):
                writes.append((forward, slab, snapshot, lead))
        return writes, snapshots, refusals

    @staticmethod
    def _leads(
        serving: Serving, snapshot: Snapshot, batch: int | None, seq: int | None, group: _Group
    ) -> list[tuple[int, int]]:
        refuse_wide(serving, snapshot)
        if snapshot.kind == "samples" and batch is not None and snapshot.num_samples != batch:
            raise ValueError(f"selection: has {snapshot.num_samples} entries, the captured batch has {batch} samples")
        return [snapshot.lead(shape, seq, "a captured layer") for shape, _ in group.slabs]

    def _write(
        self,
        writes: list[tuple[Forward, Slab, Snapshot, tuple[int, int]]],
        snapshots: dict[int, Snapshot],
        refusals: dict[Forward, str],
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for forward, slab, snapshot, lead in writes:
                snapshot.write(slab.tensor, slab.layout, lead)
                self._held[forward] = snapshot.leases
        self._held = {forward: self._held[forward] for forward in self.groups if forward in self._held}


def refuse_unfit(serving: Serving, selection: Selection, structure: int) -> None:
    """Refuse adapters with parts that a graph captured at this structure of the model lacks."""
    published = serving.published
    for name in sorted(adapters_of(selection, published)):
        needs = published.needs.get(name, 0)
        if needs == math.inf:
            raise ValueError(
                f"selection: adapter {name!r} has more than LoRA factors (copies of whole modules, sparse deltas, "
                "joint bases), which are looked up while a forward runs, so no CUDA graph can follow it"
            )
        if needs > structure:
            raise ValueError(
                f"selection: adapter {name!r} came with layers or biases that a CUDA graph captured under this "
                "selection context does not have; capture it again"
            )


def refuse_wide(serving: Serving, snapshot: Snapshot) -> None:
    """Raise ``ValueError`` where a row has more adapters than slabs have room for."""
    if snapshot.width > serving.max_pairs:
        raise ValueError(
            f"selection: mixes {snapshot.width} adapters, captured forwards take at most {serving.max_pairs}, the "
            "max_pairs of attach"
        )


def private_slab(
    serving: Serving, snapshot: Snapshot, shape: tuple[int, ...], device: torch.device, seq: int | None, path: str
) -> Slab:
    """One of the form that a captured forward reads, for its warm-up; nobody rewrites it."""
    cache, key = snapshot.cache(seq), ("slab", shape, device, stream_of(device))
    found: Slab | None = cache.get(key)
    if found is None:
        layout, lead = serving.slab_layout(shape), snapshot.lead(shape, seq, path)
        with torch.inference_mode(False), torch.no_grad():
            slab = layout.empty(device)
            snapshot.write(slab, layout, lead)
            found = Slab(layout, slab, layout.routing(slab, snapshot.leases))
            found.routing.rows.lora_leases = snapshot.leases  # type: ignore[attr-defined]
        snapshot.keep(cache, key, found)
    return found
