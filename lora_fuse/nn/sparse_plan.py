"""Where a sparse adapter's parameters are used in a model; refused by name before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint
from lora_fuse.nn import heads
from lora_fuse.nn.linear import original_class
from lora_fuse.nn.sparse_rows import EmbeddingSlots, NormSlots, is_norm
from lora_fuse.nn.sparse_site import ConvSlots, LinearSlots, Own, SiteSlots
from lora_fuse.nn.targets import conv1d_of, is_expert, target_of

_Span = tuple[int, int]


@dataclass
class FittedSparse:
    """One sparse adapter under the model's canonical paths."""

    sites: dict[str, Own] = field(default_factory=dict)
    heads: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Places:
    """Which modules use which parameter of a model, tied parameters included.

    Args:
        modules: every path -> module, duplicates included.
        canonical: id of a module -> its canonical path.
        ours: whether a path belongs to what ``attach`` put there.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], canonical: Mapping[int, str], ours: Callable[[str], bool]
    ) -> None:
        self.modules = modules
        self.tensors: dict[str, Tensor] = {}  # every name of a parameter or buffer
        self.users: dict[int, dict[tuple[str, str], Tensor]] = {}  # storage -> (canonical path, leaf) -> tensor
        self._prints: dict[int, str] = {}  # id of a tensor -> its fingerprint
        for path, module in modules.items():
            if ours(path):
                continue
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tensors[f"{path}.{leaf}" if path else leaf] = tensor
                    users = self.users.setdefault(_storage(tensor), {})
                    users[canonical[id(module)], leaf] = tensor

    def fingerprint(self, name: str) -> str:
        tensor = self.tensors[name]
        if id(tensor) not in self._prints:
            self._prints[id(tensor)] = fingerprint(tensor)
        return self._prints[id(tensor)]

    def of(self, name: str, adapter: SparseAdapter) -> list[tuple[str, str]] | str:
        """``(canonical path, leaf)`` of every module that uses this parameter, or why they cannot be told.

        That is whoever holds this very tensor, and whoever holds it under another name that the adapter knows, tied in
        this model or not.
        """
        found: dict[tuple[str, str], None] = {}
        for one in (name, *(alias for alias, first in adapter.aliases.items() if first == name)):
            used = self._holders(one) if one in self.tensors else []
            if isinstance(used, str):
                return used
            found.update(dict.fromkeys(used))
        return [*found]

    def _holders(self, name: str) -> list[tuple[str, str]] | str:
        tensor = self.tensors[name]
        low, high = _span(tensor)
        own = _memory(tensor)
        found = []
        for (path, leaf), other in self.users[_storage(tensor)].items():
            start, end = _span(other)
            if _memory(other) == own:
                found.append((path, leaf))
            elif start < high and low < end:
                return f"shares part of its memory with {path}.{leaf}"
        return found

    def unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.tensors, n=2)
        return "the model has no such parameter" + (f", nearest: {', '.join(near)}" if near else "")


def _memory(t: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one."""
    return _storage(t), _span(t)[0], t.shape, t.stride(), t.dtype


def _storage(t: Tensor) -> int:
    return id(t) if t.device.type == "meta" or not t.numel() else t.untyped_storage().data_ptr()


def _span(t: Tensor) -> _Span:
    """Addresses of the first byte and of one past the last; unique for tensors without memory."""
    if t.device.type == "meta" or not t.numel():
        return id(t), id(t) + 1
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def fit(name: str, adapter: SparseAdapter, places: Places) -> tuple[FittedSparse, list[str]]:
    """Fit one adapter to a model.

    Returns:
        Where its parameters go, and for each that cannot be served why: ``"parameter: reason"``.
    Raises:
        ValueError: the model does not hold the merged weights that the adapter belongs to (the first parameter that
            differs is named), or ties what the adapter has apart.
    """
    _check_merged(name, adapter, places)
    _check_ties(name, adapter, places)
    fitted, offenders = FittedSparse(), []
    head_leaves: dict[str, dict[str, Tensor]] = {}
    for parameter, tensor in adapter.heads.items():
        used = places.of(parameter, adapter) if parameter in places.tensors else places.unknown(parameter)
        if isinstance(used, str):
            offenders.append(f"{parameter}: {used}")
            continue
        for path, leaf in used:
            head_leaves.setdefault(path, {})[leaf] = tensor
    names: dict[str, dict[str, str]] = {}  # module -> leaf -> parameter
    for parameter in (*adapter.matrices, *adapter.dense):
        merged, own = places.tensors[parameter], adapter.dense.get(parameter)
        if own is not None and own.dtype == merged.dtype and torch.equal(own.to(merged.device), merged):
            continue  # nothing of the task's own
        used = places.of(parameter, adapter)
        if isinstance(used, str):
            offenders.append(f"{parameter}: {used}")
            continue
        for path, leaf in used:
            names.setdefault(path, {})[leaf] = parameter
    for path, leaves in head_leaves.items():
        of_module = names.pop(path, {})
        tensors, why = _head(path, leaves, Own(adapter, of_module), places)
        if why is not None:
            offenders.append(f"{path}.{next(iter(leaves))}: {why}")
        fitted.heads[path] = tensors
    for path, of_module in names.items():
        kind = slots_of(places.modules, path, of_module)
        if isinstance(kind, str):
            offenders += [f"{parameter}: {kind}" for parameter in of_module.values()]
        fitted.sites[path] = Own(adapter, of_module)
    return fitted, offenders


