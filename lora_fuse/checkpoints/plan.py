"""What fusing adapters into a checkpoint changes: decided and checked from headers, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapters.lora import LoraAdapter
from .edits import AddDeltas, Bias, Edit, NewRows, NewValues, Term, Unchanged
from .header import FLOAT_DTYPES, TensorInfo
from .match import Renaming, Tie, check_shape, find_tie, match_paths, stored_transposed, text_config
from .read import Checkpoint

ModulesToSave = Literal["first", "average"]


@dataclass
class FusePlan:
    """The edits by tensor name, and what else has to change with them.

    Args:
        edits: tensor name -> edit; names that the checkpoint lacks are inserted.
        add_prefix: goes in front of every one of the checkpoint's names (a bare encoder that gains a head).
        config: keys of ``config.json`` that change.
        notes: what a user should know about the result.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    add_prefix: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """An adapter with its weight, its name for messages, and how its paths become the checkpoint's."""

    adapter: LoraAdapter
    weight: float
    label: str
    rename: Renaming

    def tensor(self, path: str, parameter: str, checkpoint: Checkpoint) -> str:
        """The name of a module's parameter in the checkpoint; a module outside the renamed part keeps its own."""
        renamed, own = f"{self.rename(path)}.{parameter}", f"{path}.{parameter}"
        return own if own in checkpoint.tensors and renamed not in checkpoint.tensors else renamed


def plan_fuse(
    checkpoint: Checkpoint,
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    modules_to_save: ModulesToSave | None = None,
) -> FusePlan:
    """Plan ``W + sum_i w_i delta_i`` for every weight that an adapter touches.

    Args:
        checkpoint: the base model.
        adapters: at least one.
        weights: one per adapter, finite.
        modules_to_save: which copy of a module wins that several adapters carry; None refuses.
    Returns:
        The plan.
    Raises:
        ValueError: quantised weights, layers that do not fit, heads in several adapters, DoRA beside another adapter or
            with a weight other than 1, biases without a bias to add to, a tied embedding that cannot be untied.
    """
    _check_arguments(checkpoint, adapters, weights)
    sources = []
    for adapter, weight in zip(adapters, weights, strict=True):
        sources.append(_Source(adapter, weight, adapter.source, match_paths(adapter, checkpoint, adapter.source)))
    plan = FusePlan()
    for source in sources:
        if source.rename != Renaming():
            plan.notes.append(f"{source.label}: module paths were renamed to fit the model: {source.rename}")
    saved = _saved_tensors(sources, checkpoint, modules_to_save)
    tie = _tie(sources, checkpoint, saved)
    if tie is not None:
        _untie(plan, tie)
    _plan_deltas(plan, sources, checkpoint, tie)
    _plan_biases(plan, sources, checkpoint)
    _plan_rows(plan, sources, checkpoint)
    _plan_saved(plan, sources, checkpoint, saved)
    if tie is not None:
        ends = [
            plan.edits[n].shape if n in plan.edits else checkpoint.tensors[n].shape for n in (tie.embedding, tie.head)
        ]
        if ends[0][0] != ends[1][0]:
            raise ValueError(f"{tie.embedding} gets {ends[0][0]} rows, {tie.head} {ends[1][0]}; the two must agree")
    if any(name not in checkpoint.tensors for name in plan.edits):
        # a bare model's names beside a head's: loaders want the whole in the names of the model with the head
        strips = {source.rename.strip for source in sources if not source.rename.add}
        plan.add_prefix = strips.pop() if len(strips) == 1 else ""
    return plan


