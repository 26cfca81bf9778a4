"""A whole model, the real MiniLM-L6 encoder: bare, PEFT's mixed batch, lora_fuse; rank 8 on query/key/value/dense.

    python -m benchmarks.bench_model [--seconds 10] [--threads 2]

The encoder comes from the package that the demo fetches. Adapters are random: a time does not depend on their values.
Outputs are checked against PEFT before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import lora_fuse as lf
from benchmarks.timing import interleaved_us
from lora_fuse.demo.model import load_encoder
from lora_fuse.demo.packages import cache_folder

# rows, tokens, adapters
CASES = [(32, 32, 1), (32, 32, 5), (32, 32, 16), (32, 1, 1), (32, 1, 5), (32, 1, 16), (1, 1, 1)]
RANK, TARGETS = 8, ["query", "key", "value", "dense"]


def peft_encoder(encoder: nn.Module, num_adapters: int) -> nn.Module:
    """PEFT around a copy of the encoder, adapters ``a0``, ``a1``, ... with random factors."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    model = get_peft_model(copy.deepcopy(encoder), config, adapter_name="a0")
    for i in range(1, num_adapters):
        model.add_adapter(f"a{i}", config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model.eval()


def variants(encoder: nn.Module, rows: int, tokens: int, adapters: int) -> tuple[dict[str, Any], float]:
    """The three forwards of one case, and the largest difference between ours and PEFT's outputs."""
    rival = peft_encoder(encoder, adapters)
    ours = copy.deepcopy(encoder)
    lf.attach(ours, {f"a{i}": lf.load_adapter(rival, adapter_name=f"a{i}") for i in range(adapters)})
    names = [f"a{i % adapters}" for i in range(rows)]
    ids = torch.randint(encoder.config.vocab_size, (rows, tokens))  # type: ignore[union-attr,arg-type]
    batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run_ours(_: int) -> Tensor:
        with lf.use_adapters(ours, names):
            return ours(**batch).last_hidden_state

    runs = {
        "bare model": lambda _: encoder(**batch).last_hidden_state,
        "PEFT mixed batch": lambda _: rival(**batch, adapter_names=names).last_hidden_state,
        "lora_fuse": run_ours,
    }
    difference = float((run_ours(0) - runs["PEFT mixed batch"](0)).abs().max())
    if not difference < 1e-4:
        raise AssertionError(f"{rows} x {tokens}, {adapters} adapters: outputs differ by {difference:.2e}")
    return runs, difference


def run(seconds: float) -> list[dict[str, Any]]:
    """Time every case; a row each, with milliseconds of the three."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own
    rows_out = []
    encoder = load_encoder(cache_folder()).eval()
    print(f"MiniLM-L6, rank {RANK} on {'/'.join(TARGETS)}, fp32, {torch.get_num_threads()} threads, medians")
    print(f"{'rows x tokens, adapters':<26}{'bare':>12}{'PEFT mixed batch':>24}{'lora_fuse':>22}")
    with torch.inference_mode():
        for rows, tokens, adapters in CASES:
            runs, _ = variants(encoder, rows, tokens, adapters)
            us = interleaved_us(runs, seconds)
            bare = us["bare model"]
            peft, ours = (f"{us[n] / 1e3:.2f} ms ({us[n] / bare - 1:+.1%})" for n in ("PEFT mixed batch", "lora_fuse"))
            print(f"{f'{rows} x {tokens}, {adapters}':<26}{bare / 1e3:>9.2f} ms{peft:>24}{ours:>22}", flush=True)
            rows_out.append({"rows": rows, "tokens": tokens, "adapters": adapters, "us": us})
    return rows_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="for each case")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args.seconds)


if __name__ == "__main__":
    main()
