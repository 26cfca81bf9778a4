"""Accuracy of the shipped slices: alone, head only, merged, truncated; every pass is a mixed batch."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .model import TextClassifier, batches_by_length, collate
from .tasks import Head, Task

if TYPE_CHECKING:
    from ..adapters.lora import LoraAdapter

BATCH = 64
PERU_RANKS = (4, 2, 1)
MOST_SETS = 15


class Request(NamedTuple):
    """Score one task's slice with an adapter (None: the frozen encoder) under a head."""

    task: Task
    adapter: str | None
    head: Head


class Score(NamedTuple):
    """Accuracy of a task in one setting: the mean, and the range where the setting has several members."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Setting:
    """A column of the accuracy table.

    Args:
        scores: task name -> accuracy.
        nbytes: what all tasks together keep beside the encoder and the heads, in fp16; None where that is not one
            thing.
    """

    label: str
    scores: Mapping[str, Score]
    nbytes: int | None


@torch.inference_mode()
def evaluate(
    encoder: nn.Module,
    tasks: Sequence[Task],
    largest_merge: int = 3,
    advance: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Setting]:
    """All settings of the table.

    Args:
        encoder: bare encoder, left as it is.
        tasks: at least two.
        largest_merge: 2 or 3; sets of up to this many tasks are merged (``task_sets``), and all of them at once.
        advance: called with (stage, rows done, rows in all) as rows are served.
    """
    import lora_fuse as lf

    adapters = {task.name: replace(task.adapter, modules_to_save={}) for task in tasks}

    def attached(adapters: Mapping[str, LoraAdapter]) -> nn.Module:
        model = TextClassifier(copy.deepcopy(encoder), 0).eval()
        return lf.attach(model, adapters, num_slots=len(adapters))

    requests = [Request(t, None, t.baseline) for t in tasks] + [Request(t, t.name, t.head) for t in tasks]
    scores = serve(attached(adapters), requests, partial(advance, "alone"))
    n = len(tasks)
    settings = [
        _setting("head only", tasks, scores[:n], 0),
        _setting("alone", tasks, scores[n:], sum(map(_fp16_bytes, adapters.values()))),
    ]
    for rank in PERU_RANKS:
        small = lf.peru_lora(adapters, rank=rank)
        requests = [Request(t, t.name, t.head) for t in tasks]
        stage = f"PERU-LoRA rank {rank}"
        scores = serve(attached(small), requests, partial(advance, stage))
        settings.append(_setting(stage, tasks, scores, sum(map(_fp16_bytes, small.values()))))
    for size in sorted({*range(2, largest_merge + 1), n}):
        merged, requests = {}, []
        for members in task_sets(tasks, size):
            name = "+".join(t.name for t in members)
            merged[name] = lf.merge([adapters[t.name] for t in members], method="uniform")
            requests += [Request(t, name, t.head) for t in members]
        stage = f"{size} merged"
        scores = serve(attached(merged), requests, partial(advance, stage))
        by_task = {t.name: [s for r, s in zip(requests, scores, strict=True) if r.task is t] for t in tasks}
        summary = {name: Score(statistics.fmean(s), min(s), max(s)) for name, s in by_task.items()}
        settings.append(Setting(stage, summary, _fp16_bytes(merged[name]) if size == n else None))
    return settings


def task_sets(tasks: Sequence[Task], size: int) -> list[tuple[Task, ...]]:
    """Every set of ``size`` tasks; threes above ``MOST_SETS`` are thinned to as many as tasks, each task in three."""
    every = list(itertools.combinations(tasks, size))
    if size != 3 or len(every) <= MOST_SETS:
        return every
    # 0, 1, 3 has the differences 1, 2 and 3, so turning it around the circle meets near and far pairs alike.
    return [tuple(tasks[(start + step) % len(tasks)] for step in (0, 1, 3)) for start in range(len(tasks))]


def _setting(label: str, tasks: Sequence[Task], scores: Sequence[float], nbytes: int) -> Setting:
    return Setting(label, single_scores(tasks, scores), nbytes)


def single_scores(tasks: Sequence[Task], scores: Sequence[float]) -> dict[str, Score]:
    """One score per task, by its name."""
    return {task.name: Score(score, score, score) for task, score in zip(tasks, scores, strict=True)}


def _fp16_bytes(adapter: LoraAdapter) -> int:
    return 2 * sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in adapter.layers.values())


def serve(
    model: nn.Module,
    requests: Sequence[Request],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Accuracy of every request; rows of all requests share batches, grouped by length alone.

    Args:
        model: an attached ``TextClassifier`` without a head.
    """
    import lora_fuse as lf

    flat = [(request, i) for request in requests for i in range(len(request.task.rows))]
    right = [0] * len(requests)
    place = {id(request): i for i, request in enumerate(requests)}
    done = 0
    for chosen in batches_by_length([request.task.rows[i] for request, i in flat], BATCH):
        picked = [flat[k] for k in chosen]
        with lf.use_adapters(model, [request.adapter for request, _ in picked]):
            features = model(**collate([request.task.rows[i] for request, i in picked]))
        for row, (request, i) in zip(features, picked, strict=True):
            guess = F.linear(row, request.head.weight, request.head.bias).argmax()
            right[place[id(request)]] += int(guess == request.task.labels[i])
        done += len(picked)
        advance(done, len(flat))
    return [hits / len(request.task.rows) for hits, request in zip(right, requests, strict=True)]
