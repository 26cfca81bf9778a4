"""Layers with slots for sparse adapters: the layer's own result, and what each row's fine-tune makes of it.

``SparseSite`` goes on top of a layer's class, or on top of the class that LoRA slots gave it, so layers without sparse
slots run as they did. What the slots hold differs by kind of layer: see ``LinearSlots``, ``ConvSlots`` and
``sparse_rows``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.functional import sparse_delta_linear
from lora_fuse.nn.conv import columns_of
from lora_fuse.nn.linear import AdaptedModule, MultiLoRALinear, input_of, rebuildable, wrapped_class
from lora_fuse.nn.selection import Snapshot
from lora_fuse.nn.serving import Serving
from lora_fuse.nn.targets import conv1d_of, device_of, is_hooked
from lora_fuse.nn.traced import batch_of, run_as_plain_python, snapshot_of
from lora_fuse.ops._library import LIBRARY
from lora_fuse.ops.eager import under_transform
from lora_fuse.sparse import SparseMatrix


@dataclass(frozen=True)
class Own:
    """What one fine-tune has of its own in one layer.

    Args:
        adapter: the fine-tune.
        names: the layer's parameter (``weight``, ``bias``) -> its name in the adapter.
    """

    adapter: SparseAdapter
    names: Mapping[str, str]

    def values(self, leaf: str, merged: Tensor) -> SparseMatrix | None:
        """``theta_t``'s own values of a parameter as a sparse matrix; of a dense one, those that differ."""
        name = self.names.get(leaf)
        if name is None:
            return None
        if name in self.adapter.matrices:
            return self.adapter.matrices[name]
        own = self.adapter.dense[name].to(merged.device).flatten(1)
        return SparseMatrix.from_mask(own, own != merged.detach().flatten(1))

    def whole(self, leaf: str, merged: Tensor) -> Tensor:
        """``theta_t``'s own parameter, all of it."""
        name = self.names.get(leaf)
        if name is None:
            return merged.detach()
        if name in self.adapter.dense:
            return self.adapter.dense[name]
        matrix = placed(self.adapter.matrices[name], merged.device)
        return matrix.to_dense(merged.detach().reshape(matrix.shape)).view(merged.shape)

    def residual(self, leaf: str, merged: Tensor) -> SparseMatrix | None:
        """``theta_t - theta*`` of a parameter with two dimensions or more, viewed as a matrix; None: no difference."""
        name = self.names.get(leaf)
        if name is None:
            return None
        if name in self.adapter.matrices:
            return self.adapter.residual(name, merged.detach().to(self.adapter.matrices[name].values.device))
        delta = difference(self.adapter.dense[name], merged).flatten(1)
        return SparseMatrix.from_mask(delta, delta != 0)

    def shift(self, leaf: str, merged: Tensor | None) -> Tensor | None:
        """``theta_t - theta*`` of a dense parameter, or None."""
        name = self.names.get(leaf)
        return None if name is None or merged is None else difference(self.adapter.dense[name], merged)


def difference(own: Tensor, merged: Tensor) -> Tensor:
    """``own - merged``, formed in fp32 (fp64 for fp64) and rounded once to ``merged``'s dtype."""
    wide = torch.promote_types(merged.dtype, torch.float32)
    return (own.to(merged.device, wide) - merged.detach().to(wide)).to(merged.dtype)


def placed(matrix: SparseMatrix, device: torch.device, dtype: torch.dtype | None = None) -> SparseMatrix:
    """The same matrix on a device, with values of a dtype (None: as they are)."""
    if matrix.values.device == device and dtype in (None, matrix.values.dtype):
        return matrix
    columns, bitmap = (None if t is None else t.to(device) for t in (matrix.columns, matrix.bitmap))
    return SparseMatrix(matrix.values.to(device, dtype), matrix.row_starts.to(device), columns, bitmap, matrix.num_cols)


