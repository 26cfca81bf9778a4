"""The state that the adapted layers of one model share: what is attached, what each thread has selected."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_fuse.adapters.routing import Routing
from lora_fuse.nn.leases import SlotAllocator, SlotLease
from lora_fuse.nn.selection import Published, Selection, Snapshot

# Compiled code cannot hold a Python object, so it names its model by number.
BY_HANDLE: weakref.WeakValueDictionary[int, Serving] = weakref.WeakValueDictionary()
_handles = itertools.count(1)
_BATCHED_INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_values",
    "input_features",
)  # fmt: skip


class Context:
    """One selection and the snapshot last resolved from it."""

    __slots__ = ("__weakref__", "_cached", "running", "selection")

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.running: tuple[Any, ...] = ()  # the forwards around the block that entered it
        self._cached: tuple[Published, int, Snapshot] | None = None

    def forget(self) -> None:
        """Drop the snapshot, and with it the leases that it holds."""
        self._cached = None

    def resolve(self, serving: Serving, expand: int) -> Snapshot:
        published, cached = serving.published, self._cached
        if cached is not None and cached[0] is published and cached[1] == expand:
            return cached[2]
        snapshot = Snapshot(self.selection, published, serving.physical_slots, expand, serving.batch_dim)
        self._cached = (published, expand, snapshot)
        if serving.published is not published:  # republished meanwhile: an idle cache must not keep the old slots
            self._cached = None
        return snapshot


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
    """

    def __init__(self, num_slots: int, max_rank: int, batch_dim: int) -> None:
        self.num_slots, self.max_rank, self.batch_dim = num_slots, max_rank, batch_dim
        self._init_run_time({}, {}, Selection("uniform", ((),), (0,)), packs=False)

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
                default = Selection("uniform", ((),), (0,))  # its slots changed hands: a copy could not use it
            return {
                "num_slots": self.num_slots,
                "max_rank": self.max_rank,
                "batch_dim": self.batch_dim,
                "slots": slots,
                "heads": dict(self.published.heads),
                "default": default,
                "task": self.task,
                "packs": self.packs,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_slots, self.max_rank, self.batch_dim = state["num_slots"], state["max_rank"], state["batch_dim"]
        self._init_run_time(state["slots"], state["heads"], state["default"], state.get("packs", False))
        self.task = state.get("task")
        default = state["default"]
        if default.tokens is not None:
            serials = {lease.index: lease.serial for lease in self.published.leases.values()}
            tenants = tuple((slot, serials[slot]) for slot, _ in default.tenants)
            self.default = Context(Selection("tokens", (), (), default.tokens, tenants))

    @property
    def physical_slots(self) -> int:
        return self.num_slots + 1

    def publish(self, leases: Mapping[str, SlotLease], heads: Mapping[str, frozenset[str]]) -> None:
        """Make a new view current for every forward that starts from now on."""
        with self.lock:
            self.published = Published(leases, heads)
            self.default.forget()
            for context in self.contexts:
                context.forget()

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
        contexts = local.contexts
        context = contexts[-1] if contexts else self.default
        return context.resolve(self, local.expand), None

    def current(self) -> tuple[Snapshot, int | None]:
        """The snapshot that a layer called now on this thread works under."""
        local = self.local
        return (local.snapshot, local.seq) if local.snapshot is not None else self._ambient()

    def routing(self, lead: tuple[int, ...], device: torch.device, path: str) -> Routing | None:
        """Routing of a layer's input with these leading dimensions, or None when the selection is all base."""
        snapshot, seq = self.current()
        # A layer called on its own: no outermost forward has checked the length.
        return snapshot.routing(lead, device, seq, path, check=self.local.snapshot is None)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start an outermost forward: take the selection, check its length once.

        Raises:
            ValueError: a list selection's length is not the batch size.
        """
        local = self.local
        local.outer = (*local.outer, (local.snapshot, local.seq, local.cache, local.batch, local.packed))
        snapshot, seq = self._ambient()
        x, local.batch = batched_input(args, kwargs), None
        if x is not None:
            seq = check_batch(snapshot, x)
            local.batch = batch_size(snapshot, x)
        local.snapshot, local.seq, local.cache = snapshot, seq, snapshot.cache(seq)
        local.packed = {} if self.packs else None

    def end(self, output: Any) -> None:
        """Finish an outermost forward; its graph, if there is one, keeps the selection for its backward."""
        local = self.local
        snapshot, seq = local.snapshot, local.seq
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
