"""Get everything ready that serving can reach, before the first request comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.functional import multi_lora, multi_lora_slices, sparse_delta_linear
from lora_fuse.nn.attachment import Attachment, attachment_of
from lora_fuse.nn.augmented import MOST_ROWS
from lora_fuse.nn.capture import mode_of
from lora_fuse.nn.joint_site import JointSlots
from lora_fuse.nn.sparse_site import LinearSlots
from lora_fuse.ops.routed import KERNEL_DTYPES


@torch.no_grad()
def warmup(model: nn.Module, num_tokens: Sequence[int] = (1, 64), max_tokens: int = 8192) -> int:
    """Run every distinct kind of attached layer's adapter part once, on zeros: LoRA factors, joint bases
    and cores, sparse deltas. On a GPU, first compile all the kernels of LoRA factors that serving can reach.

    On a CPU this loads the native library, settles the instruction set and starts the thread pool; the kernels
    themselves were compiled when the package was built. On a CUDA device kernels are compiled at run time, so without
    this the first batches of a new kind wait for a compiler. Compiled is what forwards of 1 to ``max_tokens`` rows
    need, in whatever mixes and whichever adapters are put or swapped, captured or not: for layer inputs that are dense
    in memory and rows of at most ``max_pairs`` adapters (``attach``). It takes seconds to minutes, once: Triton keeps
    what it compiled on disk. It never runs the model itself, so what ``torch.compile`` makes of it is not warmed.
    Norms, embeddings and heads of sparse adapters are plain torch, with nothing to get ready.

    Args:
        model: an attached model.
        num_tokens: batch sizes, in rows, to run.
        max_tokens: the largest batch to compile for, in rows.
    Returns:
        How many distinct (LoRA, joint or sparse, sizes, dtype, device) were run.
    Raises:
        ValueError: the model is not attached, ``num_tokens`` holds something other than integers from 0, or
            ``max_tokens`` is not an integer from 1.
    """
    if not isinstance(num_tokens, Sequence) or any(type(n) is not int or n < 0 for n in num_tokens):
        raise ValueError(f"num_tokens: got {num_tokens!r}, accepted is a sequence of integers from 0")
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens!r}, accepted is an integer from 1")
    seen, attachment = set(), attachment_of(model)
    for device in {like.device for *_, like, _ in _parts(attachment)}:
        if device.type == "cuda":
            _compile(attachment, device, max_tokens)
    for op, pool, slots, sizes, like, columns in _parts(attachment):
        kind = (op, sizes, like.dtype, like.device, columns)
        if kind in seen:
            continue
        seen.add(kind)
        for rows in num_tokens:
            start, total = columns
            x, wide = (torch.zeros(rows, size, dtype=like.dtype, device=like.device) for size in (sizes[0], total))
            y = wide[:, start : start + sizes[1]]
            used = torch.tensor(slots, device=like.device)[torch.arange(rows, device=like.device) % len(slots)]
            routing = Routing.from_slots(used, pool.num_slots)
            op(x, pool, routing, out=y)
            routed = op is multi_lora or isinstance(op, _Slices)
            if routed and mode_of(like.device):  # captured forwards take kernels of their own
                layout = SlabLayout(rows, attachment.serving.max_pairs, pool.num_slots)
                slab = layout.empty(like.device)
                layout.write(slab, routing)
                op(x, pool, layout.routing(slab), out=y)
    return len(seen)


def _compile(attachment: Attachment, device: torch.device, max_tokens: int) -> None:
    try:
        from lora_fuse.kernels.launch import compile_all
    except ImportError:  # no Triton: plain torch runs
        return
    backend = "hip" if torch.version.hip else "cuda"
    compile_all(reachable(attachment, device, max_tokens, backend), device)
    compile_all(reachable_beside(attachment, device, max_tokens, backend), device)
    compile_all(reachable_sparse(attachment, device, max_tokens, backend), device)


def reachable(attachment: Attachment, device: torch.device, max_tokens: int, backend: str) -> Iterator[Any]:
    """Every launch of LoRA layers on a device that forwards of 1 to ``max_tokens`` rows can make, of each kind one."""
    from lora_fuse.kernels.reach import multi_lora_launches, routing_launches

    serving, seen = attachment.serving, set()
    yield from routing_launches(serving.physical_slots, max_tokens, serving.max_pairs)
    for pools, starts, columns in _lora_sites(attachment):
        tensors = [pool.tensors for pool in pools]
        kind = tuple((tuple(t.shape), t.stride(), t.dtype, t.data_ptr() % 16) for of in tensors for t in of)
        if pools[0].pool_a.device == device and (kind, starts, columns) not in seen:
            seen.add((kind, starts, columns))
            yield from multi_lora_launches(tensors, starts, columns, max_tokens, serving.max_pairs, backend)


def _lora_sites(attachment: Attachment) -> Iterator[tuple[list[AdapterPool], tuple[int, ...], int]]:
    """Pools that serve an input together, where the output of each begins, and how many columns there are."""
    for layer in attachment.layers.values():
        yield [layer.lora_pool], (0,), layer.lora_pool.out_features
    for site in attachment.sparse.values():
        for pool in site.lora_sparse.pools if isinstance(site.lora_sparse, JointSlots) else ():
            yield [pool], (0,), pool.out_features
    for pack, _ in attachment.packs:
        for first, end in combinations(range(len(pack.sizes) + 1 if pack.live else 0), 2):  # who runs without others
            has = [i for i in range(first, end) if pack.pools[i] is not None]
            if has and end - first > 1:
                starts = tuple(sum(pack.sizes[first:i]) for i in has)
                yield [pack.pools[i] for i in has], starts, sum(pack.sizes[first:end])  # type: ignore[misc]


@dataclass(frozen=True)
class _Slices:
    """``multi_lora_slices`` of a pack; kinds that take the same kernels are equal."""

    sizes: tuple[int, ...]
    filled: tuple[bool, ...]
    pools: tuple[AdapterPool | None, ...] = field(compare=False)

    def __call__(self, x: Tensor, pool: AdapterPool, routing: Routing, out: Tensor) -> Tensor:
        return multi_lora_slices(x, self.pools, self.sizes, routing, out)


def reachable_beside(attachment: Attachment, device: torch.device, max_tokens: int, backend: str) -> Iterator[Any]:
    """``reachable`` of layers whose A lies behind the weight, see augmented.py."""
    from lora_fuse.kernels.reach import expand_reach

    seen, rows = set(), min(max_tokens, MOST_ROWS)
    for pack, _ in attachment.packs:
        for first in range(len(pack.sizes)):
            beside = pack.beside(first)
            if beside is None or beside.weight.device != device:
                continue
            tensors = [pack.pools[first + i].tensors for i in beside.inside]  # type: ignore[union-attr]
            kind = tuple((tuple(t.shape), t.stride(), t.dtype, t.data_ptr() % 16) for of in tensors for t in of[1:])
            where = tuple(beside.starts), beside.weight.shape[0], beside.shrunk
            if (kind, where) not in seen:
                seen.add((kind, where))
                yield from expand_reach(tensors, *where, rows, attachment.serving.max_pairs, backend)


def reachable_sparse(attachment: Attachment, device: torch.device, max_tokens: int, backend: str) -> Iterator[Any]:
    """``reachable`` of layers with sparse deltas."""
    from lora_fuse.kernels.reach import sparse_reach

    seen = set()
    for site in attachment.sparse.values():
        if not isinstance(site.lora_sparse, LinearSlots) or site.lora_sparse.pool.anchor.device != device:
            continue
        pool = site.lora_sparse.pool
        kind = pool.num_slots, (pool.in_features, pool.out_features), pool.anchor.dtype
        if kind not in seen and pool.anchor.dtype in KERNEL_DTYPES:
            seen.add(kind)
            yield from sparse_reach(*kind, max_tokens, attachment.serving.max_pairs, backend)


_Part = tuple[Callable[..., Tensor], Any, list[int], tuple[int, int], Tensor, tuple[int, int]]


def _parts(attachment: Attachment) -> Iterator[_Part]:
    """Op, pool, the slots to run, in and out features, a tensor of its dtype and device; where the output lies: its
    first column, and how many there are with packed siblings'."""
    for layer in attachment.layers.values():
        pool = layer.lora_pool
        sizes = pool.pool_a.shape[1], pool.pool_b.shape[1]
        yield multi_lora, pool, [*range(pool.num_slots)], sizes, pool.pool_a, (0, sizes[1])
    for pack, _ in attachment.packs:
        for i, packed in enumerate(pack.pools if pack.live else ()):
            if packed is not None:
                sizes, columns = (packed.in_features, packed.out_features), (sum(pack.sizes[:i]), sum(pack.sizes))
                yield multi_lora, packed, [*range(packed.num_slots)], sizes, packed.pool_a, columns
        pools = [p for p in pack.pools if p is not None] if pack.live else []
        if len(pools) > 1:
            slices = _Slices(pack.sizes, tuple(p is not None for p in pack.pools), pack.pools)
            sizes, like = (pools[0].in_features, sum(pack.sizes)), pools[0].pool_a
            yield slices, pools[0], [*range(pools[0].num_slots)], sizes, like, (0, sizes[1])
    for site in attachment.sparse.values():
        slots = site.lora_sparse
        if isinstance(slots, JointSlots):
            for pool in slots.pools:
                sizes = pool.in_features, pool.out_features
                yield multi_lora, pool, [*range(pool.num_slots)], sizes, pool.pool_a, (0, sizes[1])
        if isinstance(slots, LinearSlots) and slots.filled:
            sparse = slots.pool
            sizes = sparse.in_features, sparse.out_features
            yield sparse_delta_linear, sparse, sorted(slots.filled), sizes, sparse.anchor, (0, sizes[1])
