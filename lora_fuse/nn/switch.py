"""``switch_task``: one sparse adapter's fine-tune in the weights themselves, and back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.nn.attachment import ActiveTask, Attachment, attachment_of, unwrap
from lora_fuse.nn.selection import Selection
from lora_fuse.nn.sparse_site import placed
from lora_fuse.ops.exchange import Entry, Exchange, takes
from lora_fuse.sparse import SparseMatrix, Write, write_all


@torch.no_grad()
def switch_task(model: nn.Module, name: str | None) -> None:
    """Make the whole model one task's fine-tune, in place: ``W[kept] = theta_t[kept]``, and its other parameters whole.

    Forwards then run at the bare model's speed, for every row alike, and the task's heads are used. What was
    overwritten is kept (as many bytes as the adapter has values) and put back, bit for bit, by ``switch_task(model,
    None)``; switching from one task to another puts it back first. A state dict taken meanwhile is the fine-tune's.

    While a task is switched in, selecting adapters for rows is refused, and so are ``add_adapter``, ``swap_adapter``,
    ``remove_adapter`` and ``fuse``; ``detach`` switches back first.

    Args:
        model: an attached model; no forward of it may be running, on any thread.
        name: an attached ``SparseAdapter``, or None: the merged weights.
    Raises:
        ValueError: no sparse adapter of that name is attached, adapters are selected for rows (the model's default, or
            a ``use_adapters`` block), or a parameter has gone or changed its shape. The model is then as it was.
    """
    attachment = attachment_of(model)
    model = unwrap(model)
    with attachment.changing:
        before = attachment.active
        if name == (None if before is None else before.name):
            return
        if name is not None:
            _refuse(attachment, name)
        old = None
        if before is not None:
            task = attachment.tasks[before.name]
            old = _Parts(attachment, task, [p for p in _places(model, task) if p.name in before.saved])
        new = (
            None if name is None else _Parts(attachment, attachment.tasks[name], _places(model, attachment.tasks[name]))
        )
        saved: dict[str, Tensor] = {}
        try:
            if old is not None and before is not None:
                old.undo(before.saved)
            if new is not None:
                new.write(saved)
        except BaseException:
            if new is not None:
                _write([place for place in new.all if place.written(saved)], saved)
            if old is not None:
                _write(old.all, {place.name: place.own for place in old.all})
            raise
        attachment.active = None if name is None else ActiveTask(name, saved)
        attachment.serving.task = None if name is None else attachment.serving.published.leases[name].index


def _refuse(attachment: Attachment, name: str) -> None:
    serving = attachment.serving
    serving.published.lease(name, "name")
    if name not in attachment.tasks:
        raise ValueError(
            f"name: {name!r} is no sparse adapter; switch_task takes {sorted(attachment.tasks)}, lora_fuse.fuse "
            "merges a LoraAdapter into the weights"
        )
    if not selects_base(serving.default.selection):
        raise ValueError("model: its default selection has adapters for rows; call set_adapters(model, None) first")
    if any(not selects_base(context.selection) for context in list(serving.contexts)):
        raise ValueError("model: a use_adapters block selects adapters for rows; leave it first")


def selects_base(selection: Selection) -> bool:
    """Whether a selection gives every row the base model."""
    return not any(selection.entries) and not selection.tenants


def refuse_while_switched(attachment: Attachment, what: str) -> None:
    """Raise ``ValueError`` if a task is in the weights."""
    if attachment.active is not None:
        raise ValueError(
            f"{what}: the model is switched to {attachment.active.name!r}; call switch_task(model, None) first"
        )


def undo_switch(model: nn.Module, attachment: Attachment) -> None:
    """What ``switch_task(model, None)`` does, for ``detach``."""
    if attachment.active is not None:
        switch_task(model, None)


@dataclass(eq=False)
class _Place:
    """One parameter or buffer of the model, and a task's own values there.

    Args:
        matrix: where the values lie; None: they are the whole tensor.
    """

    name: str
    param: Tensor
    matrix: SparseMatrix | None
    own: Tensor
    version: int = -1

    def entry(self) -> Entry:
        """What an exchange writes."""
        param = self.param.detach()
        matrix = None if self.matrix is None else placed(self.matrix, param.device)
        return Entry(matrix, param, self.own.detach().to(param.device, param.dtype).contiguous())

    def make_room(self, saved: dict[str, Tensor]) -> None:
        """For what the task's values overwrite. Parameters without a version are saved here, others by the write."""
        if not self.param.is_inference():
            self.version = self.param._version
            saved[self.name] = torch.empty_like(self.own, dtype=self.param.dtype, device=self.param.device)
        elif self.matrix is None:
            saved[self.name] = self.param.clone()
        else:
            saved[self.name] = self.matrix.read_from(self.param.reshape(self.matrix.shape))

    def written(self, saved: Mapping[str, Tensor]) -> bool:
        """Whether the task's values may be there, and ``saved`` holds what they overwrote."""
        return self.name in saved and (self.param.is_inference() or self.param._version != self.version)


