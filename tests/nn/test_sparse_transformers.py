"""PERU-FFT of whole transformers models: mixed batches, switched tasks and the materialised fine-tunes agree."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import nn_models
import pytest
import torch
from sparse_models import fine_tuned
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.nn.sparse_site import SparseSite

transformers = pytest.importorskip("transformers")
DATA = Path(os.environ.get("LORA_FUSE_DATA", "/nowhere"))


def bert() -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    mask = torch.ones(6, 8, dtype=torch.long)
    mask[1, 4:] = 0
    return transformers.BertForSequenceClassification(config), _ids(mask), {"heads": "classifier.*"}


def gpt2() -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), _ids(torch.ones(6, 8, dtype=torch.long)), {}


def llama() -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), _ids(torch.ones(6, 8, dtype=torch.long)), {}


def vit() -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    shared = ["*cls_token", "*position_embeddings"]  # parameters of no layer's own
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(6, 3, 8, 8)}, {"shared": shared}


def _ids(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, mask.shape), "attention_mask": mask}


ENTRIES = ["a", None, "b", "lora", "c", "a"]


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Any = model(**inputs)
    return out.logits if hasattr(out, "logits") else out


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("build", [bert, gpt2, llama, vit])
def test_whole_models(build: Any, density: float) -> None:
    torch.manual_seed(0)
    base, inputs, kwargs = build()
    base.eval()
    tasks = {name: fine_tuned(base, seed, 0.5) for seed, name in enumerate("abc")}
    peru = lf.peru_fft(base, tasks, density=density, **kwargs)
    model = copy.deepcopy(base)
    model.load_state_dict(peru.merged)
    bare = copy.deepcopy(model)
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and "classifier" not in n and n != "lm_head"]
    extra = {"lora": nn_models.adapter(model, linears[:3], 4)} if linears else {}
    entries = [e if e in ("a", "b", "c", *extra) else None for e in ENTRIES]
    lf.attach(model, {**peru.adapters, **extra})
    with lf.use_adapters(model, entries):
        mixed = logits(model, inputs)
    want = logits(bare, inputs)
    for name in "abc":
        rows = [i for i, e in enumerate(entries) if e == name]
        own = copy.deepcopy(base)
        own.load_state_dict(peru.state_dict(name))
        own_logits = logits(own, inputs)
        assert not torch.allclose(own_logits[rows], want[rows], atol=1e-2)
        torch.testing.assert_close(mixed[rows], own_logits[rows], rtol=1e-4, atol=1e-5)
        lf.switch_task(model, name)
        assert torch.equal(logits(model, inputs), own_logits)
        assert all(torch.equal(t, own.state_dict()[n]) for n, t in model.state_dict().items() if "classifier" not in n)
    lf.switch_task(model, None)
    rows = [i for i, e in enumerate(entries) if e is None]
    assert torch.equal(mixed[rows], want[rows])
    lf.detach(model)
    assert torch.equal(logits(model, inputs), want)
    assert all(torch.equal(t, bare.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_served_tied_or_not(tied: bool) -> None:
    """The adapter names one of the two; a model that holds them apart gets the task's values in both."""
    torch.manual_seed(0)
    base, inputs, _ = llama()
    base.eval()
    peru = lf.peru_fft(base, {"a": fine_tuned(base, 1, 0.5)}, density=0.2)
    base.load_state_dict(peru.merged)
    if not tied:
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    bare, own = copy.deepcopy(base), copy.deepcopy(base)
    own.load_state_dict(peru.state_dict("a"))
    model = lf.attach(base, peru.adapters)
    assert {"model.embed_tokens", "lm_head"} <= set(lf.adapters(model)["a"].layers)
    with lf.use_adapters(model, ["a", None, "a", "a", None, "a"]):
        mixed = logits(model, inputs)
    torch.testing.assert_close(mixed[[0, 2, 3, 5]], logits(own, inputs)[[0, 2, 3, 5]], rtol=1e-4, atol=1e-5)
    assert torch.equal(mixed[[1, 4]], logits(bare, inputs)[[1, 4]])
    lf.switch_task(model, "a")
    assert torch.equal(logits(model, inputs), logits(own, inputs))
    lf.switch_task(model, None)
    assert all(torch.equal(t, bare.state_dict()[n]) for n, t in model.state_dict().items())
    lf.detach(model)
    if not tied:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        with pytest.raises(ValueError, match=r"the model's lm_head\.weight .* is not the merged weight"):
            lf.attach(model, peru.adapters)


