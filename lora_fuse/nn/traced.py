"""Selections under ``torch.compile``: two ops read the current selection at run time, so that no graph depends on it.

Compiled code must not bake a selection in, nor be recompiled when it changes. So a compiled layer asks an opaque op
for the routing tensors, which then flow into ``multi_lora`` (and into the saved tensors of its backward) like any
others. The outermost forward's hooks run outside of compiled code where ``torch.compile(model)`` puts them, and take
the selection for the thread as ever. Where they are traced into a larger graph they pin it with a token instead: all
layers, and their recomputation in a backward, see one snapshot.

On a CPU the routing's tensors have the sizes that the selection makes. On a GPU they have one size for all selections
(adapters/slab.py), so that inductor may capture the code into CUDA graphs (``mode="reduce-overhead"``): a captured op
copies from the slab that later selections are written into.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.nn import capture
from lora_fuse.nn.serving import BY_HANDLE, Serving, batch_size, check_batch
from lora_fuse.ops._library import LIBRARY

if TYPE_CHECKING:
    from lora_fuse.nn.selection import Snapshot

LIBRARY.define("pin_selection(Tensor x, int handle) -> Tensor")
LIBRARY.define(
    "current_routing(Tensor x, Tensor? token, int handle, bool one_entry)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("current_slab(Tensor x, Tensor? token, int handle, bool one_entry) -> Tensor")


def run_as_plain_python(function: Callable[..., Any]) -> None:
    """Keep dynamo from compiling this function as a frame of its own; tracing through a call of it still works.

    ``torch.compiler.disable`` would be a graph break there, and importing it costs a second.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def _serving(handle: int) -> Serving:
    serving = BY_HANDLE.get(handle)
    if serving is None:
        raise RuntimeError("the attached model that this code was compiled for no longer exists; compile again")
    return serving


def _pin(x: Tensor, handle: int) -> Tensor:
    snapshot, seq = _serving(handle).current()
    seq, batch = check_batch(snapshot, x), batch_size(snapshot, x)
    token = torch.zeros(1, dtype=torch.int64, device=x.device)
    # Lives, and keeps the slots on loan, for as long as the token does.
    token.lora_pinned = (snapshot, seq, batch)  # type: ignore[attr-defined]
    return token


def snapshot_of(token: Tensor | None, handle: int) -> tuple[Snapshot, int | None]:
    """What the token pinned, or else what the calling thread works under."""
    pinned: tuple[Snapshot, int | None, int | None] | None = getattr(token, "lora_pinned", None)
    return _serving(handle).current() if pinned is None else pinned[:2]


def batch_of(token: Tensor | None, handle: int) -> int | None:
    """How many samples the outermost forward's input has, if one is running."""
    pinned: tuple[Snapshot, int | None, int | None] | None = getattr(token, "lora_pinned", None)
    return _serving(handle).local.batch if pinned is None else pinned[2]


def _current(x: Tensor, token: Tensor | None, handle: int, one_entry: bool) -> tuple[Tensor, ...]:
    snapshot, seq = snapshot_of(token, handle)
    if one_entry:
        snapshot.require_one_entry("an attached expert")
    routing = snapshot.explicit_routing(tuple(x.shape[:-1]), x.device, seq, "an attached layer")
    # An op's outputs are the caller's to overwrite, so they are copies.
    tiles = routing.rows.new_empty(0, 4) if routing.tiles is None else routing.tiles
    copies = tuple(t.clone() for t in (*routing.tensors, tiles) if t is not None)
    copies[0].lora_leases = routing.leases  # type: ignore[attr-defined]
    return copies


def _current_slab(x: Tensor, token: Tensor | None, handle: int, one_entry: bool) -> Tensor:
    snapshot, seq = snapshot_of(token, handle)
    if one_entry:
        snapshot.require_one_entry("an attached expert")
    # No slabs for captures are made in here: inductor's warm-up keeps count of what is allocated.
    where = tuple(x.shape[:-1]), x.device
    found = _serving(handle).slab(snapshot, seq, batch_of(token, handle), where, "an attached layer", grant=False)
    copy = found.tensor.clone()
    copy.untyped_storage().lora_leases = found.routing.leases  # type: ignore[attr-defined]  # views outlive the tensor
    return copy


run_as_plain_python(_current_slab)
run_as_plain_python(_pin)  # where a graph broke, dynamo would look into the ops that run between its pieces
run_as_plain_python(_current)


def _fake_current(x: Tensor, token: Tensor | None, handle: int, one_entry: bool) -> tuple[Tensor, ...]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    num_slots = _serving(handle).physical_slots
    num_rows = x[..., 0].numel()
    index = x.new_empty(num_pairs, dtype=torch.int32)
    return (
        index,
        x.new_empty(num_pairs, dtype=torch.float32),
        x.new_empty(num_slots + 1, dtype=torch.int32),
        x.new_empty(num_rows + 1, dtype=torch.int32),
        torch.empty_like(index),
        index.new_empty(torch.library.get_ctx().new_dynamic_size(), 4),
    )


def _fake_slab(x: Tensor, token: Tensor | None, handle: int, one_entry: bool) -> Tensor:
    return x.new_empty(_layout(_serving(handle), x).size, dtype=torch.int32)


def _layout(serving: Serving, x: Tensor) -> SlabLayout:
    return SlabLayout(math.prod(x.shape[:-1]), serving.max_pairs, serving.physical_slots)


LIBRARY.impl("current_slab", _current_slab, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::current_slab", _fake_slab, lib=LIBRARY)
LIBRARY.impl("pin_selection", _pin, "CompositeExplicitAutograd")
LIBRARY.impl("current_routing", _current, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lora_fuse::pin_selection", lambda x, handle: x.new_empty(1, dtype=torch.int64), lib=LIBRARY
)
torch.library.register_fake("lora_fuse::current_routing", _fake_current, lib=LIBRARY)


def pin(serving: Serving, x: Tensor | None) -> None:
    """Start a compiled outermost forward."""
    serving.token = None if x is None else torch.ops.lora_fuse.pin_selection(x.detach(), serving.handle)


def unpin(serving: Serving) -> None:
    """End a compiled outermost forward."""
    serving.token = None


def traced_routing(serving: Serving, x: Tensor, one_entry: bool = False) -> tuple[Tensor, ...]:
    """``(*Routing.tensors, Routing.tiles)`` of an input ``[..., features]``, read at run time; no tiles on a
    CPU, padded on a GPU.

    Args:
        one_entry: refuse any selection but one entry for all rows.
    """
    if x.device.type == "cuda" or capture.simulating:
        slab = torch.ops.lora_fuse.current_slab(x.detach(), serving.token, serving.handle, one_entry)
        return _layout(serving, x).split(slab)
    return torch.ops.lora_fuse.current_routing(x.detach(), serving.token, serving.handle, one_entry)
