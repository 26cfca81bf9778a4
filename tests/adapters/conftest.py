"""Tiny models, and adapters for them written by PEFT itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="the oracle of these tests")
transformers = pytest.importorskip("transformers", reason="the oracle of these tests")


@contextmanager
def quiet() -> Iterator[None]:
    """The oracle may warn; our own code may not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Plain(nn.Module):
    """Embedding, strided and 1x1 convolutions, linear layers of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(19, 12)
        self.conv = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.pointwise = nn.Conv2d(6, 5, 1)
        self.block = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5, bias=False))
        self.weight_lora = nn.Linear(5, 7)  # a name that looks like parts of keys
        self.norm = nn.BatchNorm1d(7)  # it has an integer buffer

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        pooled = self.pointwise(torch.relu(self.conv(image))).mean((2, 3))
        return self.norm(self.weight_lora(self.block(self.emb(ids)).mean(1) + pooled))


def _llama() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.LlamaConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config), (torch.randint(0, 41, (2, 6)),)


def _gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.GPT2Config(vocab_size=41, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config), (torch.randint(0, 41, (2, 6)),)


def _bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.BertConfig(
        vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=36, num_labels=3
    )
    return transformers.BertForSequenceClassification(config), (torch.randint(0, 41, (2, 6)),)


def _plain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Plain(), (torch.randint(0, 19, (4, 6)), torch.randn(4, 3, 8, 7))


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "plain": _plain,
}


class Written:
    """A base model, PEFT's model on a copy of it with every adapter tensor made random, and where PEFT saved it."""

    def __init__(self, kind: str, directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> None:
        with quiet():
            base, self.inputs = MODELS[kind]()
            self.base = base.to(dtype).eval()
            self.inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.inputs)
            settings = peft.LoraConfig(**{"init_lora_weights": False, **config})
            self.model = peft.get_peft_model(copy.deepcopy(self.base), settings).eval()
            for name, parameter in self.model.named_parameters():
                if any(part in name for part in ("lora_", "modules_to_save", "tokens_delta")) or (
                    parameter.requires_grad and name.endswith("bias")
                ):
                    scale = parameter.abs().mean() if "magnitude" in name else 0.2
                    parameter.data.add_(torch.randn_like(parameter), alpha=float(scale))
            self.model.save_pretrained(directory)
        self.directory = directory

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), quiet():
            out = model(*self.inputs)
        return out if isinstance(out, Tensor) else out.logits

    def load_in_peft(self, directory: Path) -> nn.Module:
        with quiet():
            return peft.PeftModel.from_pretrained(copy.deepcopy(self.base), directory).eval()

    def lora_modules(self) -> Iterator[tuple[str, Any]]:
        """PEFT's layers under the base model's own paths."""
        for name, module in self.model.base_model.model.named_modules():
            if hasattr(module, "lora_A") and module.scaling:
                yield name, module


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    def make(kind: str, name: str = "peft", **config: Any) -> Written:
        return Written(kind, tmp_path / name, **config)

    return make
