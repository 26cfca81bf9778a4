"""The adapters of a layer as one stacked product: ``y += B (c * (A x))``, hooked onto a model for as long as needed.

A and B are the adapters' factors one below the other, R rows in all; ``c [R]`` holds each row's weight times scaling,
and is all that a gradient is wanted of. Nothing of the weight's shape is formed. ``apart`` is LoraHub's way instead,
``(sum w_i sqrt(s_i) B_i) (sum w_i sqrt(s_i) A_i)``, for adapters of one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.merging.terms import Term, load_sources, refuse_other_bases
from lora_fuse.nn import bypass
from lora_fuse.nn.plan import plan
from lora_fuse.nn.select import use_adapters
from lora_fuse.nn.targets import device_of, pool_dtype
from lora_fuse.ops.eager import autocasts


class StackedLayer:
    """One module's adapters; a forward hook of it.

    Args:
        path: the module's, for messages.
        module: a Linear, Conv1D, Conv2d or Embedding, or a Linear-like one.
        layers: the adapters' factors, at least one, all of this module's kind and shape.
        which: for each of ``layers`` its adapter's place among all.
        apart: add up A's and B's apart.
    """

    def __init__(
        self, path: str, module: nn.Module, layers: Sequence[LoraLayer], which: Sequence[int], apart: bool
    ) -> None:
        self.path, self.kind, self.apart = path, layers[0].kind, apart
        device, dtype = device_of(module), pool_dtype(module, layers[0].lora_a.dtype)
        self.ranks, self.which = [layer.rank for layer in layers], list(which)
        self.scalings = [layer.scaling for layer in layers]
        a = torch.cat([layer.lora_a.detach().to(device, dtype) for layer in layers])  # [R, in] or [R, in, kh, kw]
        b = torch.cat([layer.lora_b.detach().flatten(1).to(device, dtype) for layer in layers], 1)  # [out, R]
        self.a = a.t().contiguous() if self.kind == "embedding" else a  # a lookup reads rows
        self.b = b
        self.biases = None
        if any(layer.lora_bias is not None for layer in layers):
            zero = b.new_zeros(b.shape[0])
            biases = [zero if layer.lora_bias is None else layer.lora_bias.detach().to(zero) for layer in layers]
            self.biases = torch.stack(biases)  # [adapters that have the layer, out]
        self.column = b.new_empty(0, dtype=torch.float32)  # [R], weight * scaling; apart: weight * its root, for B
        self.column_a = self.column  # [R], apart: likewise, for A
        self.row = self.column  # [adapters that have the layer], weight * scaling, for the biases

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(f"{self.path}: its forward returned {type(y).__name__}, expected a Tensor")
        x = args[0] if args else next(iter(kwargs.values()))
        if self.kind == "conv2d":
            return self._conv2d(module, x, y)
        x = x.to(self.a.device)  # an offloading hook may have moved the input inside the forward
        if self.kind == "embedding":
            h = F.embedding(x, self.a)
        else:
            h = F.linear(x if autocasts(x) else x.to(self.a.dtype), self.a)
        h = self._weigh(h, -1)
        scale = getattr(module, "embed_scale", None) if self.kind == "embedding" else None
        if scale is not None:
            h = h * scale
        if y.dtype == self.b.dtype and not autocasts(x):
            flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), self.b.t())
            y = flat.view(y.shape)
        else:
            y = y + F.linear(h, self.b).to(y.device, y.dtype)
        return y if self.biases is None else y + self._bias().to(y.device, y.dtype)

    def _conv2d(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        h = nn.Conv2d._conv_forward(module, x if autocasts(x) else x.to(self.a.device, self.a.dtype), self.a, None)
        h = self._weigh(h, -3)
        y = y + F.conv2d(h, self.b[:, :, None, None]).to(y.device, y.dtype)
        return y if self.biases is None else y + self._bias()[:, None, None].to(y.device, y.dtype)

    def _weigh(self, h: Tensor, dim: int) -> Tensor:
        """``h`` with its R channels along ``dim`` weighted, in fp32, so that the gradient of ``column`` is too."""
        shape = (-1, *[1] * (-1 - dim))
        if self.apart:
            each = (h * self.column_a.view(shape)).unflatten(dim, (len(self.ranks), -1))
            h = each.sum(dim - 1, keepdim=True).expand_as(each).flatten(dim - 1, dim)
        return (h * self.column.view(shape)).to(self.b.dtype)

    def _bias(self) -> Tensor:
        """``[out]``, the sum of weight * scaling * lora_bias."""
        assert self.biases is not None
        return self.row @ self.biases.to(self.row.dtype)


class Stack:
    """All adapted layers of a model.

    Attributes:
        names: of the adapters, in order.
        adapters: by name, under the model's own canonical paths, without heads.
        layers: path -> stacked factors, in the model's order.
        present: ``[num_layers, num_adapters]`` bool, which adapter has which layer.
        dtype: of the weights; fp32, or fp64 where a layer computes in it.
        device: of the weights, the first layer's.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraAdapter], apart: bool) -> None:
        attachment = model.__dict__.get("lora_attachment")
        held, sparse = (attachment.layers, attachment.sparse) if attachment is not None else ({}, {})
        planned = plan(model, adapters, held, sparse, {}, sys.maxsize)
        modules = dict(model.named_modules())
        self.model, self.attached, self.apart = model, attachment is not None, apart
        self.names = tuple(adapters)
        self.adapters = {n: replace(a, layers=planned.adapters[n].layers) for n, a in adapters.items()}
        self.layers: dict[str, StackedLayer] = {}
        for path, module in modules.items():
            which = [i for i, a in enumerate(self.adapters.values()) if path in a.layers]
            if which:
                found = [self.adapters[self.names[i]].layers[path] for i in which]
                self.layers[path] = StackedLayer(path, module, found, which, apart)
                if apart and len({layer.rank for layer in found}) > 1:
                    ranks = {self.names[i]: layer.rank for i, layer in zip(which, found, strict=True)}
                    raise ValueError(
                        f"layer {path!r}: method 'factor_average' adds A's and B's up and needs one rank, got {ranks}; "
                        "use 'linear'"
                    )
        present = [[path in a.layers for a in self.adapters.values()] for path in self.layers]
        self.present = torch.tensor(present)
        first, *_ = self.layers.values()
        self.device = first.a.device
        double = any(layer.a.dtype == torch.float64 for layer in self.layers.values())
        self.dtype = torch.float64 if double else torch.float32
        self._index_columns()

    def _index_columns(self) -> None:
        """Where in the flattened weights each column's weight lies, over all layers, and its scaling."""
        index: list[int] = []
        scaling: list[float] = []
        for i, layer in enumerate(self.layers.values()):
            for rank, which, s in zip(layer.ranks, layer.which, layer.scalings, strict=True):
                index += [i * len(self.names) + which] * rank
                scaling += [s] * rank
        self._index = torch.tensor(index, device=self.device)
        self._scaling = torch.tensor(scaling, device=self.device, dtype=self.dtype)

    def set_weights(self, weights: Tensor) -> None:
        """Use ``weights [num_layers, num_adapters]``, of ``dtype``, in the forwards to come; gradients flow into it."""
        each, sizes = weights.flatten()[self._index], [layer.rank for layer in self.layers.values()]
        root = self._scaling.abs().sqrt()
        columns = (each * (root.copysign(self._scaling) if self.apart else self._scaling)).split(sizes)
        for layer, column in zip(self.layers.values(), columns, strict=True):
            layer.column = column.to(layer.a.device)
        if self.apart:
            for layer, column in zip(self.layers.values(), (each * root).split(sizes), strict=True):
                layer.column_a = column.to(layer.a.device)
        for i, layer in enumerate(self.layers.values()):
            if layer.biases is not None:
                scalings = weights.new_tensor(layer.scalings)
                layer.row = (weights[i, layer.which] * scalings).to(layer.a.device)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The model computes with the stack until exit; then it is as it was, whatever happened.

        Adapters that are attached to the model take no part, unless a forward selects them. Code compiled with
        ``torch.compile`` runs eagerly meanwhile: it would not see the hooks.
        """
        with ExitStack() as undo:
            if self.attached:
                undo.enter_context(use_adapters(self.model, None))
            if "torch._dynamo" in sys.modules:
                undo.enter_context(torch.compiler.set_stance("force_eager"))
            undo.callback(bypass.restore, bypass.switch_off(self.model, self.layers))
            for path, layer in self.layers.items():
                # before the caller's own hooks, which then see what a merged model would return
                hook = self.model.get_submodule(path).register_forward_hook(layer, prepend=True, with_kwargs=True)
                undo.callback(hook.remove)
            yield


def make_stack(model: nn.Module, adapters: Any, what: str, apart: bool = False) -> Stack:
    """Load the adapters and fit them to a model; nothing is changed yet.

    Args:
        model: the module whose paths the adapters name.
        adapters: name -> ``LoraAdapter``, or where one lies.
        what: the function on whose behalf, for messages.
        apart: add up A's and B's apart.
    Raises:
        TypeError, ValueError: no adapters by name, or one that does not fit the model or cannot be weighted.
    Warns:
        UserWarning: the adapters' configs name one base model in two places.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters: expected a dict of names to adapters, got {type(adapters).__name__}")
    loaded = load_sources(adapters)
    for name, adapter in loaded.items():
        dora = next((path for path, layer in adapter.layers.items() if layer.magnitude is not None), None)
        if dora is not None:
            raise ValueError(
                f"adapter {name!r}: uses DoRA (layer {dora!r}), whose update is not linear in a weight, so {what} "
                "cannot weigh it; fuse it into a copy of the model and give the plain LoRA of the difference"
            )
    refuse_other_bases([Term(repr(name), adapter, 1.0) for name, adapter in loaded.items()])
    return Stack(model, {name: replace(a, modules_to_save={}) for name, a in loaded.items()}, apart)
