"""Packed siblings: Linears of one parent that receive the same input share one product and one pass over their slots.

Their weights lie behind one another in one storage. The first of them to be called in a forward computes all their
outputs; each of the others takes its own if it is called, in the same forward, with the very same input, and computes
alone if not. What is computed and never asked for is noticed, and no longer computed.

The pools' A rows may lie behind the weights, see augmented.py; a layer without siblings is then a pack of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse._cpu import may_bypass as _may_bypass
from lora_fuse._cpu import serve_packed as _serve_packed
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.nn.augmented import MOST_ROWS, Beside, has_room, linear_with_lora
from lora_fuse.nn.linear import MultiLoRALinear, add_biases
from lora_fuse.nn.overlap import begin
from lora_fuse.ops.multi_lora import slices_fresh_, slices_of

_HABIT = 2  # outputs that went to waste so many times in a row are no longer computed


class Run(NamedTuple):
    """Neighbours in a pack, as one layer."""

    weight: Tensor  # [sum of sizes, in_features]
    bias: Tensor | None
    sizes: list[int]
    pools: tuple[AdapterPool | None, ...]
    parts: tuple[tuple[Any, int], ...]  # of each: buffers of its pool or None, its width
    beside: Beside | None


class Waiting:
    """Outputs that one thread has computed and their layers have not yet asked for, in the running forward."""

    __slots__ = ("copy", "leader", "outputs", "start", "version", "x")

    def __init__(self, leader: int, start: int, outputs: list[Tensor | None], x: Tensor, trusted: bool) -> None:
        self.leader, self.start, self.outputs, self.x = leader, start, outputs, x
        self.version, self.copy = None, None
        if not x.is_inference():
            self.version = x._version
        elif not trusted:  # no version tells whether the model writes into x between two siblings
            self.copy = x.clone()

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The output of one layer, if it is there and is that of this ``x``; handed out once."""
        at = index - self.start
        if not 0 <= at < len(self.outputs) or not self._is_of(x):
            return None
        y, self.outputs[at] = self.outputs[at], None
        return y

    def _is_of(self, x: Tensor) -> bool:
        if x is not self.x and not (x.dtype == self.x.dtype and x.is_set_to(self.x)):
            return False
        if self.version is not None:
            return x._version == self.version
        return self.copy is None or torch.equal(x, self.copy)


