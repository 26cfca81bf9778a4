"""Composition on real adapters: a task of its own from the adapters of the other five, few-shot and with more data.

    python -m benchmarks.experiments.compose_text [--threads 1]      # about 15 minutes on one core

Upstream are the demo's adapters on MiniLM-L6 (examples/adapters). A held-out task gets, from the same examples: a head
tuned on the frozen encoder; a head tuned on the uniform composition of the others; the learned composition, head
trained along; a LoRA from scratch, head likewise. Writes docs/composition_experiment.{md,json}. Data are fetched as
peru_fft_text.py does.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fuse as lf
from benchmarks.experiments.compose_report import HEAD_ONLY, LEARNED, SCRATCH, UNIFORM, report
from benchmarks.experiments.finetune_text import TASKS, TaskData, correct, embed, read_tasks, tune_head
from lora_fuse.demo.model import HEAD, TARGETS, Encoded, TextClassifier, collate, load_encoder
from lora_fuse.demo.packages import cache_folder

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ("verb_topic", "missing_word", "verb_form")
LIMITS = {"train": 2000, "validation": 100, "test": 800}
STEPS = {"8": 32, "32": 48, "128": 64, "all": 128}  # by examples per class
SEEDS = (0, 1)  # of the few-shot choices; with all examples only the first
BATCH = 16
WEIGHT_LR, HEAD_LR, LORA_LR = 0.05, 1e-3, 2e-3
RANK, ALPHA = 8, 16


class Batches:
    """Shuffled anew at every reading; eight batches at a time are cut from a sample sorted by length."""

    def __init__(self, rows: Sequence[Encoded], labels: Tensor, seed: int) -> None:
        self.rows, self.labels = rows, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()
        chosen = []
        for start in range(0, len(order), 8 * BATCH):
            sample = sorted(order[start : start + 8 * BATCH], key=lambda i: len(self.rows[i].ids))
            chosen += [sample[i : i + BATCH] for i in range(0, len(sample), BATCH)]
        for k in torch.randperm(len(chosen), generator=self.generator).tolist():
            yield collate([self.rows[i] for i in chosen[k]]), self.labels[chosen[k]]


def loss_fn(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(model(**batch[0]), batch[1])


def choose(task: TaskData, shots: str, seed: int) -> list[int]:
    """Training rows: ``shots`` of every class (or as many as it has), or all."""
    labels = task.labels["train"]
    if shots == "all":
        return list(range(len(labels)))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    picked = [order[labels[order] == c][: int(shots)] for c in range(len(task.classes))]
    return torch.cat(picked).tolist()


def classifier(encoder: nn.Module, head: nn.Linear) -> TextClassifier:
    """Copies of both, in eval mode."""
    model = TextClassifier(copy.deepcopy(encoder), head.out_features)
    model.classifier.load_state_dict(head.state_dict())
    return model.eval()


def learned(
    encoder: nn.Module, head: nn.Linear, adapters: Mapping[str, lf.LoraAdapter], task: TaskData, data: Batches,
    steps: int, seed: int,
) -> tuple[Tensor, lf.Composition]:  # fmt: skip
    """Which test rows the composition gets right, served live, and the composition."""
    model = classifier(encoder, head)
    comp = lf.learn_composition(
        model, adapters, loss_fn, data, steps=steps, lr=WEIGHT_LR, seed=seed, trainable=[HEAD], trainable_lr=HEAD_LR,
    )  # fmt: skip
    with lf.use_adapters(model, comp.attach(model, "composed")):
        return correct(model, task.rows["test"], task.labels["test"]), comp


def from_scratch(
    encoder: nn.Module, head: nn.Linear, task: TaskData, data: Batches, steps: int, seed: int
) -> tuple[Tensor, int]:
    """A new LoRA and its head by AdamW, one-cycle.

    Returns:
        Which test rows are right, and the number of trained parameters.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), modules_to_save=[HEAD])
    model: Any = get_peft_model(classifier(encoder, head), config).eval()  # type: ignore[arg-type]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LORA_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LORA_LR, total_steps=steps, pct_start=0.1)
    stream: Iterator[Any] = iter(())
    for _ in range(steps):
        batch = next(stream, None)
        if batch is None:
            stream = iter(data)
            batch = next(stream)
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
    return correct(model, task.rows["test"], task.labels["test"]), sum(p.numel() for p in params)


