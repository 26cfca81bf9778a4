"""The report of peru_fft_text.py: averages with intervals, the Markdown page, the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

SINGLE = "single-task fine-tunes"
Results = Mapping[str, Any]


def average(hits: Mapping[str, Tensor], single: Mapping[str, Tensor] | None) -> dict[str, float]:
    """Mean accuracy over tasks, each counting alike, and its paired distance from the single-task fine-tunes.

    Args:
        hits, single: task -> which test rows are right, bool ``[rows]``, over the same rows; None where not known yet.
    Returns:
        ``average`` in 0 to 1; with ``single`` also ``of_single`` (ratio of averages), ``points`` (difference in
        percentage points) and ``points_ci95``, its half width (normal, paired over the rows).
    """
    means = [h.double().mean().item() for h in hits.values()]
    out = {"average": sum(means) / len(means)}
    if single is not None:
        gains = [(h.double() - single[name].double()) for name, h in hits.items()]
        variance = sum(g.var().item() / len(g) for g in gains) / len(gains) ** 2
        points = sum(g.mean().item() for g in gains) / len(gains)
        out["of_single"] = out["average"] / (out["average"] - points)
        out["points"] = round(100 * points, 2)
        out["points_ci95"] = round(196 * math.sqrt(variance), 2)
    return {k: round(v, 4) for k, v in out.items()}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(results: Results) -> str:
    """What is kept at 10 % and 1 %: the default scaling, the merges tuned on validation, no merge; against merging."""
    rows = results["settings"]
    merged = {k.removeprefix("merged: "): v for k, v in rows.items() if k.startswith("merged: ")}
    best = max(merged, key=lambda k: merged[k]["average"])
    wanted = [
        label
        for density in ("10.0%", "1.0%")
        for label in rows
        if label in (f"PERU-FFT {density}", f"post-pruning {density}") or label.startswith(f"PERU-FFT {density} on ")
    ]
    lines = [
        f"- {label}: **{rows[label]['of_single']:.2%}** of the single-task fine-tunes' average accuracy "
        f"({rows[label]['points']:+.2f} points, 95 % interval +-{rows[label]['points_ci95']:.2f}), above "
        f"{sum(rows[label]['average'] > v['average'] for v in merged.values())} of the {len(merged)} merged models"
        for label in wanted
    ]
    lines.append(f"- the best merged model ({best}): {merged[best]['of_single']:.2%}")
    return "\n".join(lines)


def _row(label: str, entry: Mapping[str, Any], tasks: list[str]) -> list[str]:
    size, energy = entry["megabytes_per_task"], entry["energy"]
    return [
        label,
        f"**{100 * entry['average']:.1f}**",
        f"{100 * entry['of_single']:.1f} %" if "of_single" in entry else "",
        *(f"{100 * entry['test'][name]:.1f}" for name in tasks),
        "0" if size is None else f"{size:.2f}",
        "" if energy is None else f"{100 * energy:.1f} %",
    ]


def report(results: Results) -> str:
    """docs/peru_fft_experiment.md."""
    tasks, made = list(results["tasks"]), results["tasks"]
    first, steps = made[tasks[0]], [m["finetuned"]["steps"] for m in made.values()]
    scores = table(
        ["", "average", "of single", *tasks, "MB per task", "energy kept"],
        [_row(label, entry, tasks) for label, entry in results["settings"].items()],
    )
    training = table(
        [
            "task",
            "classes",
            "train / test",
            "tuned head",
            "fine-tune (95 %)",
            "learning rate",
            "steps (of a short run)",
        ],
        [_training(name, m, results["test_examples"][name]) for name, m in made.items()],
    )
    grids = "\n".join(
        f"- {method}: " + ", ".join(f"{scaling} -> {100 * v:.1f}" for scaling, v in grid.items())
        for method, grid in results["validation_by_scaling"].items()
    )
    size = 4 * results["parameters"] / 1e6
    arithmetic = "bf16 autocast" if first["bf16_autocast"] else "fp32"
    notes = "".join(f"- {note}\n" for note in results.get("notes", []))
    return f"""# PERU-FFT on {len(tasks)} text tasks

Written by `python -m benchmarks.experiments.peru_fft_text evaluate`. Full fine-tunes of MiniLM-L6
({results["parameters"]:,} parameters, fp32) on the demo's WordNet tasks (examples/wordnet_tasks.py), each with a head
of its own.

{verdict(results)}

![average accuracy against density](peru_fft_experiment.png)