def test_generate_with_beams() -> None:
    torch.manual_seed(0)
    base, inputs, _ = gpt2()
    base.eval()
    peru = lf.peru_fft(base, {n: fine_tuned(base, i, 0.5) for i, n in enumerate("ab")}, density=0.3)
    base.load_state_dict(peru.merged)
    bare = copy.deepcopy(base)
    model = lf.attach(base, peru.adapters)
    prompt = {name: t[:3, :4] for name, t in inputs.items()}
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with lf.use_adapters(model, ["a", None, "b"]):
        mixed: Any = model.generate(**prompt, **options)
    for i, name in enumerate(("a", None, "b")):
        bare.load_state_dict(peru.state_dict(name))
        want = bare.generate(**{n: t[i : i + 1] for n, t in prompt.items()}, **options)
        assert torch.equal(mixed[i], want[0])


@pytest.mark.skipif(not DATA.is_dir(), reason="the MiniLM model is not at hand (LORA_FUSE_DATA)")
def test_minilm() -> None:
    from lora_fuse.demo.model import TextClassifier, load_encoder

    torch.manual_seed(0)
    base = TextClassifier(load_encoder(DATA), 2).eval()
    tasks = {}
    for seed, (name, width) in enumerate({"mnli": 3, "sst2": 2, "trec": 6}.items()):
        tasks[name] = fine_tuned(base, seed, 0.05)
        tasks[name].classifier = nn.Linear(384, width)
    peru = lf.peru_fft(base, tasks, density=0.1, heads="classifier.*")
    base.load_state_dict(peru.merged, strict=False)
    bare = copy.deepcopy(base)
    names = [n for n, m in base.named_modules() if n.endswith((".query", ".value"))]
    model = lf.attach(base, {**peru.adapters, "lora": nn_models.adapter(base, names, 8)})
    assert len(lf.adapters(model)["mnli"].layers) == 3 + 13 + 6 * 6
    ids = torch.randint(1000, 30000, (8, 20))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs["attention_mask"][5, 9:] = 0
    entries: list[Any] = ["mnli", None, "sst2", "lora", "trec", "mnli", None, {"mnli": 0.5, "lora": 1.0}]
    with lf.use_adapters(model, entries):
        mixed = logits(model, inputs)
    want = logits(bare, inputs)
    for name in tasks:
        lf.switch_task(model, name)
        switched, width = logits(model, inputs), tasks[name].classifier.out_features
        rows = [i for i, e in enumerate(entries) if e == name]
        torch.testing.assert_close(mixed[rows, :width], switched[rows], rtol=1e-4, atol=2e-5)
        assert bool((mixed[rows, width:] == -torch.inf).all())
        own = copy.deepcopy(bare)
        own.classifier = nn.Linear(384, width)
        own.load_state_dict(peru.state_dict(name))
        assert torch.equal(switched, logits(own, inputs))
    lf.switch_task(model, None)
    assert torch.equal(mixed[[1, 6], :2], want[[1, 6]])
    with lf.use_adapters(model, ["lora"] * 8):
        torch.testing.assert_close(mixed[3, :2], logits(model, inputs)[3], rtol=1e-4, atol=1e-5)
    assert any(isinstance(m, SparseSite) for m in model.modules())
    lf.detach(model)
    assert all(torch.equal(t, bare.state_dict()[n]) for n, t in model.state_dict().items())
