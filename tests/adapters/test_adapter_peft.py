"""PEFT's files, read and written, against PEFT itself."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Written, quiet
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fuse as lf
from lora_fuse.adapters.config import LoraSettings
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer

LLAMA = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PLAIN = {"r": 5, "lora_alpha": 7, "target_modules": ["emb", "conv", "pointwise", "0", "2", "weight_lora"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", LLAMA),
    "bf16": ("llama", {**LLAMA, "dtype": torch.bfloat16}),
    "rank_1": ("llama", {**LLAMA, "r": 1}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "regex_targets": ("llama", {"target_modules": r".*\.layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "some_layers": ("llama", {**LLAMA, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "patterns": (
        "llama",
        {
            **LLAMA,
            "rank_pattern": {r"^model\.layers\.0\..*q_proj": 3, "layers.1.self_attn.q_proj": 5, "q_proj": 7},
            "alpha_pattern": {r"layers\.\d\.self_attn\..*": 3, "v_proj": 99},
        },
    ),
    "rslora": ("llama", {**LLAMA, "use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 3}}),
    "lora_bias": ("plain", {**PLAIN, "target_modules": ["0", "weight_lora", "conv"], "lora_bias": True}),
    "conv1d": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d_unsaid": ("gpt2", {"r": 3, "target_modules": ["c_attn"]}),
    "conv2d_embedding": ("plain", PLAIN),
    "embedding_and_head": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "head_saved": ("bert", {"r": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "seq_cls": ("bert", {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "nested_saved": ("bert", {"r": 4, "target_modules": ["query"], "modules_to_save": ["pooler", "LayerNorm"]}),
    "integer_buffer_saved": ("plain", {"target_modules": ["0"], "modules_to_save": ["norm"]}),
    "bias_all": ("bert", {"r": 4, "target_modules": ["query"], "bias": "all"}),
    "bias_all_head": ("bert", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bias_lora_only": ("bert", {"r": 4, "target_modules": ["query", "output.dense"], "bias": "lora_only"}),
    "dora": ("llama", {**LLAMA, "use_dora": True}),
    "dora_conv1d": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "dora_conv2d_embedding": ("plain", {**PLAIN, "use_dora": True}),
    "dora_rslora": ("llama", {**LLAMA, "use_dora": True, "use_rslora": True}),
    "tokens": ("llama", {**LLAMA, "trainable_token_indices": [5, 2, 40]}),
    "tokens_by_name": ("llama", {**LLAMA, "trainable_token_indices": {"embed_tokens": [7, 1]}}),
}
cases = pytest.mark.parametrize(("kind", "config"), CASES.values(), ids=CASES.keys())


def _same(a: LoraAdapter, b: LoraAdapter) -> None:
    """Bit-equal tensors, equal scalings, equal paths."""

    def flat(adapter: LoraAdapter) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for path, layer in adapter.layers.items():
            out |= {f"{path}/{i}": t for i, t in enumerate(layer.tensors())}
        for path, saved in adapter.modules_to_save.items():
            out |= {f"{path}/saved/{name}": t for name, t in saved.items()}
        for path, (ids, rows) in adapter.trainable_tokens.items():
            out |= {f"{path}/ids": ids, f"{path}/rows": rows}
        out |= {f"{path}/bias": t for path, t in adapter.base_biases.items()}
        return out | {f"{path}/base": t for path, t in adapter.base_weights.items()}

    ours, theirs = flat(a), flat(b)
    assert ours.keys() == theirs.keys()
    for key, t in ours.items():
        assert t.dtype == theirs[key].dtype
        assert torch.equal(t, theirs[key]), key
    for path, layer in a.layers.items():
        assert (layer.kind, layer.scaling) == (b.layers[path].kind, b.layers[path].scaling), path


@cases
def test_delta_is_what_peft_merges(write: Callable[..., Written], kind: str, config: dict[str, Any]) -> None:
    written = write(kind, **config)
    adapter = lf.load_adapter(written.directory)
    modules = dict(written.lora_modules())
    assert adapter.layers.keys() == modules.keys()
    for path, module in modules.items():
        base = module.get_base_layer().weight.detach().float()
        turn = type(module.get_base_layer()).__name__ == "Conv1D"
        weight = base.t() if turn else base
        ours = adapter.delta(path, base_weight=weight if config.get("use_dora") else None)
        layer = copy.deepcopy(module).float()
        layer.merge()
        merged = layer.get_base_layer().weight.detach()
        theirs = (merged.t() if turn else merged) - weight
        assert ours.shape == weight.shape
        assert ours.dtype == torch.float32
        assert adapter.layers[path].scaling == pytest.approx(module.scaling["default"], rel=1e-15)
        assert adapter.layers[path].rank == module.r["default"]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@cases
def test_round_trip(write: Callable[..., Written], kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    written = write(kind, **config)
    adapter = lf.load_adapter(written.directory)
    adapter.save_pretrained(tmp_path / "ours")
    _same(adapter, lf.load_adapter(tmp_path / "ours"))
    expected = written.run(written.model)
    assert not torch.equal(expected, written.run(written.base))
    assert torch.equal(written.run(written.load_in_peft(tmp_path / "ours")), expected)


@cases
def test_every_tensor_is_taken(
    write: Callable[..., Written], kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """What PEFT wrote and what we write are the same tensors under the same keys."""
    written = write(kind, **config)
    lf.load_adapter(written.directory).save_pretrained(tmp_path / "ours")
    theirs = load_file(written.directory / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    inert = {key for key in theirs if "original_module" in key or ".modules_to_save." in key}  # bias="all" writes these
    assert bool(inert) == (config.get("bias") == "all" and "modules_to_save" in config)
    assert ours.keys() == theirs.keys() - inert
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())


@cases
def test_live_model_is_a_source(
    write: Callable[..., Written], kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    written = write(kind, **config)
    from_file = lf.load_adapter(written.directory)
    live = lf.load_adapter(written.model)
    if not from_file.base_weights:  # PEFT writes embeddings to files; a live model has them itself
        _same(live, from_file)
    live.save_pretrained(tmp_path / "live")
    assert torch.equal(written.run(written.load_in_peft(tmp_path / "live")), written.run(written.model))
    before = {path: layer.lora_b.clone() for path, layer in live.layers.items()}
    with torch.no_grad():
        for parameter in written.model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(layer.lora_b, before[path]) for path, layer in live.layers.items())


def test_order_of_patterns(write: Callable[..., Written], tmp_path: Path) -> None:
    """The first match wins; PEFT's own save sorts the keys and loses that, ours does not."""
    overlapping = {
        "rank_pattern": {"q_proj": 7, "layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 99, "1.*": 3},
    }
    written = write("llama", **LLAMA, **overlapping)
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj: the config gives rank 5, the tensors have rank 7"
    ):
        lf.load_adapter(written.directory)
    adapter = lf.load_adapter(written.model)
    assert {path: layer.scaling for path, layer in adapter.layers.items()} == {
        path: module.scaling["default"] for path, module in written.lora_modules()
    }
    adapter.save_pretrained(tmp_path / "ours")
    _same(adapter, lf.load_adapter(tmp_path / "ours"))
    assert torch.equal(written.run(written.load_in_peft(tmp_path / "ours")), written.run(written.model))