class Pack:
    """What siblings share.

    Args:
        paths: the layers', in the order in which their weights lie.
        sizes: their output features.
        augment: whether A may lie behind the weights.
    """

    def __init__(self, paths: tuple[str, ...], sizes: tuple[int, ...], augment: bool = False) -> None:
        self.paths, self.sizes, self.augment = paths, sizes, augment
        self.behind: tuple[int | None, ...] = (None,) * len(paths)  # rows at which the pools' A begin
        self.pools: tuple[AdapterPool | None, ...] = (None,) * len(paths)
        self.spans = [(0, len(paths))] * len(paths)  # by who comes first: the neighbours to compute
        self.wasted = [0] * len(paths)
        self.live = True  # False: dissolved for good
        self.places: set[int] = set()  # where parameters were laid that have to move out again
        self.trusted = False  # whether siblings were seen to share an input that nobody writes into
        self.forget()

    def forget(self) -> None:
        """Let go of the packed weights; layers compute alone until ``bind`` is called again."""
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._runs: dict[tuple[int, int], Run] = {}

    def bind(self, weight: Tensor, bias: Tensor | None, behind: tuple[int | None, ...]) -> None:
        """Args: ``[sum of sizes + A's rows, in_features]`` and ``[as many]``, of which the layers' parameters and their
        pools' A are views, and where each A begins, if it is there."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        row, item = weight.stride(0) * weight.element_size(), weight.element_size()
        self._offsets = [
            (start * row, start * item, None if a is None else a * row) for start, a in zip(starts, behind, strict=True)
        ]
        self.bias, self.weight, self.behind, self._runs = bias, weight, behind, {}

    def is_augmented(self, index: int) -> bool:
        """Whether a layer's A lies behind the weights."""
        return self.live and self.behind[index] is not None

    def dissolve(self) -> None:
        """Let the layers compute alone from now on; their parameters stay what they are."""
        self.live = False
        self.forget()

    def set_pool(self, index: int, pool: AdapterPool | None) -> None:
        """Give one layer slots, or none."""
        self.pools = (*self.pools[:index], pool, *self.pools[index + 1 :])
        self._runs = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy's parameters lie elsewhere: it is bound anew when its first forward begins."""
        return {**self.__dict__, "weight": None, "bias": None, "_runs": {}, "trusted": False}

    def holds(self, index: int, layer: nn.Module) -> bool:
        """Whether the layer's parameters and its A are still the views that ``bind`` was given."""
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        packed, packed_bias = self.weight, self.bias
        if packed is None or weight is None:
            return False
        of_weight, of_bias, of_a = self._offsets[index]
        if weight.data_ptr() != packed.data_ptr() + of_weight:
            return False
        if of_a is not None:
            pool = self.pools[index]
            if pool is None or pool._buffers["pool_a"].data_ptr() != packed.data_ptr() + of_a:  # type: ignore[union-attr]
                return False
        if bias is None or packed_bias is None:
            return bias is None
        return bias.data_ptr() == packed_bias.data_ptr() + of_bias

    def output(self, index: int, layer: PackedLinear, x: Tensor) -> Tensor | None:
        """One layer's output, or None: it has to compute alone."""
        waiting, single = layer.lora_serving.local.packed, len(self.sizes) == 1
        # Plain inference only: no graph, no mode or transform that wants to see each layer.
        if (waiting is None and not single) or self.weight is None or torch.is_grad_enabled():
            return None
        if not _may_bypass(x, None):
            return None
        if not self.holds(index, layer):  # somebody put other weights there
            self.dissolve()
            return None
        if single or waiting is None:
            run = self._run(0, 1)
            return None if run is None else self._compute(run, layer, x)[0]
        before = waiting.get(self)
        if before is not None:
            y = before.take(index, x)
            if y is not None:
                if not any(other is not None for other in before.outputs):
                    del waiting[self]
                    self.wasted[before.leader] = 0
                    self.trusted = True
                return y
            del waiting[self]
            self.settle(before)
        start, end = self.spans[index]
        run = self._run(start, end) if end - start > 1 else None
        if run is None:
            return None
        outputs: list[Tensor | None] = [*self._compute(run, layer, x)]
        y, outputs[index - start] = outputs[index - start], None
        waiting[self] = Waiting(index, start, outputs, x, self.trusted)
        return y

    def settle(self, waiting: Waiting) -> None:
        """Learn from outputs that nobody asked for."""
        leader = waiting.leader
        self.wasted[leader] += 1
        if self.wasted[leader] >= _HABIT:
            taken = [waiting.start + i for i, y in enumerate(waiting.outputs) if y is None]
            self.spans[leader] = (min(taken), max(taken) + 1)
            self.wasted[leader] = 0

    def beside(self, first: int) -> Beside | None:
        """What the neighbours from ``first`` on multiply by, if their A lies behind their weights."""
        run = self._run(first, len(self.sizes)) if self.live else None
        return None if run is None else run.beside

    def _run(self, start: int, end: int) -> Run | None:
        """None: another thread took the pack apart just now."""
        runs = self._runs  # this very dict: one that is replaced meanwhile must not get what the old pools say
        run = runs.get((start, end))
        if run is None:
            weight, packed_bias = self.weight, self.bias
            if weight is None:
                return None
            first, sizes, pools = sum(self.sizes[:start]), [*self.sizes[start:end]], self.pools[start:end]
            rows = slice(first, first + sum(sizes))
            parts = tuple((None if p is None else p._buffers, size) for p, size in zip(pools, sizes, strict=True))
            bias = None if packed_bias is None else packed_bias[rows]
            run = Run(weight[rows], bias, sizes, pools, parts, self._beside(start, end, first))
            runs[start, end] = run
        return run

    def _beside(self, start: int, end: int, first: int) -> Beside | None:
        """What a run multiplies by to get its shrink as well; those that end with other weights cannot."""
        weight, total = self.weight, sum(self.sizes)
        lodgers = [i for i in range(start, end) if self.behind[i] is not None]
        if weight is None or end < len(self.sizes) or not lodgers:
            return None
        rows = [p.num_slots * p.max_rank for p, at in zip(self.pools, self.behind, strict=True) if p and at is not None]
        if not has_room(weight.shape[1], total - first, sum(rows), weight.element_size()):
            return None
        bias = None if self.bias is None else self.bias[first:]
        inside, starts = tuple(i - start for i in lodgers), [sum(self.sizes[start:i]) for i in lodgers]
        shrunk = self.behind[lodgers[0]] - first, sum(rows[-len(lodgers) :])  # type: ignore[operator]
        return Beside(weight[first:], bias, inside, starts, shrunk)

    def _compute(self, run: Run, layer: PackedLinear, x: Tensor) -> tuple[Tensor, ...]:
        serving = layer.lora_serving
        if run.beside is not None and x.shape[:-1].numel() <= MOST_ROWS:
            routing = serving.routing(tuple(x.shape[:-1]), x.device, layer.lora_path)
            if routing is not None:
                return linear_with_lora(x, run.beside, run.sizes, run.pools, routing)
        if serving.overlap and (side := begin(x, run.pools, run.sizes, serving, layer.lora_path)) is not None:
            with side:
                y = F.linear(x, run.weight, run.bias)
            side.expand_(y, True)
            return self._outputs(y, run, side.routing)
        y = F.linear(x, run.weight, run.bias)
        done = _serve_packed(y, x, serving.local, run.parts)
        if done:
            return y.split_with_sizes(run.sizes, -1)  # type: ignore[no-any-return]
        routing = serving.routing(tuple(x.shape[:-1]), x.device, layer.lora_path)
        if routing is None:
            return y.split_with_sizes(run.sizes, -1)  # type: ignore[no-any-return]
        slices_fresh_(y, x, *slices_of(run.pools, run.sizes), *routing.tensors, routing.tiles)
        return self._outputs(y, run, routing)

    @staticmethod
    def _outputs(y: Tensor, run: Run, routing: Routing) -> tuple[Tensor, ...]:
        pairs = zip(y.split_with_sizes(run.sizes, -1), run.pools, strict=True)
        return tuple(part if pool is None else add_biases(part, pool, routing) for part, pool in pairs)


class PackedLinear(MultiLoRALinear):
    """An ``nn.Linear`` that shares its product with siblings, or with its own A; with slots, or without. Made by
    ``lora_fuse.attach``."""

    lora_base = nn.Linear
    lora_fresh = True
    lora_pack: tuple[Pack, int]

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            pack, index = self.lora_pack
            y = pack.output(index, self, input)
            if y is not None:
                return y
        if "lora_pool" in self._modules:
            return super().forward(input)
        return F.linear(input, self.weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        pack, index = self.lora_pack
        if pack.weight is not None and not pack.holds(index, self):
            pack.forget()
            self.lora_serving.repack = True
        return self

    def _slots_repr(self) -> str:
        pack, index = self.lora_pack
        slots = super()._slots_repr() if "lora_pool" in self._modules else "no slots"
        others = ", ".join(path.rpartition(".")[2] for i, path in enumerate(pack.paths) if i != index)
        packed = f", packed with {others}" if pack.live and others else ""
        return slots + packed + (", A behind the weight" if pack.is_augmented(index) else "")
