"""Linear layers with slots: ``y[row] = W x[row] + bias + sum of weight * scaling * B (A x[row])`` over its adapters."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse._cpu import serve as _serve  # the whole of routing() and add_lora() for a layer of a running forward
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.nn.overlap import SideShrink, begin
from lora_fuse.nn.serving import Serving
from lora_fuse.nn.traced import traced_routing
from lora_fuse.ops.eager import autocasts, under_transform


def add_lora(y: Tensor, x: Tensor, pool: AdapterPool, routing: Routing, fresh: bool) -> Tensor:
    """``y[row] += weight * scaling * (B (A x[row]) + lora_bias)``; rows without an adapter keep their bits.

    Args:
        y: ``[..., out_features]``, the bare layer's output.
        x: ``[..., in_features]``, the same leading dimensions.
        fresh: nobody else sees ``y``, so it may be written into (when no gradient is wanted).
    """
    if fresh and not y.requires_grad and x.dtype is y.dtype and not under_transform():
        multi_lora(x, pool, routing, out=y)
    else:
        y = y - _negated(x, y, pool, routing)
    return add_biases(y, pool, routing)


def add_biases(y: Tensor, pool: AdapterPool, routing: Routing) -> Tensor:
    """``y[row] += weight * scaling * lora_bias`` over the row's pairs, out of place; ``y`` itself if there are none."""
    if pool._buffers["slot_bias"] is None:
        return y
    return add_bias(y, pool, routing.rows, routing.weights, pair_slots(routing.segment_starts, routing.rows))


def finish(side: SideShrink, y: Tensor, x: Tensor, pool: AdapterPool, fresh: bool) -> Tensor:
    """``add_lora`` where the shrink was done meanwhile."""
    done = side.expand_(y, fresh)
    return add_lora(y, x, pool, side.routing, fresh) if done is None else add_biases(done, pool, side.routing)


def pair_slots(segment_starts: Tensor, rows: Tensor) -> Tensor:
    """``[num_pairs]`` int64, the slot of each pair, ``num_slots`` where there is none (padding); traceable."""
    return torch.searchsorted(segment_starts[1:], torch.arange(rows.shape[0], device=rows.device), right=True)


def _negated(x: Tensor, y: Tensor, pool: AdapterPool, routing: Routing) -> Tensor:
    """Minus the LoRA part. ``y - 0.0`` has the bits of ``y`` even where that is -0.0; ``y + 0.0`` has not."""
    x = x.neg()
    if not autocasts(x):
        x = x.to(pool.pool_a.device, pool.pool_a.dtype)
    return multi_lora(x, pool, routing).to(y.device, y.dtype)


