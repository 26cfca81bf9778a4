"""Everything about an attach or an add that can be refused, found out before anything is changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.joint_adapter import JointAdapter
from lora_fuse.adapters.lora import LayerKind, LoraAdapter, LoraLayer
from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.nn import heads, joint_plan, sparse_plan
from lora_fuse.nn.joint_site import JointOwn, JointSlots
from lora_fuse.nn.sparse_site import Own, SiteSlots
from lora_fuse.nn.targets import Fit, Target, pool_dtype, target_of

Adapter: TypeAlias = LoraAdapter | SparseAdapter | JointAdapter
_LISTED = 10
_OURS = re.compile(r"(^|\.)lora_(pool|heads|sparse)(\.|$)")  # modules that attach put there


@dataclass
class Fitted:
    """One adapter under the model's canonical paths."""

    layers: dict[str, LoraLayer] = field(default_factory=dict)
    heads: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    sites: dict[str, Own | JointOwn] = field(default_factory=dict)


@dataclass
class Plan:
    """What will be done: modules that get slots or head copies, and where each adapter's tensors go."""

    new_layers: dict[str, tuple[nn.Module, Target]] = field(default_factory=dict)
    new_heads: dict[str, tuple[nn.Module, type[nn.Module]]] = field(default_factory=dict)
    new_sparse: dict[str, tuple[nn.Module, type[SiteSlots]]] = field(default_factory=dict)
    adapters: dict[str, Fitted] = field(default_factory=dict)


def plan(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    layers: Mapping[str, nn.Module],
    sparse: Mapping[str, nn.Module],
    head_widths: Mapping[str, Mapping[str, int]],
    max_rank: int,
    packed: Collection[str] = (),
) -> Plan:
    """Fit adapters to a model.

    Args:
        layers: what has LoRA slots already, by canonical path.
        sparse: what has sparse slots already, likewise.
        head_widths: what has head copies already, and the widths of those that will stay, by adapter.
        packed: what shares a product with siblings, with or without slots.
    Raises:
        ValueError: naming the adapter, up to ten offending paths with the reason, and the nearest names that exist.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical: dict[int, str] = {}
    for path, module in modules.items():
        canonical.setdefault(id(module), path)
    fits: dict[str, Fit] = {path: module.lora_fit for path, module in layers.items()}  # type: ignore[misc]
    result = Plan()
    places = None
    for name, adapter in adapters.items():
        if isinstance(adapter, SparseAdapter):
            places = places or sparse_plan.Places(modules, canonical, lambda path: _OURS.search(path) is not None)
            _fit_sparse(name, adapter, places, sparse, head_widths, result)
            continue
        if isinstance(adapter, JointAdapter):
            planned = {other: done.sites for other, done in result.adapters.items()}
            missing = partial(_no_such_module, model, modules=modules)
            sites, offenders = joint_plan.fit(adapter, modules, canonical, sparse, planned, missing)
            fitted = Fitted(sites=dict(sites))
            result.new_sparse.update({path: (modules[path], JointSlots) for path in sites if path not in sparse})
            offenders += _fit_heads(model, adapter, modules, canonical, head_widths, fitted, result)
            _refuse_offenders(name, adapter, offenders, f"{len(adapter.cores) + len(adapter.modules_to_save)} modules")
            result.adapters[name] = fitted
            continue
        _refuse_unservable(name, adapter)
        fitted, offenders = Fitted(), []
        for path, layer in adapter.layers.items():
            module = modules.get(path)
            home = path if module is None else canonical[id(module)]
            why = None
            if module is None:
                why = _no_such_module(model, path, modules)
            elif home in fitted.layers:
                why = f"is the same module as {home}, and the adapter has factors for both"
            else:
                if home in head_widths:
                    offenders.append(f"{path}: another adapter has a full copy of it (modules_to_save)")
                    continue
                if home not in fits:
                    ours = home in sparse or home in packed
                    target = target_of(module, home, modules.get(home.rpartition(".")[0]), ours)
                    if isinstance(target, str):
                        offenders.append(f"{path}: {target}")
                        continue
                    fits[home] = target.fit
                    result.new_layers[home] = (module, target)
                why = _misfit(layer, *fits[home]) or _other_base(module, adapter.base_weights.get(path))
            if why is not None:
                offenders.append(f"{path}: {why}")
                continue
            if layer.rank > max_rank:
                raise ValueError(f"adapter {name!r}: {path} has rank {layer.rank}, which exceeds max_rank {max_rank}")
            _refuse_overflow(name, path, layer, modules[path])
            fitted.layers[home] = layer
        offenders += _fit_heads(model, adapter, modules, canonical, head_widths, fitted, result)
        _refuse_offenders(name, adapter, offenders, f"{len(adapter.layers) + len(adapter.modules_to_save)} modules")
        result.adapters[name] = fitted
    changed = dict.fromkeys((*sparse, *result.new_sparse), "values of its own")
    _refuse_overlaps({**changed, **dict.fromkeys(fits, "LoRA factors")}, [*head_widths, *result.new_heads])
    heads.refuse_mixed_kinds(result.adapters, modules, head_widths)
    return result


_JOINT = "has slots for joint adapters; a layer takes those or fine-tunes as sparse adapters, not both"


def _fit_heads(
    model: nn.Module,
    adapter: LoraAdapter | JointAdapter,
    modules: Mapping[str, nn.Module],
    canonical: Mapping[int, str],
    head_widths: Mapping[str, Mapping[str, int]],
    fitted: Fitted,
    result: Plan,
) -> list[str]:
    """Put an adapter's module copies into ``fitted``; what cannot be served, with the reason."""
    offenders = []
    for path, tensors in adapter.modules_to_save.items():
        module = modules.get(path)
        why = _no_such_module(model, path, modules) if module is None else heads.misfit(module, tensors)
        if module is None or why is not None:
            offenders.append(f"{path}: {why}")
            continue
        home = canonical[id(module)]
        fitted.heads[home] = tensors
        if home not in head_widths and home not in result.new_heads:
            result.new_heads[home] = (module, heads.head_class(module))
    return offenders