def test_live_model_scaling_and_names(write: Callable[..., Written]) -> None:
    written = write("llama", **LLAMA)
    with quiet():
        written.model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj"]))
    for _, module in written.lora_modules():
        module.scale_layer(0.25)
    adapter = lf.load_adapter(written.model)
    assert {layer.scaling for layer in adapter.layers.values()} == {10 / 4 * 0.25}
    other = lf.load_adapter(written.model, adapter_name="other")
    assert {path.rpartition(".")[2] for path in other.layers} == {"o_proj"}
    assert (other.rank, adapter.rank) == (2, 4)
    with pytest.raises(ValueError, match=r"adapter_name: the model has no adapter 'x', it has \['default', 'other'\]"):
        lf.load_adapter(written.model, adapter_name="x")
    with pytest.raises(ValueError, match="has no PEFT adapters"):
        lf.load_adapter(written.base)


def test_compiled_model_is_a_source(write: Callable[..., Written]) -> None:
    written = write("llama", **LLAMA)
    _same(lf.load_adapter(torch.compile(written.model, backend="eager")), lf.load_adapter(written.directory))


def test_injected_model_is_a_source(write: Callable[..., Written]) -> None:
    """transformers' own add_adapter: no PeftModel, no prefix."""
    written = write("llama", **LLAMA)
    model = copy.deepcopy(written.base)
    with quiet():
        model.add_adapter(peft.LoraConfig(**LLAMA, init_lora_weights=False), adapter_name="mine")
    adapter = lf.load_adapter(model)
    assert adapter.layers.keys() == lf.load_adapter(written.directory).layers.keys()
    path = "model.layers.0.self_attn.q_proj"
    theirs = model.get_submodule(path).get_delta_weight("mine").detach()
    torch.testing.assert_close(adapter.delta(path), theirs, rtol=1e-6, atol=1e-7)


