"""Which tensors of a full fine-tune become factors, which are copied, and which an adapter cannot hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lora_fuse.adapters.config import LoraSettings
from lora_fuse.adapters.lora import LayerKind
from lora_fuse.merging.targets import is_hf_conv1d
from lora_fuse.merging.weights import Weights

Targets: TypeAlias = str | Sequence[str] | None
_SHOWN = 5
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")  # besides what has "embed" in its name
_LINEAR_ALL_THE_SAME = ("embed_out",)  # GPT-NeoX's output head


@dataclass(frozen=True)
class Layer:
    """A weight to be factored: where it lies, what PEFT calls it, and whether it is stored ``[in, out]``."""

    name: str
    path: str
    kind: LayerKind
    transposed: bool = False


@dataclass(frozen=True)
class Plan:
    """Names are the fine-tune's.

    Args:
        layers: weights to be factored, if they changed.
        saved: module path -> names of its tensors, to be copied.
        others: name -> why no factors are made of it.
        missing: floating-point names that only the fine-tune has.
        base_names: name -> the base's name for it, where several names share memory.
        tuned_names: the same of the fine-tune.
    """

    layers: list[Layer]
    saved: dict[str, list[str]]
    others: dict[str, str]
    missing: list[str]
    base_names: dict[str, str]
    tuned_names: dict[str, str]


def make_plan(base: Weights, tuned: Weights, sources: Sequence[Any], targets: Targets, saved: Targets) -> Plan:
    """Sort the fine-tune's tensors.

    Args:
        base, tuned: the weights, under the same names.
        sources: what they came from; a module tells its layers' kinds, a folder its model's type.
        targets: PEFT's ``target_modules``; None: linear layers and, where a module says what they are, convolutions.
        saved: PEFT's ``modules_to_save``.
    Raises:
        ValueError: a name or shape does not fit, or ``targets`` or ``saved`` matches nothing.
    """
    targets = None if targets == "all-linear" else targets
    modules = next((dict(s.named_modules(remove_duplicate=False)) for s in sources if isinstance(s, nn.Module)), None)
    conv1d = _conv1d_names(sources)
    wanted, kept = _matcher("targets", targets), _matcher("modules_to_save", saved)
    base_names = {name: base.aliases.get(name, name) for name in base.names}
    tuned_names = {name: tuned.aliases.get(name, name) for name in tuned.names}
    tied: dict[str, str] = {}
    for alias, first in (*base.aliases.items(), *tuned.aliases.items()):
        tied.setdefault(alias, first)
        tied.setdefault(first, alias)
    plan = Plan([], {}, {}, [], base_names, tuned_names)
    for name in tuned.names:
        copied = next((p for p in _ancestors(name) if saved is not None and kept(p)), None)
        if copied is not None:
            plan.saved.setdefault(copied, []).append(name)
            continue
        entry = tuned.entries[tuned_names[name]]
        if name not in base_names:
            if entry.dtype.is_floating_point:
                plan.missing.append(name)
            continue
        if entry.shape != base.entries[base_names[name]].shape:
            raise ValueError(
                f"finetuned: {name!r} has shape {list(entry.shape)}, the base's is "
                f"{list(base.entries[base_names[name]].shape)}; to copy the whole module, name it in modules_to_save"
            )
        path = name.rpartition(".")[0]
        if not entry.dtype.is_floating_point or not base.entries[base_names[name]].dtype.is_floating_point:
            plan.others[name] = "not floating-point"
            continue
        if not name.endswith(".weight"):
            plan.others[name] = "no module's weight" if len(entry.shape) > 1 else "one-dimensional"
            continue
        found = _kind(path, entry.shape, modules, conv1d)
        if isinstance(found, str):
            plan.others[name] = found
        elif targets is not None:
            if wanted(path):
                plan.layers.append(Layer(name, path, *found))
            else:
                plan.others[name] = "not in targets"
        elif name in tied:
            plan.others[name] = f"tied to {tied[name]}"
        elif found[0] == "embedding":
            plan.others[name] = "an embedding; name it in targets"
        elif found[0] == "conv2d" and modules is None:
            plan.others[name] = "looks like a convolution; name it in targets"
        else:
            plan.layers.append(Layer(name, path, *found))
    lost = [
        n
        for n, e in ((n, base.entries[f]) for n, f in base_names.items())
        if e.dtype.is_floating_point and n not in tuned_names
    ]
    if lost:
        raise ValueError(f"finetuned: lacks {_few(lost)} of the base{_advice(lost, plan.missing)}")
    if not plan.layers and targets is not None:
        raise ValueError(
            f"targets: {targets!r} matches no weight that can be factored; the model has {_few(tuned.names)}"
        )
    if not plan.saved and saved:
        raise ValueError(f"modules_to_save: {saved!r} matches no module; the model has {_few(tuned.names)}")
    return plan


def _kind(
    path: str, shape: tuple[int, ...], modules: dict[str, nn.Module] | None, conv1d: Callable[[str], bool]
) -> tuple[LayerKind, bool] | str:
    """Kind of the layer and whether its weight is ``[in, out]``, or why it cannot be factored."""
    module = None if modules is None else modules.get(path)
    if module is None:
        last = path.rpartition(".")[2]
        if len(shape) == 4:
            return "conv2d", False
        if len(shape) != 2:
            return "one-dimensional" if len(shape) < 2 else f"{len(shape)}-dimensional"
        if (last in _EMBEDDINGS or "embed" in last) and last not in _LINEAR_ALL_THE_SAME:
            return "embedding", True
        return "linear", conv1d(path)
    if isinstance(module, nn.Linear):
        return "linear", False
    if is_hf_conv1d(module):
        return "linear", True
    if isinstance(module, nn.Embedding):
        return "embedding", True
    if isinstance(module, nn.Conv2d):
        return "a grouped convolution" if module.groups != 1 else ("conv2d", False)
    return f"{type(module).__name__}, no linear layer"


def _conv1d_names(sources: Sequence[Any]) -> Callable[[str], bool]:
    """Whether a model folder keeps the weight at a path as transformers' Conv1D does, going by its config."""
    # The reader of configs rests on torch alone, although it lives in a package above this one.
    from lora_fuse.checkpoints.match import is_conv1d
    from lora_fuse.checkpoints.read import open_checkpoint

    folders = [Path(s).expanduser() for s in sources if isinstance(s, (str, os.PathLike))]
    config = next((c for f in folders if f.is_dir() and (c := open_checkpoint(f).config)), {})
    return lambda path: is_conv1d(config, path)


def _matcher(argument: str, given: Targets) -> Callable[[str], bool]:
    if isinstance(given, str):
        try:
            re.compile(given)
        except re.error as error:
            raise ValueError(f"{argument}: {given!r} is no regex ({error})") from None
    elif given is not None and not (isinstance(given, Iterable) and all(isinstance(t, str) for t in given)):
        raise TypeError(f"{argument}: expected a regex or a list of names, got {given!r}")
    return LoraSettings(target_modules=given).targets


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _advice(lost: list[str], extra: list[str]) -> str:
    """How the two namings may fit together, if one ends with the other."""
    for name in lost[:1]:
        if before := next((n.removesuffix(name) for n in extra if n.endswith(f".{name}")), None):
            return f"; its names start with {before!r}: give prefix={before!r}"
    return "; is it a fine-tune of another model?"


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + rest
