"""Where a joint adapter's cores go in a model; refused by name before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from lora_fuse.adapters.joint_adapter import JointAdapter
from lora_fuse.nn.joint_site import JointOwn, JointSlots
from lora_fuse.nn.sparse_site import Own, SiteSlots
from lora_fuse.nn.targets import pool_dtype, target_of


def fit(
    adapter: JointAdapter,
    modules: Mapping[str, nn.Module],
    canonical: Mapping[int, str],
    held: Mapping[str, nn.Module],
    planned: Mapping[str, Mapping[str, Own | JointOwn]],
    missing: Callable[[str], str],
) -> tuple[dict[str, JointOwn], list[str]]:
    """Fit one adapter to a model.

    Args:
        modules: every path -> module, duplicates included.
        canonical: id of a module -> its canonical path.
        held: modules that have slots for fine-tunes or joint adapters already, by canonical path.
        planned: what the adapters planned so far put there, by name and canonical path.
        missing: says what is wrong with a path that no module has.
    Returns:
        Where its cores go, and for each layer that cannot be served why: ``"path: reason"``.
    """
    adapter.check()
    sites: dict[str, JointOwn] = {}
    offenders = []
    for path in adapter.cores:
        module = modules.get(path)
        home = path if module is None else canonical[id(module)]
        own = JointOwn(adapter, path)
        if module is None:
            why: str | None = missing(path)
        elif home in sites:
            why = f"is the same module as {home}, and the adapter has cores for both"
        else:
            others = [layers[home] for layers in planned.values() if home in layers]
            slots = getattr(held.get(home), "lora_sparse", None)
            parent = modules.get(home.rpartition(".")[0]) if home else None
            why = _misfit(own, module, home, parent) or _clash(own, slots, others)
        if why is None:
            sites[home] = own
        else:
            offenders.append(f"{path}: {why}")
    return sites, offenders


def _misfit(own: JointOwn, module: nn.Module, home: str, parent: nn.Module | None) -> str | None:
    target = target_of(module, home, parent, ours=True)
    if isinstance(target, str):
        return target
    basis = own.basis
    shape = (basis.u.shape[1], basis.v.shape[1])
    if target.kind != "linear" or tuple(target.weight_shape) != shape:
        return f"the bases are for a linear weight {list(shape)}, this is {target.kind} {list(target.weight_shape)}"
    if pool_dtype(module, torch.float32) is torch.float16:
        largest = max(float(t.abs().max()) if t.numel() else 0.0 for t in (basis.u, basis.v, own.core))
        if largest > torch.finfo(torch.float16).max:
            return f"has a value of {largest:g}, float16 ends at 65504"
    return None


def _clash(own: JointOwn, slots: SiteSlots | None, others: list[Own | JointOwn]) -> str | None:
    """Why a layer cannot hold this adapter beside what it holds already."""
    if any(isinstance(other, Own) for other in others) or not isinstance(slots, (JointSlots, type(None))):
        return "holds fine-tunes as sparse adapters; a layer takes those or joint adapters, not both"
    prints = {other.basis.fingerprint for other in others if isinstance(other, JointOwn)}
    if slots is not None and slots.filled:
        prints.add(slots.fingerprint)
    if prints - {own.basis.fingerprint}:
        return "holds adapters of another joint bank, whose bases differ; compress them together, or remove those first"
    return None
