"""Packed siblings of transformers models: found where they are, right in whole models, saved as ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_models import adapted_copy, linear_layer
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import LoraAdapter
from lora_fuse.nn.packed import Pack

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
IDS = {"input_ids": torch.arange(24).view(4, 6) % 50}
Build = tuple[Any, dict[str, Tensor], tuple[str, ...], dict[tuple[str, ...], int]]


def decoder(name: str, **extra: Any) -> Build:
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": 50, "num_key_value_heads": 1, "pad_token_id": 0, **SIZES, **extra}
    )
    packs = {("q_proj", "k_proj", "v_proj"): 2, ("gate_proj", "up_proj"): 2}
    return getattr(transformers, f"{name}ForCausalLM")(config), IDS, ("q_proj", "v_proj", "up_proj"), packs


def llama() -> Build:
    return decoder("Llama")


def mistral() -> Build:
    return decoder("Mistral")


def qwen2() -> Build:
    return decoder("Qwen2")


def qwen3() -> Build:
    return decoder("Qwen3", head_dim=8)


def gemma() -> Build:
    return decoder("Gemma", head_dim=8)


def phi() -> Build:
    model, inputs, names, _ = decoder("Phi", num_key_value_heads=2)
    return model, inputs, names, {("q_proj", "k_proj", "v_proj"): 2}


def opt() -> Build:
    config = transformers.OPTConfig(vocab_size=50, ffn_dim=24, word_embed_proj_dim=16, **SIZES)
    return transformers.OPTForCausalLM(config), IDS, ("k_proj", "v_proj"), {("q_proj", "k_proj", "v_proj"): 2}


def gptj() -> Build:
    config = transformers.GPTJConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    return transformers.GPTJForCausalLM(config), IDS, ("q_proj", "fc_in"), {("q_proj", "k_proj", "v_proj"): 2}


def bert() -> Build:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SIZES))
    return model, IDS, ("query", "value", "dense"), {("query", "key", "value"): 2}


def roberta() -> Build:
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=50, **SIZES))
    return model, {"input_ids": IDS["input_ids"] + 2}, ("key",), {("query", "key", "value"): 2}


def vit() -> Build:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))
    names = ("q_proj", "k_proj", "v_proj") if any(n.endswith("q_proj") for n, _ in model.named_modules()) else (
        "query", "key", "value",
    )  # fmt: skip
    return model, {"pixel_values": torch.randn(4, 3, 8, 8)}, names[::2], {names: 2}


def t5() -> Build:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    packs = {("q", "k", "v"): 6, ("wi_0", "wi_1"): 4}
    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"][:, :3]}
    return transformers.T5ForConditionalGeneration(config), inputs, ("q", "v", "wi_1"), packs


def bart() -> Build:
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"][:, :3]}
    packs = {("q_proj", "k_proj", "v_proj"): 3}
    return transformers.BartForConditionalGeneration(config), inputs, ("q_proj", "v_proj"), packs


def gpt2() -> Build:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), IDS, ("c_attn",), {}


def leaves(pack: Pack) -> tuple[str, ...]:
    return tuple(path.rpartition(".")[2] for path in pack.paths)


MODELS = [llama, mistral, qwen2, qwen3, gemma, phi, opt, gptj, bert, roberta, vit, t5, bart, gpt2]


@pytest.mark.parametrize("build", MODELS, ids=[m.__name__ for m in MODELS])
def test_whole_models(build: Any, products: list[tuple[str, ...]]) -> None:
    bare, inputs, names, packs = build()
    bare = bare.eval().requires_grad_(False)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    paths = [n for n, m in bare.named_modules() if isinstance(m, kinds) and n.rpartition(".")[2] in names]
    adapters = {
        n: LoraAdapter({p: linear_layer(bare.get_submodule(p), r) for p in paths}) for n, r in (("a", 2), ("b", 3))
    }
    model = lf.attach(copy.deepcopy(bare), adapters, pack=True)
    found: dict[tuple[str, ...], int] = {}
    for pack, _ in model.lora_attachment.packs:
        found[leaves(pack)] = found.get(leaves(pack), 0) + 1
    assert found == packs
    assert model.state_dict().keys() == bare.state_dict().keys()
    entries = ["a", None, {"a": 0.5, "b": -0.5}, "b"]
    with torch.inference_mode():
        base = bare(**inputs).logits
        for _ in range(3):
            torch.testing.assert_close(model(**inputs).logits, base, rtol=1e-4, atol=1e-5)
        del products[:]
        with lf.use_adapters(model, entries):
            got = model(**inputs).logits
        # Cross-attention: k and v share the encoder's output, q has an input of its own.
        assert len(products) == sum(packs.values())
        assert sum(made not in packs for made in products) == {"t5": 2, "bart": 1}.get(build.__name__, 0)
        for i, entry in enumerate(entries):
            one = {k: v[i : i + 1] for k, v in inputs.items()}
            want = adapted_copy(bare, adapters, entry)(**one).logits
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)
    lf.detach(model)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("build", [llama, t5], ids=["llama", "t5"])
def test_generate(build: Any) -> None:
    bare, _, names, _ = build()
    bare = bare.eval().requires_grad_(False)
    paths = [n for n, m in bare.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in names]
    adapters = {n: LoraAdapter({p: linear_layer(bare.get_submodule(p), 3) for p in paths}) for n in "ab"}
    plain = lf.attach(copy.deepcopy(bare), adapters)
    packed = lf.attach(copy.deepcopy(bare), adapters, pack=True)
    outs = []
    for model in (plain, packed):
        with lf.use_adapters(model, ["a", None, "b", "a"]):
            outs.append(model.generate(**IDS, max_new_tokens=8, min_new_tokens=8, num_beams=2, do_sample=False))
    assert torch.equal(*outs)


def test_save_pretrained(tmp_path: Path) -> None:
    bare, _, names, _ = llama()
    paths = [n for n, m in bare.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in names]
    model = lf.attach(
        copy.deepcopy(bare), {"a": LoraAdapter({p: linear_layer(bare.get_submodule(p), 2) for p in paths})}, pack=True
    )
    model.save_pretrained(tmp_path / "packed")
    bare.save_pretrained(tmp_path / "bare")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("packed", "bare")]
    assert sizes[0] == sizes[1]
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    for (name, want), got in zip(bare.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(want, got), name


def test_experts_are_not_packed() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.ModuleDict({"w1": nn.Linear(8, 8), "w3": nn.Linear(8, 8)}) for _ in range(2)
            )

    model = lf.attach(Experts(), {}, pack=True)
    assert model.lora_attachment.packs == []
