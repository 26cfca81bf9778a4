"""Choose adapters for the forwards to come, and see which there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from lora_fuse.nn import heads
from lora_fuse.nn.attachment import AttachedAdapter, attachment_of
from lora_fuse.nn.selection import Selection, SelectionLike, parse_selection
from lora_fuse.nn.serving import Context
from lora_fuse.nn.switch import refuse_while_switched, selects_base


def adapters(model: nn.Module) -> dict[str, AttachedAdapter]:
    """What is attached: name -> slot, rank, bytes, module paths, which of them run packed with
    their siblings, and which have A behind the weight.

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    attachment = attachment_of(model)
    packs = [pack for pack, _ in attachment.packs if pack.live]
    if not packs:
        return dict(attachment.info)
    packed = {path for pack in packs if len(pack.paths) > 1 for path in pack.paths}
    augmented = {path for pack in packs for i, path in enumerate(pack.paths) if pack.is_augmented(i)}
    return {
        name: replace(
            info,
            packed=tuple(path for path in info.layers if path in packed),
            augmented=tuple(path for path in info.layers if path in augmented),
        )
        for name, info in attachment.info.items()
    }


def adapter_slots(model: nn.Module) -> dict[str, int]:
    """Name -> slot, as a tensor selection wants it. A swap moves an adapter to another slot.

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    return {name: lease.index for name, lease in attachment_of(model).serving.published.leases.items()}


@contextmanager
def use_adapters(model: nn.Module, selection: SelectionLike) -> Iterator[None]:
    """Select adapters for the forwards that the calling thread makes until exit.

    Args:
        model: an attached model.
        selection: one entry for every row, a list with an entry per sample, or an int32 tensor ``[num_tokens]`` of
            slots (-1 = base). An entry is a name, None (base), or ``{name: weight, ...}``.
    Raises:
        ValueError, TypeError: an unknown name (those attached are listed), a weight that is not finite, a slot that
            holds no adapter (its row is named), or a task is switched in (``switch_task``). A list of the wrong length
            is refused by the forward, which says both lengths.
    """
    serving = attachment_of(model).serving
    serving.slot_errors.check()
    context: Context = serving.enter(_parse(model, selection))
    try:
        yield
    finally:
        serving.leave(context)
    serving.slot_errors.check()


def set_adapters(model: nn.Module, selection: SelectionLike) -> None:
    """Set the model's default selection, seen by every thread that is not inside ``use_adapters``. Weights never
    change.

    CUDA graphs captured under the model's default selection follow: their next replay computes with the new one, and
    likewise after ``add_adapter``, ``swap_adapter`` and ``remove_adapter``. Graphs of other batch sizes than the
    selection's compute base rows until it fits them again. See docs/cuda_graphs.md.

    Args and Raises: as ``use_adapters``; also a ``ValueError`` if a graph was captured and the selection fits none (it
        has another number of samples or tokens, mixes more adapters than ``attach`` was told, or names one with parts
        that the graph lacks). Nothing is changed then.
    """
    serving = attachment_of(model).serving
    serving.slot_errors.check()
    serving.set_default(_parse(model, selection))


def check(model: nn.Module) -> None:
    """Wait for what devices still have to find out about tensors of slots, and raise it.

    A selection that is a tensor on a GPU is not read back. A slot in it that is out of range or holds no adapter makes
    its row a base row, and the ``ValueError`` comes at the next ``set_adapters``, ``use_adapters`` or forward once the
    device has got that far, or here.

    Raises:
        ValueError: naming the first such row and its slot; or nothing is attached to ``model``.
    """
    attachment_of(model).serving.slot_errors.check(wait=True)


def _parse(model: nn.Module, selection: SelectionLike) -> Selection:
    attachment = attachment_of(model)
    serving = attachment.serving
    parsed = parse_selection(selection, serving.published, serving.physical_slots)
    if not selects_base(parsed):
        refuse_while_switched(attachment, "selection")
    return parsed


def head_sizes(model: nn.Module) -> dict[str, dict[str | None, int]]:
    """Module path -> {adapter name: width of its head, None: width of the base model's head}.

    Adapters that bring no copy of a module are left out there; their rows use the base model's.

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    attachment = attachment_of(model)
    return heads.sizes(attachment.heads, attachment.serving.published)
