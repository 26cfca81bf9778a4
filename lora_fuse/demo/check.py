"""Every row of a mixed batch against PEFT, on the same weights and the same rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .model import HEAD, TextClassifier, collate
from .tasks import Task

ROWS_PER_TASK = 6
BASE_ROWS = 4
MIX = (0.7, 0.3)
# Of the largest value that is compared: both sides compute in fp32 and differ only in the order of sums.
TOLERANCE = 1e-5


class Difference(NamedTuple):
    """One kind of row: the largest difference from PEFT (from the bare model for rows without an adapter)."""

    name: str
    rows: int
    largest: float
    largest_value: float


@torch.inference_mode()
def against_peft(encoder: nn.Module, tasks: Sequence[Task]) -> list[Difference]:
    """Serve one batch with rows of every adapter and of none, then one of weighted mixes; compare with PEFT row by row.

    Args:
        encoder: bare encoder, left as it is.
        tasks: at least two; rows of different tasks alternate.
    Returns:
        An entry per adapter, one for the rows without an adapter, one for the weighted mixes.
    Raises:
        RuntimeError: a row differs by more than ``TOLERANCE`` times the largest value (without an adapter: at all).
    """
    return [*_one_adapter_a_row(encoder, tasks), _mixes(encoder, tasks)]


def _one_adapter_a_row(encoder: nn.Module, tasks: Sequence[Task]) -> list[Difference]:
    import peft

    import lora_fuse as lf

    plan: list[Task | None] = [task for _ in range(ROWS_PER_TASK) for task in tasks]
    plan[3:3] = [None] * BASE_ROWS  # among the others, not one tail
    batch = first_rows([task or tasks[0] for task in plan])
    served = TextClassifier(copy.deepcopy(encoder), 2).eval()
    bare = copy.deepcopy(served)
    lf.attach(served, {task.name: task.adapter for task in tasks})
    with lf.use_adapters(served, [None if task is None else task.name for task in plan]):
        got = served(**batch)

    differences = []
    for task in tasks:
        mine = [i for i, planned in enumerate(plan) if planned is task]
        oracle = peft.PeftModel.from_pretrained(
            TextClassifier(copy.deepcopy(encoder), len(task.classes)), str(task.folder)
        ).eval()
        want = oracle(**{key: value[mine] for key, value in batch.items()})
        if not torch.isneginf(got[mine, want.shape[1] :]).all():
            raise RuntimeError(f"adapter {task.name!r} has {want.shape[1]} classes, but its rows have more logits")
        differences.append(compare(task.name, got[mine, : want.shape[1]], want))
    mine = [i for i, planned in enumerate(plan) if planned is None]
    want = bare(**batch)[mine]
    differences.append(compare("no adapter", got[mine, : want.shape[1]], want, tolerance=0.0))
    return differences


def _mixes(encoder: nn.Module, tasks: Sequence[Task]) -> Difference:
    """Rows that blend each task's adapter with the next one's, before the heads; PEFT merges every pair exactly."""
    import lora_fuse as lf

    pairs = [(task.name, tasks[(i + 1) % len(tasks)].name) for i, task in enumerate(tasks)]
    batch = first_rows(tasks)
    served = TextClassifier(copy.deepcopy(encoder), 0).eval()
    lf.attach(served, {task.name: replace(task.adapter, modules_to_save={}) for task in tasks})
    with lf.use_adapters(served, [dict(zip(pair, MIX, strict=True)) for pair in pairs]):
        got = served(**batch)
    oracle = peft_model(encoder, tasks)
    want = []
    for i, pair in enumerate(pairs):
        oracle.add_weighted_adapter(list(pair), list(MIX), f"mix{i}", combination_type="cat")
        oracle.set_adapter(f"mix{i}")
        want.append(oracle(**{key: value[i : i + 1] for key, value in batch.items()}))
    return compare("weighted mixes", got, torch.cat(want))


def first_rows(sources: Sequence[Task]) -> Mapping[str, Tensor]:
    """A batch that takes each task's examples in turn, one for every time that it is named."""
    taken: dict[str, int] = {}
    rows = []
    for task in sources:
        taken[task.name] = taken.get(task.name, -1) + 1
        rows.append(task.rows[taken[task.name]])
    return collate(rows)


def compare(name: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> Difference:
    largest, value = (got - want).abs().max().item(), want.abs().max().item()
    if not largest <= tolerance * max(1.0, value):
        raise RuntimeError(f"{name}: rows of the mixed batch differ by {largest:.3g} where values reach {value:.3g}")
    return Difference(name, len(got), largest, value)


def peft_model(encoder: nn.Module, tasks: Sequence[Task]) -> Any:
    """One PEFT model with every task's LoRA factors and no heads, which it cannot hold in different widths."""
    import peft

    model: Any = None
    for task in tasks:
        config = peft.LoraConfig.from_pretrained(str(task.folder))
        config.modules_to_save = None
        if model is None:
            model = peft.PeftModel(TextClassifier(copy.deepcopy(encoder), 0), config, adapter_name=task.name)
        else:
            model.add_adapter(task.name, config)
        factors = load_file(task.folder / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(
            model, {k: v.float() for k, v in factors.items() if f".{HEAD}." not in k}, adapter_name=task.name
        )
    return model.eval()
