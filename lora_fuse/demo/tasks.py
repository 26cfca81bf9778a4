"""The shipped tasks: adapters, tuned baseline heads, and evaluation slices under ``examples/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from .model import HEAD, Encoded, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..adapters.lora import LoraAdapter


class Head(NamedTuple):
    """A linear head in fp32: ``weight [num_classes, hidden_size]``, ``bias [num_classes]``."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Task:
    """One task with everything the demo needs.

    Args:
        classes: label names; a label's number is its place here.
        rows, labels: the evaluation slice, encoded; ``labels`` int64 ``[len(rows)]``.
        folder: PEFT files of the adapter.
        adapter: the same, loaded.
        head: the adapter's own head (trained with the LoRA).
        baseline: the head tuned on the frozen encoder.
        recorded: the task's entry in ``results.json``.
    """

    name: str
    classes: Sequence[str]
    rows: Sequence[Encoded]
    labels: Tensor
    folder: Path
    adapter: LoraAdapter
    head: Head
    baseline: Head
    recorded: Mapping[str, Any]


def examples_folder() -> Path:
    """``examples/`` of the source checkout that this package is imported from.

    Raises:
        RuntimeError: there is none, as in an installed wheel.
    """
    folder = Path(__file__).resolve().parents[2] / "examples"
    if not (folder / "adapters" / "results.json").is_file():
        raise RuntimeError(
            f"the demo's adapters and evaluation slices are not in {folder}: an installed wheel does not carry them. "
            "Clone the repository and run `make demo` there, or `pip install --editable .` and `lora-fuse demo`"
        )
    return folder


def load_tasks(folder: Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Task]:
    """Every task of ``results.json``, with the first ``limit`` examples of its slice (all if None)."""
    from .. import load_adapter

    recorded = json.loads((folder / "adapters" / "results.json").read_text(encoding="utf-8"))["tasks"]
    tasks = []
    for name, entry in recorded.items():
        lines = (folder / "slices" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        examples = [json.loads(line) for line in lines][:limit]
        adapter = load_adapter(str(folder / "adapters" / name))
        baseline = load_file(folder / "adapters" / name / "head_only.safetensors")
        tasks.append(
            Task(
                name=name,
                classes=entry["classes"],
                rows=encode(tokenizer, [(e["text"], e["pair"]) for e in examples]),
                labels=torch.tensor([entry["classes"].index(e["label"]) for e in examples]),
                folder=folder / "adapters" / name,
                adapter=adapter,
                head=_head(adapter.modules_to_save[HEAD]),
                baseline=_head(baseline),
                recorded=entry,
            )
        )
    return tasks


def _head(tensors: Mapping[str, Tensor]) -> Head:
    return Head(tensors["weight"].float(), tensors["bias"].float())
