"""Latency of one mixed batch: the bare encoder, PEFT's mixed batch, lora_fuse."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .check import compare, peft_model
from .model import TextClassifier
from .tasks import Task

THREADS = 2
ROWS = 32
SHAPES = (32, 1)  # tokens a row


class Latency(NamedTuple):
    """Median milliseconds of a forward over ``ROWS`` rows of ``tokens`` tokens."""

    tokens: int
    repeats: int
    milliseconds: dict[str, float]

    def overhead(self, name: str) -> float:
        """Time over the bare model's, as a fraction of it."""
        return self.milliseconds[name] / self.milliseconds["bare model"] - 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's intra-op thread count inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def measure(encoder: nn.Module, tasks: Sequence[Task], seconds: float = 12.0) -> list[Latency]:
    """Time the three side by side, in turn, on the same token ids; row ``i`` wants adapter ``i mod number``.

    Heads are left out of all three: PEFT cannot hold heads of different widths in one model.

    Args:
        encoder: bare encoder, left as it is.
        tasks: whose LoRA factors to use.
        seconds: about how long to measure each shape.
    Returns:
        A ``Latency`` per shape, with ``THREADS`` torch threads.
    Raises:
        RuntimeError: lora_fuse's and PEFT's outputs differ, in which case a time would mean nothing.
    """
    import lora_fuse as lf

    names = tuple(tasks[i % len(tasks)].name for i in range(ROWS))
    bare = TextClassifier(copy.deepcopy(encoder), 0).eval()
    ours = TextClassifier(copy.deepcopy(encoder), 0).eval()
    lf.attach(ours, {task.name: replace(task.adapter, modules_to_save={}) for task in tasks})
    rival = peft_model(encoder, tasks)

    def run_ours(**batch: Tensor) -> Tensor:
        with lf.use_adapters(ours, names):
            return ours(**batch)

    variants: dict[str, Callable[..., Tensor]] = {
        "bare model": bare,
        "lora_fuse": run_ours,
        "PEFT mixed batch": lambda **batch: rival(**batch, adapter_names=list(names)),
    }
    found = []
    with torch_threads(THREADS):
        for tokens in SHAPES:
            vocab_size: int = encoder.config.vocab_size  # type: ignore[assignment, union-attr]
            ids = torch.randint(vocab_size, (ROWS, tokens), generator=torch.Generator().manual_seed(tokens))
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
            compare(f"{tokens} tokens", variants["lora_fuse"](**batch), variants["PEFT mixed batch"](**batch))
            found.append(_interleaved(variants, batch, seconds))
    return found


def _interleaved(variants: dict[str, Callable[..., Tensor]], batch: dict[str, Tensor], seconds: float) -> Latency:
    """Medians over rounds; a round runs every variant once, so that slow spells of the machine hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run(**batch)  # first calls allocate
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times["bare model"]) < 3:
        for name, run in variants.items():
            t = time.perf_counter()
            run(**batch)
            times[name].append(time.perf_counter() - t)
    return Latency(
        tokens=batch["input_ids"].shape[1],
        repeats=len(times["bare model"]),
        milliseconds={name: 1e3 * statistics.median(t) for name, t in times.items()},
    )