def _check_merged(name: str, adapter: SparseAdapter, places: Places) -> None:
    adapter.check()
    where, prints = f"adapter {name!r} ({adapter.source})", adapter.fingerprint
    tied = {
        alias: prints[first] for alias, first in adapter.aliases.items() if first in prints and alias in places.tensors
    }
    for parameter, expected in {**prints, **tied}.items():
        if parameter not in places.tensors:
            raise ValueError(f"{where}: {parameter}: {places.unknown(parameter)}")
        tensor = places.tensors[parameter]
        if tensor.device.type == "meta":
            raise ValueError(f"{where}: {parameter} is on the meta device, it has no data (offloaded?)")
        if places.fingerprint(parameter) != expected:
            raise ValueError(
                f"{where}: the model's {parameter} ({tensor.dtype}, shape {list(tensor.shape)}) is not the merged "
                "weight that the adapter was made against; load the merged weights into the model first (and cast the "
                "model after attach, not before)"
            )
    shapes = {**adapter.shapes, **{parameter: t.shape for parameter, t in adapter.dense.items()}}
    for parameter, shape in shapes.items():
        merged = places.tensors[parameter]
        if tuple(merged.shape) != tuple(shape):
            raise ValueError(f"adapter {name!r}: {parameter} has shape {list(shape)}, the model's {list(merged.shape)}")


def _check_ties(name: str, adapter: SparseAdapter, places: Places) -> None:
    """Names that are one tensor in this model, but not in ``theta*``, have to stand for the same values."""
    first: dict[tuple[object, ...], str] = {}
    for parameter in dict.fromkeys((*adapter.fingerprint, *adapter.aliases, *adapter.heads)):
        if parameter in places.tensors:
            other = first.setdefault(_memory(places.tensors[parameter]), parameter)
            if not adapter.agrees(*(adapter.aliases.get(n, n) for n in (other, parameter))):
                raise ValueError(
                    f"adapter {name!r} ({adapter.source}): {other} and {parameter} are one tensor in the model (tied "
                    "weights), but the fine-tune has values of its own under each; untie them in the model, or tie "
                    "them in the base that the adapter is made from"
                )


def _head(path: str, leaves: Mapping[str, Tensor], own: Own, places: Places) -> tuple[dict[str, Tensor], str | None]:
    """All tensors of the task's copy of a module, and why it cannot be had."""
    module = places.modules[path]
    if any(not child.startswith("lora_") for child in module._modules):
        return {}, f"a {original_class(type(module)).__name__} with modules inside cannot be copied per task"
    if isinstance(places.modules.get(path.rpartition(".")[0]), nn.MultiheadAttention):
        return {}, "nn.MultiheadAttention reads this module's weight and never calls it"
    tensors = {leaf: own.whole(leaf, merged) for leaf, merged in module.state_dict().items()}
    tensors.update(leaves)
    return tensors, heads.misfit(module, tensors)


def slots_of(modules: Mapping[str, nn.Module], path: str, leaves: Mapping[str, str]) -> type[SiteSlots] | str:
    """The kind of slots that serve these parameters of a module per row, or why none does.

    Args:
        leaves: the module's own parameters, as it names them.
    """
    module, parent = modules[path], modules.get(path.rpartition(".")[0]) if path else None
    cls = original_class(type(module))
    strange = [leaf for leaf in leaves if leaf not in ("weight", "bias") or leaf not in module._parameters]
    if strange:
        return f"a {cls.__name__} holds it, and no row of a batch can have a {strange[0]!r} of its own there"
    if "weight" not in module._parameters or "lora_heads" in module._modules:
        return f"another adapter has a full copy of this {cls.__name__} (a head)"
    if is_norm(module):
        return NormSlots
    if path.rpartition(".")[2] == "relative_attention_bias":
        return "is looked up by pairs of positions, so no row of a batch can have its own"
    plain: Any = nn.Linear if isinstance(module, nn.Linear) else conv1d_of(module)
    known = plain is not None or isinstance(module, (nn.Conv2d, nn.Embedding))
    target = target_of(module, path, parent, ours=True) if known else f"a {cls.__name__} cannot differ per row"
    if isinstance(target, str):
        return target
    if plain is not None and cls.forward is not plain.forward:
        return f"{cls.__name__} has a forward of its own, which is not a plain product"
    return {"linear": LinearSlots, "conv2d": ConvSlots, "embedding": EmbeddingSlots}[target.kind]


def make_slots(module: nn.Module, path: str, kind: type[SiteSlots], num_slots: int) -> SiteSlots:
    """Empty slots for a module that gets them for the first time."""
    one_entry = is_expert(path)
    if kind is LinearSlots:
        return LinearSlots(module, num_slots, one_entry, transposed=conv1d_of(module) is not None)
    return kind(module, num_slots, one_entry)
