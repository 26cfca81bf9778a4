"""``fuse``: adapters into the weights of a model, and ``unfuse``: the original bits back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.merging.progress import track
from lora_fuse.merging.rounding import round_nearest, round_stochastic
from lora_fuse.merging.targets import is_transposed, refuse_tied, require_modules, writable
from lora_fuse.merging.terms import (
    LayerTerm,
    SavePolicy,
    Sources,
    Weights,
    check_finite,
    combine_base_weights,
    combine_saved,
    layer_terms,
    make_terms,
    refuse_absolute,
)
from lora_fuse.merging.update import accumulation_dtype, dora_scale, stacked_factors
from lora_fuse.nn.joint_site import JointSlots
from lora_fuse.nn.sparse_site import SiteSlots

ModelT = TypeVar("ModelT", bound=nn.Module)
_Rounder: TypeAlias = Callable[[Tensor, torch.dtype], Tensor]

# Where a model keeps the original values, by parameter name; a plain attribute, so copies of the model carry their own.
_ORIGINALS = "_lora_fuse_originals"
# Elements per tile: an fp32 tile of 4 MB stays in a CPU's cache; a GPU wants more work per launch.
_TILE = {"cpu": 1 << 20, "other": 1 << 24}


@torch.no_grad()
def fuse(
    model: ModelT,
    adapters: Sources,
    weights: Weights = None,
    *,
    backup: bool = True,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    modules_to_save: SavePolicy = "refuse",
    allow_tied: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> ModelT:
    """Write ``W + sum_i weights[i] * delta_i`` into the weights of ``model``, in place.

    The sum over all adapters is accumulated in fp32 (fp64 for fp64 weights, and where torch's fp32 matmul precision has
    been lowered) and rounded once, in tiles: beyond the factors and one tile nothing of the weight's size is computed.
    ``lora_bias`` adds to the bias. Replaced biases, token rows and module copies (heads) overwrite the model's.

    Parameters keep their identity, address, dtype and ``requires_grad``; their version counters go up. Everything is
    checked before the first write, and if writing fails (overflow, interrupt) the touched weights are put back.
    Fusing again adds to what is there; ``unfuse`` goes back to the weights before the first fuse.

    Args:
        model: plain or attached; its modules at the adapters' paths are nn.Linear, transformers' Conv1D, nn.Conv2d or
            nn.Embedding with fp32, fp64, bf16 or fp16 weights.
        adapters: one adapter, a list, or a dict name -> adapter; an entry may be a path.
        weights: a finite number per adapter, or a dict by name. None: 1 each. Weight 0: takes no part, heads included.
        backup: keep a copy of the touched weights, in CPU memory, for ``unfuse``. False: the result is final, and the
            copy that guards against failure is dropped on return.
        rounding: "nearest" (ties to even), or "stochastic", whose expectation is the exact value, so that updates below
            half a step of bf16 or fp16 survive on average; other dtypes always round to nearest.
        modules_to_save: for a module that several adapters replace: "refuse", "first" or "average" (by weight).
        allow_tied: write a parameter although another module reads it too (tied embeddings).
        seed: of stochastic rounding.
        progress: show a bar on stderr.

    Returns:
        ``model``.

    Raises:
        ValueError: a module is missing, of another shape, quantised, parametrized or tied; an adapter has a lora_bias
            where the module has no bias; DoRA or replaced values in anything but one adapter of weight 1; DoRA on a
            model that is fused already; ``backup=False`` on a model whose earlier fuse has a backup; factors that are
            not finite; a result that overflows the weight's dtype.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: expected 'nearest' or 'stochastic', got {rounding!r}")
    model_, originals = _plain(model), _originals(model)
    _refuse_sparse(model_)
    if originals is not None and not backup:
        raise ValueError("backup: an earlier fuse of this model kept a backup; unfuse it first, or pass backup=True")
    writes = _plan(model_, adapters, weights, modules_to_save, allow_tied, fused=originals is not None)

    round_to = _rounder(rounding, seed)
    undo: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        for write in track(writes, "fuse", progress):
            undo[write.name] = (write.param, write.param.detach().to("cpu", copy=True))
            write.run(round_to)
    except BaseException:
        for param, before in undo.values():
            param.copy_(before)
        raise
    if backup:
        kept = {name: before for name, (_, before) in undo.items()}
        setattr(model_, _ORIGINALS, {**kept, **(originals or {})})
    return model


