"""What ``attach`` does to modules: pools made and filled, classes changed, and changed back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.nn import bypass, heads
from lora_fuse.nn.attachment import AttachedAdapter, Attachment
from lora_fuse.nn.linear import AdaptedModule, original_class
from lora_fuse.nn.packed import PackedLinear
from lora_fuse.nn.plan import Adapter, Plan
from lora_fuse.nn.serving import Serving
from lora_fuse.nn.sparse_plan import make_slots
from lora_fuse.nn.sparse_site import SiteSlots, SparseSite, sparse_class


@dataclass
class Parts:
    """What modules will get, by canonical path; filled before the model is changed."""

    pools: dict[str, AdapterPool]
    copies: dict[str, heads.HeadCopies]
    sparse: dict[str, SiteSlots]


def make_parts(planned: Plan, attachment: Attachment) -> Parts:
    """Empty slots for what no adapter adapted before."""
    serving = attachment.serving
    slots, rank, dtype = serving.physical_slots, serving.max_rank, attachment.fallback_dtype
    return Parts(
        {path: target.make_pool(module, slots, rank, dtype) for path, (module, target) in planned.new_layers.items()},
        heads.new_sites(planned),
        {path: make_slots(module, path, kind, slots) for path, (module, kind) in planned.new_sparse.items()},
    )


def fill(planned: Plan, name: str, made: Parts, attachment: Attachment, slot: int) -> None:
    """Write one adapter into a slot of every layer, old and new; layers that it does not adapt get an empty slot."""
    fitted = planned.adapters[name]
    for path, pool in ({path: m.lora_pool for path, m in attachment.layers.items()} | made.pools).items():
        layer = fitted.layers.get(path)
        if layer is None:
            pool.clear(slot)
        else:
            a, b = layer.lora_a, layer.lora_b
            pool.write(slot, a.detach().flatten(1), b.detach().flatten(1), layer.scaling, layer.lora_bias)
    modules: dict[str, nn.Module] = {**attachment.heads, **{p: module for p, (module, _) in planned.new_heads.items()}}
    for path, site in ({path: m.lora_heads for path, m in attachment.heads.items()} | made.copies).items():
        site.put(slot, fitted.heads.get(path), modules[path])
    for path, slots in ({path: m.lora_sparse for path, m in attachment.sparse.items()} | made.sparse).items():
        slots.put(slot, fitted.sites.get(path))


def describe(adapter: Adapter, planned: Plan, name: str, slot: int) -> AttachedAdapter:
    """The adapter's entry in ``adapters(model)``."""
    fitted = planned.adapters[name]
    rank, density = (0, adapter.density) if isinstance(adapter, SparseAdapter) else (adapter.rank, None)
    layers = (*fitted.layers, *fitted.sites)
    return AttachedAdapter(slot, rank, adapter.nbytes, layers, tuple(fitted.heads), adapter.source, density)


def install(model: nn.Module, planned: Plan, attachment: Attachment, made: Parts) -> None:
    """Change the classes of modules that get slots, and note them in the attachment."""
    serving = attachment.serving
    for path, (module, target) in planned.new_layers.items():
        module.__dict__["lora_fit"] = target.fit
        adapted: type[nn.Module] = target.adapted
        pack, index = module.__dict__.get("lora_pack", (None, 0))
        if pack is not None:
            pack.set_pool(index, made.pools[path])
            adapted = PackedLinear
        if path in attachment.sparse:
            adapted = sparse_class(module, adapted)
        _adapt(module, adapted, serving, path, lora_pool=made.pools[path])
        attachment.layers[path] = cast(AdaptedModule, module)
    for path, (module, adapted) in planned.new_heads.items():
        _adapt(module, adapted, serving, path, lora_heads=made.copies[path])
        attachment.heads[path] = cast(heads.MultiHead, module)
    for path, (module, _) in planned.new_sparse.items():
        _adapt(module, sparse_class(module, type(module)), serving, path, lora_sparse=made.sparse[path])
        attachment.sparse[path] = cast(SparseSite, module)
    attachment.switched += bypass.switch_off(model, [*planned.new_layers, *planned.new_sparse])


def install_packs(attachment: Attachment) -> None:
    """Change the classes of packed layers; those that have slots get them from ``install``."""
    attachment.serving.packs = bool(attachment.packs)
    for pack, layers in attachment.packs:
        for i, layer in enumerate(layers):
            layer.__dict__["lora_pack"] = pack, i
            _adapt(layer, PackedLinear, attachment.serving, pack.paths[i])


def dissolve_packs(attachment: Attachment, planned: Plan) -> None:
    """Take packs apart whose layers get something that wants a product of their own."""
    apart = (*planned.new_sparse, *planned.new_heads)
    for pack, _ in attachment.packs:
        if any(path == a or path.startswith(f"{a}.") or a == "" for a in apart for path in pack.paths):
            pack.dissolve()


def _adapt(module: nn.Module, adapted: type[nn.Module], serving: Serving, path: str, **children: nn.Module) -> None:
    own_forward = module.__dict__.pop("forward", None)
    if own_forward is not None:
        module.__dict__["lora_base_forward"] = own_forward
    for name, child in children.items():
        child.train(module.training)
        module._modules[name] = child
    module.__dict__["lora_serving"], module.__dict__["lora_path"] = serving, path
    module.__class__ = adapted  # last: a forward on another thread finds everything in place


def restore(module: nn.Module) -> None:
    """Make an adapted module what it was."""
    module.__class__ = original_class(type(module))  # type: ignore[assignment]
    for name in ("lora_pool", "lora_heads", "lora_sparse"):
        module._modules.pop(name, None)
    for name in ("lora_serving", "lora_path", "lora_fit", "lora_pack"):
        module.__dict__.pop(name, None)
    own_forward = module.__dict__.pop("lora_base_forward", None)
    if own_forward is not None:
        module.__dict__["forward"] = own_forward
