"""Embeddings and norms with slots for sparse adapters: every row's result is computed with its fine-tune's own values.

A row that selects one fine-tune gets that fine-tune's result bit for bit. A weighted mix is linear in the parameters,
and so are these layers: ``y = y* + sum of weight * (y_t - y*)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fuse.adapters.routing import Routing
from lora_fuse.nn.heads import HeadCopies, template_of
from lora_fuse.nn.linear import AdaptedModule, original_class
from lora_fuse.nn.selection import Snapshot
from lora_fuse.nn.sparse_site import Call, Own, SiteSlots, placed, touched_rows
from lora_fuse.sparse import SparseMatrix


def replace_rows(y: Tensor, routing: Routing, own_rows: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """``y[row] += sum of weight * (y_t[row] - y[row])``; rows without one of these adapters keep their bits.

    Args:
        y: ``[num_rows, features]``, what the layer makes of every row.
        own_rows: slot -> function from row numbers ``[n]`` to what that slot's fine-tune makes of them
            ``[n, features]``.
    """
    starts = routing.segment_starts.tolist()
    pairs = [slice(starts[slot], starts[slot + 1]) for slot in own_rows]
    parts = [(own_rows[slot], pair) for slot, pair in zip(own_rows, pairs, strict=True) if pair.start < pair.stop]
    if not parts:
        return y
    rows = torch.cat([routing.rows[pair] for _, pair in parts]).long()
    own = torch.cat([make(routing.rows[pair].long()) for make, pair in parts]).to(y.dtype)
    rows = rows.to(y.device)
    if routing.weights is None and routing.row_starts is None:
        return y.index_copy(0, rows, own)
    wide = torch.promote_types(y.dtype, torch.float32)
    ones = torch.ones(routing.num_pairs, device=y.device) if routing.weights is None else routing.weights.to(y.device)
    weights = torch.cat([ones[pair] for _, pair in parts]).to(wide)[:, None]
    # As (1 - sum of weights) * y + sum of weight * y_t: one adapter with weight 1 gives y_t itself.
    rest = torch.ones(y.shape[0], 1, dtype=wide, device=y.device).index_add(0, rows, -weights)
    mixed = torch.where(rest == 0, 0.0, rest * y.to(wide)).index_add(0, rows, weights * own.to(wide))
    return torch.where(touched_rows(routing, y.device)[:, None], mixed.to(y.dtype), y)


class NormSlots(SiteSlots):
    """A norm's: a copy of the module per slot, holding the fine-tune's own weight and bias."""

    def __init__(self, owner: nn.Module, num_slots: int, one_entry: bool = False) -> None:
        super().__init__(owner, num_slots, one_entry)
        self.store = HeadCopies(template_of(owner))

    def _write(self, slot: int, own: Own) -> None:
        tensors = {leaf: own.whole(leaf, merged) for leaf, merged in self.owner.state_dict().items()}
        self.store.put(slot, tensors, self.owner)

    def _clear(self, slot: int) -> None:
        self.store.put(slot, None, self.owner)

    def serve(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        dims = len(getattr(self.owner, "normalized_shape", (1,)))
        lead = tuple(x.shape[: x.dim() - dims])
        routing = call.routing(lead, x.device)
        if routing is None:
            return y
        flat = x.reshape(-1, *x.shape[x.dim() - dims :])

        def run(copy: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda rows: cast(Tensor, copy.forward(flat[rows])).flatten(1)

        own_rows = {slot: run(copy) for slot, copy in self.store.copies.items()}
        return replace_rows(y.reshape(flat.shape[0], -1), routing, own_rows).view(y.shape)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its last dimensions, one row at a time, and is linear in its parameters."""
    cls = original_class(type(module))
    if isinstance(module, nn.LayerNorm):
        return cls.forward is nn.LayerNorm.forward
    if isinstance(module, nn.RMSNorm):
        return cls.forward is nn.RMSNorm.forward
    if not cls.__name__.endswith(("RMSNorm", "T5LayerNorm")):
        return False
    inputs = [*inspect.signature(cls.forward).parameters][1:]
    own = [*module._parameters]
    return own == ["weight"] and module._parameters["weight"] is not None and len(inputs) == 1


