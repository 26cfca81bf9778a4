"""Eager decoding with a transformers Llama of 8B's width: every row with an adapter of its own, beside the bare model.

``generate`` as users call it. Wall time a step counts the host as well, which is what eager decoding waits for; the
device's share is told apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lora_fuse as lf
from benchmarks.gpu import measure, report
from benchmarks.gpu.own_ways import OPTIONS
from lora_fuse.adapters.lora import LoraLayer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS, RANK, PROMPT, STEPS = 8, 16, 32, 32


def llama(tiny: bool, dtype: torch.dtype) -> nn.Module:
    """Random weights; an 8B decoder with 8 of its 32 layers and a small vocabulary, or next to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"num_hidden_layers": 8, "vocab_size": 4096}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(**sizes, max_position_embeddings=256, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(measure.device()):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def adapters_of(model: nn.Module, number: int, size: float = 1.0) -> dict[str, Any]:
    """On every projection; factors of one shape are shared between layers, which each copy them."""
    made = {}
    for i in range(number):
        drawn: dict[tuple[int, int], LoraLayer] = {}
        layers = {}
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in PROJECTIONS:
                shape = module.out_features, module.in_features
                if shape not in drawn:
                    a = torch.randn(RANK, shape[1], device=module.weight.device) / shape[1] ** 0.5
                    b = torch.randn(shape[0], RANK, device=module.weight.device) * size / RANK**0.5
                    drawn[shape] = LoraLayer(a, b, 0.5)
                layers[path] = drawn[shape]
        made[str(i)] = lf.LoraAdapter(layers)
    return made


def attached(bare: nn.Module, adapters: dict[str, Any]) -> dict[str, nn.Module]:
    """Packed, and with each of ``attach``'s options, with a row for each adapter."""
    made = {}
    for name, options in OPTIONS.items():
        made[name] = lf.attach(copy.deepcopy(bare), adapters, pack=True, **options)
        lf.set_adapters(made[name], [str(i % len(adapters)) for i in range(ROWS)])
    return made


def peft_model(bare: nn.Module, adapters: dict[str, Any]) -> Callable[..., Any] | None:
    """``generate`` of PEFT's model with as many adapters, random ones; None, and why is told, if it cannot be had."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as problem:
        return measure.tell("peft", problem)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS), init_lora_weights=False)
    names = [*adapters]
    model = get_peft_model(copy.deepcopy(bare), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    mixed = [names[i % len(names)] for i in range(ROWS)]
    generate = partial(model.generate, adapter_names=mixed)
    try:
        generate_with(generate, torch.ones(ROWS, 4, dtype=torch.long, device=measure.device()), 2)()
    except Exception as problem:  # releases of PEFT and transformers that do not fit each other
        return measure.tell("peft", problem)
    return generate


def check() -> None:
    """Each row's logits against those of a model that has its adapter merged in.

    Raises:
        SystemExit: one of them is off.
    """
    bare = llama(True, torch.float32)
    adapters = adapters_of(bare, 3)
    ids = torch.randint(1, 96, (ROWS, 6), device=measure.device())
    want = []
    for row in range(ROWS):
        merged = copy.deepcopy(bare)
        for path, layer in adapters[str(row % 3)].layers.items():
            merged.get_submodule(path).weight += layer.product()
        want.append(merged(ids[row : row + 1]).logits)
    together = torch.cat(want)
    for name, model in attached(bare, adapters).items():
        measure.require(f"model: {name}", model(ids).logits, together, 1e-3 if ids.is_cuda else 1e-4)


def generate_with(generate: Callable[..., Tensor], ids: Tensor, steps: int) -> Callable[[], Tensor]:
    mask = torch.ones_like(ids)
    return lambda: generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)


def run(at: measure.Setting) -> list[dict[str, Any]]:
    tiny = measure.device().type == "cpu"
    bare = llama(tiny, torch.float32 if tiny else torch.bfloat16)
    adapters = adapters_of(bare, 2 if tiny else ROWS, 0.1)
    ids = torch.randint(1, 96, (ROWS, 4 if tiny else PROMPT), device=measure.device())
    generates: dict[str, Callable[..., Any]] = {"bare": bare.generate}
    generates |= {f"{name} + base": model.generate for name, model in attached(bare, adapters).items()}
    if not at.quick and (of_peft := peft_model(bare, adapters)) is not None:
        generates["peft + base"] = of_peft
    steps = 2 if tiny else STEPS
    every = {name: generate_with(generate, ids, steps) for name, generate in generates.items()}
    prompt = {name: generate_with(generate, ids, 1) for name, generate in generates.items()}
    rounds = 1 if tiny else 7
    long, short = measure.wall_us(every, rounds), measure.wall_us(prompt, rounds)
    wall = {name: (long[name] - short[name]) / (steps - 1) for name in every}  # the prompt's own step taken off
    nbytes = sum(p.nbytes for p in bare.parameters())  # of a step: all weights, once
    made = [report.row("model", f"decode {ROWS} rows, wall", wall, nbytes, at.bandwidth, "bare")]
    report.show(made[0])
    if not at.budget.over("decode, device"):
        busy = {}
        for name in every:
            both = [measure.busy_us(lambda _, run=run: run(), 1) for run in (every[name], prompt[name])]
            busy[name] = (both[0] - both[1]) / (steps - 1)
        made.append(report.row("model", f"decode {ROWS} rows, device", busy, nbytes, at.bandwidth, "bare"))
        report.show(made[1])
    return made


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for name in OPTIONS:
        over = rows[0]["overhead"][name] if rows else None
        made.append(report.target(f"{name}: eager decoding with 8 adapters over the bare model, wall time", 0.05, over))
    return made
