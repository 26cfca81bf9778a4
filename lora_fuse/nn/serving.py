"""The state that the adapted layers of one model share: what is attached, what each thread has selected."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.nn import capture
from lora_fuse.nn.fixed import BASE, FixedRoutings, Slab, Where, private_slab, refuse_unfit, refuse_wide
from lora_fuse.nn.leases import SlotAllocator, SlotLease
from lora_fuse.nn.selection import Published, Selection, Snapshot
from lora_fuse.nn.slot_errors import SlotErrors
from lora_fuse.ops.eager import passing_tensors

# Compiled code cannot hold a Python object, so it names its model by number.
BY_HANDLE: weakref.WeakValueDictionary[int, Serving] = weakref.WeakValueDictionary()
_handles = itertools.count(1)
_BATCHED_INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_values",
    "input_features",
)  # fmt: skip


class Context:
    """One selection, the snapshot last resolved from it, and what its captured forwards read."""

    __slots__ = ("__weakref__", "_cached", "fixed", "running", "selection")

    def __init__(self, selection: Selection, fixed: FixedRoutings | None = None) -> None:
        self.selection, self.fixed = selection, fixed or FixedRoutings()
        self.running: tuple[Any, ...] = ()  # the forwards around the block that entered it
        self._cached: tuple[Published, int, Snapshot] | None = None

    def forget(self) -> None:
        """Drop the snapshot, and with it the leases that it holds."""
        self._cached = None

    def resolve(self, serving: Serving, expand: int) -> Snapshot:
        published, cached = serving.published, self._cached
        if cached is not None and cached[0] is published and cached[1] == expand:
            return cached[2]
        snapshot = serving.snapshot(self.selection, expand, published)
        self._cached = (published, expand, snapshot)
        if serving.published is not published:  # republished meanwhile: an idle cache must not keep the old slots
            self._cached = None
        return snapshot

    def remember(self, published: Published, expand: int, snapshot: Snapshot) -> None:
        """Take a snapshot that was resolved elsewhere."""
        self._cached = (published, expand, snapshot)


class _Backward:
    """The forward whose graph is running backward; recomputed layers read it."""

    __slots__ = ("contexts", "seq", "snapshot")

    def __init__(self, snapshot: Snapshot, seq: int | None, contexts: tuple[Context, ...]) -> None:
        self.snapshot: Snapshot | None = snapshot
        self.seq, self.contexts = seq, contexts

    def clear(self) -> None:
        self.snapshot = None


class _Local(threading.local):
    """Per thread: the forwards that are running (innermost last) and the selections entered."""

    snapshot: Snapshot | None = None
    seq: int | None = None
    cache: dict[Any, Routing | None] | None = None
    wishes: list[Where]  # slabs that this thread's warm-up would have read, had it been captured
    packed: dict[Any, Any] | None = None  # Pack -> Waiting: outputs that packed siblings have not asked for yet
    batch: int | None = None  # samples in the outermost forward's input
    outer: tuple[Any, ...] = ()
    contexts: tuple[Context, ...] = ()
    expand: int = 1
    backward: _Backward | None = None


class Serving:
    """What the layers of one attached model share.

    Args:
        num_slots: adapters that may be attached at once; one spare slot more exists, so that a swap has somewhere to
            go.
        max_rank: largest rank that fits.
        batch_dim: batch axis of the layers' inputs.
        max_pairs: most adapters of a row in a captured forward.
        overlap: whether shrinks may run beside their layers' products, see overlap.py.
    """

    def __init__(
        self, num_slots: int, max_rank: int, batch_dim: int, max_pairs: int = 4, overlap: bool = False
    ) -> None:
        self.num_slots, self.max_rank, self.batch_dim, self.max_pairs = num_slots, max_rank, batch_dim, max_pairs
        self.overlap = overlap
        self.structure = 0  # grows with every layer, copy, sparse site or bias that an adapter brings
        self._init_run_time({}, {}, BASE, packs=False)

    def _init_run_time(
        self, slots: Mapping[str, int], heads: Mapping[str, frozenset[str]], default: Selection, packs: bool
    ) -> None:
        self.lock = threading.RLock()
        self.local = _Local()
        self.allocator = SlotAllocator(self.physical_slots, slots.values())
        leases = {name: self.allocator.initial[slot] for name, slot in slots.items()}
        self.allocator.initial.clear()
        self.published = Published(leases, heads)
        self.default = Context(default)
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.kept: list[FixedRoutings] = []  # what graphs may read: nobody knows when these are gone
        self.slot_errors = SlotErrors()
        self.task: int | None = None  # the slot of the adapter that switch_task wrote into the weights
        self.packs = packs
        self.repack = packs  # whether packs may have to be bound first: those of a copy are not
        self.token: Tensor | None = None  # set while a compiled forward is being traced, see traced.py
        self.handle = next(_handles)
        BY_HANDLE[self.handle] = self

    # Locks and thread-locals neither copy nor pickle; a copy is a model of its own, with its own slots and selection.
    def __getstate__(self) -> dict[str, Any]:
        with self.lock:
            slots = {name: lease.index for name, lease in self.published.leases.items()}
            tenants = {lease.serial: lease.index for lease in self.published.leases.values()}
            default = self.default.selection
            if default.tokens is not None and any(tenants.get(serial) != slot for slot, serial in default.tenants):
                default = BASE  # its slots changed hands: a copy could not use it
            return {
                "num_slots": self.num_slots,
                "max_rank": self.max_rank,
                "batch_dim": self.batch_dim,
                "max_pairs": self.max_pairs,
                "overlap": self.overlap,
                "structure": self.structure,
                "needs": dict(self.published.needs),
                "slots": slots,
                "heads": dict(self.published.heads),
                "default": default,
                "task": self.task,
                "packs": self.packs,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_slots, self.max_rank, self.batch_dim = state["num_slots"], state["max_rank"], state["batch_dim"]
        self.max_pairs, self.structure = state.get("max_pairs", 4), state.get("structure", 0)
        self.overlap = state.get("overlap", False)
        self._init_run_time(state["slots"], state["heads"], state["default"], state.get("packs", False))
        self.published = Published(self.published.leases, self.published.heads, state.get("needs", {}))
        self.task = state.get("task")
        default = state["default"]
        if default.tokens is not None:
            serials = {lease.index: lease.serial for lease in self.published.leases.values()}
            tenants = tuple((slot, serials[slot]) for slot, _ in default.tenants)
            self.default = Context(Selection("tokens", (), (), default.tokens, tenants, default.unread))

    @property
    def physical_slots(self) -> int:
        return self.num_slots + 1

    def publish(
        self,
        leases: Mapping[str, SlotLease],
        heads: Mapping[str, frozenset[str]],
        needs: Mapping[str, float] | None = None,
    ) -> None:
        """Make a new view current for every forward, and every replay of a captured one, that starts from now on.

        Args:
            needs: of the adapters that are new, see ``Published``.
        """
        with self.lock:
            needs = {**self.published.needs, **(needs or {})}
            self.published = Published(leases, heads, {name: needs[name] for name in leases if name in needs})
            contexts = [self.default, *self.contexts]
            for context in contexts:
                context.forget()
            for fixed in {*self.kept, *(context.fixed for context in contexts)}:
                fixed.refresh(self)

    def refuse_growth(self, name: str, grows: bool) -> None:
        """Raise ``ValueError`` if captured forwards select the adapter that is to be put, and it brings new parts."""
        if grows and any(fixed.selects(self, name) for fixed in {*self.kept, self.default.fixed}):
            raise ValueError(
                f"name: a CUDA graph was captured under a selection with {name!r}, and the new adapter brings layers, "
                "biases or copies that it does not have; select something else, or put it under another name"
            )

    def set_default(self, selection: Selection) -> None:
        """Make a selection the model's, for replays of what was captured under its default too.

        Raises:
            ValueError: it does not fit what was captured; nothing is changed.
        """
        with self.lock:
            fixed = self.default.fixed
            snapshots = fixed.select(self, selection)
            context = Context(selection, fixed)
            if 1 in snapshots:
                context.remember(self.published, 1, snapshots[1])
            self.default = context

    def snapshot(self, selection: Selection, expand: int, published: Published | None = None) -> Snapshot:
        """A selection resolved now; what a device has to find out about it is under way."""
        published = published or self.published
        snapshot = Snapshot(selection, published, self.physical_slots, expand, self.batch_dim)
        if snapshot.flag is not None and snapshot.asked is not None:
            held = {name: lease.index for name, lease in published.leases.items()}
            self.slot_errors.post(snapshot.flag, snapshot.asked, snapshot.refused(), held)
        return snapshot

    def slab_layout(self, shape: tuple[int, ...]) -> SlabLayout:
        """Of an input with these leading dimensions."""
        return SlabLayout(math.prod(shape), self.max_pairs, self.physical_slots)

    def keep(self, fixed: FixedRoutings) -> None:
        """A graph reads these from now on."""
        if fixed not in self.kept:
            self.kept.append(fixed)

    def enter(self, selection: Selection) -> Context:
        """Make a selection current for the calling thread; returns what ``leave`` wants."""
        context, local = Context(selection), self.local
        context.running = (local.snapshot, local.seq, local.cache, local.batch, local.packed, local.outer)
        with self.lock:
            self.contexts.add(context)
        local.contexts = (*local.contexts, context)
        return context

    def leave(self, context: Context) -> None:
        """Undo ``enter``, and end forwards that began inside and never did: torch runs no hook after an interrupt."""
        local = self.local
        local.contexts = tuple(c for c in local.contexts if c is not context)
        if len(local.outer) > len(context.running[-1]):
            local.snapshot, local.seq, local.cache, local.batch, local.packed, local.outer = context.running

    def _ambient(self) -> tuple[Snapshot, int | None]:
        """The snapshot that a forward starting now on this thread takes, and its sequence length if that is known."""
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace cannot record a model with adapters attached: the trace would keep this selection and "
                "these sizes for good; use torch.compile or torch.export, or detach(), fuse() an adapter into the "
                "weights and trace that"
            )
        local = self.local
        backward = local.backward
        if backward is not None:
            snapshot = backward.snapshot
            if snapshot is None or torch._C._current_graph_task_id() == -1:
                local.backward = None
            elif backward.contexts == local.contexts:  # no selection was entered since: this is a recomputation
                return snapshot, backward.seq
        return self._context().resolve(self, local.expand), None

    def current(self) -> tuple[Snapshot, int | None]:
        """The snapshot that a layer called now on this thread works under."""
        local = self.local
        return (local.snapshot, local.seq) if local.snapshot is not None else self._ambient()

    def routing(self, lead: tuple[int, ...], device: torch.device, path: str) -> Routing | None:
        """Routing of a layer's input with these leading dimensions, or None when the selection is all base."""
        snapshot, seq = self.current()
        if device.type != "cpu" or capture.simulated:
            mode = capture.mode_of(device)
            if mode == "capture" or (mode == "warm" and snapshot.width <= self.max_pairs):
                return self.slab(snapshot, seq, self.local.batch, (lead, device), path).routing
        # A layer called on its own: no outermost forward has checked the length.
        return snapshot.routing(lead, device, seq, path, check=self.local.snapshot is None)

    def slab(
        self, snapshot: Snapshot, seq: int | None, batch: int | None, where: Where, path: str, grant: bool = True
    ) -> Slab:
        """A routing of fixed size: at the address that captured forwards read, or, outside a capture, of one's own.

        Args:
            batch: samples in the outermost forward's input.
            where: the input's leading dimensions, and the device.
            grant: a warm-up with no outermost forward around it may allocate what a capture will read.
        Raises:
            ValueError: the selection mixes more adapters than there is room for, see also ``Snapshot.lead``.
            RuntimeError: a capture without a warm-up.
        """
        refuse_wide(self, snapshot)
        mode = capture.mode_of(where[1])
        if mode == "capture":
            return self._context().fixed.slab(self, (batch, seq, self.local.expand), where, path)
        if mode == "warm" and not passing_tensors():
            wishes = self.local.__dict__.setdefault("wishes", [])
            if where not in wishes:
                wishes.append(where)
            if grant and self.local.snapshot is None:
                self._grant(seq)
        return private_slab(self, snapshot, *where, seq, path)

    def _context(self) -> Context:
        contexts = self.local.contexts
        return contexts[-1] if contexts else self.default

    def _grant(self, seq: int | None) -> None:
        """Make the slabs that the warm-up of this thread wished for."""
        wishes = self.local.__dict__.pop("wishes", [])
        with self.lock:
            context = self._context()
            context.fixed.grant(self, context.selection, (self.local.batch, seq, self.local.expand), wishes)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start an outermost forward: take the selection, check its length once.

        Raises:
            ValueError: a list selection's length is not the batch size, or a device found a wrong slot meanwhile.
        """
        local = self.local
        local.outer = (*local.outer, (local.snapshot, local.seq, local.cache, local.batch, local.packed))
        if self.slot_errors.pending and not capture.capturing():
            self.slot_errors.check()
        if math.inf in self.published.needs.values() and capture.capturing():
            refuse_unfit(self, self._context().selection, self.structure)
        snapshot, seq = self._ambient()
        x, local.batch = batched_input(args, kwargs), None
        if x is not None:
            seq = check_batch(snapshot, x)
            local.batch = batch_size(snapshot, x)
        local.snapshot, local.seq, local.cache = snapshot, seq, snapshot.cache(seq)
        if capture.simulated:
            local.cache = None  # C++ would take a routing from there
        local.packed = {} if self.packs else None

    def end(self, output: Any) -> None:
        """Finish an outermost forward; its graph, if there is one, keeps the selection for its backward."""
        local = self.local
        snapshot, seq = local.snapshot, local.seq
        if "wishes" in local.__dict__:
            self._grant(seq)
        if local.packed and output is not None:  # after an exception, nothing can be learnt from what is left
            for pack, waiting in local.packed.items():
                pack.settle(waiting)
        if local.outer:
            *rest, (local.snapshot, local.seq, local.cache, local.batch, local.packed) = local.outer
            local.outer = tuple(rest)
        if snapshot is not None and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(_Restore(self, snapshot, seq))


class _Restore:
    """Prehook of an output's graph node: layers recomputed in this backward see the forward's own selection."""

    def __init__(self, serving: Serving, snapshot: Snapshot, seq: int | None) -> None:
        self.serving, self.snapshot, self.seq = serving, snapshot, seq

    def __call__(self, grads: Any) -> None:
        local = self.serving.local
        local.backward = cell = _Backward(self.snapshot, self.seq, local.contexts)
        torch.autograd.Variable._execution_engine.queue_callback(cell.clear)  # type: ignore[attr-defined]


def check_batch(snapshot: Snapshot, x: Tensor) -> int | None:
    """Check a list selection against the model's input; returns the sequence length if the input tells it."""
    dim = snapshot.batch_dim
    if snapshot.kind == "samples" and dim < x.dim() and x.shape[dim] != snapshot.num_samples:
        raise ValueError(
            f"selection: the batch has {x.shape[dim]} samples (input of shape {list(x.shape)}, batch axis {dim}), the "
            f"selection has {snapshot.num_samples} entries"
        )
    is_sequence = x.dim() == 3 or (x.dim() == 2 and not x.dtype.is_floating_point)
    return int(x.shape[1 - dim]) if is_sequence and dim < 2 else None


def batch_size(snapshot: Snapshot, x: Tensor) -> int | None:
    """How many samples the model's input has."""
    return int(x.shape[snapshot.batch_dim]) if snapshot.batch_dim < x.dim() else None


def batched_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input that tells the batch size: first positional, or of a well-known name, or the first there is."""
    if args and isinstance(args[0], Tensor) and args[0].dim():
        return args[0]
    for name in _BATCHED_INPUTS:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim():
            return value
    return next((t for t in _tensors([args, kwargs]) if t.dim()), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
