"""Gram matrices of layers' inputs, collected while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.merging.targets import require_modules


@torch.no_grad()
def collect_grams(
    model: nn.Module,
    paths: LoraAdapter | Iterable[str],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Run a model and return the Gram matrix of each layer's inputs, ``X^T X / rows``, for ``merge(method="regmean")``.

    Run it on the fine-tuned model, the adapter in use and in eval mode: its inputs are what RegMean asks for. Rows of
    padding count as any others. Sums are kept in fp32, ``in x in`` per layer, where the layer computes.

    Args:
        model: as it is; only hooks are added while it runs.
        paths: module paths, or the adapter whose layers are meant.
        batches: each is passed on as keywords (a mapping), positions (a tuple or list) or the only argument.
        forward: called as ``forward(model, batch)`` instead.

    Returns:
        Module path -> ``[in, in]`` on the CPU; ``[in * kh * kw] * 2`` for a convolution; for an embedding, whose inputs
        are one-hot, the diagonal alone: ``[num_embeddings]``, the share of each token.

    Raises:
        ValueError: a path that the model lacks; no batches; a layer that no batch reaches, a grouped convolution, or
            inputs that are not finite.

    Source: RegMean, arXiv:2212.09849.
    """
    wanted = [*paths.layers] if isinstance(paths, LoraAdapter) else [*paths]
    if isinstance(paths, str) or not wanted:
        raise ValueError(f"paths: expected an adapter or module paths, at least one, got {paths!r}")
    modules = require_modules(model, wanted)
    collectors = {path: _Collector(path, module) for path, module in modules.items()}
    memo = _Memo()
    count = 0
    with ExitStack() as stack:
        for path, module in modules.items():
            handle = module.register_forward_pre_hook(collectors[path].hook(memo), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            count += 1
            if forward is not None:
                forward(model, batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
            memo.clear()
    if not count:
        raise ValueError("batches: expected at least one, got none")
    return {path: collector.result() for path, collector in collectors.items()}


class _Memo:
    """The last input and its product: layers in a row often read one tensor (query, key, value)."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._x: Tensor | None = None
        self._version = -1
        self._product = torch.empty(0)

    def product(self, x: Tensor) -> Tensor:
        version = -1 if x.is_inference() else x._version
        if x is not self._x or version != self._version or version == -1:
            rows = x.detach().reshape(-1, x.shape[-1])
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._x, self._version, self._product = x, version, rows.mT @ rows
        return self._product


class _Collector:
    def __init__(self, path: str, module: nn.Module) -> None:
        if getattr(module, "groups", 1) != 1:
            raise ValueError(f"layer {path!r}: a grouped convolution has no one Gram matrix")
        self._path, self._module = path, module
        self._rows = 0
        self._total: Tensor | None = None

    def hook(self, memo: _Memo) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if not given or not isinstance(given[0], Tensor):
                raise ValueError(f"layer {self._path!r}: was called without a tensor")
            self._add(given[0], memo)

        return add

    def _add(self, x: Tensor, memo: _Memo) -> None:
        module = self._module
        if isinstance(module, nn.Embedding):
            product = torch.bincount(x.reshape(-1), minlength=module.num_embeddings).to(torch.float32)
            self._rows += x.numel()
        else:
            if isinstance(module, nn.Conv2d):
                x = _patches(module, x)
            product = memo.product(x)
            self._rows += x.shape[:-1].numel()
        self._total = product.clone() if self._total is None else self._total.add_(product)

    def result(self) -> Tensor:
        if self._total is None or not self._rows:
            raise ValueError(f"layer {self._path!r}: no batch reaches it")
        if not all_finite(self._total):
            raise ValueError(f"layer {self._path!r}: its inputs have NaN or infinite entries, or overflow")
        return self._total.div_(self._rows).cpu()


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position sees: ``[batch, positions, in_channels * kh * kw]``."""
    if x.ndim == 3:
        x = x[None]
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = module.padding  # type: ignore[assignment]
    return F.unfold(x, module.kernel_size, module.dilation, padding, module.stride).mT  # type: ignore[arg-type]