def _check_arguments(checkpoint: Checkpoint, adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> None:
    if not adapters:
        raise ValueError("adapters: none given; at least one is needed")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: {len(weights)} given for {len(adapters)} adapters")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"weights: {weight!r} is not a finite number")
    for key in ("quantization_config", "compression_config"):
        found = checkpoint.config.get(key) or text_config(checkpoint.config).get(key)
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
            raise ValueError(
                f"{checkpoint.folder}: its weights are quantised ({key}: {method}), and a delta cannot be added "
                "to them exactly; fuse into the unquantised model and quantise the result"
            )
    for adapter in adapters:
        dora = [path for path, layer in adapter.layers.items() if layer.magnitude is not None]
        if dora and (len(adapters) > 1 or weights[0] != 1):
            raise ValueError(
                f"{adapter.source}: a DoRA adapter ({dora[0]} has a magnitude) is fused alone and with weight 1; "
                f"{len(adapters)} adapters were given, with weights {list(weights)}"
            )


def _saved_tensors(
    sources: Sequence[_Source], checkpoint: Checkpoint, modules_to_save: ModulesToSave | None
) -> dict[str, Tensor]:
    """Tensor name in the checkpoint -> the copy that replaces it or is inserted."""
    if modules_to_save not in (None, "first", "average"):
        raise ValueError(f"modules_to_save: {modules_to_save!r} given; accepted: 'first', 'average'")
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for source in sources:
        for path, tensors in source.adapter.modules_to_save.items():
            place = source.rename(path) if _holds(checkpoint, source.rename(path)) else path
            for name, tensor in tensors.items():
                found.setdefault(f"{place}.{name}", []).append((source.label, tensor))
    result = {}
    for name, copies in found.items():
        if len(copies) > 1 and modules_to_save is None:
            labels = ", ".join(label for label, _ in copies)
            raise ValueError(
                f"{name}: a full copy of it lies in several adapters ({labels}), and a model has room for one; "
                "choose with modules_to_save='first' or 'average'"
            )
        shapes = {tuple(tensor.shape) for _, tensor in copies}
        if modules_to_save == "average" and len(copies) > 1:
            if len(shapes) > 1:
                raise ValueError(f"{name}: copies of different shapes ({shapes}) cannot be averaged")
            result[name] = torch.stack([tensor.double() for _, tensor in copies]).mean(0).float()
        else:
            result[name] = copies[0][1]
    return result


def _holds(checkpoint: Checkpoint, path: str) -> bool:
    return any(name.startswith(f"{path}.") for name in checkpoint.tensors)


def _tie(sources: Sequence[_Source], checkpoint: Checkpoint, saved: Iterable[str]) -> Tie | None:
    """The tie that the edits break. PEFT's ``ensure_weight_tying`` means both ends: then it holds."""
    touched = {name.removesuffix(".weight") for name in saved}
    for source in sources:
        paths = {source.rename(path) for path in source.adapter.layers}
        both = source.adapter.config.get("ensure_weight_tying", False)
        if not both or any(path.rpartition(".")[2] == "lm_head" for path in paths):
            touched |= paths
    return find_tie(checkpoint, touched)


def _untie(plan: FusePlan, tie: Tie) -> None:
    plan.config["tie_word_embeddings"] = False
    plan.notes.append(
        f"the model ties {tie.head} to {tie.embedding} and the adapter changes only one of them or each by itself: "
        "the result has both, with tie_word_embeddings=false"
    )


def _plan_deltas(plan: FusePlan, sources: Sequence[_Source], checkpoint: Checkpoint, tie: Tie | None) -> None:
    terms: dict[str, list[Term]] = {}
    transposed: dict[str, bool] = {}
    untied = {} if tie is None or tie.head_stored else {tie.head: checkpoint.tensors[tie.embedding]}
    for source in sources:
        for path, layer in source.adapter.layers.items():
            name = source.tensor(path, "weight", checkpoint)
            weight = checkpoint.tensors.get(name) or untied.get(name)
            if weight is None:
                raise ValueError(f"{source.label}: {path} has no weight in {checkpoint.folder}: no tensor {name!r}")
            check_shape(layer, weight, path, source.label)
            _check_float(weight, checkpoint)
            flip = stored_transposed(path, layer, weight, checkpoint, source.adapter, source.label)
            if transposed.setdefault(name, flip) != flip or (
                terms.get(name) and terms[name][0].layer.kind != layer.kind
            ):
                raise ValueError(f"{source.label}: {path}: the adapters disagree about how {name} is stored")
            terms.setdefault(name, []).append(Term(layer, source.weight, source.label))
    for name, parts in terms.items():
        weight = checkpoint.tensors.get(name) or untied[name]
        active = [term for term in parts if term.weight != 0]
        if active or name in untied:
            plan.edits[name] = AddDeltas(weight, active, transposed[name]) if active else Unchanged(weight)
    for name, weight in untied.items():
        plan.edits.setdefault(name, Unchanged(weight))


def _check_float(weight: TensorInfo, checkpoint: Checkpoint) -> None:
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{checkpoint.folder}: {weight.name} is stored as {weight.dtype}, a quantised weight to which a delta "
            f"cannot be added exactly; accepted: {', '.join(FLOAT_DTYPES)}"
        )