def run_task(
    encoder: nn.Module, task: TaskData, adapters: Mapping[str, lf.LoraAdapter], shots: Sequence[str],
    seeds: Sequence[int], steps: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """All methods on one held-out task: accuracies by number of examples, method and seed, in the seeds' order."""
    started = time.time()
    bare = TextClassifier(copy.deepcopy(encoder), len(task.classes)).eval()
    uniform = copy.deepcopy(bare)
    lf.fuse(uniform, lf.merge(adapters, method="uniform"), backup=False)
    features = {
        n: {p: embed(m, rows) for p, rows in task.rows.items()} for n, m in ((HEAD_ONLY, bare), (UNIFORM, uniform))
    }
    out: dict[str, Any] = {"classes": len(task.classes), "accuracy": {}, "examples": {}, "weights": {}}
    for count in shots:
        scores: dict[str, list[float]] = {m: [] for m in (HEAD_ONLY, UNIFORM, LEARNED, SCRATCH)}
        weights: list[Tensor] = []
        for seed in seeds[:1] if count == "all" else seeds:
            chosen = choose(task, count, seed)
            rows, labels = [task.rows["train"][i] for i in chosen], task.labels["train"][chosen]
            y = {**task.labels, "train": labels}
            heads = {}
            for name, x in features.items():
                heads[name], _ = tune_head({**x, "train": x["train"][chosen]}, y, len(task.classes))
                scores[name].append(mean(heads[name](x["test"]).argmax(1) == y["test"]))
            right, comp = learned(
                encoder, heads[UNIFORM], adapters, task, Batches(rows, labels, seed), steps[count], seed
            )
            scores[LEARNED].append(mean(right))
            weights.append(torch.stack([*comp.weights.values()]).mean(0))
            right, out["lora_parameters"] = from_scratch(
                encoder, heads[HEAD_ONLY], task, Batches(rows, labels, seed), steps[count], seed
            )
            scores[SCRATCH].append(mean(right))
            out["weight_parameters"] = sum(w.numel() for w in comp.weights.values())
            shown = {m: round(100 * s[-1], 1) for m, s in scores.items()}
            print(f"{task.name}, {count} per class, seed {seed}: {shown} ({time.time() - started:.0f} s)", flush=True)
        out["examples"][count] = len(chosen)
        out["accuracy"][count] = scores
        average = torch.stack(weights).mean(0)
        out["weights"][count] = {n: round(w, 3) for n, w in zip(adapters, average.tolist(), strict=True)}
    out["test_examples"] = len(task.rows["test"])
    return out


def mean(right: Tensor) -> float:
    return round(right.float().mean().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(HELD_OUT), help="held out in turn (default: %(default)s)")
    parser.add_argument("--shots", default=",".join(STEPS), help="examples per class (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--cache", type=Path, default=None, help="downloads (default: $LORA_FUSE_DATA or ~/.cache)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache, started = cache_folder(args.cache), time.time()
    encoder = load_encoder(cache)
    loaded = {name: lf.load_adapter(ROOT / "examples" / "adapters" / name) for name in TASKS}
    tasks = read_tasks(args.tasks.split(","), cache, LIMITS)
    shots = args.shots.split(",")
    results: dict[str, Any] = {
        "tasks": {},
        "steps": {count: STEPS[count] for count in shots},
        "batch": BATCH,
        "lr": {"weights": WEIGHT_LR, "head": HEAD_LR, "lora": LORA_LR},
        "limits": LIMITS,
        "torch": torch.__version__,
        "threads": args.threads,
    }
    for name, task in tasks.items():
        others = {n: replace(a, modules_to_save={}) for n, a in loaded.items() if n != name}
        results["tasks"][name] = run_task(encoder, task, others, shots, range(args.seeds), STEPS)
        results["seconds"] = round(time.time() - started)
        write(results, args.docs)


def write(results: Mapping[str, Any], docs: Path) -> None:
    """The figures and the report."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "composition_experiment.json").write_text(json.dumps(results, indent=1) + "\n")
    (docs / "composition_experiment.md").write_text(report(results))


if __name__ == "__main__":
    main()