class EmbeddingSlots(SiteSlots):
    """An embedding's: each slot holds the fine-tune's own values, which replace the looked-up row's kept entries."""

    matrices: dict[int, SparseMatrix]

    def __init__(self, owner: nn.Module, num_slots: int, one_entry: bool = False) -> None:
        super().__init__(owner, num_slots, one_entry)
        self.__dict__["matrices"] = {}

    def _write(self, slot: int, own: Own) -> None:
        weight = cast(Tensor, self.owner.weight)
        matrix = own.values("weight", weight)
        assert matrix is not None
        moved = placed(matrix, weight.device, weight.dtype)
        self.__dict__["matrices"] = {**self.matrices, slot: moved}

    def _clear(self, slot: int) -> None:
        self.__dict__["matrices"] = {s: matrix for s, matrix in self.matrices.items() if s != slot}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(m: SparseMatrix) -> SparseMatrix:
            columns, bitmap = (None if t is None else fn(t) for t in (m.columns, m.bitmap))
            return SparseMatrix(fn(m.values), fn(m.row_starts), columns, bitmap, m.num_cols)

        self.__dict__["matrices"] = {slot: moved(matrix) for slot, matrix in self.matrices.items()}
        return super()._apply(fn, recurse)

    def serve(self, y: Tensor, ids: Tensor, call: Call) -> Tensor:
        repeat = _repeat(ids, call.snapshot, call.seq, call.path)
        if repeat is not None:
            y, ids = _spread(y, ids, call.snapshot.batch_dim, repeat)
        routing = call.routing(tuple(ids.shape), y.device)
        if routing is None:
            return y
        tokens, flat = ids.reshape(-1).to(y.device), y.reshape(-1, y.shape[-1])
        scale = getattr(self.owner, "embed_scale", None)

        def run(matrix: SparseMatrix) -> Callable[[Tensor], Tensor]:
            return lambda rows: _write_entries(flat[rows], matrix, tokens[rows], scale)

        own_rows = {slot: run(matrix) for slot, matrix in self.matrices.items()}
        return replace_rows(flat, routing, own_rows).view(y.shape)

    def traced_shape(self, y: Tensor, ids: Tensor) -> Tensor:
        serving = cast(AdaptedModule, self.owner).lora_serving
        axis = serving.batch_dim
        if not _alone(ids, axis) or ids.dim() == 1 or serving.local.batch == 1:
            return super().traced_shape(y, ids)
        sizes = [*y.shape]
        sizes[axis] = torch.library.get_ctx().new_dynamic_size()  # type: ignore[call-overload]
        return y.new_empty(sizes)

    def spread(self, y: Tensor, ids: Tensor, batch: int | None) -> tuple[Tensor, Tensor]:
        axis = cast(AdaptedModule, self.owner).lora_serving.batch_dim
        return (y, ids) if batch is None or ids.dim() == 1 or not _alone(ids, axis) else _spread(y, ids, axis, batch)


def _alone(ids: Tensor, axis: int) -> bool:
    """Whether these ids may be looked up once for all samples."""
    return ids.dim() == 1 or (axis < ids.dim() and ids.shape[axis] == 1)


def _spread(y: Tensor, ids: Tensor, axis: int, batch: int) -> tuple[Tensor, Tensor]:
    if ids.dim() == 1:
        ids, y = ids.unsqueeze(axis), y.unsqueeze(axis)
    shape = (*ids.shape[:axis], batch, *ids.shape[axis + 1 :])
    return y.expand(*shape, y.shape[-1]), ids.expand(shape)


def _repeat(ids: Tensor, snapshot: Snapshot, seq: int | None, path: str) -> int | None:
    """How often the batch repeats what was looked up once for all samples (position embeddings), or None.

    Raises:
        ValueError: one-dimensional ids that may be positions or samples, as many of the one as of the other.
    """
    n, size = snapshot.num_samples, ids.numel()
    if snapshot.kind == "uniform" or not size or not _alone(ids, snapshot.batch_dim):
        return None
    if snapshot.kind == "tokens":
        return n // size if size != n and n % size == 0 else None
    if ids.dim() > 1:
        return n if n > 1 else None
    if seq is None or size != seq:
        return None
    if seq == n > 1:
        raise ValueError(
            f"{path}: cannot tell whether its {n} ids are one per sample or one per position, the batch has {n} "
            f"samples of length {n}; select one entry for the whole batch, or run this batch in two parts"
        )
    return n


def _write_entries(rows: Tensor, matrix: SparseMatrix, ids: Tensor, scale: Tensor | float | None) -> Tensor:
    """Overwrite the kept entries of looked-up rows.

    Args:
        rows: ``[n, dim]``, ``W[ids]`` (times ``scale``); belongs to the caller alone.
        ids: ``[n]``, the rows of ``matrix``.
    """
    first, n = matrix.row_starts[ids], ids.shape[0]
    counts = matrix.row_starts[ids + 1] - first
    ends = counts.cumsum(0)
    total = int(ends[-1]) if n else 0
    entries = torch.arange(total, device=ids.device)
    entries += torch.repeat_interleave(first - ends + counts, counts, output_size=total)
    values = matrix.values[entries]
    if scale is not None:
        values = values * (scale.to(values.dtype) if isinstance(scale, Tensor) else scale)
    if matrix.bitmap is not None:
        shifts = torch.arange(8, dtype=torch.uint8, device=ids.device)
        bits = (matrix.bitmap[ids][..., None] >> shifts) & 1
        return rows.masked_scatter(bits.view(n, -1)[:, : matrix.num_cols].bool(), values.to(rows.dtype))
    assert matrix.columns is not None
    columns = matrix.columns
    if columns.dtype is torch.uint16:  # which torch cannot index
        columns = columns.view(torch.int16)[entries].long() & 0xFFFF
    else:
        columns = columns[entries].long()
    place = torch.repeat_interleave(torch.arange(n, device=ids.device) * matrix.num_cols, counts, output_size=total)
    return rows.reshape(-1).scatter(0, place + columns, values.to(rows.dtype)).view(rows.shape)
