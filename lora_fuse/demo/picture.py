"""The demo's picture: latency above, accuracy of every task in every setting below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .accuracy import Setting
from .latency import ROWS, THREADS, Latency
from .tasks import Task

COLUMNS = 3
COLORS = {"bare model": "#8c8c8c", "lora_fuse": "#1f77b4", "PEFT mixed batch": "#d95f02"}
ALONE, MERGED, TRUNCATED, BASELINE = "#1f77b4", "#d95f02", "#1b9e77", "#5a5a5a"


def draw(path: Path, tasks: Sequence[Task], latencies: Sequence[Latency], settings: Sequence[Setting]) -> None:
    """Write a PNG to ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task_rows = -(-len(tasks) // COLUMNS)
    figure: Any = Figure(figsize=(11, 2.6 + 2.7 * task_rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.4, 2.7 * task_rows], hspace=0.04)
    _latency(top, latencies, len(tasks))
    _accuracy(bottom, tasks, settings, task_rows)
    figure.savefig(path)


def _latency(figure: Any, latencies: Sequence[Latency], num_adapters: int) -> None:
    figure.suptitle(
        f"One mixed batch of {ROWS} rows over {num_adapters} adapters, MiniLM-L6 on {THREADS} CPU threads, fp32",
        fontsize=12,
    )
    panels = figure.subplots(1, len(latencies), sharey=True)
    for axes, latency in zip(panels, latencies, strict=True):
        names = list(latency.milliseconds)
        values = [latency.milliseconds[name] for name in names]
        axes.barh(names, values, color=[COLORS[name] for name in names], height=0.62)
        for i, name in enumerate(names):
            over = "" if i == 0 else f"  ({latency.overhead(name):+.0%})"
            number = f"{values[i]:.0f}" if values[i] >= 100 else f"{values[i]:.1f}"
            axes.text(values[i], i, f" {number} ms{over}", va="center", fontsize=9)
        axes.set_xlim(0, 1.4 * max(values))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"{latency.tokens} token{'s' if latency.tokens > 1 else ''} a row", fontsize=10)
        axes.set_xlabel("milliseconds a forward, median")
        axes.spines[["top", "right"]].set_visible(False)


def _accuracy(figure: Any, tasks: Sequence[Task], settings: Sequence[Setting], task_rows: int) -> None:
    baseline, shown = settings[0], settings[1:]
    num_rows = max(len(task.rows) for task in tasks)
    figure.suptitle(
        f"Accuracy on the shipped slices ({num_rows} test examples a task); dashed: tuned head on the frozen encoder. "
        "Bars: range over the merged sets",
        fontsize=11,
    )
    grid = figure.subplots(task_rows, COLUMNS, sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        floor = baseline.scores[task.name].mean
        axes.axvline(floor, color=BASELINE, linestyle="--", linewidth=1.2, zorder=1)
        for i, setting in enumerate(shown):
            score = setting.scores[task.name]
            color = ALONE if i == 0 else TRUNCATED if setting.label.startswith("PERU") else MERGED
            if score.highest > score.lowest:
                axes.plot([score.lowest, score.highest], [i, i], color=color, alpha=0.35, linewidth=5, zorder=2)
            axes.plot(score.mean, i, "o", color=color, markersize=6, zorder=3)
            axes.annotate(
                f"{score.mean:.2f}", (score.highest, i), (8, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(shown)), [setting.label for setting in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.axvspan(0, task.recorded["majority"], color="0.93", zorder=0)
        axes.set_title(f"{task.name} ({len(task.classes)} classes)", fontsize=10)
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("accuracy (grey: up to the share of the commonest class)", fontsize=10)
