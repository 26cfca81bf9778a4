"""Put adapters into a model and take them out again: plan everything first, then change the model without failing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fuse.adapters.joint_adapter import JointAdapter
from lora_fuse.adapters.load import load_adapter
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.adapters.sparse_files import load_sparse_adapter, sparse_folder
from lora_fuse.nn import bypass, generate, heads, packing
from lora_fuse.nn.attachment import Attachment, Begin, End, attachment_of, needs_of, outgrows, structure_of, unwrap
from lora_fuse.nn.install import describe, dissolve_packs, fill, install, install_packs, make_parts, restore
from lora_fuse.nn.plan import Adapter, plan
from lora_fuse.nn.serving import Serving
from lora_fuse.nn.switch import refuse_while_switched, undo_switch

_WAIT_SECONDS = 5.0


def _load(adapters: Mapping[str, Any]) -> dict[str, Adapter]:
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters: expected a mapping of names to adapters, got {type(adapters).__name__}")
    loaded = {}
    for name, source in adapters.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"adapters: names are non-empty strings, got {name!r}")
        loaded[name] = source if isinstance(source, (LoraAdapter, SparseAdapter, JointAdapter)) else _open(source)
    return loaded


def _open(source: Any) -> Adapter:
    if isinstance(source, (str, os.PathLike)) and (Path(source).expanduser() / "joint.json").is_file():
        raise ValueError(f"{source}: holds a joint bank, not one adapter; give load_joint(path).adapters")
    folder = sparse_folder(source) if isinstance(source, (str, os.PathLike)) else None
    return load_adapter(source) if folder is None else load_sparse_adapter(folder)


def attach(
    model: nn.Module,
    adapters: Mapping[str, Any],
    *,
    num_slots: int | None = None,
    max_rank: int | None = None,
    batch_dim: int = 0,
    pack: bool = False,
    augment: bool = False,
    overlap: bool = False,
    max_pairs: int = 4,
) -> nn.Module:
    """Give the model's layers slots and put the adapters there, in place. Nothing is selected yet: it computes as
    before.

    Adapted modules keep their identity, parameters, hooks and state-dict keys; only their class changes. The same
    module reached by two paths is adapted once, under either path. A layer that shares its weight with another (a tied
    lm_head) is adapted alone, since the weight is not touched. Factors are stored in the dtype of the weight they
    belong to.

    ``JointAdapter``s of one bank (``joint_compress``) share their bases in every layer, which are stored once.

    A ``SparseAdapter`` is relative to merged weights, which the model has to hold; it takes a slot like any other. Its
    rows get what the whole fine-tune would make of them: weights and biases of Linear, Conv1D, Conv2d and Embedding,
    LayerNorm and RMSNorm, and heads. A weighted mix adds the weighted differences of all parameters.

    ``pack=True`` makes one product and one pass over the slots of siblings that receive the same input: q/k/v, gate/up
    and the like, found by their names in Hugging Face and diffusers models and checked call by call. It is meant for
    inference: with gradients, under autocast or transforms, and in compiled code, each layer computes alone. Know that

    - the siblings' weights are moved into one piece of memory, which lives as long as any of them; ``detach`` gives
      each memory of its own again;
    - a wider product may round differently, so base rows agree with the bare layer's within rounding only;
    - under ``inference_mode``, where tensors count no versions, a write into the input between two siblings is noticed
      only until a forward has gone without one;
    - siblings' outputs are views of one tensor: rows lie further apart, and holding one holds the others' memory;
    - layers are packed when attaching, never later. Packs come apart where a layer gets sparse deltas, a full copy (a
      head) or other weights; ``adapters(model)`` and ``print(model)`` tell what is packed.

    ``augment=True`` lays A behind the weight, in one piece of memory, where a plain ``nn.Linear`` gets slots and there
    is room: its product yields every slot's shrink as well, for up to 256 rows in plain inference, and one expand is
    left to do. For decoding on GPUs. The shrink is rounded to the layer's dtype, as torch and PEFT round it, the wider
    product may round base rows differently, and outputs are views. See docs/decoding.md.

    Limits: what ``checkpoint(model, ..., use_reentrant=True)`` runs again in the backward sees the selection of that
    moment, not the forward's (inside the model, or with ``use_reentrant=False``, it sees the forward's).
    ``torch.jit.trace`` is refused, since a trace would keep one selection for good.

    Args:
        model: the outermost module, the one whose forward is called. Selections belong to it.
        adapters: name -> ``LoraAdapter``, ``SparseAdapter``, ``JointAdapter``, whatever ``load_adapter`` takes, or the
            folder of a sparse adapter (one task's in a saved PERU). May be empty.
        num_slots: how many adapters may be attached at once; default ``max(8, number given)``.
        max_rank: largest rank that will fit; default the largest present.
        batch_dim: batch axis of the layers' inputs; 1 for ``[seq, batch, features]``. A layer whose input has another
            axis there is refused, but ``[seq, batch, features]`` with ``seq == batch`` looks like a batch-first input:
            such a model needs ``batch_dim=1``, or its rows get each other's adapters.
        pack: let siblings that receive the same input share one product, where there are any.
        augment: let products yield the shrink as well, where there is room.
        overlap: on CUDA devices, run the shrink of a few rows on a stream of its own beside a large layer's product.
        max_pairs: most adapters that one row of a captured forward (a CUDA graph) may mix.
    Returns:
        ``model``.
    Raises:
        ValueError, TypeError: an adapter does not fit the model (offending paths are listed), a rank or the number of
            adapters is too large, something an adapter holds cannot be served per row, the model does not hold the
            merged weights of a sparse adapter. The model is then as it was.
    """
    given, model = model, unwrap(model)
    if "lora_attachment" in model.__dict__:
        raise ValueError("model: adapters are already attached; use add_adapter, swap_adapter or remove_adapter")
    loaded = _load(adapters)
    if num_slots is None:
        num_slots = max(8, len(loaded))
    if max_rank is None:
        max_rank = max((a.rank for a in loaded.values() if isinstance(a, LoraAdapter)), default=1) or 1
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"batch_dim: got {batch_dim!r}, accepted is an integer from 0")
    for what, value in (("num_slots", num_slots), ("max_rank", max_rank), ("max_pairs", max_pairs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what}: got {value!r}, accepted is an integer from 1")
    for what, flag in (("pack", pack), ("augment", augment), ("overlap", overlap)):
        if not isinstance(flag, bool):
            raise TypeError(f"{what}: got {flag!r}, accepted are True and False")
    if len(loaded) > num_slots:
        raise ValueError(f"num_slots: {len(loaded)} adapters were given, {num_slots} slots hold at most {num_slots}")
    serving = Serving(num_slots, max_rank, batch_dim, max_pairs, overlap)
    factors = (t.dtype for a in loaded.values() if not isinstance(a, SparseAdapter) for t in a.tensors())
    dtype = next(factors, torch.float32)
    attachment = Attachment(serving, dtype)
    with torch.inference_mode(False), torch.no_grad():
        planned = plan(model, loaded, {}, {}, {}, max_rank)
        leases = {name: serving.allocator.acquire(0) for name in loaded}
        made = make_parts(planned, attachment)
        for name, adapter in loaded.items():
            fill(planned, name, made, attachment, leases[name].index)
            attachment.info[name] = describe(adapter, planned, name, leases[name].index)
        apart = (*planned.new_sparse, *planned.new_heads)
        groups = packing.find_siblings(model, apart) if pack else []
        if augment:
            groups += packing.find_others(model, apart, groups)
        attachment.packs = packing.pack(groups, made.pools, augment)
    # From here on nothing can fail.
    attachment.tasks = {name: a for name, a in loaded.items() if isinstance(a, SparseAdapter)}
    install_packs(attachment)
    install(model, planned, attachment, made)
    model.register_forward_pre_hook(Begin(serving), prepend=True, with_kwargs=True)
    model.register_forward_hook(End(serving), always_call=True)
    attachment.wrapped = generate.install(model, serving)
    model.__dict__["lora_attachment"] = attachment
    serving.structure = structure_of(attachment)
    copied = {name: frozenset(info.heads) for name, info in attachment.info.items()}
    serving.publish(leases, copied, needs_of(attachment, planned))
    return given


def detach(model: nn.Module) -> nn.Module:
    """Take all adapters out: classes, attributes, hooks and flags are what they were, parameters hold the same bits.

    A task that ``switch_task`` wrote into the weights is undone first.

    Args:
        model: what ``attach`` returned; no forward of it may be running.
    Returns:
        ``model``.
    Raises:
        ValueError: nothing is attached, or something (a parametrization) changed an adapted module's class since;
            nothing is changed then.
    """
    attachment = attachment_of(model)
    given, model = model, unwrap(model)
    packed = {path: layer for pack, layers in attachment.packs for path, layer in zip(pack.paths, layers, strict=True)}
    adapted: dict[str, nn.Module] = {**packed, **attachment.layers, **attachment.heads, **attachment.sparse}
    for path, module in adapted.items():
        if "lora_base" not in type(module).__dict__:
            raise ValueError(
                f"model: {path} became a {type(module).__name__} after attach; undo that (for example "
                "remove its parametrizations) before detach"
            )
    undo_switch(model, attachment)
    packing.unpack(attachment.packs)
    for module in adapted.values():
        restore(module)
    for hooks, kind in ((model._forward_pre_hooks, Begin), (model._forward_hooks, End)):
        for key in [key for key, hook in hooks.items() if type(hook) is kind]:  # type: ignore[attr-defined]
            for table in (hooks, model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                table.pop(key, None)  # type: ignore[attr-defined]
    bypass.restore(attachment.switched)
    generate.remove(attachment.wrapped)
    del model.__dict__["lora_attachment"]
    return given


def add_adapter(model: nn.Module, name: str, adapter: Any, *, timeout: float = _WAIT_SECONDS) -> None:
    """Attach one more adapter while the model may be serving.

    Layers that no adapter had before get slots now, which makes compiled code that runs them compile once more.

    Args:
        name: must be new.
        adapter: one, or where it lies, as ``attach`` takes them.
        timeout: seconds to wait for a slot that running forwards still hold.
    Raises:
        ValueError: the name is taken, all slots are, the adapter does not fit, or a task is switched in
            (``switch_task``); nothing is changed.
        RuntimeError: no slot became free in time; nothing is changed.
    """
    attachment = attachment_of(model)
    loaded = _load({name: adapter})
    with attachment.changing:
        refuse_while_switched(attachment, "add_adapter")
        taken = attachment.serving.published.leases
        if name in taken:
            raise ValueError(f"name: {name!r} is attached already; swap_adapter replaces it")
        if len(taken) >= attachment.serving.num_slots:
            raise ValueError(
                f"adapters: all {attachment.serving.num_slots} slots are taken by {sorted(taken)}; remove one, or "
                "attach with a larger num_slots"
            )
        _put(model, attachment, name, loaded, timeout)


def swap_adapter(model: nn.Module, name: str, adapter: Any, *, timeout: float = _WAIT_SECONDS) -> None:
    """Replace an adapter under its name. Forwards that are running finish with the old one.

    The new factors go into a spare slot, then the name changes over in one step; ``adapter_slots`` tells the new slot.

    Args:
        name: an attached adapter.
        adapter: what to put there, likewise.
        timeout: seconds to wait for the spare slot, if running forwards (or graphs awaiting their backward) still hold
            it.
    Raises:
        ValueError: nothing of that name is attached, the new adapter does not fit, or a task is switched in; nothing
            is changed.
        RuntimeError: the spare slot did not become free in time; nothing is changed.
    """
    attachment = attachment_of(model)
    loaded = _load({name: adapter})
    with attachment.changing:
        refuse_while_switched(attachment, "swap_adapter")
        attachment.serving.published.lease(name, "name")
        _put(model, attachment, name, loaded, timeout)


def _put(model: nn.Module, attachment: Attachment, name: str, loaded: Mapping[str, Adapter], timeout: float) -> None:
    serving = attachment.serving
    model = unwrap(model)
    with torch.inference_mode(False), torch.no_grad():
        widths = {
            path: {n: size for n, size in widths.items() if n not in (None, name)}
            for path, widths in heads.sizes(attachment.heads, serving.published).items()
        }
        packed = [path for pack, _ in attachment.packs for path in pack.paths]
        planned = plan(model, loaded, attachment.layers, attachment.sparse, widths, serving.max_rank, packed)  # type: ignore[arg-type]
        serving.refuse_growth(name, outgrows(attachment, planned, name))
        lease = serving.allocator.acquire(timeout)
        made = make_parts(planned, attachment)
        fill(planned, name, made, attachment, lease.index)
    dissolve_packs(attachment, planned)
    install(model, planned, attachment, made)
    info = describe(loaded[name], planned, name, lease.index)
    attachment.info = {**attachment.info, name: info}
    tasks = {n: task for n, task in attachment.tasks.items() if n != name}
    attachment.tasks = tasks | {n: a for n, a in loaded.items() if isinstance(a, SparseAdapter)}
    leases = {**serving.published.leases, name: lease}
    serving.structure = structure_of(attachment)
    copied = {**serving.published.heads, name: frozenset(info.heads)}
    serving.publish(leases, copied, needs_of(attachment, planned))
    _prune(attachment)


def _prune(attachment: Attachment) -> None:
    """Free what slots hold that nothing reads any more; LoRA pools keep their size."""
    heads.prune(attachment.heads.values(), attachment.serving)
    live = set(attachment.serving.allocator.live.keys())
    for module in attachment.sparse.values():
        module.lora_sparse.keep(live)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter out. Forwards that are running finish with it.

    A selection that still names it (the default, or a ``use_adapters`` block) makes the next forward under it a
    ``ValueError``; replays of a CUDA graph, which cannot raise, compute such rows as base rows.

    Args:
        model: an attached model.
        name: an attached adapter.
    Raises:
        ValueError: nothing of that name is attached, or a task is switched in.
    """
    attachment = attachment_of(model)
    with attachment.changing:
        refuse_while_switched(attachment, "remove_adapter")
        serving = attachment.serving
        serving.published.lease(name, "name")
        attachment.info = {n: info for n, info in attachment.info.items() if n != name}
        attachment.tasks = {n: task for n, task in attachment.tasks.items() if n != name}
        serving.publish(
            {n: lease for n, lease in serving.published.leases.items() if n != name},
            {n: paths for n, paths in serving.published.heads.items() if n != name},
        )
        _prune(attachment)
