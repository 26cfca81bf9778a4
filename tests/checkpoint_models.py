"""Tiny real models on disk, and adapters that PEFT makes for them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fuse as lf

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

LLAMA = transformers.LlamaForCausalLM
GPT2 = transformers.GPT2LMHeadModel
BERT = transformers.BertModel
BERT_CLS = transformers.BertForSequenceClassification


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What PEFT and transformers warn about is not under test."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def save_llama(folder: Path, tie: bool = False, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=tie,
    )  # fmt: skip
    with quiet():
        LLAMA(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_gpt2(folder: Path) -> Path:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    with quiet():
        GPT2(config).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    with quiet():
        BERT(config).save_pretrained(folder)
    return folder


def load(model_class: Any, folder: Path, **kwargs: Any) -> nn.Module:
    with quiet():
        return model_class.from_pretrained(folder, dtype=kwargs.pop("dtype", torch.float32), **kwargs).eval()


def make_adapter(
    model_class: Any, base: Path, out: Path, seed: int = 1, model_kwargs: Any = None, **config: Any
) -> Path:
    """A PEFT adapter with random factors (heads and biases too), written by PEFT."""
    torch.manual_seed(seed)
    model = load(model_class, base, **(model_kwargs or {}))
    with quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                spread = 0.1 * torch.randn_like(parameter)
                parameter.data.copy_(parameter + spread.abs() if "magnitude" in name else spread)
        wrapped.save_pretrained(out)
    return out


def peft_model(model_class: Any, base: Path, adapter: Path, **kwargs: Any) -> nn.Module:
    with quiet():
        return peft.PeftModel.from_pretrained(load(model_class, base, **kwargs), adapter).eval()


def peft_merged(model_class: Any, base: Path, adapter: Path, **kwargs: Any) -> dict[str, Tensor]:
    """The oracle: state dict after PEFT's own merge, in fp32."""
    with quiet():
        return peft_model(model_class, base, adapter, **kwargs).merge_and_unload().state_dict()


def adapter(path: Path) -> lf.LoraAdapter:
    return lf.load_adapter(path)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), quiet():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def assert_same_state(ours: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    assert ours.keys() == oracle.keys()
    for name, tensor in oracle.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
