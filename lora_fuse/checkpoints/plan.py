"""What fusing adapters into a checkpoint changes: decided and checked from headers, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.checkpoints.edits import AddDeltas, Bias, Edit, NewRows, NewValues, Unchanged
from lora_fuse.checkpoints.header import FLOAT_DTYPES, TensorInfo
from lora_fuse.checkpoints.match import (
    Renaming,
    Tie,
    check_shape,
    find_tie,
    match_paths,
    renamed,
    stored_transposed,
    text_config,
)
from lora_fuse.checkpoints.read import Checkpoint, read_tiles
from lora_fuse.merging.terms import (
    SavePolicy,
    Term,
    Weights,
    check_finite,
    combine_base_weights,
    combine_saved,
    layer_terms,
    make_terms,
    refuse_absolute,
    warn_about_bases,
)

_TASK_HEADS = ("classifier", "score", "out_proj")


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


def plan_fuse(
    checkpoint: Checkpoint, adapters: Sequence[LoraAdapter], weights: Weights, modules_to_save: SavePolicy
) -> FusePlan:
    """Plan ``W + sum_i w_i delta_i`` for every weight that an adapter touches.

    Args:
        checkpoint: the base model.
        adapters: at least one; one with weight 0 takes no part, but has to fit.
        weights: one per adapter, finite; None is 1 each.
        modules_to_save: as in ``merge``.
    Returns:
        The plan.
    Raises:
        ValueError: quantised weights, layers that do not fit, heads in several adapters, anything absolute (DoRA,
            replaced biases, rows or weights) beside another adapter or with a weight other than 1, biases without a
            bias to add to, a tied embedding that cannot be untied.
    """
    refuse_quantised(checkpoint)
    plan = FusePlan()
    terms, renamings = [], []
    for term in make_terms(adapters, weights):
        renaming = match_paths(term.adapter, checkpoint, term.name)
        adapter = _without_known_weights(renamed(term.adapter.to(device="cpu"), renaming, checkpoint), checkpoint)
        terms.append(replace(term, adapter=adapter))
        renamings.append(renaming)
        if renaming != Renaming():
            plan.notes.append(f"adapter {term.name}: module paths were renamed to fit the model: {renaming}")
    active = [term for term in terms if term.weight != 0]
    if len(active) != 1 or active[0].weight != 1:
        refuse_absolute(active, "fuse")
    check_finite(active)
    warn_about_bases(active)
    saved = {
        f"{path}.{name}": tensor
        for path, tensors in combine_saved(active, modules_to_save).items()
        for name, tensor in tensors.items()
    }
    tie = _broken_tie(active, checkpoint, saved)
    _plan_deltas(plan, active, checkpoint, tie)
    _plan_biases(plan, active, checkpoint)
    _plan_rows(plan, active, checkpoint)
    _plan_saved(plan, checkpoint, saved)
    if any(term.adapter.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") for term in active):
        _set_labels(plan, checkpoint, saved)
    if tie is not None:
        _untie(plan, checkpoint, tie)
    if any(name not in checkpoint.tensors for name in plan.edits):
        plan.add_prefix = _prefix_of_headed_model(renamings, checkpoint)
    return plan


def _prefix_of_headed_model(renamings: Sequence[Renaming], checkpoint: Checkpoint) -> str:
    """What a bare model's names get in front where a head joins them, as in ``bert.`` beside ``classifier``.

    Loaders want all names of the model with the head or all of the bare one. Only transformers' own prefixes count: a
    wrapper class of the adapter's author means nothing to them.
    """
    strips = {renaming.strip for renaming in renamings if not renaming.add}
    strip = strips.pop() if len(strips) == 1 else ""
    model_type = str(checkpoint.config.get("model_type"))
    name = strip.removesuffix(".")
    return strip if name and (name in ("model", "transformer") or name in model_type) else ""


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """ValueError if the config says that the weights are quantised."""
    for key in ("quantization_config", "compression_config"):
        found = checkpoint.config.get(key) or text_config(checkpoint.config).get(key)
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
            raise ValueError(
                f"{checkpoint.folder}: its weights are quantised ({key}: {method}), and a delta cannot be added "
                "to them exactly; take the unquantised model and quantise the result"
            )


def _check_float(weight: TensorInfo, checkpoint: Checkpoint) -> None:
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{checkpoint.folder}: {weight.name} is stored as {weight.dtype}, a quantised weight to which a delta "
            f"cannot be added exactly; accepted: {', '.join(FLOAT_DTYPES)}"
        )


def _without_known_weights(adapter: LoraAdapter, checkpoint: Checkpoint) -> LoraAdapter:
    """Drop base weights that PEFT saved along with an adapted embedding where they are what the model has anyway."""

    def known(path: str, given: Tensor) -> bool:
        own = checkpoint.tensors.get(f"{path}.weight")
        if own is None or own.shape != tuple(given.shape) or own.dtype not in FLOAT_DTYPES:
            return False
        return all(torch.equal(given[i : i + len(tile)].to(tile), tile) for i, tile in read_tiles(own))

    kept = {path: given for path, given in adapter.base_weights.items() if not known(path, given)}
    return replace(adapter, base_weights=kept)


def _broken_tie(terms: Sequence[Term], checkpoint: Checkpoint, saved: Mapping[str, Tensor]) -> Tie | None:
    """The tie that the edits break. PEFT's ``ensure_weight_tying`` means both ends: then it holds."""
    touched = {name.removesuffix(".weight") for name in saved}
    for term in terms:
        paths = {*term.adapter.layers, *term.adapter.base_weights}
        both = term.adapter.config.get("ensure_weight_tying", False)
        if not both or any(path.rpartition(".")[2] == "lm_head" for path in paths):
            touched |= paths
    return find_tie(checkpoint, touched)


