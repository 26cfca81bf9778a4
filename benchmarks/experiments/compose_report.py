"""The report of compose_text.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.peru_fft_report import table

HEAD_ONLY, UNIFORM, LEARNED, SCRATCH = "tuned head", "uniform + head", "learned + head", "LoRA from scratch"
METHODS = (HEAD_ONLY, UNIFORM, LEARNED, SCRATCH)


def amount(count: str, examples: int) -> str:
    return f"{count} per class ({examples:,})" if count != "all" else f"all {examples:,}"


def points(scores: Sequence[float]) -> str:
    """Mean in percent, and with several seeds their standard deviation."""
    spread = f" +-{100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.fmean(scores):.1f}{spread}"


def gain(tasks: Mapping[str, Any], count: str, one: str, other: str) -> tuple[float, int, int]:
    """Mean of ``one`` minus ``other`` in points, every task counting alike; runs in which ``one`` was better; runs."""
    pairs = [
        [a - b for a, b in zip(t["accuracy"][count][one], t["accuracy"][count][other], strict=True)]
        for t in tasks.values()
        if count in t["accuracy"]
    ]
    every = [d for p in pairs for d in p]
    return 100 * statistics.fmean(map(statistics.fmean, pairs)), sum(d > 0 for d in every), len(every)


def verdict(results: Mapping[str, Any]) -> str:
    tasks = results["tasks"]
    lines = []
    for count in next(iter(tasks.values()))["accuracy"]:
        parts = []
        for one, other in ((UNIFORM, HEAD_ONLY), (LEARNED, UNIFORM), (LEARNED, SCRATCH)):
            by, better, runs = gain(tasks, count, one, other)
            parts.append(f"{one} against {other} {by:+.1f} ({better} of {runs} runs better)")
        lines.append(f"- {'all examples' if count == 'all' else f'{count} per class'}: " + "; ".join(parts))
    return "\n".join(lines)


def report(results: Mapping[str, Any]) -> str:
    """docs/composition_experiment.md."""
    tasks = results["tasks"]
    rows = [
        [name, amount(count, t["examples"][count]), *(points(scores[m]) for m in METHODS)]
        for name, t in tasks.items()
        for count, scores in t["accuracy"].items()
    ]
    shares = [
        [name, "all" if count == "all" else count, ", ".join(f"{n} {w:.2f}" for n, w in found.items())]
        for name, t in tasks.items()
        for count, found in t["weights"].items()
    ]
    first = next(iter(tasks.values()))
    lr, steps, limits = results["lr"], results["steps"], results["limits"]
    return f"""# Composing a task from other tasks' adapters

Written by `python -m benchmarks.experiments.compose_text --tasks {",".join(tasks)} --shots {",".join(steps)}`
({results["seconds"] / 60:.0f} minutes, {results["threads"]} thread). MiniLM-L6 and the demo's adapters (rank 8 on
query/key/value/dense); one task is held out, the other five are upstream. The systems are those of
arXiv:2402.15414, in language only.

Differences in points of accuracy, mean over the {len(tasks)} tasks:

{verdict(results)}

Test accuracy in percent ({first["test_examples"]:,} rows), mean and standard deviation over the seeds:

{table(["held-out task", "examples", *METHODS], rows)}

- **{HEAD_ONLY}**: logistic regression on the frozen encoder's features.
- **{UNIFORM}**: the same on the features of `lf.merge(others, method="uniform")`.
- **{LEARNED}**: `lf.learn_composition(per="layer", trainable=["classifier"])`, which starts at the one above:
  {first["weight_parameters"]} weights and the head.
- **{SCRATCH}**: a new rank-8 LoRA, which starts at the first: {first["lora_parameters"]:,} parameters, head included.

Learned weights, mean over layers and seeds (uniform: 0.20 each):

{table(["held-out task", "per class", "weights"], shares)}

## Caveats

- The penalty of the tuned heads is chosen by {limits["validation"]} validation rows, more data than 8 per class offers.
  Nothing else is: both trained methods take a fixed number of steps and keep the last state. (A first run kept the
  best of five states by loss on those rows, and so mostly the start; it was dropped with its test results in sight.)
- Steps of {results["batch"]} rows: {", ".join(f"{n} for {c}" for c, n in steps.items())} per class (all: of
  {limits["train"]:,} training rows, one seed). Learning rates were set beforehand and are the same for all tasks:
  {lr["weights"]} weights, {lr["head"]} head, {lr["lora"]} LoRA (one-cycle). Longer training helps the LoRA most: the
  shipped adapters took 400 steps of 32 rows over 12,000.
- One encoder, {len(tasks)} tasks, one source of data; with {first["test_examples"]:,} test rows an accuracy is good to
  about +-3 points, differences between methods on the same rows to less.
"""