def test_prefix_is_removed_once() -> None:
    stem = "base_model.model.wrapped.base_model.model.q.lora_"
    tensors = {f"{stem}A.weight": torch.ones(2, 5), f"{stem}B.weight": torch.ones(3, 2)}
    adapter = lf.load_adapter(tensors, config={"peft_type": "LORA", "r": 2})
    assert list(adapter.layers) == ["wrapped.base_model.model.q"]


def _rename(tensors: dict[str, Tensor], pattern: str, into: str) -> dict[str, Tensor]:
    renamed = {re.sub(pattern, into, key): t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    return renamed


@pytest.mark.parametrize(
    ("pattern", "into"),
    [
        (r"\.(lora_[AB])\.weight", r".\1.default.weight"),
        (r"\.(lora_embedding_[AB])", r".\1.default"),
        (r"\.lora_magnitude_vector", r".lora_magnitude_vector.default.weight"),
        (r"\.lora_magnitude_vector", r".lora_magnitude_vector.weight"),
        (r"\.lora_magnitude_vector", r".lora_magnitude_vector.default"),
        (r"^base_model\.model\.", ""),
        (r"^", "_orig_mod."),
        (r"^base_model\.model\.", "base_model.model._orig_mod."),
        (r"^base_model\.model\.", "_fsdp_wrapped_module.base_model.model."),
        (r"^base_model\.model\.([a-z]+)\.", r"base_model.model.\1._fsdp_wrapped_module."),
        (r"\.(lora_[AB])\.weight", r".\1.lora.weight"),  # an adapter called "lora"
    ],
)
def test_spellings(write: Callable[..., Written], pattern: str, into: str) -> None:
    written = write("plain", **PLAIN, use_dora=True)
    config = json.loads((written.directory / "adapter_config.json").read_text())
    tensors = load_file(written.directory / "adapter_model.safetensors")
    respelled = lf.load_adapter(_rename(tensors, pattern, into), config=config)
    _same(respelled, lf.load_adapter(written.directory))


def test_state_dict_of_several_adapters(write: Callable[..., Written]) -> None:
    written = write("llama", **LLAMA)
    with quiet():
        written.model.add_adapter("other", peft.LoraConfig(**LLAMA, init_lora_weights=False))
    state = {key: t for key, t in written.model.state_dict().items() if "lora_" in key}
    config = {"peft_type": "LORA", **LLAMA}
    with pytest.raises(ValueError, match=r"choose one of \['default', 'other'\]"):
        lf.load_adapter(state, config=config)
    with pytest.raises(ValueError, match="has no adapter 'third'"):
        lf.load_adapter(state, config=config, adapter_name="third")
    _same(
        lf.load_adapter(state, config=config, adapter_name="other"),
        lf.load_adapter(written.model, adapter_name="other"),
    )


def test_config_object_and_override(write: Callable[..., Written]) -> None:
    written = write("llama", **LLAMA)
    tensors = load_file(written.directory / "adapter_model.safetensors")
    by_object = lf.load_adapter(tensors, config=written.model.peft_config["default"])
    _same(by_object, lf.load_adapter(written.directory))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 40}
    overridden = lf.load_adapter(written.directory, config=config)
    assert {layer.scaling for layer in overridden.layers.values()} == {10.0}
    assert json.loads((written.directory / "adapter_config.json").read_text())["lora_alpha"] == 10


def test_dtype_and_device(write: Callable[..., Written]) -> None:
    written = write("bert", r=4, target_modules=["query"], modules_to_save=["classifier"])
    plain = lf.load_adapter(
        write("plain", "p", target_modules=["0"], modules_to_save=["norm"]).directory, dtype=torch.half
    )
    assert plain.modules_to_save["norm"]["num_batches_tracked"].dtype == torch.int64
    assert plain.modules_to_save["norm"]["running_mean"].dtype == torch.float16
    adapter = lf.load_adapter(written.directory, dtype=torch.bfloat16, device="cpu")
    assert {t.dtype for t in adapter.tensors()} == {torch.bfloat16}
    assert adapter.nbytes == 2 * adapter.num_parameters()