def _untie(plan: FusePlan, checkpoint: Checkpoint, tie: Tie) -> None:
    rows = {
        name: (plan.edits[name] if name in plan.edits else checkpoint.tensors[name]).shape[0]
        for name in (tie.embedding, tie.head)
    }
    if len(set(rows.values())) > 1:
        raise ValueError(f"the tied parameters would differ in length: {rows}; the adapter has to bring both")
    plan.config["tie_word_embeddings"] = False
    if "tie_word_embeddings" in text_config(checkpoint.config):
        _set_text_config(plan, checkpoint, "tie_word_embeddings", False)
    plan.notes.append(
        f"{tie.head} and {tie.embedding} were one parameter, and the adapter changes only one of them or each by "
        "itself: the result has both, with tie_word_embeddings=false"
    )


def _plan_deltas(plan: FusePlan, terms: Sequence[Term], checkpoint: Checkpoint, tie: Tie | None) -> None:
    instead = {f"{path}.weight": weight for path, weight in combine_base_weights(terms).items()}
    sources: dict[str, TensorInfo] = dict(checkpoint.tensors)
    if tie is not None and not tie.head_stored:
        sources[tie.head] = checkpoint.tensors[tie.embedding]
        plan.edits[tie.head] = Unchanged(checkpoint.tensors[tie.embedding])
        if tie.embedding in instead:
            instead.setdefault(tie.head, instead[tie.embedding])
    for name, given in instead.items():
        plan.edits[name] = NewValues(given)
    adapters = {term.name: term.adapter for term in terms}
    for path, parts in layer_terms(terms).items():
        name = f"{path}.weight"
        weight = sources.get(name)
        if weight is None:
            raise ValueError(f"{checkpoint.folder}: no tensor {name!r} for the layer {path} of adapter {parts[0].name}")
        _check_float(weight, checkpoint)
        values = instead.get(name)
        shape = weight.shape if values is None else tuple(values.shape)
        for part in parts:
            check_shape(part.layer, replace(weight, shape=shape), path, part.name)
        flips = {stored_transposed(path, p.layer, weight, checkpoint, adapters[p.name], p.name) for p in parts}
        if len(flips) > 1:
            raise ValueError(f"{path}: the adapters disagree about how {name} is stored (fan_in_fan_out)")
        plan.edits[name] = AddDeltas(weight if values is None else values, parts, flips.pop())
    for name, edit in plan.edits.items():
        if name in checkpoint.tensors and edit.shape[:1] != checkpoint.tensors[name].shape[:1]:
            _resize_vocabulary(plan, checkpoint, checkpoint.tensors[name].shape[0], edit.shape[0])


