"""transformers.generate on tiny models: greedy, left-padded, beams, sampling; against one model per entry, and PEFT."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from nn_models import adapted_copy, adapter
from torch import Tensor

import lora_fuse as lf

transformers = pytest.importorskip("transformers")

ENTRIES: list[Any] = ["a", None, {"a": 0.5, "b": 0.5}, "b"]
PROJECTIONS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def bare() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=60,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapters(bare: Any) -> dict[str, lf.LoraAdapter]:
    torch.manual_seed(2)
    paths = [n for n, _ in bare.named_modules() if n.rpartition(".")[2] in PROJECTIONS]
    assert len(paths) == 6
    return {n: adapter(bare, [*paths, "lm_head"], rank, scaling=1.5) for n, rank in (("a", 4), ("b", 3))}


@pytest.fixture(scope="module")
def model(bare: Any, adapters: Any) -> Any:
    return lf.attach(copy.deepcopy(bare), adapters)


def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded."""
    torch.manual_seed(3)
    ids, mask = torch.randint(2, 59, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    for row, pad in enumerate([0, 3, 1, 5]):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 2},
    "no-cache": {"use_cache": False},
}


@pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES.keys())
def test_every_row_generates_what_its_own_model_would(model: Any, bare: Any, adapters: Any, kwargs: Any) -> None:
    ids, mask = prompts()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
    with lf.use_adapters(model, ENTRIES):
        got = model.generate(input_ids=ids, attention_mask=mask, **options)
    returned = kwargs.get("num_return_sequences", 1)
    distinct = set()
    for i, entry in enumerate(ENTRIES):
        alone = adapted_copy(bare, adapters, entry)
        want = alone.generate(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
        assert torch.equal(got[i * returned : (i + 1) * returned], want), i
        distinct.add(tuple(want[0, 7:].tolist()))
    assert len(distinct) > 2  # the adapters do change what is said


def test_sampled_sequences_expand_the_selection(model: Any, bare: Any) -> None:
    ids, mask = prompts()
    kwargs = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 3}
    with lf.use_adapters(model, [None] * 4):
        torch.manual_seed(0)
        got = model.generate(ids, **kwargs)
    torch.manual_seed(0)
    assert torch.equal(got, bare.generate(ids, **kwargs))
    with lf.use_adapters(model, ENTRIES):
        assert model.generate(ids, **kwargs).shape == (12, 10)


@pytest.mark.parametrize("count", [3, 12])
def test_a_wrong_length_is_still_an_error(model: Any, count: int) -> None:
    ids, mask = prompts()
    with lf.use_adapters(model, ["a"] * count), pytest.raises(ValueError, match=rf"12 samples.* {3 * count} entries"):
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=2)
    with lf.use_adapters(model, ENTRIES):  # the failed call left no expansion behind
        model(ids)


def test_prefill_then_decode_by_hand(model: Any, bare: Any, adapters: Any) -> None:
    ids, _ = prompts()
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        cache = model(ids[:, :4], use_cache=True).past_key_values
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 7)]
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 4:], rtol=1e-4, atol=1e-4)
    for i, entry in enumerate(ENTRIES):
        want = adapted_copy(bare, adapters, entry)(ids[i : i + 1]).logits
        torch.testing.assert_close(whole[i : i + 1], want, rtol=1e-4, atol=1e-4)


def test_detached_and_copied_models_generate(bare: Any, adapters: Any) -> None:
    ids, mask = prompts()
    kwargs = {"attention_mask": mask, "num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    want = bare.generate(ids, **kwargs)
    model = lf.attach(copy.deepcopy(bare), adapters)
    lf.set_adapters(model, ENTRIES)
    got = model.generate(ids, **kwargs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert twin.generate.model is twin
        assert torch.equal(twin.generate(ids, **kwargs), got)
    lf.detach(model)
    assert "generate" not in model.__dict__
    assert torch.equal(model.generate(ids, **kwargs), want)


def test_encoder_decoder() -> None:
    torch.manual_seed(4)
    config = transformers.T5Config(
        vocab_size=53, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    bare = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    paths = [n for n, _ in bare.named_modules() if n.rpartition(".")[2] in ("q", "v", "wo")]
    adapters = {n: adapter(bare, paths, 3, scaling=2.0) for n in "ab"}
    model = lf.attach(copy.deepcopy(bare), adapters)
    ids, options = torch.randint(2, 53, (3, 5)), {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    entries = ["a", None, "b"]
    with lf.use_adapters(model, entries):  # the encoder runs before the batch is expanded, the decoder after
        got = model.generate(ids, **options)
    for i, entry in enumerate(entries):
        want = adapted_copy(bare, adapters, entry).generate(ids[i : i + 1], **options)[0]
        n = min(len(want), got.shape[1])
        assert torch.equal(got[i][:n], want[:n])


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_greedy_tokens_equal_pefts(bare: Any, adapters: Any) -> None:
    peft = pytest.importorskip("peft")
    ids, mask = prompts()
    names = ["a", "__base__", "b", "a"]
    oracle = None
    layer_names = sorted({p.rpartition(".")[2] for p in adapters["a"].layers} - {"lm_head"})
    for name, source in adapters.items():
        config = peft.LoraConfig(r=source.rank, lora_alpha=source.rank * 1.5, target_modules=layer_names)
        if oracle is None:
            oracle = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name=name)
        else:
            oracle.add_adapter(name, config)
        for path, layer in source.layers.items():
            if path != "lm_head":
                module = oracle.get_submodule(f"base_model.model.{path}")
                module.lora_A[name].weight.data.copy_(layer.lora_a)
                module.lora_B[name].weight.data.copy_(layer.lora_b)
    assert oracle is not None
    oracle.eval()
    trimmed = {n: lf.LoraAdapter({p: v for p, v in a.layers.items() if p != "lm_head"}) for n, a in adapters.items()}
    model = lf.attach(copy.deepcopy(bare), trimmed)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    want = oracle.generate(input_ids=ids, adapter_names=names, **options)
    with lf.use_adapters(model, [None if n == "__base__" else n for n in names]):
        got = model.generate(input_ids=ids, **options)
        logits = model(ids, attention_mask=mask).logits
    assert torch.equal(got, want)
    with torch.no_grad():
        oracle_logits = oracle(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    torch.testing.assert_close(logits, oracle_logits, rtol=1e-4, atol=1e-4)
    from_peft = lf.attach(copy.deepcopy(bare), {"a": lf.load_adapter(oracle, adapter_name="a")})
    with lf.use_adapters(from_peft, "a"), lf.use_adapters(model, "a"):
        assert torch.equal(from_peft(ids).logits, model(ids).logits)
