"""Whole fine-tunes from one set of weights: PERU-FFT's sparse residuals, in a mixed batch and switched in place."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .accuracy import Request, Score, serve, single_scores
from .check import Difference, compare, first_rows
from .model import TextClassifier
from .tasks import Task

if TYPE_CHECKING:
    from ..compress.peru_fft import Peru

DENSITIES = (0.1, 0.01)
SWITCHES = 20


@dataclass(frozen=True)
class Kept:
    """A way of keeping all fine-tunes.

    Args:
        scores: task name -> accuracy.
        nbytes: what all tasks together hold beside one set of weights, heads aside.
        switch_ms: median milliseconds from one task's weights to another's, in place; None where nothing is switched.
    """

    label: str
    scores: Mapping[str, Score]
    nbytes: int
    switch_ms: float | None = None


def finetunes(encoder: nn.Module, tasks: Sequence[Task]) -> dict[str, dict[str, Tensor]]:
    """Task -> state dict of a headless ``TextClassifier`` that has the task's adapter in its weights."""
    import lora_fuse as lf

    states = {}
    for task in tasks:
        model = TextClassifier(copy.deepcopy(encoder), 0)
        lf.fuse(model, [replace(task.adapter, modules_to_save={})], backup=False)
        states[task.name] = model.state_dict()
    return states


@torch.inference_mode()
def evaluate_finetunes(
    encoder: nn.Module,
    tasks: Sequence[Task],
    advance: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[list[Kept], Difference]:
    """What each way keeps of the fine-tunes, and how far a mixed batch is from the fine-tunes' own models.

    Args:
        encoder: bare encoder, left as it is.
        tasks: at least two.
        advance: called with (stage, rows done, rows in all) as rows are served.
    Raises:
        RuntimeError: a row of the mixed batch differs from its task's own model.
    """
    import lora_fuse as lf

    states = finetunes(encoder, tasks)
    whole = sum(t.nbytes for state in states.values() for t in state.values())
    found: list[Kept] = []
    difference = None
    merged: Any = "task_arithmetic"
    for density in DENSITIES:
        peru = lf.peru_fft(TextClassifier(encoder, 0), states, density=density, merge=merged)
        merged = peru.merged  # the same at every density
        model = TextClassifier(copy.deepcopy(encoder), 0).eval()
        model.load_state_dict(peru.merged)
        if difference is None:
            found.append(Kept("a copy each", {}, whole, _copy_ms(model, states)))
        lf.attach(model, peru.adapters, num_slots=len(tasks))
        if difference is None:
            requests = [Request(task, None, task.head) for task in tasks]
            scores = serve(model, requests, partial(advance, "fine-tunes merged"))
            found.append(Kept("merged", single_scores(tasks, scores), 0))
            difference = _mixed_against_own(encoder, model, peru, tasks)
        requests = [Request(task, task.name, task.head) for task in tasks]
        stage = f"PERU-FFT {density:.0%}"
        scores = serve(model, requests, partial(advance, stage))
        nbytes = sum(adapter.nbytes for adapter in peru.adapters.values())
        found.append(Kept(stage, single_scores(tasks, scores), nbytes, _switch_ms(model, tasks)))
    assert difference is not None
    return found, difference


def _mixed_against_own(encoder: nn.Module, served: nn.Module, peru: Peru, tasks: Sequence[Task]) -> Difference:
    """A batch with a row of every task and one of none, against each task's own weights in a bare model."""
    import lora_fuse as lf

    names = (*(task.name for task in tasks), None)
    batch = first_rows([*tasks, tasks[0]])
    with lf.use_adapters(served, names):
        got = served(**batch)
    bare = TextClassifier(copy.deepcopy(encoder), 0).eval()
    want = []
    for i, name in enumerate(names):
        bare.load_state_dict(peru.state_dict(name))
        want.append(bare(**{key: value[i : i + 1] for key, value in batch.items()}))
    return compare("fine-tunes", got, torch.cat(want))


def _copy_ms(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> float:
    own = model.state_dict()
    before = copy.deepcopy(own)
    cycle = list(states.values())

    def switch(i: int) -> None:
        for name, tensor in cycle[i % len(cycle)].items():
            own[name].copy_(tensor)

    ms = _median_ms(switch)
    model.load_state_dict(before)
    return ms


def _switch_ms(model: nn.Module, tasks: Sequence[Task]) -> float:
    import lora_fuse as lf

    ms = _median_ms(lambda i: lf.switch_task(model, tasks[i % len(tasks)].name))
    lf.switch_task(model, None)
    return ms


def _median_ms(switch: Callable[[int], None]) -> float:
    times = []
    for i in range(SWITCHES):
        started = time.perf_counter()
        switch(i)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:])