def _fit_sparse(
    name: str,
    adapter: SparseAdapter,
    places: sparse_plan.Places,
    sparse: Mapping[str, nn.Module],
    head_widths: Mapping[str, Mapping[str, int]],
    result: Plan,
) -> None:
    fitted, offenders = sparse_plan.fit(name, adapter, places)
    taken = {path for path, module in sparse.items() if isinstance(module.lora_sparse, JointSlots)}
    taken |= {path for done in result.adapters.values() for path, o in done.sites.items() if isinstance(o, JointOwn)}
    offenders += [f"{path}: {_JOINT}" for path in fitted.sites if path in taken]
    total = len({*adapter.matrices, *adapter.dense, *adapter.heads})
    _refuse_offenders(name, adapter, offenders, f"{total} parameters")
    for path, own in fitted.sites.items():
        if path not in sparse:
            kind = sparse_plan.slots_of(places.modules, path, own.names)
            assert not isinstance(kind, str)
            result.new_sparse[path] = (places.modules[path], kind)
    for path in fitted.heads:
        if path not in head_widths and path not in result.new_heads:
            module = places.modules[path]
            result.new_heads[path] = (module, heads.head_class(module))
    result.adapters[name] = Fitted({}, fitted.heads, dict(fitted.sites))


def _refuse_offenders(name: str, adapter: Adapter, offenders: list[str], total: str) -> None:
    if offenders:
        shown = "\n  ".join(offenders[:_LISTED])
        more = f"\n  and {len(offenders) - _LISTED} more" if len(offenders) > _LISTED else ""
        raise ValueError(
            f"adapter {name!r} ({adapter.source}) does not fit this model, {len(offenders)} of {total}:"
            f"\n  {shown}{more}"
        )


