"""Which modules can be given slots, what their pools look like, and which are refused, with the reason."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fuse.adapters.lora import LayerKind
from lora_fuse.adapters.pool import AdapterPool, EmbeddingPool
from lora_fuse.nn.conv import MultiLoRAConv2d, WrappedConv2d
from lora_fuse.nn.embedding import MultiLoRAEmbedding, WrappedEmbedding
from lora_fuse.nn.linear import (
    AdaptedModule,
    MultiLoRALinear,
    PermutedLinear,
    WrappedLinear,
    original_class,
    wrapped_class,
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


Fit = tuple[LayerKind, tuple[int, ...]]  # the kind of factors that fit a module, and its weight's [out, in] shape


@dataclass(frozen=True)
class Target:
    """How a module takes part.

    Args:
        kind: the layout of the adapter layers that fit.
        weight_shape: the base weight's shape in ``[out, in]`` order, as ``LoraLayer.weight_shape`` gives it.
        adapted: the class that the module gets.
        pool: the class of its pool.
    """

    kind: LayerKind
    weight_shape: tuple[int, ...]
    adapted: type[AdaptedModule]
    pool: type[AdapterPool] = AdapterPool

    @property
    def fit(self) -> Fit:
        return self.kind, self.weight_shape

    def make_pool(self, module: nn.Module, num_slots: int, max_rank: int, fallback: torch.dtype) -> AdapterPool:
        """An empty pool where the module computes, in the dtype in which it computes."""
        if self.kind == "conv2d":
            out_features, *kernel = self.weight_shape
            sizes = (torch.Size(kernel).numel(), out_features)
        elif self.kind == "embedding":
            sizes = (self.weight_shape[0], self.weight_shape[1])
        else:
            sizes = (self.weight_shape[1], self.weight_shape[0])
        return self.pool(num_slots, max_rank, *sizes, dtype=pool_dtype(module, fallback), device=device_of(module))


def target_of(module: nn.Module, path: str, parent: nn.Module | None, ours: bool = False) -> Target | str:
    """How this module takes part, or why it cannot.

    Args:
        ours: whether the module may have slots already, from this model's attach.
    """
    if isinstance(module, AdaptedModule) and not ours:
        return "already has slots from an attach() of another model object"
    cls = original_class(type(module))
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this module's weight and never calls it: an adapter here would do nothing"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention is not supported: its projections are one packed parameter of no layer's own"
    hooked = is_hooked(module)
    if isinstance(module, nn.Embedding):
        return _embedding(module, cls, hooked)
    if isinstance(module, (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return f"{cls.__name__} is not supported"
    if isinstance(module, nn.Conv2d):
        return _conv2d(module, cls, hooked)
    conv1d = conv1d_of(module)
    if conv1d is not None:
        in_features, out_features = cast(Tensor, module.weight).shape
        fresh = not hooked and cls.forward is conv1d.forward  # a forward of another's may return what it keeps
        adapted = wrapped_class(WrappedLinear, cls, fresh=fresh)
        return Target("linear", (out_features, in_features), adapted)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not all(isinstance(size, int) for size in sizes):
        return f"{cls.__name__} is neither Linear, Conv1D, Conv2d nor Embedding, and not Linear-like"
    if is_expert(path):
        adapted = wrapped_class(PermutedLinear, cls)
    elif cls is nn.Linear and not hooked:
        adapted = MultiLoRALinear
    else:
        adapted = wrapped_class(WrappedLinear, cls)
    return Target("linear", sizes, adapted)  # type: ignore[arg-type]


def conv1d_of(module: nn.Module) -> Any:
    """transformers' Conv1D, whose weight lies ``[in, out]``, if the module is one."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d if conv1d is not None and isinstance(module, conv1d) else None


def is_hooked(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own: accelerate and others put one there."""
    return "forward" in module.__dict__ or "lora_base_forward" in module.__dict__


def is_expert(path: str) -> bool:
    """Whether this module sees its own choice of tokens."""
    return _EXPERT.search(path) is not None


def _embedding(module: nn.Embedding, cls: Any, hooked: bool) -> Target | str:
    if module.max_norm is not None:
        return "an Embedding with max_norm rewrites its weight in forward"
    own_forward = cls.forward is not nn.Embedding.forward
    if own_forward and not hasattr(module, "embed_scale"):
        return f"{cls.__name__} has a forward of its own, which is not a plain lookup"
    plain = cls is nn.Embedding and not hooked
    adapted: Any = MultiLoRAEmbedding if plain else wrapped_class(WrappedEmbedding, cls)
    return Target("embedding", (module.num_embeddings, module.embedding_dim), adapted, EmbeddingPool)


def _conv2d(module: nn.Conv2d, cls: Any, hooked: bool) -> Target | str:
    if module.groups != 1:
        return f"Conv2d with groups={module.groups} is not supported, groups=1 is"
    if cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward:
        return f"{cls.__name__} has a forward of its own, which is not a plain convolution"
    plain = cls is nn.Conv2d and not hooked
    adapted: Any = MultiLoRAConv2d if plain else wrapped_class(WrappedConv2d, cls)
    return Target("conv2d", (module.out_channels, module.in_channels, *module.kernel_size), adapted)


def _first_tensor(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor):  # torch.ao's quantised modules: a method
        weight = weight()
    if isinstance(weight, Tensor):
        return weight
    return next((*module.parameters(recurse=False), *module.buffers(recurse=False)).__iter__(), None)


def pool_dtype(module: nn.Module, fallback: torch.dtype) -> torch.dtype:
    """The dtype in which a module computes; ``fallback`` where nothing tells it."""
    weight = _first_tensor(module)
    if weight is not None and weight.dtype in _FLOATS and not weight.is_quantized:
        return weight.dtype
    compute = getattr(module, "compute_dtype", None)
    return compute if compute in _FLOATS else fallback


def device_of(module: nn.Module) -> torch.device:
    weight = _first_tensor(module)
    device = torch.device("cpu") if weight is None else weight.device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and hook is not None:  # offloaded: the weight visits this device for each forward
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device