def test_file_may_change_after_loading(write: Callable[..., Written]) -> None:
    written = write("llama", **LLAMA)
    adapter = lf.load_adapter(written.directory)
    kept = {path: layer.lora_a.clone() for path, layer in adapter.layers.items()}
    file = written.directory / "adapter_model.safetensors"
    with file.open("r+b") as handle:
        handle.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(layer.lora_a, kept[path]) for path, layer in adapter.layers.items())


def test_embedding_with_a_resized_vocabulary(write: Callable[..., Written], tmp_path: Path) -> None:
    """PEFT then saves embeddings whole, in one of two spellings; both come back."""
    written = write("llama", r=4, target_modules=["q_proj"])
    tensors = load_file(written.directory / "adapter_model.safetensors")
    rows = torch.randn(41, 24)
    tensors["base_model.model.model.embed_tokens.weight"] = rows
    save_file(tensors, written.directory / "adapter_model.safetensors")
    adapter = lf.load_adapter(written.directory)
    assert torch.equal(adapter.modules_to_save["model.embed_tokens"]["weight"], rows)
    adapter.save_pretrained(tmp_path / "ours")
    model = written.load_in_peft(tmp_path / "ours")
    reference = copy.deepcopy(written.model)
    reference.base_model.model.model.embed_tokens.weight.data.copy_(rows)
    assert torch.equal(written.run(model), written.run(reference))


def test_delta_errors() -> None:
    layers = {"model.layers.0.q_proj": LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 1.0)}
    dora = LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 1.0, magnitude=torch.ones(4))
    adapter = LoraAdapter({**layers, "dora": dora}, source="loras/sql")
    with pytest.raises(ValueError, match=r"loras/sql adapts 2 modules, but not 'model.layer.0.q_proj'; did you mean"):
        adapter.delta("model.layer.0.q_proj")
    with pytest.raises(ValueError, match=r"dora: base_weight: .* pass base_weight="):
        adapter.delta("dora")
    with pytest.raises(ValueError, match=r"dora: base_weight: expected shape \(4, 3\), .* got \(3, 4\)"):
        adapter.delta("dora", torch.ones(3, 4))


def test_dora_row_without_direction() -> None:
    layer = LoraLayer(torch.zeros(1, 3), torch.zeros(2, 1), 1.0, magnitude=torch.tensor([2.0, 5.0]))
    weight = torch.tensor([[0.0, 3.0, 4.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(layer.delta(weight) + weight, torch.tensor([[0.0, 1.2, 1.6], [0.0, 0.0, 0.0]]))


def test_repr(write: Callable[..., Written]) -> None:
    written = write("bert", r=4, target_modules=["query"], modules_to_save=["classifier"], rank_pattern={"0.*query": 2})
    text = repr(lf.load_adapter(written.directory))
    assert text.startswith("LoraAdapter(ranks 2 to 4, 2 layers, 363 parameters, 1.4 KiB float32, ")
    assert "modules_to_save classifier" in text
    assert str(written.directory) in text
    assert len(text) < 300
    layer = LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 0.5, lora_bias=torch.ones(4))
    assert repr(layer) == "LoraLayer(linear 4 x 3, rank 2, scaling 0.5, lora_bias, float32)"


@pytest.mark.parametrize(
    ("key", "path", "matches"),
    [
        ("q", "q", True),
        ("q", "a.q", True),
        ("q", "a.kq", False),  # whole parts of a path only
        ("q", "q.a", False),
        ("a.q", "b.a.q", True),
        ("a.q", "b.ba.q", False),
        ("^a.q", "a.q", True),
        ("^a.q", "b.a.q", False),
        (r"\d\.q", "layers.12.q", False),
        (r"\d+\.q", "layers.12.q", True),
        ("k|q", "a.q", True),
        (".*", "anything.at.all", True),
    ],
)
def test_pattern_rule_is_pefts(key: str, path: str, matches: bool) -> None:
    assert (peft.utils.other.get_pattern_key([key], path) == key) is matches or key == path
    settings = LoraSettings(rank_pattern={key: 3}, alpha_pattern={key: 6.0})
    assert (settings.rank(path), settings.scaling(path, 2)) == ((3, 3.0) if matches else (8, 4.0))
