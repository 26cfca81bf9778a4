"""``extract``: a LoRA adapter from a full fine-tune, with a report of what it keeps and what it leaves out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.compress.extract_plan import Layer, Plan, Targets, make_plan
from lora_fuse.functional import Difference, LowRankSVD, randomized_svd
from lora_fuse.merging.config import lora_config
from lora_fuse.merging.linear import from_svd
from lora_fuse.merging.progress import track
from lora_fuse.merging.terms import check_dtype, check_truncation
from lora_fuse.merging.weights import Weights, WeightSource, open_weights

_RANK = 64


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer's difference from the base: rank of its factors, squared Frobenius norm, and squared error."""

    rank: int
    squared_norm: float
    squared_error: float

    @property
    def energy(self) -> float:
        """Share of the squared norm that was kept."""
        return 1.0 - self.squared_error / self.squared_norm


@dataclass(frozen=True)
class Uncovered:
    """A tensor that changed and is not in the adapter: why, and the squared norm of its change, if there is a base."""

    reason: str
    squared_norm: float | None


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction kept; ``str()`` gives a summary, then a line per tensor that was left out.

    Args:
        layers: module path -> what became of its weight.
        saved: paths of the modules that were copied.
        uncovered: tensors that changed and are not in the adapter.
        unchanged: number of tensors that the fine-tune left as they were.
    """

    layers: Mapping[str, ExtractedLayer] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    uncovered: Mapping[str, Uncovered] = field(default_factory=dict)
    unchanged: int = 0

    @property
    def energy(self) -> float:
        """Share of the layers' squared norm that was kept, over all layers together."""
        total = sum(layer.squared_norm for layer in self.layers.values())
        return 1.0 - sum(layer.squared_error for layer in self.layers.values()) / total if total > 0 else 1.0

    def __str__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers.values()})
        span = "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        worst = min(self.layers, key=lambda path: self.layers[path].energy, default=None)
        lines = [f"{len(self.layers)} layers, rank {span}, energy kept {self.energy:.2%}"]
        if worst is not None:
            lines[0] += f", worst {self.layers[worst].energy:.2%} ({worst})"
        if self.saved:
            lines.append(f"copied whole: {', '.join(self.saved)}")
        if self.uncovered:
            lines.append(f"{len(self.uncovered)} changed tensors are not in the adapter:")
        for name, left in self.uncovered.items():
            size = "" if left.squared_norm is None else f", change of norm {left.squared_norm**0.5:.3g}"
            lines.append(f"  {name}: {left.reason}{size}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class ExtractedAdapter(LoraAdapter):
    """A ``LoraAdapter`` whose ``report`` says what of the fine-tune it holds."""

    report: ExtractReport = field(default_factory=ExtractReport)


@torch.no_grad()
def extract(
    base: WeightSource,
    finetuned: WeightSource,
    rank: int | None = None,
    *,
    energy: float | None = None,
    targets: Targets = None,
    modules_to_save: Targets = None,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tolerance: float = 1e-3,
    progress: bool = False,
) -> ExtractedAdapter:
    """Approximate a full fine-tune by a LoRA adapter: ``finetuned - base ~ lora_b @ lora_a``, layer by layer.

    Weights are read one layer at a time, and no difference is formed as a whole unless it is small. A layer that the
    fine-tune left as it was gets no factors. Nothing that changed is dropped silently: ``report`` lists it.

    Args:
        base: a state dict, a module, a model folder or a safetensors file.
        finetuned: the same; names as the base's, after ``prefix``. Where one of the two is a module it tells which
            weights are Conv1D (stored ``[in, out]``), convolutions or embeddings; where one is a folder its
            ``config.json`` tells the Conv1D ones; otherwise shapes and names have to tell.
        rank: largest rank of a layer; 64 if ``energy`` is not given either.
        energy: instead: about as few directions as keep this share of a layer's squared Frobenius norm.
        targets: modules to factor, as PEFT's ``target_modules``: names or ends of paths, or a regex for whole paths.
            None: every linear layer, and the ``Conv2d`` of a module, but nothing tied, no embeddings.
        modules_to_save: modules to copy whole, such as a head (``["classifier"]``), by the same rules.
        prefix: put before each of the base's names, for an encoder whose fine-tune has a head around it: "bert.".
        dtype: of the factors and copies.
        seed: of ``randomized_svd``.
        tolerance: how far a layer's error may be above the smallest possible, as ``randomized_svd`` estimates it.
        progress: show a bar on stderr.

    Returns:
        An ``ExtractedAdapter``; ``lora_b = U sqrt(S)``, ``lora_a = sqrt(S) Vh``, scaling 1. PEFT loads what its
        ``save_pretrained`` writes.

    Raises:
        TypeError: a source, or ``targets``, of a kind that is not accepted.
        ValueError: an option is out of range; names or shapes that differ from the base's; NaN or infinite weights;
            ``targets`` or ``modules_to_save`` that match nothing; a fine-tune in which nothing that an adapter can
            hold has changed; factors that overflow ``dtype``.

    Source: LoRA extraction by truncated SVD; the SVD is ``randomized_svd``'s.
    """
    check_truncation(rank, energy)
    check_dtype(dtype)
    rank = _RANK if rank is None and energy is None else rank
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string such as 'bert.', got {type(prefix).__name__}")
    ours, theirs = open_weights("base", base).renamed(prefix), open_weights("finetuned", finetuned)
    plan = make_plan(ours, theirs, (finetuned, base) if not prefix else (finetuned,), targets, modules_to_save)

    layers: dict[str, LoraLayer] = {}
    reports: dict[str, ExtractedLayer] = {}
    unchanged = 0
    for layer in track(plan.layers, "extract", progress):
        new, old = theirs[plan.tuned_names[layer.name]], ours[plan.base_names[layer.name]]
        if _same(new, old):
            unchanged += 1
            continue
        try:
            svd = _decompose(new, old, layer, rank, energy, tolerance, seed)
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"{layer.path}: {error}") from None
        factors = from_svd(svd, _layout(layer, tuple(new.shape)), dtype)
        if not all(all_finite(t) for t in factors.tensors()):
            raise ValueError(f"layer {layer.path!r}: the factors overflow {dtype}; choose a wider dtype")
        layers[layer.path] = factors
        reports[layer.path] = ExtractedLayer(factors.rank, float(svd.norm) ** 2, float(svd.residual) ** 2)
    saved = {path: _copies(plan, theirs, path, names, dtype) for path, names in plan.saved.items()}
    uncovered, still = _left_out(plan, ours, theirs)
    if not layers and not saved:
        seen = f"; changed, but not covered: {', '.join(list(uncovered)[:5])}" if uncovered else ""
        raise ValueError(f"finetuned: no weight that an adapter can hold differs from the base{seen}")
    report = ExtractReport(reports, tuple(saved), uncovered, unchanged + still)
    config = lora_config(layers, saved, [_origin(base, plan)])
    source = f"extract({ours.source}, {theirs.source})"
    return ExtractedAdapter(layers, saved, config=config, source=source, report=report)