def _plan_biases(plan: FusePlan, sources: Sequence[_Source], checkpoint: Checkpoint) -> None:
    absolute: dict[str, list[tuple[float, Tensor]]] = {}
    added: dict[str, list[tuple[float, Tensor]]] = {}
    for source in sources:
        given = [(path, bias, 1.0, absolute) for path, bias in source.adapter.base_biases.items()]
        for path, layer in source.adapter.layers.items():
            if layer.lora_bias is not None:
                given.append((path, layer.lora_bias, layer.scaling, added))
        for path, bias, factor, into in given:
            name = source.tensor(path, "bias", checkpoint)
            base = checkpoint.tensors.get(name)
            if base is None:
                raise ValueError(
                    f"{source.label}: it has a bias for {path}, but {checkpoint.folder} has no tensor {name!r} for it"
                )
            if base.shape != tuple(bias.shape):
                raise ValueError(
                    f"{source.label}: its bias for {path} is {list(bias.shape)}, but {name} is {list(base.shape)}"
                )
            _check_float(base, checkpoint)
            if source.weight != 0:
                into.setdefault(name, []).append((factor * source.weight, bias))
    for name in {**absolute, **added}:
        plan.edits[name] = Bias(checkpoint.tensors[name], absolute.get(name, ()), added.get(name, ()))


def _plan_rows(plan: FusePlan, sources: Sequence[_Source], checkpoint: Checkpoint) -> None:
    for source in sources:
        for path, (ids, rows) in source.adapter.trainable_tokens.items():
            name = source.tensor(path, "weight", checkpoint)
            base = checkpoint.tensors.get(name)
            if base is None:
                raise ValueError(f"{source.label}: it has rows for {path}, but there is no tensor {name!r}")
            if name in plan.edits:
                raise ValueError(f"{source.label}: it replaces rows of {name}, which is also changed otherwise")
            if rows.shape != (len(ids), *base.shape[1:]):
                raise ValueError(f"{source.label}: {path}: {list(rows.shape)} rows for {name} {list(base.shape)}")
            if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= base.shape[0]):
                raise ValueError(
                    f"{source.label}: {path}: token ids from {int(ids.min())} to {int(ids.max())}, "
                    f"but {name} has {base.shape[0]} rows"
                )
            _check_float(base, checkpoint)
            plan.edits[name] = NewRows(base, ids, rows)
            tie = find_tie(checkpoint, [name.removesuffix(".weight")])
            if tie is not None and tie.head_stored:  # the copy of a shared parameter follows it
                plan.edits[tie.head] = NewRows(checkpoint.tensors[tie.head], ids, rows)


def _plan_saved(
    plan: FusePlan, sources: Sequence[_Source], checkpoint: Checkpoint, saved: Mapping[str, Tensor]
) -> None:
    for name, tensor in saved.items():
        base = checkpoint.tensors.get(name)
        if name in plan.edits and not isinstance(plan.edits[name], Unchanged):
            raise ValueError(f"{name}: one adapter replaces it and a LoRA layer changes it; they cannot be combined")
        if base is None:
            plan.notes.append(f"{name} {list(tensor.shape)} was inserted; the base model has no such tensor")
        elif base.shape != tuple(tensor.shape):
            if base.shape[1:] != tuple(tensor.shape[1:]):
                raise ValueError(f"{name}: the adapter's copy is {list(tensor.shape)}, the model's {list(base.shape)}")
            plan.notes.append(f"{name}: {base.shape[0]} rows became {tensor.shape[0]}")
            _resize_vocabulary(plan, checkpoint, base.shape[0], tensor.shape[0])
        plan.edits[name] = NewValues(tensor)
    _set_labels(plan, sources, checkpoint, saved)


def _resize_vocabulary(plan: FusePlan, checkpoint: Checkpoint, old: int, new: int) -> None:
    config = checkpoint.config
    if config.get("vocab_size") == old:
        plan.config["vocab_size"] = new
    elif text_config(config).get("vocab_size") == old:
        plan.config["text_config"] = {**text_config(config), "vocab_size": new}


def _set_labels(
    plan: FusePlan, sources: Sequence[_Source], checkpoint: Checkpoint, saved: Mapping[str, Tensor]
) -> None:
    """Tell the config how wide a new classification head is, so that the model class builds it so."""
    if not any(str(source.adapter.config.get("task_type")) in ("SEQ_CLS", "TOKEN_CLS") for source in sources):
        return
    widths = {
        int(tensor.shape[0])
        for name, tensor in saved.items()
        if tensor.dim() == 2 and name.split(".")[-2] in ("classifier", "score", "out_proj")
    }
    labels = checkpoint.config.get("id2label")
    if len(widths) == 1 and (labels is None or len(labels) not in widths):
        names = [f"LABEL_{i}" for i in range(widths.pop())]
        plan.config["id2label"] = {str(i): name for i, name in enumerate(names)}
        plan.config["label2id"] = {name: i for i, name in enumerate(names)}
