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
    """What is attached: name -> slot, rank, bytes, module paths, and which of them run packed with their siblings.

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    attachment = attachment_of(model)
    packed = {path for pack, _ in attachment.packs if pack.live for path in pack.paths}
    if not packed:
        return dict(attachment.info)
    return {
        name: replace(info, packed=tuple(path for path in info.layers if path in packed))
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
    context: Context = serving.enter(_parse(model, selection))
    try:
        yield
    finally:
        serving.leave(context)


def set_adapters(model: nn.Module, selection: SelectionLike) -> None:
    """Set the model's default selection, seen by every thread that is not inside ``use_adapters``. Weights never
    change.

    Args and Raises: as ``use_adapters``.
    """
    serving = attachment_of(model).serving
    serving.default = Context(_parse(model, selection))


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
