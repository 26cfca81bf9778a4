"""A ``Peru`` as a folder: ``peru.json``, ``merged.safetensors`` and a sparse adapter per task; see docs/peru.md."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from lora_fuse.adapters._atomic import atomic_directory
from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.files import read_safetensors, write_json, write_safetensors
from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint
from lora_fuse.adapters.sparse_files import (
    PERU_CONFIG,
    SPARSE_CONFIG,
    check_tensors,
    load_sparse_adapter,
    read_fields,
    write_sparse_adapter,
)
from lora_fuse.compress.peru_fft import MERGES, SCOPES, Peru, check_task_name
from lora_fuse.compress.peru_plan import Treatment
from lora_fuse.compress.peru_report import PeruReport, report_task

MERGED_NAME = "merged.safetensors"
_FORMAT, _VERSION = "lora_fuse.peru", 1
_FIELDS = {
    "settings": dict,
    "tasks": dict,
    "treatments": dict,
    "tensors": list,
    "aliases": dict,
    "notes": list,
    "checksums": dict,
}


def save_peru(peru: Peru, directory: str | os.PathLike[str]) -> None:
    """Write a PERU folder; see ``Peru.save_pretrained``."""
    tensors = {name: t for name, t in peru.merged.items() if name not in peru.aliases}
    checksums = {name: fingerprint(t) for name, t in tensors.items()}
    for task, adapter in peru.adapters.items():
        check_task_name(task)
        adapter.check()
        if task not in peru.report.tasks:
            raise ValueError(f"adapters[{task!r}]: the report has no such task; use peru_fft(..., merge=peru.merged)")
        _check_fit(f"adapters[{task!r}]", adapter, tensors, checksums, peru.report.treatments)
        _check_aliases(f"adapters[{task!r}]", adapter, peru.aliases)
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": dict(peru.settings),
        "tasks": {task: {"nbytes_finetuned": peru.report.tasks[task].nbytes_finetuned} for task in peru.adapters},
        "treatments": dict(peru.report.treatments),
        "tensors": list(peru.merged),
        "aliases": dict(peru.aliases),
        "notes": list(peru.report.notes),
        "checksums": checksums,
    }
    with atomic_directory(directory, last=PERU_CONFIG) as stage:
        write_safetensors(stage / MERGED_NAME, tensors)
        for task, adapter in peru.adapters.items():
            (stage / task).mkdir()
            write_sparse_adapter(adapter, stage / task)
        write_json(stage / PERU_CONFIG, config)


def load_peru(directory: str | os.PathLike[str], tasks: Iterable[str] | None = None) -> Peru:
    """Read a PERU folder, strictly.

    Args:
        directory: as ``Peru.save_pretrained`` wrote it.
        tasks: which to read; None: all.
    Returns:
        The same merged model and adapters, bit for bit, and the same report (of the tasks read).
    Raises:
        ValueError: no such task (those there are get named); a file is missing, cut short, damaged or from a newer
            version; a tensor is missing, unknown or changed; an adapter does not belong to the merged model. The file
            and the offender are named.
    """
    folder = Path(directory).expanduser()
    path = folder / PERU_CONFIG
    if not path.is_file():
        one = (folder / SPARSE_CONFIG).is_file()
        hint = ", only one task; attach takes it, load_peru its parent folder" if one else ""
        raise ValueError(f"{folder}: not a PERU folder: there is no {PERU_CONFIG} in it{hint}")
    config = read_fields(path, _FORMAT, _VERSION, _FIELDS)
    _check_settings(path, config["settings"])
    wanted = _wanted(folder, config["tasks"], tasks)
    stored, _ = read_safetensors(folder / MERGED_NAME)
    check_tensors(folder / MERGED_NAME, stored, config["checksums"])
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{folder / MERGED_NAME}: {name!r} has NaN or infinite entries")
    aliases, treatments = config["aliases"], config["treatments"]
    _check_names(path, config, stored)
    adapters = {}
    for task in wanted:
        adapters[task] = load_sparse_adapter(folder / task)
        _check_fit(str(folder / task), adapters[task], stored, config["checksums"], treatments)
        _check_aliases(str(folder / task), adapters[task], aliases)
    merged = {name: stored[aliases.get(name, name)] for name in config["tensors"]}
    reports = {
        task: report_task(adapter, treatments, merged, config["tasks"][task]["nbytes_finetuned"])
        for task, adapter in adapters.items()
    }
    report = PeruReport(reports, treatments, sum(t.nbytes for t in stored.values()), config["notes"])
    return Peru(merged, adapters, report, aliases, config["settings"])


def _wanted(folder: Path, known: Mapping[str, Any], tasks: Iterable[str] | None) -> list[str]:
    for task, info in known.items():
        check_task_name(task)  # it becomes a path
        if not isinstance(info, dict) or info.keys() != {"nbytes_finetuned"}:
            raise ValueError(f"{folder / PERU_CONFIG}: damaged: task {task!r} is described as {str(info)[:200]}")
        if type(info["nbytes_finetuned"]) is not int or info["nbytes_finetuned"] < 0:
            raise ValueError(f"{folder / PERU_CONFIG}: damaged: task {task!r} has {info}")
    wanted = list(known) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    for task in wanted:
        if task not in known:
            raise ValueError(f"tasks: {folder} has no task {task!r}; it has {', '.join(map(repr, known))}")
    return list(dict.fromkeys(wanted))


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    def number(name: str) -> bool:
        return type(settings.get(name)) in (int, float) and math.isfinite(settings[name])

    merge = settings.get("merge")
    sound = {
        "density": number("density") and 0 < settings["density"] <= 1,
        "merge": merge in (*MERGES, "given"),
        "scaling": number("scaling") if merge in ("task_arithmetic", "ties") else settings.get("scaling", 0) is None,
        "scope": settings.get("scope") in SCOPES,
        **({"trim": number("trim") and 0 < settings["trim"] <= 1} if merge == "ties" else {}),
    }
    if wrong := [name for name, right in sound.items() if not right] or sorted(settings.keys() - sound.keys()):
        raise ValueError(f"{path}: damaged: 'settings' has {wrong[0]!r} as {str(settings.get(wrong[0]))[:200]}")


def _check_names(path: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Refuse a ``peru.json`` whose lists of names do not agree with each other and with the merged tensors."""
    names, aliases, treatments = config["tensors"], config["aliases"], config["treatments"]
    if not all(isinstance(name, str) for name in (*names, *aliases.values(), *config["notes"])):
        raise ValueError(f"{path}: damaged: 'tensors', 'aliases' and 'notes' hold text only")
    if unknown := [t for t in treatments.values() if t not in get_args(Treatment)]:
        raise ValueError(f"{path}: damaged: unknown treatment {unknown[0]!r}")
    plain = [name for name in names if name not in aliases]
    lists = {
        "'tensors' and merged.safetensors": stored.keys() ^ set(plain),
        "'tensors' and 'aliases'": (aliases.keys() - set(names)) | (set(aliases.values()) - set(plain)),
        "'tensors' and 'treatments'": (set(plain) - treatments.keys())
        | {name for name, t in treatments.items() if t != "head" and name not in stored},
    }
    for what, differing in lists.items():
        if differing:
            raise ValueError(f"{path}: damaged: {what} disagree on {min(differing)!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: damaged: 'tensors' names one twice")


