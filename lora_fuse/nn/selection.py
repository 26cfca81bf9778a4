"""What a caller selects: parsed from names, resolved to slots, laid out over the rows of a layer's input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.nn.capture import mode_of, stream_of
from lora_fuse.nn.leases import SlotLease
from lora_fuse.ops.eager import passing_tensors

Entry = tuple[tuple[str, float], ...]  # (name, weight) pairs; () is the base model
EntryLike: TypeAlias = str | Mapping[str, float] | None
SelectionLike: TypeAlias = EntryLike | list[EntryLike] | tuple[EntryLike, ...] | Tensor

_ACCEPTED = "a name, None for the base model, or a mapping of names to weights"
_MAX_CACHED = 64


@dataclass(frozen=True)
class Selection:
    """A selection in one form.

    Args:
        kind: one entry for all rows, an entry per sample, or a slot per token.
        entries: the distinct entries (one when uniform, none when per token).
        which: per sample, its index in ``entries``.
        tokens: ``[num_tokens]`` int64, a private copy: on the CPU, checked, or ``unread``.
        tenants: serial of the lease that each slot in ``tokens`` had when the selection was made; that of every slot
            where the tokens are unread.
        unread: the tokens lie on a device, and nobody has waited for what they say.
    """

    kind: Literal["uniform", "samples", "tokens"]
    entries: tuple[Entry, ...] = ()
    which: tuple[int, ...] = ()
    tokens: Tensor | None = None
    tenants: tuple[tuple[int, int], ...] = ()
    unread: bool = False


@dataclass(frozen=True)
class Published:
    """One consistent view of what is attached; replaced as a whole, never changed."""

    leases: Mapping[str, SlotLease]
    heads: Mapping[str, frozenset[str]]  # adapter -> module paths that it brings a copy of
    needs: Mapping[str, float] = field(default_factory=dict)  # adapter -> the structure that a graph has to know of

    def lease(self, name: str, argument: str = "selection") -> SlotLease:
        lease = self.leases.get(name)
        if lease is None:
            raise ValueError(f"{argument}: no adapter {name!r} is attached; attached are {sorted(self.leases)}")
        return lease


def parse_selection(selection: Any, published: Published, num_slots: int) -> Selection:
    """Check a selection's form and its names.

    Raises:
        ValueError, TypeError: naming the entry and what is accepted.
    """
    if isinstance(selection, Tensor):
        parsed = _parse_tokens(selection, published, num_slots)
    elif isinstance(selection, (list, tuple)):
        entries: dict[Entry, int] = {}
        by_name: dict[str | None, int] = {}
        which = []
        for i, entry in enumerate(selection):
            k = by_name.get(entry) if entry is None or type(entry) is str else None
            if k is None:
                k = entries.setdefault(_parse_entry(entry, f"selection[{i}]"), len(entries))
                if entry is None or type(entry) is str:
                    by_name[entry] = k
            which.append(k)
        parsed = Selection("samples", tuple(entries), tuple(which))
    else:
        parsed = Selection("uniform", (_parse_entry(selection, "selection"),), (0,))
    for entry in parsed.entries:
        for name, _ in entry:
            published.lease(name)
    return parsed


def _parse_entry(entry: Any, where: str) -> Entry:
    if entry is None:
        return ()
    if isinstance(entry, str):
        return ((entry, 1.0),)
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where}: got {type(entry).__name__}, accepted is {_ACCEPTED}")
    pairs = []
    for name, weight in entry.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: adapter names are strings, got {name!r}")
        if isinstance(weight, (bool, str)):
            raise TypeError(f"{where}[{name!r}]: a weight is a finite number, got {weight!r}")
        try:
            value = float(weight)
        except (TypeError, ValueError):
            raise TypeError(f"{where}[{name!r}]: a weight is a finite number, got {weight!r}") from None
        if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
            raise ValueError(f"{where}[{name!r}]: a weight is a finite fp32 number, got {weight!r}")
        pairs.append((name, value))
    return tuple(pairs)


def _parse_tokens(slots: Tensor, published: Published, num_slots: int) -> Selection:
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"selection: a tensor of slots is 1-d int32, one slot per token, got {slots.dtype} with shape "
            f"{tuple(slots.shape)}"
        )
    tenants = {lease.index: lease.serial for lease in published.leases.values()}
    if mode_of(slots.device):
        unread = slots.detach().to(torch.int64, copy=True)
        return Selection("tokens", (), (), unread, tuple(tenants.items()), unread=True)
    tokens = slots.detach().to("cpu", torch.int64, copy=True)
    values = np.unique(tokens.numpy())
    for slot in values.tolist():
        if slot != -1 and slot not in tenants:
            row = int((tokens == slot).nonzero()[0])
            held = {name: lease.index for name, lease in published.leases.items()}
            what = "holds no adapter" if 0 <= slot < num_slots else "is out of range"
            raise ValueError(
                f"selection: row {row} asks for slot {slot}, which {what}; accepted are -1 (base) and {held}"
            )
    return Selection("tokens", (), (), tokens, tuple((slot, tenants[slot]) for slot in values.tolist() if slot != -1))


def adapters_of(selection: Selection, published: Published) -> set[str]:
    """Names of the adapters that rows may get."""
    names = {name for entry in selection.entries for name, _ in entry}
    serials = {serial for _, serial in selection.tenants}
    return names | {name for name, lease in published.leases.items() if lease.serial in serials}


def without_gone(selection: Selection, published: Published) -> Selection:
    """The selection with base in place of entries that name a removed adapter and of slots that changed hands."""
    entries = tuple(e if all(name in published.leases for name, _ in e) else () for e in selection.entries)
    live = {(lease.index, lease.serial) for lease in published.leases.values()}
    tokens, tenants = selection.tokens, tuple(t for t in selection.tenants if t in live)
    if tokens is not None and not selection.unread:
        kept = torch.tensor([slot for slot, _ in tenants], dtype=tokens.dtype)
        tokens = torch.where(torch.isin(tokens, kept), tokens, -1)
    return replace(selection, entries=entries, tokens=tokens, tenants=tenants)


class Snapshot:
    """A selection resolved against one published view: slots instead of names, leases held.

    Args:
        selection: what was asked for.
        published: the view that turns names into slots.
        num_slots: physical slots of the pools.
        expand: every sample stands for this many consecutive rows of the batch (beams, returned sequences).
        batch_dim: batch axis of a layer's input.
    Raises:
        ValueError: a name is no longer attached, a token's slot changed hands, or two heads would claim one sample.
    """

    __slots__ = ("asked", "base", "batch_dim", "caches", "entries", "flag", "kind", "leases", "num_samples",
                 "num_slots", "tokens", "which")  # fmt: skip

    entries: tuple[tuple[tuple[int, float], ...], ...]  # (slot, weight) pairs of each distinct entry
    which: tuple[int, ...]  # per sample, its index in `entries`

    def __init__(
        self, selection: Selection, published: Published, num_slots: int, expand: int = 1, batch_dim: int = 0
    ) -> None:
        self.kind, self.num_slots, self.batch_dim = selection.kind, num_slots, batch_dim
        self.caches: dict[int | None, dict[Any, Any]] = {}
        self.tokens = self.asked = selection.tokens
        self.flag: Tensor | None = None  # [1] int32 on a device: not zero if a slot in `asked` is refused
        if self.tokens is not None:
            self._resolve_tokens(selection, published)
            return
        for entry in selection.entries:
            _refuse_two_heads(entry, published)
        leases: dict[int, SlotLease] = {}
        pairs = []
        for entry in selection.entries:
            found = [(published.lease(name), weight) for name, weight in entry]
            leases.update([(lease.index, lease) for lease, _ in found])
            pairs.append(tuple([(lease.index, weight) for lease, weight in found]))
        self.entries, self.leases = tuple(pairs), tuple(leases.values())
        which = selection.which
        if expand > 1 and self.kind == "samples":
            which = tuple([k for k in which for _ in range(expand)])
        self.which, self.num_samples = which, len(which)
        self.base = not leases

    def _resolve_tokens(self, selection: Selection, published: Published) -> None:
        assert self.tokens is not None
        by_slot = {lease.index: lease for lease in published.leases.values()}
        self.num_samples, self.entries, self.which = int(self.tokens.shape[0]), (), ()
        if selection.unread:
            kept = [slot for slot, serial in selection.tenants if slot in by_slot and by_slot[slot].serial == serial]
            with torch.inference_mode(False), torch.no_grad():  # later forwards may be of another mode
                self._resolve_unread(kept)
            self.leases, self.base = tuple(by_slot[slot] for slot in kept), False
            return
        for slot, serial in selection.tenants:
            if slot not in by_slot or by_slot[slot].serial != serial:
                row = int((self.tokens == slot).nonzero()[0])
                raise ValueError(
                    f"selection: row {row} asks for slot {slot}, whose adapter was swapped or removed since the "
                    "selection was made; read adapter_slots() again"
                )
        self.leases = tuple(by_slot[slot] for slot, _ in selection.tenants)
        self.base = not selection.tenants

    def _resolve_unread(self, kept: list[int]) -> None:
        """Refuse slots other than these and -1, where the tokens lie and without a wait: they become -1."""
        assert self.tokens is not None
        device = self.tokens.device
        table = torch.zeros(self.num_slots + 2, dtype=torch.bool, pin_memory=device.type == "cuda")
        table[[slot + 1 for slot in (-1, *kept)]] = True  # the last place is that of all slots out of range
        place = torch.where(self.tokens < -1, self.num_slots, self.tokens).clamp(max=self.num_slots) + 1
        good = table.to(device, non_blocking=True)[place]
        self.tokens = torch.where(good, self.tokens, -1)
        self.flag = good.logical_not().any().int().view(1)

    def refused(self) -> Tensor:
        """``[num_tokens]`` bool, which slots that were asked for became -1."""
        assert self.tokens is not None
        assert self.asked is not None
        return self.tokens.ne(self.asked)

    @property
    def width(self) -> int:
        """Most adapters of a row."""
        return 1 if self.kind == "tokens" else max((len(entry) for entry in self.entries), default=0)

    def require_one_entry(self, path: str) -> None:
        """Raise ``ValueError`` unless every row gets the same: for modules that see rows in an order of their own."""
        if self.kind != "uniform" and not self.base:
            raise ValueError(
                f"{path}: an expert sees its own choice of tokens, so it cannot tell which sample a row belongs to; "
                "select one entry for the whole batch"
            )

    def cache(self, seq: int | None) -> dict[Any, Any]:
        """Routings built so far for forwards of this sequence length (None: not known); None: no row has an adapter.

        Keys are leading dimensions on the CPU and ``(dimensions, device)`` elsewhere (csrc/bindings.cpp looks there);
        other forms start with a word. What a side stream builds is for it alone: nothing orders other streams after it.
        """
        cache = self.caches.get(seq)
        if cache is None:
            if len(self.caches) >= _MAX_CACHED:
                self.caches.clear()
            cache = self.caches[seq] = {}
        return cache

    def lead(self, shape: tuple[int, ...], seq: int | None, path: str) -> tuple[int, int]:
        """The sizes of ``shape``, an input's leading dimensions, before and after the batch axis.

        Raises:
            ValueError: the batch axis is not where it should be; the module's path is named.
        """
        rows = math.prod(shape)
        if self.kind == "uniform":
            return 1, rows
        n, axis = self.num_samples, self.batch_dim
        if self.kind == "tokens":
            if rows != n:
                raise ValueError(
                    f"{path}: the selection has a slot for each of {n} tokens, this input has {rows} rows "
                    f"(leading dimensions {list(shape)})"
                )
            return 1, 1
        if axis < len(shape) and shape[axis] == n:
            return math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        if shape and seq is not None and shape[0] == n * seq:  # [batch * seq, ...], or [seq * batch, ...]
            inner = math.prod(shape[1:])
            return (1, seq * inner) if axis == 0 else (seq, inner)
        if len(shape) == 1 and shape[0] == n:  # [batch, features] in a model with batch_dim=1
            return 1, 1
        flat = "" if seq is None else f", nor [batch * seq, ...] = [{n * seq}, ...]"
        want = "[" + "seq, " * axis + f"batch = {n}, ...]"
        raise ValueError(
            f"{path}: the selection has {n} samples, but this input's leading dimensions {list(shape)} are neither "
            f"{want}{flat}; select one entry for the whole batch, give a slot per token, or attach with batch_dim="
        )

    def routing(
        self, shape: tuple[int, ...], device: torch.device, seq: int | None, path: str, check: bool = False
    ) -> Routing | None:
        """The routing of an input with these leading dimensions, or None: base. Built once, then shared by all layers.

        Args:
            check: nobody has checked the selection's length yet.
        Raises:
            ValueError: see ``lead``.
        """
        cache = self.cache(seq)
        key: Any = shape if device.type == "cpu" else (shape, device)
        if (stream := stream_of(device)) != 0:
            key = ("stream", *key, stream)
        routing: Routing | None = cache.get(key)
        if routing is None:
            if not self.base:
                routing = self._build(shape, device, seq, path)
            elif check or self.kind == "tokens":  # how many tokens there are, the outermost forward cannot tell
                self.lead(shape, seq, path)
            self.keep(cache, key, routing)
        return routing

    def explicit_routing(self, shape: tuple[int, ...], device: torch.device, seq: int | None, path: str) -> Routing:
        """The same with no field None and no None for base: compiled code wants one form."""
        cache, key = self.cache(seq), ("explicit", shape, device, stream_of(device))
        routing: Routing | None = cache.get(key)
        if routing is None:
            with torch.inference_mode(False), torch.no_grad():
                routing = self._build(shape, device, seq, path).explicit()
            self.keep(cache, key, routing)
        return routing

    @staticmethod
    def keep(cache: dict[Any, Any], key: Any, built: Any) -> None:
        """Put what was built for a forward into its ``cache``."""
        if built is not None and passing_tensors():
            return
        if len(cache) >= _MAX_CACHED:
            cache.clear()
        cache[key] = built

    def _build(self, shape: tuple[int, ...], device: torch.device, seq: int | None, path: str) -> Routing:
        lead = self.lead(shape, seq, path)
        if torch.is_inference_mode_enabled():  # it may be saved for a later backward
            with torch.inference_mode(False):
                routing = self._routing(lead, device)
        else:
            routing = self._routing(lead, device)
        # Autograd saves tensors, not this object: the slots stay on loan for as long as a graph holds the rows.
        routing.rows.lora_leases = self.leases  # type: ignore[attr-defined]
        return routing

    def _routing(self, lead: tuple[int, int], device: torch.device) -> Routing:
        if self.tokens is None:
            return Routing.from_samples(self.entries, self.which, lead, self.num_slots, device, self.leases)
        flag = None if self.flag is None else self.flag.to(device)
        return Routing.from_slots(self.tokens.to(device), self.num_slots, self.leases, flag)

    def write(self, slab: Tensor, layout: SlabLayout, lead: tuple[int, int]) -> None:
        """Put the routing of an input with this ``lead`` into a slab."""
        device = slab.device if self.flag is not None else torch.device("cpu")
        layout.write(slab, self._routing(lead, device))


def _refuse_two_heads(entry: Entry, published: Published) -> None:
    if len(entry) < 2:
        return
    owner: dict[str, str] = {}
    for name, _ in entry:
        for path in published.heads.get(name, ()):
            if path in owner:
                raise ValueError(
                    f"selection: a mix may contain one adapter with a head of its own, {owner[path]!r} and {name!r} "
                    f"both bring a copy of {path}"
                )
            owner[path] = name