def _refuse_unservable(name: str, adapter: LoraAdapter) -> None:
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(
            f"adapter {name!r}: expected a LoraAdapter, a SparseAdapter or a JointAdapter, got {type(adapter).__name__}"
        )
    dora = [path for path, layer in adapter.layers.items() if layer.magnitude is not None]
    if dora:
        raise ValueError(
            f"adapter {name!r}: {dora[0]} and {len(dora) - 1} more layers are DoRA, whose norm depends on the whole "
            "weight and cannot be served row by row; merge it into the weights with lora_fuse.fuse"
        )
    if adapter.base_biases:
        raise ValueError(
            f"adapter {name!r}: it replaces biases of the base model (PEFT's bias='all' or 'lora_only'; "
            f"{next(iter(adapter.base_biases))} and {len(adapter.base_biases) - 1} more), which cannot be served row "
            "by row"
        )
    if adapter.trainable_tokens:
        raise ValueError(
            f"adapter {name!r}: it replaces embedding rows (trainable_token_indices of "
            f"{sorted(adapter.trainable_tokens)}), which cannot be served row by row"
        )
    if not adapter.layers and not adapter.modules_to_save:
        raise ValueError(f"adapter {name!r}: it has no layers")
    for path, layer in adapter.layers.items():
        if not abs(layer.scaling) <= torch.finfo(torch.float32).max:  # nor NaN
            raise ValueError(f"adapter {name!r}: {path} has the scaling {layer.scaling}, accepted is a finite number")
        if not all(all_finite(t) for t in layer.tensors()):
            raise ValueError(f"adapter {name!r}: {path} has factors that are not finite")


def _no_such_module(model: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> str:
    parent, _, leaf = path.rpartition(".")
    owner = modules.get(parent)
    parameter = None if owner is None else owner._parameters.get(leaf)
    if parameter is not None:
        kind = "a stack of expert weights" if parameter.dim() == 3 else "a parameter"
        return f"is {kind} {list(parameter.shape)}, not a module; adapters on bare parameters are not supported"
    near = difflib.get_close_matches(path, [p for p in modules if p and not _OURS.search(p)], n=2)
    return "no such module" + (f", nearest: {', '.join(near)}" if near else "")


def _misfit(layer: LoraLayer, kind: LayerKind, weight_shape: tuple[int, ...]) -> str | None:
    if layer.kind != kind:
        return f"the adapter's factors are for {layer.kind}, the module is {kind}"
    a, b = layer.lora_a.flatten(1), layer.lora_b.flatten(1)
    if a.shape[0] != b.shape[1]:
        return f"lora_a has rank {a.shape[0]}, lora_b has rank {b.shape[1]}"
    if layer.weight_shape != weight_shape:
        return f"the adapter's delta has shape {list(layer.weight_shape)}, the weight {list(weight_shape)}"
    if layer.lora_bias is not None and tuple(layer.lora_bias.shape) != (b.shape[0],):
        return f"lora_bias has shape {list(layer.lora_bias.shape)}, expected [{b.shape[0]}]"
    if layer.lora_bias is not None and kind == "embedding":
        return "an embedding has no lora_bias"
    return None


def _other_base(module: nn.Module, saved: Tensor | None) -> str | None:
    """PEFT saves a resized embedding's base weight along; serving reads the model's own, so the two must agree."""
    if saved is None:
        return None
    weight = getattr(module, "weight", None)
    same = isinstance(weight, Tensor) and weight.shape == saved.shape and not weight.is_meta
    if same and torch.equal(saved.to(weight), weight):  # type: ignore[arg-type]
        return None
    return (
        "the adapter brings the base weight that it was trained with (save_embedding_layers), and the model's differs; "
        "put that weight into the model first, or merge the adapter with lora_fuse.fuse"
    )


def _refuse_overflow(name: str, path: str, layer: LoraLayer, module: nn.Module) -> None:
    """Factors are stored in the weight's dtype; half precision may be too narrow for them."""
    dtype = pool_dtype(module, torch.float32)
    if dtype is not torch.float16:
        return
    largest = max(float(t.abs().max()) if t.numel() else 0.0 for t in layer.tensors())
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"adapter {name!r}: {path} has a factor of {largest:g}, float16 ends at 65504")


def _refuse_overlaps(changed: Mapping[str, str], head_paths: list[str]) -> None:
    """Args: what an adapter has at each path that it changes per row; paths of which adapters have full copies."""
    for head in head_paths:
        for path, what in changed.items():
            if path == head or path.startswith(f"{head}.") or head == "":
                raise ValueError(
                    f"{path}: one adapter has {what} here, another a full copy of {head} (modules_to_save, or a head); "
                    "these two cannot be mixed in one model"
                )
        for other in head_paths:
            if other != head and other.startswith(f"{head}."):
                raise ValueError(f"{other} and {head}: one is inside the other, and adapters have full copies of both")