def _check_aliases(label: str, adapter: SparseAdapter, aliases: Mapping[str, str]) -> None:
    if dict(adapter.aliases) != dict(aliases):
        raise ValueError(f"{label}: has tied weights {dict(adapter.aliases)}, the PERU has {dict(aliases)}")


def _check_fit(
    label: str,
    adapter: SparseAdapter,
    merged: Mapping[str, Tensor],
    checksums: Mapping[str, str],
    treatments: Mapping[str, Treatment],
) -> None:
    """Refuse an adapter that does not belong to the merged model; ``checksums`` are the merged tensors'."""
    for name, expected in adapter.fingerprint.items():
        if checksums.get(name) != expected:
            raise ValueError(f"{label}: was made against other merged weights: {name!r} differs")
    groups = {"pruned": adapter.matrices, "dense": adapter.dense, "head": adapter.heads}
    for treatment, group in groups.items():
        for name in group:
            if treatments.get(name) != treatment:
                raise ValueError(f"{label}: {name!r} is {treatment}, the PERU says {treatments.get(name)}")
    for name, shape in adapter.shapes.items():
        values, weight = adapter.matrices[name].values, merged[name]
        if tuple(weight.shape) != tuple(shape) or values.dtype != weight.dtype:
            raise ValueError(
                f"{label}: {name!r} is {values.dtype} of shape {list(shape)}, merged has {weight.dtype} of shape "
                f"{list(weight.shape)}"
            )
    for name, tensor in adapter.dense.items():
        weight = merged[name]
        if tensor.shape != weight.shape or tensor.dtype != weight.dtype:
            raise ValueError(
                f"{label}: {name!r} is {tensor.dtype} of shape {list(tensor.shape)}, merged has {weight.dtype} of "
                f"shape {list(weight.shape)}"
            )
    needed = {n for n, t in treatments.items() if t != "head" and merged[n].is_floating_point()}
    if lost := sorted(needed - adapter.fingerprint.keys()):
        raise ValueError(f"{label}: has no fingerprint of {lost[0]!r}")