class _Parts:
    """The places of one task: those on GPUs, exchanged together, and the others.

    Args:
        places: all of them.
    """

    def __init__(self, attachment: Attachment, adapter: SparseAdapter, places: list[_Place]) -> None:
        self.all = places
        self.together: list[_Place] = []
        self.apart: list[_Place] = []
        for place in places:
            (self.together if place.own.numel() and takes(place.param) else self.apart).append(place)
        self.params = [place.param for place in self.together]
        known = attachment.exchanges.of
        found = known.get(adapter)
        if found is None or not found.fits(self.params):
            known.pop(adapter, None)
            found = Exchange([place.entry() for place in self.together])
            if self.together:
                known[adapter] = found
        self.exchange = found

    def write(self, saved: dict[str, Tensor]) -> None:
        """The task's values into the parameters; what they overwrite goes to ``saved``."""
        for place, room in zip(self.together, self.exchange.make_room(), strict=True):
            place.version = place.param._version
            saved[place.name] = room
        for place in self.apart:
            place.make_room(saved)
        self.exchange.write(self.params, [saved[place.name] for place in self.together])
        _write(self.apart, {place.name: place.own for place in self.apart}, saved)

    def undo(self, saved: Mapping[str, Tensor]) -> None:
        done = self.exchange.undo(self.params, [saved[place.name] for place in self.together])
        _write(self.apart if done else self.all, saved)


def _write(places: list[_Place], values: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None = None) -> None:
    """Put ``values`` into the parameters; what they overwrite goes to ``saved``."""
    writes, copies = [], []
    for place in places:
        param = place.param.detach()
        new = values[place.name].to(param.device, param.dtype)
        old = None if saved is None or param.is_inference() else saved[place.name]
        if place.matrix is None:
            if old is not None:
                old.copy_(param)
            param.copy_(new)
            continue
        flat = param if param.dim() == 2 and param.is_contiguous() else param.reshape(place.matrix.shape)
        if flat.data_ptr() != param.data_ptr():  # no view of it has that shape
            copies.append((param, flat))
        writes.append(Write(place.matrix, flat, new, old))
    write_all(writes)
    for param, flat in copies:
        param.copy_(flat.view(param.shape))


def _places(model: nn.Module, adapter: SparseAdapter) -> list[_Place]:
    """Every parameter that a task has values for, checked as far as a write could fail."""
    places: dict[object, _Place] = {}  # by memory: of tied parameters the first, attach has made sure that they agree
    for name in (*adapter.matrices, *adapter.dense):
        aliases = [alias for alias, first in adapter.aliases.items() if first == name and _holds(model, alias)]
        for where in (name, *aliases):
            place = _place(model, adapter, name, where)
            places.setdefault((place.param.device, place.param.data_ptr()), place)
    return [*places.values()]


def _holds(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    module = _submodule(model, path)
    return module is not None and leaf in module._parameters


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """``model.get_submodule(path)``, which takes as long as the write; None if there is none."""
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    return module


def _place(model: nn.Module, adapter: SparseAdapter, name: str, where: str) -> _Place:
    """The model's parameter ``where``, and the adapter's values of ``name``."""
    path, _, leaf = where.rpartition(".")
    module = _submodule(model, path)
    if module is None:
        raise ValueError(f"{where}: the model has no module {path!r} any more")
    param: Tensor | None = module._parameters.get(leaf)
    param = module._buffers.get(leaf) if param is None else param
    if param is None:
        raise ValueError(f"{where}: {type(module).__name__} has no such parameter any more")
    matrix = adapter.matrices.get(name)
    shape = adapter.dense[name].shape if matrix is None else adapter.shapes[name]
    if tuple(param.shape) != tuple(shape) or param.device.type == "meta":
        raise ValueError(
            f"{where}: is {list(param.shape)} on {param.device}, accepted is {list(shape)} with its data at hand"
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{where}: was made in inference mode; call switch_task inside torch.inference_mode()")
    own = adapter.dense[name] if matrix is None else matrix.values
    return _Place(where, param, matrix, own)
