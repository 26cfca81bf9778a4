"""A step of learn_composition beside the bare model's forward and backward: ``python -m benchmarks.bench_compose``.

Eight adapters on query/key/value/dense of the real MiniLM-L6. The bare model is differentiated to its inputs, the
embedded tokens, and not further. The rival runs a branch per adapter and layer, as PEFT does and as wlora, the
published code of arXiv:2402.15414, weighs them. Its loss and its weights after a step are checked against ours first.
Steps are timed inside one call of ``learn_composition``, the others run between them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.demo.model import TARGETS, load_encoder
from lora_fuse.demo.packages import cache_folder

NUM_ADAPTERS, LR = 8, 1e-2
CASES = [(32, 32, 8), (32, 32, 16), (8, 32, 8), (32, 128, 8)]  # rows, tokens, rank of each adapter


def make_adapters(encoder: nn.Module, rank: int) -> dict[str, lf.LoraAdapter]:
    """Random factors of a trained adapter's size; a time does not depend on their values."""
    paths = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in TARGETS]

    def layer(module: Any) -> LoraLayer:
        a = torch.randn(rank, module.in_features) / module.in_features**0.5
        return LoraLayer(a, 0.02 * torch.randn(module.out_features, rank), 2.0)

    return {f"a{i}": lf.LoraAdapter({p: layer(encoder.get_submodule(p)) for p in paths}) for i in range(NUM_ADAPTERS)}


class Branches(nn.Module):
    """A Linear and its adapters, one after the other."""

    def __init__(self, base: nn.Module, layers: list[LoraLayer]) -> None:
        super().__init__()
        self.base, self.layers = base, layers
        self.logits = nn.Parameter(torch.zeros(len(layers)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for layer, weight in zip(self.layers, self.logits.softmax(0), strict=True):
            y = y + F.linear(F.linear(x, layer.lora_a), layer.lora_b) * layer.scaling * weight
        return y


def loop_step(encoder: nn.Module, adapters: dict[str, lf.LoraAdapter], loss_fn: Any) -> tuple[nn.Module, Callable]:
    """The rival's model, and its step: batch -> loss."""
    model = copy.deepcopy(encoder).requires_grad_(False)
    for path in next(iter(adapters.values())).layers:
        parent, _, leaf = path.rpartition(".")
        branches = Branches(model.get_submodule(path), [a.layers[path] for a in adapters.values()])
        setattr(model.get_submodule(parent), leaf, branches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0.0)

    def step(batch: Any) -> float:
        loss = loss_fn(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return model, step


def bench(encoder: nn.Module, rows: int, tokens: int, rank: int, budget_s: float) -> dict[str, Any]:
    """Check, then time one case; milliseconds of each, medians."""
    adapters = make_adapters(encoder, rank)
    ids = torch.randint(1000, encoder.config.vocab_size, (rows, tokens))  # type: ignore[arg-type, union-attr]
    weight = torch.randn(rows, tokens, encoder.config.hidden_size)  # type: ignore[arg-type, union-attr]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (model(**batch).last_hidden_state * weight).mean()

    rival, step = loop_step(encoder, adapters, loss_fn)
    loss = step(batch)
    comp = lf.learn_composition(encoder, adapters, loss_fn, [batch], steps=1, lr=LR)
    off = max(
        float((comp.weights[p] - rival.get_submodule(p).logits.detach().softmax(0)).abs().max())  # type: ignore[operator, union-attr]
        for p in comp.weights
    )
    if not (off < 1e-4 and abs(comp.history.loss[0] - loss) < 1e-4 * abs(loss) + 1e-6):
        raise SystemExit(f"{rows} x {tokens}, rank {rank}: the rival's loss or weights differ by {off:.1e}; no times")

    bare = copy.deepcopy(encoder).requires_grad_(False)
    embedded = bare.embeddings.word_embeddings(ids)  # type: ignore[operator, union-attr]
    times: dict[str, list[float]] = {"bare model": [], "lora_fuse": [], "branch per adapter": []}

    def timed(name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - start)

    def plain() -> None:
        x = embedded.detach().requires_grad_()
        loss_fn(bare, {"inputs_embeds": x, "attention_mask": batch["attention_mask"]}).backward()

    rounds = 0

    def batches() -> Iterator[Any]:
        nonlocal rounds
        deadline = time.perf_counter() + budget_s
        while rounds < 6 or time.perf_counter() < deadline:
            timed("bare model", plain)
            timed("branch per adapter", lambda: step(batch))
            start = time.perf_counter()
            yield batch
            times["lora_fuse"].append(time.perf_counter() - start)
            rounds += 1

    try:
        lf.learn_composition(encoder, adapters, loss_fn, batches(), steps=1_000_000, lr=LR)
    except ValueError as error:  # the time is up: the stream ended
        if "an iterator that ended after" not in str(error):
            raise
    ms = {name: 1e3 * median(found[1:]) for name, found in times.items()}  # the first round warms up
    return {"rows": rows, "tokens": tokens, "rank": rank, "ms": ms, "rounds": rounds}


def run(seconds: float, quick: bool = False) -> list[dict[str, Any]]:
    """Every case (the first with ``quick``), printed as it comes."""
    torch.manual_seed(0)
    encoder = load_encoder(cache_folder()).eval()
    print(f"learn_composition, {NUM_ADAPTERS} adapters on MiniLM-L6, {torch.get_num_threads()} threads, medians")
    results = []
    for rows, tokens, rank in CASES[: 1 if quick else None]:
        result = bench(encoder, rows, tokens, rank, seconds)
        ms = result["ms"]
        shown = ", ".join(f"{name} {t:.1f} ms ({t / ms['bare model']:.2f}x)" for name, t in ms.items())
        print(f"{rows} x {tokens}, rank {rank}: {shown}; {result['rounds']} rounds", flush=True)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each case")
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args.seconds, args.quick)


if __name__ == "__main__":
    main()
