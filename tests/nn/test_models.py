"""Whole models of transformers: every attached layer's path runs, rows get their own adapters and heads, paths load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_models import adapted_copy, conv_layer, embedding_layer, linear_layer
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import LoraAdapter
from lora_fuse.adapters.lora import LoraLayer

transformers = pytest.importorskip("transformers")


def bert() -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {"input_ids": torch.randint(0, 50, (4, 6)), "attention_mask": mask}
    return transformers.BertForSequenceClassification(config), inputs, ("query", "value", "dense", "word_embeddings")


def gpt2() -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return (
        transformers.GPT2LMHeadModel(config),
        {"input_ids": torch.randint(0, 50, (4, 6))},
        ("c_attn", "c_fc", "lm_head"),
    )


def vit() -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 8, 8)}, (
        "projection", "q_proj", "query", "fc1", "dense",
    )  # fmt: skip


def factors(module: nn.Module, rank: int) -> LoraLayer:
    if isinstance(module, nn.Embedding):
        return embedding_layer(module, rank)
    if isinstance(module, nn.Conv2d):
        return conv_layer(module, rank)
    return linear_layer(module, rank)


@pytest.mark.parametrize("build", [bert, gpt2, vit])
def test_whole_models(build: Any) -> None:
    bare, inputs, names = build()
    bare = bare.eval().requires_grad_(False)
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, transformers.pytorch_utils.Conv1D)
    paths = [n for n, m in bare.named_modules() if isinstance(m, kinds) and n.rpartition(".")[2] in names]
    assert len(paths) >= 4
    adapters = {n: LoraAdapter({p: factors(bare.get_submodule(p), r) for p in paths}) for n, r in (("a", 2), ("b", 3))}
    model = lf.attach(copy.deepcopy(bare), adapters)
    assert model.state_dict().keys() == bare.state_dict().keys()
    entries = ["a", None, {"a": 0.5, "b": -0.5}, "b"]
    with torch.no_grad():
        base = bare(**inputs).logits
        assert torch.equal(model(**inputs).logits, base)
        with lf.use_adapters(model, entries):
            got = model(**inputs).logits
        assert torch.equal(got[1], base[1])
        for i, entry in enumerate(entries):
            want = adapted_copy(bare, adapters, entry)(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)
        with lf.use_adapters(model, "b"):
            whole = model(**inputs).logits
            for path in paths:  # no layer is bypassed: emptying any one shows
                ranks = model.get_submodule(path).lora_pool.slot_rank
                kept = ranks.clone()
                ranks.zero_()
                assert not torch.equal(model(**inputs).logits, whole), path
                ranks.copy_(kept)
        with lf.use_adapters(model, ["a"] * 3), pytest.raises(ValueError, match=r"4 samples.* 3 entries"):
            model(**inputs)
    lf.detach(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)


def test_bert_heads_of_several_widths() -> None:
    bare, inputs, _ = bert()
    bare = bare.eval().requires_grad_(False)
    path = "bert.encoder.layer.1.attention.self.query"
    adapters = {
        name: LoraAdapter(
            {path: linear_layer(bare.get_submodule(path), 2)},
            {"classifier": {"weight": torch.randn(width, 16), "bias": torch.randn(width)}},
        )
        for name, width in (("two", 2), ("five", 5))
    }
    model = lf.attach(copy.deepcopy(bare), adapters)
    assert lf.head_sizes(model) == {"classifier": {None: 3, "two": 2, "five": 5}}
    with torch.no_grad(), lf.use_adapters(model, ["two", None, "five", "two"]):
        got = model(**inputs).logits
    assert torch.equal(got[1, :3], bare(**inputs).logits[1])
    assert got.isinf().sum(-1).tolist() == [3, 2, 0, 3]
    for i, name in ((0, "two"), (2, "five"), (3, "two")):
        alone = adapted_copy(bare, adapters, name)
        head = adapters[name].modules_to_save["classifier"]
        alone.classifier = nn.Identity()
        with torch.no_grad():
            pooled = alone(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
        want = pooled @ head["weight"].t() + head["bias"]
        torch.testing.assert_close(got[i : i + 1, : want.shape[-1]], want, rtol=1e-4, atol=1e-4)


def test_adapters_from_files(tmp_path: Path) -> None:
    bare, inputs, _ = bert()
    bare = bare.eval().requires_grad_(False)
    path = "bert.encoder.layer.0.attention.self.value"
    made = LoraAdapter({path: linear_layer(bare.get_submodule(path), 2)})
    made.save_pretrained(tmp_path / "adapter")
    model = lf.attach(copy.deepcopy(bare), {"file": str(tmp_path / "adapter"), "memory": made})
    lf.add_adapter(model, "later", tmp_path / "adapter")
    with torch.no_grad():
        with lf.use_adapters(model, ["file", "memory", "later", None]):
            got = model(**inputs).logits
        with lf.use_adapters(model, ["memory"] * 3 + [None]):
            assert torch.equal(model(**inputs).logits, got)
    with pytest.raises((ValueError, OSError)):
        lf.swap_adapter(model, "file", tmp_path / "nothing")
    assert set(lf.adapters(model)) == {"file", "memory", "later"}


def test_factors_beyond_the_weights_dtype_are_refused() -> None:
    bare = nn.Sequential(nn.Linear(4, 4)).half()
    layer = linear_layer(nn.Linear(4, 4), 2)
    big = LoraLayer(layer.lora_a * 1e6, layer.lora_b, 1.0)
    with pytest.raises(ValueError, match=r"'big': 0 has a factor of .*, float16 ends at 65504"):
        lf.attach(bare, {"big": LoraAdapter({"0": big})})
    model = lf.attach(bare, {"fine": LoraAdapter({"0": layer})})
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        lf.add_adapter(model, "big", LoraAdapter({"0": big}))