def _plan_biases(plan: FusePlan, terms: Sequence[Term], checkpoint: Checkpoint) -> None:
    instead: dict[str, Tensor] = {}
    added: dict[str, list[tuple[float, Tensor]]] = {}
    for term in terms:
        lora_biases = {
            path: layer.lora_bias
            for path, layer in term.adapter.layers.items()
            if layer.lora_bias is not None and bool(layer.lora_bias.any())  # zeros need no bias to be added to
        }
        for path, bias in (*term.adapter.base_biases.items(), *lora_biases.items()):
            name = f"{path}.bias"
            base = checkpoint.tensors.get(name)
            if base is None:
                raise ValueError(f"adapter {term.name}: a bias for {path}, but {checkpoint.folder} has no {name!r}")
            if base.shape != tuple(bias.shape):
                raise ValueError(f"adapter {term.name}: {path}: its bias is {list(bias.shape)}, {name} {[*base.shape]}")
            _check_float(base, checkpoint)
        instead.update({f"{path}.bias": bias for path, bias in term.adapter.base_biases.items()})
        for path, bias in lora_biases.items():
            factor = term.weight * term.adapter.layers[path].scaling
            added.setdefault(f"{path}.bias", []).append((factor, bias))
    for name in {**instead, **added}:
        plan.edits[name] = Bias(checkpoint.tensors[name], added.get(name, ()), instead.get(name))


def _plan_rows(plan: FusePlan, terms: Sequence[Term], checkpoint: Checkpoint) -> None:
    for term in terms:
        for path, (given_ids, rows) in term.adapter.trainable_tokens.items():
            ids = given_ids.to("cpu")
            name = f"{path}.weight"
            base = checkpoint.tensors.get(name)
            if base is None:
                raise ValueError(f"adapter {term.name}: token rows for {path}, but there is no tensor {name!r}")
            if name in plan.edits:
                raise ValueError(f"adapter {term.name}: it replaces rows of {name}, which is also changed otherwise")
            if tuple(rows.shape) != (len(ids), *base.shape[1:]):
                raise ValueError(f"adapter {term.name}: {path}: rows {list(rows.shape)} for {name} {list(base.shape)}")
            if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= base.shape[0]):
                raise ValueError(
                    f"adapter {term.name}: {path}: token ids from {int(ids.min())} to {int(ids.max())}, "
                    f"but {name} has {base.shape[0]} rows"
                )
            _check_float(base, checkpoint)
            plan.edits[name] = NewRows(base, ids, rows)
            tie = find_tie(checkpoint, [path])
            if tie is not None and tie.head_stored:  # the copy of a shared parameter follows it
                plan.edits[tie.head] = NewRows(checkpoint.tensors[tie.head], ids, rows)


def _plan_saved(plan: FusePlan, checkpoint: Checkpoint, saved: Mapping[str, Tensor]) -> None:
    for name, tensor in saved.items():
        base = checkpoint.tensors.get(name)
        if not isinstance(plan.edits.get(name, Unchanged), (type, Unchanged)):
            raise ValueError(
                f"{name}: an adapter replaces it while another change is due to it; that cannot be combined"
            )
        if base is None:
            plan.notes.append(f"{name} {list(tensor.shape)} was inserted; the base model has no such tensor")
        elif base.shape != tuple(tensor.shape):
            if base.shape[1:] != tuple(tensor.shape[1:]):
                raise ValueError(f"{name}: the adapter's copy is {list(tensor.shape)}, the model's {list(base.shape)}")
            _resize_vocabulary(plan, checkpoint, base.shape[0], tensor.shape[0])
            plan.notes.append(f"{name}: {base.shape[0]} rows became {tensor.shape[0]}")
        plan.edits[name] = NewValues(tensor)


def _resize_vocabulary(plan: FusePlan, checkpoint: Checkpoint, old: int, new: int) -> None:
    if checkpoint.config.get("vocab_size") == old:
        plan.config["vocab_size"] = new
    elif text_config(checkpoint.config).get("vocab_size") == old:
        _set_text_config(plan, checkpoint, "vocab_size", new)


def _set_text_config(plan: FusePlan, checkpoint: Checkpoint, key: str, value: object) -> None:
    nested = checkpoint.config.get("text_config")
    if isinstance(nested, Mapping):
        plan.config["text_config"] = {**nested, **plan.config.get("text_config", {}), key: value}


def _set_labels(plan: FusePlan, checkpoint: Checkpoint, saved: Mapping[str, Tensor]) -> None:
    """Tell the config how wide a new classification head is, so that the model class builds it so."""
    widths = {
        int(tensor.shape[0])
        for name, tensor in saved.items()
        if tensor.dim() == 2 and name.endswith(tuple(f"{head}.weight" for head in _TASK_HEADS))
    }
    labels = checkpoint.config.get("id2label")
    if len(widths) == 1 and (labels is None or len(labels) not in widths):
        names = [f"LABEL_{i}" for i in range(widths.pop())]
        plan.config["id2label"] = {str(i): name for i, name in enumerate(names)}
        plan.config["label2id"] = {name: i for i, name in enumerate(names)}