Test accuracy in percent. "of single": the average over that of the single-task fine-tunes. "MB per task": what a task
keeps beside the shared weights ({size:.1f} MB), its head included for PERU-FFT and post-pruning. "energy kept": share
of the sum of squares of the pruned matrices' residual, mean over tasks.

{scores}

- **merged**: one encoder for all tasks, each task under its own head (the fine-tune's). The scalings of task
  arithmetic and TIES (top 20 %, sign election, disjoint mean) are the best of a grid on the validation parts.
- **PERU-FFT**: theta* by task arithmetic with scaling 0.3 (the default, not tuned) unless a row says otherwise; of
  all matrices (embeddings included) the largest |theta_t - theta*| are kept, one threshold per task (scope global)
  unless said otherwise; biases, norms and the head are the task's own.
- **post-pruning**: the same with theta_0 in place of theta*: nothing is merged.
- **theta\\* with own biases and norms**: PERU-FFT at density 0, to show what the matrices' entries add.

Before scoring, the kept entries were checked against the definition: with scope global exactly the `int(density * n)`
largest differences, the fine-tune's values there, theta*'s elsewhere.

{_served(results)}## The fine-tunes

{training}

All encoder weights and the head, from the head tuned on the frozen encoder (L2 by validation); AdamW, one-cycle, batch
{first["batch"]}, {arithmetic}, seed {first["seed"]}, torch {first["torch"]}; learning rate by validation after
short runs. The test parts chose nothing.

Mean validation accuracy by scaling, each task under its own head (the first 500 rows of each task, bf16 autocast):

{grids}

## Caveats

- One seed, one encoder, one family of tasks from one source; a task's accuracy is good to about +-2 points.
- Short fine-tunes ({min(steps)} to {max(steps)} steps): longer ones move further from the base.
- A PERU-FFT folder holds theta* whole ({size:.0f} MB here), which the base and the sparse parts do not give back, so
  none is in the repository.
{notes}"""


def _served(results: Results) -> str:
    if "served" not in results:
        return ""
    served, num_tasks = results["served"], len(results["tasks"])
    same = sum(served["accuracy"][name] == served["accuracy_alone"][name] for name in results["tasks"])
    return f"""## Served as mixed batches

All {served["rows"]:,} test rows through one model with the {num_tasks} adapters at 10 % attached, tasks mixed in every
batch of 64: {served["predictions_that_differ"]} predictions differ from each task run alone; largest difference of a
logit {served["largest_difference"]:.1e} (logits up to {served["largest_logit"]:.0f}); accuracy the same on {same} of
{num_tasks} tasks.

"""


def _training(name: str, made: Mapping[str, Any], num_test: int) -> list[str]:
    tuned = made["finetuned"]
    low, high = tuned["ci95"]
    return [
        name,
        str(len(made["classes"])),
        f"{made['examples']['train']:,} / {num_test:,}",
        f"{100 * made['head_only']['test']:.1f}",
        f"{100 * tuned['test']:.1f} ({100 * low:.1f}-{100 * high:.1f})",
        f"{tuned['lr']:g} of {', '.join(tuned['validation_by_lr'])}",
        f"{tuned['steps']} ({tuned['trial_steps']})",
    ]


def draw(path: Path, results: Results) -> None:
    """Average accuracy against density, the merged models as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    entries = results["settings"]
    tuned = next((k.split(" on ")[1] for k in entries if " on task arithmetic" in k), None)
    curves = {
        "PERU-FFT (task arithmetic 0.3)": lambda k: k.startswith("PERU-FFT") and k.endswith("%"),
        f"PERU-FFT ({tuned})": lambda k: k.endswith(f" on {tuned}"),
        "post-pruning": lambda k: k.startswith("post-pruning"),
    }
    for (name, belongs), color in zip(curves.items(), ("#1f77b4", "#1b9e77", "#d95f02"), strict=True):
        curve = sorted((e["density"], 100 * e["average"]) for k, e in entries.items() if belongs(k))
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", color=color, label=name)
    for label, entry in entries.items():
        if label == SINGLE or label.startswith(("merged: ", "tuned head")):
            style, color = ("-", "#333333") if label == SINGLE else ("--", "#8c8c8c")
            axes.axhline(100 * entry["average"], ls=style, color=color, lw=1)
            at = (1, 100 * entry["average"])
            axes.annotate(label, at, xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.05, 0.1], ["1 %", "5 %", "10 %"])
    axes.minorticks_off()
    axes.set_xlabel("density")
    axes.set_ylabel("average test accuracy, %")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.93), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