def _decompose(
    new: Tensor, old: Tensor, layer: Layer, rank: int | None, energy: float | None, tolerance: float, seed: int
) -> LowRankSVD:
    """Of the difference as ``[out, in]``, which an embedding's and a Conv1D's are the transposes of."""
    new, old = new.flatten(1), old.flatten(1)
    difference = Difference(new.T, old.T) if layer.transposed else Difference(new, old)
    return randomized_svd(difference, rank, generator=seed, energy=energy, tolerance=tolerance)


def _layout(layer: Layer, shape: tuple[int, ...]) -> LoraLayer:
    """Empty factors of rank 0 in the layer's layout."""
    out, *inner = shape[::-1] if layer.transposed else shape
    ones = [1] * (len(inner) - 1)
    return LoraLayer(torch.empty(0, *inner), torch.empty(out, 0, *ones), 1.0, layer.kind)


def _copies(plan: Plan, theirs: Weights, path: str, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    copies = {}
    for name in names:
        tensor = theirs[plan.tuned_names[name]]
        copy = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        if copy.is_floating_point() and not all_finite(copy):
            raise ValueError(f"{name}: overflows {dtype}; choose a wider dtype")
        copies[name.removeprefix(f"{path}.")] = copy
    return copies


def _left_out(plan: Plan, ours: Weights, theirs: Weights) -> tuple[dict[str, Uncovered], int]:
    """What changed without being in the adapter, and how many of the other tensors did not change."""
    left = {
        name: Uncovered("only the fine-tune has it; name its module in modules_to_save", None) for name in plan.missing
    }
    seen: set[tuple[str, str]] = set()
    unchanged = 0
    for name, reason in plan.others.items():
        pair = plan.base_names[name], plan.tuned_names[name]
        new, old = theirs[pair[1]], ours[pair[0]]
        if pair in seen or _same(new, old):
            unchanged += pair not in seen
        elif new.is_floating_point():
            change = torch.linalg.vector_norm(new.to(torch.float64) - old.to(torch.float64))
            left[name] = Uncovered(reason, float(change) ** 2)
        else:
            left[name] = Uncovered(reason, None)
        seen.add(pair)
    return left, unchanged


def _same(new: Tensor, old: Tensor) -> bool:
    return torch.equal(new, old) if new.dtype == old.dtype else torch.equal(new.double(), old.double())


def _origin(base: WeightSource, plan: Plan) -> dict[str, object]:
    """What the adapter's config says about the base."""
    path = os.fspath(base) if isinstance(base, (str, os.PathLike)) else None
    conv1d = any(layer.transposed and layer.kind == "linear" for layer in plan.layers)
    return {"base_model_name_or_path": path, "fan_in_fan_out": conv1d}