def add_bias(y: Tensor, pool: AdapterPool, rows: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    """``y[row] += weight * scaling * lora_bias`` over the row's pairs, out of place."""
    assert pool.slot_bias is not None
    padding = slots >= pool.num_slots
    slots = slots.clamp_max(pool.num_slots - 1)
    scale = pool.slot_scaling[slots]
    if weights is not None:
        scale = scale * weights
    delta = pool.slot_bias[slots].float() * scale[:, None]  # [pairs, out_features]
    delta = delta.masked_fill(padding[:, None], -0.0)  # y + -0.0 has the bits of y
    flat = y.reshape(-1, y.shape[-1])
    return flat.index_add(0, rows.to(y.device), delta.to(y.device, y.dtype)).view(y.shape)


def add_lora_traced(y: Tensor, x: Tensor, pool: AdapterPool, serving: Serving, one_entry: bool = False) -> Tensor:
    """``add_lora`` for code that is being compiled."""
    rows, weights, segment_starts, *_ = routing = traced_routing(serving, x, one_entry)
    factors = (pool.pool_a, pool.pool_b, pool.slot_rank, pool.slot_scaling)
    y = y - torch.ops.lora_fuse.multi_lora(x.neg().to(pool.pool_a.dtype), *factors, *routing).to(y.dtype)
    if pool.slot_bias is not None:
        y = add_bias(y, pool, rows, weights, pair_slots(segment_starts, rows))
    return y


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called with: the first argument, by whatever name its class has for it."""
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]


class AdaptedModule(nn.Module):
    """What every layer that was given slots has; a module gets it by a change of class, so its identity stays."""

    lora_base: type[nn.Module] = nn.Module  # the class to go back to
    lora_prefix = "MultiLoRA"
    lora_serving: Serving
    lora_path: str
    lora_pool: AdapterPool

    def _slots_repr(self) -> str:
        return f"slots={self.lora_serving.num_slots}, max_rank={self.lora_serving.max_rank}"

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return f"{base}, {self._slots_repr()}" if base else self._slots_repr()


class MultiLoRALinear(AdaptedModule, nn.Linear):
    """An ``nn.Linear`` whose rows may each use adapters of their own. Made by ``lora_fuse.attach``."""

    lora_base = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        x, serving = input, self.lora_serving  # the name that nn.Linear has, for calls by keyword
        if torch.compiler.is_compiling():
            return add_lora_traced(F.linear(x, self.weight, self.bias), x, self.lora_pool, serving)
        pool: AdapterPool = self._modules["lora_pool"]  # type: ignore[assignment]
        if serving.overlap and (side := begin(x, (pool,), (self.out_features,), serving, self.lora_path)) is not None:
            with side:
                y = F.linear(x, self.weight, self.bias)
            return finish(side, y, x, pool, True)
        y = F.linear(x, self.weight, self.bias)
        if _serve(y, x, serving.local, pool._buffers):
            return y
        routing = serving.routing(tuple(x.shape[:-1]), x.device, self.lora_path)
        return y if routing is None else add_lora(y, x, pool, routing, True)


class WrappedLinear(AdaptedModule):
    """Any Linear-like module: its own forward runs, the LoRA part is added to what it returns.

    Mixed into the module's class by ``wrapped_class``. A ``forward`` that the instance itself had (accelerate's hooks
    put one there) is kept as ``lora_base_forward`` and called in place of the class's.
    """

    lora_one_entry = False
    lora_fresh = False  # whether the wrapped forward's result may be written into

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = input_of(args, kwargs)
        if torch.compiler.is_compiling():
            y = self._base(*args, **kwargs)
            return add_lora_traced(y, x, self.lora_pool, self.lora_serving, self.lora_one_entry)
        pool, side = self.lora_pool, None
        if self.lora_serving.overlap:
            side = begin(x, (pool,), (pool.out_features,), self.lora_serving, self.lora_path)
        with side or nullcontext():
            y = self._base(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{self.lora_path}: its forward returned {type(y).__name__}, a Linear-like module returns a Tensor"
            )
        fresh = self.lora_fresh and "lora_base_forward" not in self.__dict__
        if side is not None:
            return finish(side, y, x, pool, fresh)
        if fresh and _serve(y, x, self.lora_serving.local, pool._buffers):
            return y
        if x.device != pool.pool_a.device:  # an offloading hook moved the input inside the wrapped forward
            x = x.to(pool.pool_a.device)
        routing = self.lora_serving.routing(tuple(x.shape[:-1]), x.device, self.lora_path)
        return y if routing is None else add_lora(y, x, pool, routing, fresh)

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        base_forward = self.__dict__.get("lora_base_forward")
        return super().forward(*args, **kwargs) if base_forward is None else base_forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuildable(type(self), super().__reduce_ex__(protocol))


class PermutedLinear(WrappedLinear):
    """A Linear in an expert: its rows are the tokens routed to that expert, so only a selection of one entry fits."""

    lora_one_entry = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            self.lora_serving.current()[0].require_one_entry(self.lora_path)
        return super().forward(*args, **kwargs)


_WRAPPED: dict[tuple[type, type, bool], type[AdaptedModule]] = {}


def wrapped_class(mixin: type[AdaptedModule], base: type[nn.Module], fresh: bool = False) -> type[AdaptedModule]:
    """The subclass of ``base`` that runs as ``mixin`` says; one per pair."""
    made = _WRAPPED.get((mixin, base, fresh))
    if made is None:
        names = {"lora_base": base, "lora_mixin": mixin, "lora_fresh": fresh, "__module__": __name__}
        made = type(f"{mixin.lora_prefix}{base.__name__}", (mixin, base), names)
        made = _WRAPPED.setdefault((mixin, base, fresh), made)
    return made


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before ``attach``, under however many of ours."""
    while issubclass(cls, AdaptedModule):
        cls = cls.lora_base
    return cls


def rebuildable(cls: type[nn.Module], reduced: Any) -> Any:
    """Make a wrapped instance's reduction independent of its class, which pickle cannot find by name."""
    func, args, *rest = reduced
    if func is copyreg.__newobj__ and args[:1] == (cls,):  # type: ignore[attr-defined]
        return (_rebuild, (_recipe(cls), *args[1:]), *rest)
    return reduced


def _recipe(cls: Any) -> Any:
    """``(mixin, recipe of the base, fresh)`` of a wrapped class; any other class itself."""
    return (cls.lora_mixin, _recipe(cls.lora_base), cls.lora_fresh) if "lora_mixin" in cls.__dict__ else cls


def _class_of(recipe: Any) -> Any:
    return wrapped_class(recipe[0], _class_of(recipe[1]), recipe[2]) if isinstance(recipe, tuple) else recipe


def _rebuild(recipe: Any, *args: Any) -> nn.Module:
    cls = _class_of(recipe)
    return cls.__new__(cls, *args)  # type: ignore[no-any-return]
