"""What ``attach`` leaves on a model: the record that undoes it, and the hooks of the outermost forward."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.adapters.sparse_adapter import SparseAdapter
from lora_fuse.nn.bypass import Switched
from lora_fuse.nn.heads import MultiHead
from lora_fuse.nn.linear import AdaptedModule
from lora_fuse.nn.packing import Packs, repack
from lora_fuse.nn.plan import Plan
from lora_fuse.nn.serving import Serving, batched_input
from lora_fuse.nn.sparse_site import SparseSite
from lora_fuse.nn.traced import pin, run_as_plain_python, unpin
from lora_fuse.ops.exchange import Exchanges


@dataclass(frozen=True)
class AttachedAdapter:
    """What ``adapters()`` says about one adapter.

    Args:
        slot: where it lies now; a swap moves it.
        rank: its largest rank; 0 for a sparse adapter.
        nbytes: bytes of its tensors as given.
        layers: module paths that it adapts.
        heads: module paths that it brings a copy of.
        source: where it came from.
        density: of a sparse adapter, the share of entries that it keeps; else None.
        packed: those of ``layers`` that share one product with their siblings (``attach(..., pack=True)``).
        augmented: those of ``layers`` whose product yields the shrink as well (``attach(..., augment=True)``).
    """

    slot: int
    rank: int
    nbytes: int
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    source: str
    density: float | None = None
    packed: tuple[str, ...] = ()
    augmented: tuple[str, ...] = ()


class Lock:
    """A lock that copies and pickles as a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


@dataclass(frozen=True)
class ActiveTask:
    """The task that ``switch_task`` wrote into the weights.

    Args:
        name: of its adapter, which stays attached for as long.
        saved: parameter name -> what was overwritten: ``[nnz]`` entries of a sparse matrix, or a whole tensor.
    """

    name: str
    saved: Mapping[str, Tensor]


@dataclass
class Attachment:
    """What ``attach`` did to a model; kept on the model, used to undo it."""

    serving: Serving
    fallback_dtype: torch.dtype
    layers: dict[str, AdaptedModule] = field(default_factory=dict)
    heads: dict[str, MultiHead] = field(default_factory=dict)
    sparse: dict[str, SparseSite] = field(default_factory=dict)
    info: dict[str, AttachedAdapter] = field(default_factory=dict)
    tasks: dict[str, SparseAdapter] = field(default_factory=dict)
    active: ActiveTask | None = None
    packs: Packs = field(default_factory=list)
    switched: list[Switched] = field(default_factory=list)
    wrapped: list[tuple[nn.Module, str]] = field(default_factory=list)
    changing: Lock = field(default_factory=Lock)
    exchanges: Exchanges = field(default_factory=Exchanges)


class Begin:
    """Forward pre-hook of the outermost module."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            pin(self.serving, batched_input(args, kwargs))
        else:
            if self.serving.repack:
                self._repack(module)
            self.serving.begin(args, kwargs)

    def _repack(self, module: nn.Module) -> None:
        with self.serving.lock:  # no other forward of the model starts before this is done
            if self.serving.repack:
                repack(module.__dict__["lora_attachment"].packs)
                self.serving.repack = False


class End:
    """Forward hook of the outermost module; runs after an exception too."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            unpin(self.serving)
        else:
            self.serving.end(output)


run_as_plain_python(Begin.__call__)
run_as_plain_python(End.__call__)


def structure_of(attachment: Attachment) -> int:
    """How many parts the model has that adapters brought: a CUDA graph has those that were there at its capture."""
    biases = sum(layer.lora_pool.slot_bias is not None for layer in attachment.layers.values())
    return len(attachment.layers) + len(attachment.heads) + len(attachment.sparse) + biases


def outgrows(attachment: Attachment, planned: Plan, name: str) -> bool:
    """Whether an adapter needs parts that the model does not have yet, or that no CUDA graph can follow."""
    fitted = planned.adapters[name]
    biased = (path for path, layer in fitted.layers.items() if layer.lora_bias is not None)
    return bool(
        planned.new_layers
        or fitted.heads
        or fitted.sites
        or any(path not in attachment.layers or attachment.layers[path].lora_pool.slot_bias is None for path in biased)
    )


def needs_of(attachment: Attachment, planned: Plan) -> dict[str, float]:
    """The structure that a CUDA graph has to know of to serve each adapter; infinite where none can."""
    now = structure_of(attachment)
    return {n: math.inf if fitted.heads or fitted.sites else now for n, fitted in planned.adapters.items()}


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, of what ``torch.compile`` returned."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return model._modules.get("_orig_mod") or model


def attachment_of(model: nn.Module) -> Attachment:
    model = unwrap(model)
    attachment = model.__dict__.get("lora_attachment")
    if attachment is None:
        raise ValueError(
            f"model: this {type(model).__name__} has no adapters attached; call lora_fuse.attach(model, ...) first"
        )
    return attachment  # type: ignore[no-any-return]