@torch.no_grad()
def unfuse(model: ModelT) -> ModelT:
    """Put back the weights that ``fuse`` found, bit for bit, whatever was done to them since.

    A model that was cast since gets its original weights cast likewise.

    Raises:
        ValueError: there is no backup (nothing was fused, or with ``backup=False``), or a parameter has gone or changed
            its shape; nothing is written then.
    """
    model_, originals = _plain(model), _originals(model)
    if originals is None:
        raise ValueError("model: has no backup to restore; nothing was fused into it, or fuse ran with backup=False")
    _refuse_sparse(model_)
    pairs = []
    modules = require_modules(model_, [name.rpartition(".")[0] for name in originals])
    for name, before in originals.items():
        path, _, leaf = name.rpartition(".")
        param = writable(path, modules[path], leaf)
        if param.shape != before.shape:
            raise ValueError(f"{name}: has shape {tuple(param.shape)}, but was fused as {tuple(before.shape)}")
        pairs.append((param, before))
    for param, before in pairs:
        param.copy_(before)
    delattr(model_, _ORIGINALS)
    return model


def _plain(model: nn.Module) -> nn.Module:
    """The model under ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _refuse_sparse(model: nn.Module) -> None:
    """ValueError if sparse adapters rely on the weights as they are."""
    for path, module in model.named_modules():
        attachment = module.__dict__.get("lora_attachment")
        slots = module._modules.get("lora_sparse")
        absolute = isinstance(slots, SiteSlots) and not isinstance(slots, JointSlots)  # joint adapters are deltas
        if (attachment is not None and attachment.tasks) or (absolute and slots.filled):
            raise ValueError(
                f"model: sparse adapters are attached{f' at {path}' if path else ''}, and they belong to these very "
                "weights; detach (or remove_adapter) them first"
            )


def _originals(model: nn.Module) -> dict[str, Tensor] | None:
    return _plain(model).__dict__.get(_ORIGINALS)


def _rounder(rounding: str, seed: int) -> _Rounder:
    if rounding == "nearest":
        return round_nearest
    generators: dict[torch.device, torch.Generator] = {}

    def stochastic(x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        return round_stochastic(x, dtype, generators[x.device])

    return stochastic


@dataclass(frozen=True)
class _Write:
    """What happens to one parameter: a new value to start from, rows replaced in it, then an update added."""

    name: str
    param: Tensor
    start: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    parts: Sequence[LayerTerm] = ()
    transposed: bool = False

    def run(self, round_to: _Rounder) -> None:
        if self.param.ndim < 2 or not self.param.is_floating_point():
            self._run_vector(round_to)
        else:
            self._run_tiles(round_to)

    def _run_vector(self, round_to: _Rounder) -> None:
        start = self.param if self.start is None else self.start.to(self.param.device)
        if not self.param.is_floating_point():
            self.param.copy_(start)  # a counter that rides along with a module copy
            return
        acc = start.to(torch.float64, copy=True)
        for part in self.parts:
            if part.layer.lora_bias is not None:
                acc += part.coef * part.layer.lora_bias.to(acc)
        self._store(self.param, round_to(acc, self.param.dtype))

    def _run_tiles(self, round_to: _Rounder) -> None:
        param, device = self.param, self.param.device
        compute = accumulation_dtype(param.dtype)
        factors = stacked_factors(self.parts, compute, self.transposed, device) if self.parts else None
        scale = self._dora_scale(factors, compute) if factors is not None else None
        for begin, end, acc in self._tiles(factors, compute):
            if scale is not None:
                acc *= scale if self.transposed else scale[begin:end, None]
            tile = param[begin:end]
            self._store(tile, round_to(acc, param.dtype).view(tile.shape))

    def _tiles(self, factors: tuple[Tensor, Tensor] | None, compute: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """``(begin, end, updated rows [end - begin, columns])`` from the top; only the yielded tile exists in full."""
        param = self.param
        columns = max(1, param[:1].numel())
        step = max(1, _TILE["cpu" if param.device.type == "cpu" else "other"] // columns)
        for begin in range(0, param.shape[0], step):
            end = min(begin + step, param.shape[0])
            source = (param if self.start is None else self.start)[begin:end]
            acc = source.to(param.device, compute, copy=True, memory_format=torch.contiguous_format).flatten(1)
            if self.rows is not None:
                ids, values = self.rows[0].to(param.device), self.rows[1].to(param.device, compute)
                inside = (ids >= begin) & (ids < end)
                acc[ids[inside] - begin] = values[inside]
            if factors is not None:
                acc.addmm_(factors[0][begin:end], factors[1])
            yield begin, end, acc

    def _dora_scale(self, factors: tuple[Tensor, Tensor], compute: torch.dtype) -> Tensor | None:
        """DoRA: ``magnitude / norm(W + delta)`` per output feature, or None if the layer has no magnitude."""
        magnitude = self.parts[0].layer.magnitude
        if magnitude is None:
            return None
        magnitude = magnitude.to(self.param.device, torch.float64).flatten()
        squares = torch.zeros_like(magnitude)
        for begin, end, acc in self._tiles(factors, compute):
            if self.transposed:
                squares += acc.to(torch.float64).square().sum(0)
            else:
                squares[begin:end] = acc.to(torch.float64).square().sum(1)
        return dora_scale(magnitude, squares).to(compute)

    def _store(self, where: Tensor, value: Tensor) -> None:
        if not all_finite(value):
            raise ValueError(
                f"{self.name}: the fused value is not finite in {where.dtype}; the weights are as they were"
            )
        where.copy_(value)


def _plan(
    model: nn.Module, adapters: Sources, weights: Weights, policy: SavePolicy, allow_tied: bool, fused: bool
) -> list[_Write]:
    """Every check, and then what to write."""
    terms = [t for t in make_terms(adapters, weights) if t.weight != 0.0]
    alone = len(terms) == 1 and terms[0].weight == 1.0
    if not alone:
        refuse_absolute(terms, "fuse")
    if fused and any(layer.magnitude is not None for t in terms for layer in t.adapter.layers.values()):
        raise ValueError(
            f"adapter {terms[0].name}: uses DoRA, which rescales the original weights; unfuse the model first"
        )
    check_finite(terms)
    grouped = layer_terms(terms)
    saved = combine_saved(terms, policy)
    absolute: LoraAdapter | None = terms[0].adapter if alone else None
    biases = dict(absolute.base_biases) if absolute else {}
    tokens = dict(absolute.trainable_tokens) if absolute else {}
    base_weights = combine_base_weights(terms)
    modules = require_modules(model, {*grouped, *saved, *biases, *tokens, *base_weights})

    writes: dict[str, _Write] = {}

    def add(path: str, module: nn.Module, leaf: str, **what: Any) -> None:
        name = f"{path}.{leaf}" if path else leaf
        if name in writes:
            raise ValueError(f"{name}: the adapter both replaces it (modules_to_save) and updates it")
        write = _Write(name, writable(path, module, leaf), **what)
        for given in (write.start, *(write.rows or ())[1:]):
            if given is not None and given.is_floating_point() and not all_finite(given):
                raise ValueError(f"{name}: the adapter's value has NaN or infinite entries")
        if write.start is not None and write.start.shape != write.param.shape:
            raise ValueError(
                f"{name}: the adapter's value has shape {tuple(write.start.shape)}, the model's parameter "
                f"{tuple(write.param.shape)}"
            )
        writes[name] = write

    for path in (*grouped, *(set(tokens) | set(base_weights)) - set(grouped)):
        parts, module = grouped.get(path, []), modules[path]
        transposed = is_transposed(path, module, parts[0].layer) if parts else False
        if path in tokens:
            _check_tokens(path, module, *tokens[path])
        start = base_weights.get(path)
        add(path, module, "weight", start=start, rows=tokens.get(path), parts=parts, transposed=transposed)
    for path in (*grouped, *set(biases) - set(grouped)):
        parts = [p for p in grouped.get(path, []) if p.layer.lora_bias is not None and bool(p.layer.lora_bias.any())]
        if parts and getattr(modules[path], "bias", None) is None:
            raise ValueError(
                f"layer {path!r}: adapter {parts[0].name} has a lora_bias, but the model's "
                f"{type(modules[path]).__name__} has no bias to add it to; attach the adapter instead"
            )
        if parts or path in biases:
            add(path, modules[path], "bias", start=biases.get(path), parts=parts)
    for path, tensors in saved.items():
        for inner, value in tensors.items():
            within, _, leaf = inner.rpartition(".")
            full = ".".join(p for p in (path, within) if p)
            add(full, require_modules(model, [full])[full], leaf, start=value)
    refuse_tied(model, {name: write.param for name, write in writes.items()}, allow_tied)
    return list(writes.values())


def _check_tokens(path: str, module: nn.Module, ids: Tensor, rows: Tensor) -> None:
    weight = writable(path, module, "weight")
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"{path}: trainable tokens need an nn.Embedding, the model has a {type(module).__name__}")
    inside = bool(((ids >= 0) & (ids < weight.shape[0])).all())
    if rows.shape[1:] != weight.shape[1:] or not inside:
        raise ValueError(
            f"{path}: trainable tokens have rows {tuple(rows.shape)} and ids {ids.tolist()[:8]}, the model's embedding "
            f"is {tuple(weight.shape)}"
        )
