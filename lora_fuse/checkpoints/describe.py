"""What a path holds, in plain values: for the command line's tables and its JSON."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.checkpoints.header import read_header
from lora_fuse.checkpoints.match import text_config
from lora_fuse.checkpoints.read import Checkpoint
from lora_fuse.compress.joint import JointBank
from lora_fuse.compress.peru_fft import Peru


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model folder: what its config and its headers say; no tensor is read.

    Returns:
        JSON-ready values: kind, path, model_type, architectures, parameters, bytes, tensors, dtypes (count by name),
        files, tie_word_embeddings and quantization (None where the config is silent), warnings.
    """
    config = checkpoint.config
    quantised = config.get("quantization_config") or text_config(config).get("quantization_config")
    notes = [] if config else ["there is no config.json"]
    if quantised:
        notes.append("its weights are quantised: adapters cannot be fused into them")
    stored = {name for name in os.listdir(checkpoint.folder) if name.endswith(".safetensors")}
    if spare := sorted(stored - set(checkpoint.shards)):
        notes.append(f"weight files that do not belong to the model: {', '.join(spare)}")
    return {
        "kind": "model",
        "path": str(checkpoint.folder),
        "model_type": config.get("model_type"),
        "architectures": list(config.get("architectures") or []),
        "parameters": checkpoint.num_parameters(),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values()).most_common()),
        "files": list(checkpoint.shards),
        "tie_word_embeddings": config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings")),
        "quantization": quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised,
        "warnings": notes,
    }


def describe_adapter(adapter: LoraAdapter, path: str, notes: list[str] | None = None) -> dict[str, Any]:
    """An adapter: its format, its layers and what else it carries.

    Args:
        adapter: as loaded.
        path: where it was loaded from, for the format.
        notes: warnings that came up while it was loaded.
    Returns:
        JSON-ready values: kind, path, format, base_model, task_type, ranks and scalings (layers by value), targets
        (layers by the last name of their path), kinds, layers, parameters, bytes, dtypes, features, heads (shape by
        tensor name), warnings.
    """
    layers = adapter.layers
    features = {
        "rsLoRA": bool(adapter.config.get("use_rslora")),
        "DoRA": any(layer.magnitude is not None for layer in layers.values()),
        "lora_bias": any(layer.lora_bias is not None for layer in layers.values()),
        "replaced biases": bool(adapter.base_biases),
        "trained token rows": bool(adapter.trainable_tokens),
        "saved base weights": bool(adapter.base_weights),
    }
    return {
        "kind": "adapter",
        "path": path,
        "format": adapter_format(path),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "task_type": adapter.config.get("task_type"),
        "ranks": _counts(layer.rank for layer in layers.values()),
        "scalings": _counts(round(layer.scaling, 6) for layer in layers.values()),
        "targets": _counts(path.rpartition(".")[2] for path in layers),
        "kinds": _counts(layer.kind for layer in layers.values()),
        "layers": len(layers),
        "parameters": adapter.num_parameters(),
        "bytes": adapter.nbytes,
        "dtypes": _counts(str(t.dtype).removeprefix("torch.") for t in adapter.tensors()),
        "features": [name for name, present in features.items() if present],
        "heads": {
            f"{path}.{name}": list(tensor.shape)
            for path, saved in adapter.modules_to_save.items()
            for name, tensor in saved.items()
        },
        "warnings": list(notes or []),
    }


def describe_peru(peru: Peru, path: str) -> dict[str, Any]:
    """A PERU folder: its settings, and per task what was kept.

    Returns:
        JSON-ready values: kind, path, settings, bytes (of everything), merged_bytes, treatments (count by kind), tasks
        (name -> kept, entries, energy, bytes, finetuned_bytes, heads by shape), warnings.
    """
    report = peru.report
    return {
        "kind": "PERU",
        "path": path,
        "settings": dict(peru.settings),
        "bytes": report.nbytes,
        "merged_bytes": report.nbytes_merged,
        "treatments": _counts(report.treatments.values()),
        "tasks": {
            name: {
                "kept": task.kept,
                "entries": task.entries,
                "energy": task.energy,
                "bytes": task.nbytes,
                "finetuned_bytes": task.nbytes_finetuned,
                "heads": {head: list(t.shape) for head, t in peru.adapters[name].heads.items()},
            }
            for name, task in report.tasks.items()
        },
        "warnings": list(report.notes),
    }


def describe_joint(bank: JointBank, path: str) -> dict[str, Any]:
    """A joint bank: its form, and per adapter what it has of its own.

    Returns:
        JSON-ready values: kind, path, form, rank, clusters, layers, bytes (of everything), factor_bytes (of the
        adapters' factors before), adapters (name -> cluster, bytes, relative_error), warnings.
    """
    bases = bank.bases.values()
    return {
        "kind": "joint bank",
        "path": path,
        "form": bank.form,
        "rank": max((basis.rank for basis in bases), default=0),
        "clusters": max((basis.u.shape[0] for basis in bases), default=0),
        "layers": len(bank.bases),
        "bytes": bank.nbytes,
        "factor_bytes": bank.report.nbytes_before,
        "adapters": {
            name: {"cluster": a.cluster, "bytes": a.nbytes, "relative_error": bank.report.error_of(name)}
            for name, a in bank.adapters.items()
        },
        "warnings": [],
    }


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def adapter_format(path: str) -> str:
    """``PEFT``, ``kohya``, ``diffusers`` or ``safetensors`` (PEFT's keys without a config), told from names alone."""
    place = Path(path).expanduser()
    if not place.exists():
        return "PEFT (hub)"
    if place.is_dir() and (any(place.glob("adapter_config.json")) or any(place.glob("*/adapter_config.json"))):
        return "PEFT"
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        return "safetensors"
    metadata, tensors = read_header(files[0])
    if any(".lora_down." in tensor.name for tensor in tensors):
        return "kohya"
    return "diffusers" if "lora_adapter_metadata" in metadata else "safetensors"


def load_for_inspection(path: str, **options: Any) -> tuple[LoraAdapter, list[str]]:
    """The adapter, and as text what a strict reader would refuse and a lenient one leaves out.

    Raises:
        ValueError: what no reader can get over.
    """
    from lora_fuse.adapters.load import load_adapter

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = load_adapter(path, strict=False, **options)
    return adapter, [str(warning.message) for warning in caught]