class SiteSlots(nn.Module):
    """What the sparse adapters of each slot make of one layer's result; a child of the layer that follows ``.to()``.

    Args:
        owner: the layer.
        num_slots: physical slots.
    """

    owner: nn.Module
    num_slots: int
    filled: frozenset[int]  # slots that change anything here
    one_entry: bool  # the layer sees rows in an order of its own
    site: int  # how compiled code names this object

    def __init__(self, owner: nn.Module, num_slots: int, one_entry: bool = False) -> None:
        super().__init__()
        # Plain attributes: the owner is no child, and nothing here belongs into a state dict.
        self.__dict__.update(owner=owner, num_slots=num_slots, filled=frozenset(), one_entry=one_entry)
        self._register()

    def _register(self) -> None:
        self.__dict__["site"] = next(_sites)
        _SITES[self.site] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def put(self, slot: int, own: Any) -> None:
        """Fill a slot (``own`` is what this kind of slots takes), or empty it. No other slot's content is touched."""
        self.__dict__["filled"] = self.filled - {slot}
        if own is None:
            self._clear(slot)
        else:
            self._write(slot, own)
            self.__dict__["filled"] = self.filled | {slot}

    def keep(self, slots: Iterable[int]) -> None:
        """Empty all other slots."""
        for slot in self.filled - set(slots):
            self.put(slot, None)

    def concerns(self, snapshot: Snapshot) -> bool:
        """Whether any row's adapter changes anything here."""
        filled = self.filled
        return any(lease.index in filled for lease in snapshot.leases)

    def _write(self, slot: int, own: Any) -> None:
        raise NotImplementedError

    def _clear(self, slot: int) -> None:
        raise NotImplementedError

    def serve(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """The layer's result with every row's fine-tune, from ``y = layer(x)``; other rows keep their bits."""
        raise NotImplementedError

    def traced_shape(self, y: Tensor, x: Tensor) -> Tensor:
        """An empty tensor of the shape that ``serve`` returns to compiled code."""
        return torch.empty_like(y)

    def spread(self, y: Tensor, x: Tensor, batch: int | None) -> tuple[Tensor, Tensor]:
        """The same, with a row for every sample whatever is selected: compiled code wants one shape."""
        return y, x

    def extra_repr(self) -> str:
        return f"slots={sorted(self.filled)} of {self.num_slots}"


@dataclass(frozen=True)
class Call:
    """One call of a layer: which rows want what.

    Args:
        snapshot: the selection.
        seq: the sequence length, if the model's input told it.
        path: the layer's, for messages.
        check: whether nobody has checked the selection's length yet.
        fresh: whether nobody else sees the layer's result, so that it may be written into.
    """

    snapshot: Snapshot
    seq: int | None
    path: str
    check: bool
    fresh: bool

    def routing(self, lead: tuple[int, ...], device: torch.device, padded: bool = False) -> Routing | None:
        """The rows' routing, or None where all are base.

        Args:
            padded: whether one that nobody has waited for will do.
        """
        routing = self.snapshot.routing(lead, device, self.seq, self.path, self.check)
        return routing if routing is None or padded else routing.exact()


class SparseSite(AdaptedModule):
    """Mixed into a layer's class: rows of sparse adapters get their own fine-tune's result."""

    lora_prefix = "Sparse"
    lora_fresh = False  # whether the result of the class below may be written into
    lora_sparse: SiteSlots

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base_forward = self.__dict__.get("lora_base_forward")
        x = input_of(args, kwargs)
        if base_forward is None or issubclass(type(self).lora_base, AdaptedModule):
            y = super().forward(*args, **kwargs)
        else:
            y = base_forward(*args, **kwargs)
        slots, serving = cast(SiteSlots, self._modules["lora_sparse"]), self.lora_serving
        if torch.compiler.is_compiling():
            return _traced(slots, serving, y, x)
        snapshot, seq = serving.current()
        if slots.one_entry:
            snapshot.require_one_entry(self.lora_path)
        if not slots.concerns(snapshot):
            return cast(Tensor, y)
        call = Call(snapshot, seq, self.lora_path, serving.local.snapshot is None, self.lora_fresh)
        return slots.serve(y, x, call)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuildable(type(self), super().__reduce_ex__(protocol))

    def _slots_repr(self) -> str:
        return super()._slots_repr() if "lora_pool" in self._modules else f"slots={self.lora_serving.num_slots}"


def sparse_class(module: nn.Module, below: type[nn.Module]) -> type[AdaptedModule]:
    """The class of a layer that gets sparse slots; ``below`` is its own class, or the one that LoRA slots gave it."""
    conv1d = conv1d_of(module)
    made_here = below in (nn.Linear, MultiLoRALinear) or (conv1d is not None and below.forward is conv1d.forward)
    fresh = not is_hooked(module) and (made_here or getattr(below, "lora_fresh", False))
    return wrapped_class(SparseSite, below, fresh)


class LinearSlots(SiteSlots):
    """A Linear's: ``y[row] += sum of weight * (U x[row] + bias shift)``, U sparse.

    Args:
        transposed: the weight lies ``[in, out]``, as Conv1D's does.
    """

    def __init__(self, owner: nn.Module, num_slots: int, one_entry: bool = False, transposed: bool = False) -> None:
        super().__init__(owner, num_slots, one_entry)
        weight = cast(Tensor, owner.weight)
        self.__dict__["transposed"] = transposed
        rows, cols = weight.shape[0], weight[:1].numel()
        out_features, in_features = (cols, rows) if transposed else (rows, cols)
        self.pool = SparsePool(num_slots, in_features, out_features, weight.dtype, device_of(owner))

    def _write(self, slot: int, own: Own) -> None:
        matrix = own.residual("weight", cast(Tensor, self.owner.weight))
        if matrix is not None and self.transposed:
            matrix = SparseMatrix.from_mask(matrix.to_dense().t(), matrix.mask().t())
        self.pool.write(slot, matrix, own.shift("bias", cast("Tensor | None", self.owner.bias)))

    def _clear(self, slot: int) -> None:
        self.pool.clear(slot)

    def _reads_padding(self, x: Tensor) -> bool:
        """Whether the product takes a routing as it lies on the device; it does without waiting for it then."""
        return x.device.type == "cuda"

    def serve(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        routing = call.routing(tuple(x.shape[:-1]), x.device, self._reads_padding(x))
        return y if routing is None else add_sparse(y, x, self.pool, routing, call.fresh)


def add_sparse(y: Tensor, x: Tensor, pool: SparsePool, routing: Routing, fresh: bool) -> Tensor:
    """``y[row] += sum of weight * (U x[row] + bias shift)``; rows without an adapter keep their bits."""
    if fresh and not y.requires_grad and x.dtype is y.dtype and not under_transform():
        return sparse_delta_linear(x, pool, routing, out=y)
    delta = sparse_delta_linear(x, pool, routing).to(y.device, y.dtype)
    touched = touched_rows(routing, y.device).view(*y.shape[:-1], 1)
    return torch.where(touched, y + delta, y)  # y + 0.0 would turn a base row's -0.0 into 0.0


def touched_rows(routing: Routing, device: torch.device) -> Tensor:
    """``[num_rows]`` bool: rows with at least one pair."""
    rows = routing.rows.long()
    if routing.padded:
        live = torch.arange(routing.num_pairs, device=routing.device) < routing.segment_starts[-1]
        rows = torch.where(live, rows, routing.num_rows)  # of padding: one more, to throw away
    touched = torch.zeros(routing.num_rows + 1, dtype=torch.bool, device=routing.device)
    return touched.index_fill(0, rows, True)[: routing.num_rows].to(device)


class ConvSlots(LinearSlots):
    """A Conv2d's: every output position is a row, its patch of the input what the kernel's delta multiplies."""

    def serve(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        if x.dim() == 3:  # one unbatched image
            return self.serve(y.unsqueeze(0), x.unsqueeze(0), call).squeeze(0)
        height, width = y.shape[-2:]
        routing = call.routing((x.shape[0], height * width), x.device, self._reads_padding(x))
        if routing is None:
            return y
        columns = columns_of(cast(nn.Conv2d, self.owner), x).contiguous()
        delta = sparse_delta_linear(columns, self.pool, routing).to(y.device, y.dtype)
        delta = delta.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        touched = touched_rows(routing, y.device).view(y.shape[0], 1, height, width)
        layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
        return torch.where(touched, y + delta.contiguous(memory_format=layout), y)


_SITES: weakref.WeakValueDictionary[int, SiteSlots] = weakref.WeakValueDictionary()
_sites = itertools.count(1)
LIBRARY.define("serve_sparse(Tensor y, Tensor x, Tensor? token, int handle, int site) -> Tensor")


def _serve_sparse(y: Tensor, x: Tensor, token: Tensor | None, handle: int, site: int) -> Tensor:
    slots = _SITES[site]
    snapshot, seq = snapshot_of(token, handle)
    path = str(slots.owner.lora_path)
    if slots.one_entry:
        snapshot.require_one_entry(path)
    y, x = slots.spread(y, x, batch_of(token, handle))
    y = y.clone(memory_format=torch.contiguous_format)  # an op's output is the caller's to overwrite
    if not slots.concerns(snapshot):
        return y
    served = slots.serve(y, x, Call(snapshot, seq, path, False, True))
    if served.shape != y.shape:
        raise ValueError(
            f"{path}: compiled code wants one shape whatever is selected, and cannot repeat {list(y.shape)} for every "
            "sample; give it ids with a row for each"
        )
    return served.contiguous()


run_as_plain_python(_serve_sparse)


def _fake_sparse(y: Tensor, x: Tensor, token: Tensor | None, handle: int, site: int) -> Tensor:
    return _SITES[site].traced_shape(y, x)


LIBRARY.impl("serve_sparse", _serve_sparse, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::serve_sparse", _fake_sparse, lib=LIBRARY)


def _traced(slots: SiteSlots, serving: Serving, y: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and y.requires_grad:
        raise RuntimeError(
            "layers with sparse slots cannot be compiled together with their backward; use torch.no_grad() or "
            "torch.inference_mode()"
        )
    return torch.ops.lora_fuse.serve_sparse(y.detach(), x.detach(), serving.token, serving.handle, slots.site)
