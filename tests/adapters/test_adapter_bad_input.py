"""Broken and foreign files: an error that names the thing, never a half-read adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fuse as lf

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
STEM = "base_model.model.layers.0.q"
OTHER = "base_model.model.layers.1.q"


def _tensors() -> dict[str, Tensor]:
    return {
        f"{stem}.lora_{part}.weight": torch.randn(shape)
        for stem in (STEM, OTHER)
        for part, shape in (("A", (2, 5)), ("B", (3, 2)))
    }


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A good adapter on disk, for the tests to break."""
    save_file(_tensors(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert len(lf.load_adapter(tmp_path).layers) == 2
    return tmp_path


def _load(config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return lf.load_adapter({**_tensors(), **(tensors or {})}, config={**CONFIG, **(config or {})}, **kwargs)


# --- bytes


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, 0.3, 0.6, -64, -4, -1])
def test_truncated_file(home: Path, keep: float) -> None:
    file = home / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: (the file is empty|.*truncated or damaged)"):
        lf.load_adapter(home)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],  # absurd header length
        lambda data: b"\x00" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],  # not JSON
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
        lambda data: data.replace(b'"shape":[2,5]', b'"shape":[3,5]', 1),
        lambda data: data.replace(b"[0,40]", b"[8,48]", 1),
        lambda data: data + b"trailing",
        lambda data: b"not a tensor file at all" * 20,
    ],
)
def test_damaged_file(home: Path, damage: Callable[[bytes], bytes]) -> None:
    file = home / "adapter_model.safetensors"
    data = file.read_bytes()
    assert damage(data) != data
    file.write_bytes(damage(data))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a readable safetensors file \(\d+ bytes\)"):
        lf.load_adapter(home)


def test_git_lfs_pointer(home: Path) -> None:
    (home / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )
    with pytest.raises(ValueError, match="git lfs pull"):
        lf.load_adapter(home)


def test_renamed_pickle(home: Path) -> None:
    torch.save(_tensors(), home / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="looks like pickled weights under another name"):
        lf.load_adapter(home)


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt", "lora.ckpt", "lora.pth"])
def test_pickled_weights(home: Path, name: str) -> None:
    (home / "adapter_model.safetensors").unlink()
    torch.save(_tensors(), home / name)
    for source in (home, home / name):
        with pytest.raises(ValueError, match=rf"{name}: pickled weights are not read, .*safetensors"):
            lf.load_adapter(source)


def test_no_weights(home: Path) -> None:
    (home / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no adapter_model\.safetensors; it has adapter_config\.json"):
        lf.load_adapter(home)
    (home / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="it is empty"):
        lf.load_adapter(home)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"peft_type": "LORA",', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
    ],
)
def test_broken_config(home: Path, text: str, message: str) -> None:
    (home / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        lf.load_adapter(home)
    (home / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not valid JSON"):
        lf.load_adapter(home)


def test_missing_config(home: Path) -> None:
    (home / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        lf.load_adapter(home)


# --- config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type: expected LORA, got 'LOHA'; .*save_as_lora"),
        ({"peft_type": "ADALORA"}, "peft_type: expected LORA, got 'ADALORA'"),
        ({"peft_type": None}, "peft_type: expected LORA, got None"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication: .* repeats layers"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: .*aLoRA"),
        ({"use_qalora": True}, "use_qalora: True is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: .* is not supported"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config: .* is not supported"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config: .* is not supported"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config: .* is not supported"),
        ({"target_parameters": ["experts.w"]}, r"target_parameters: .* \(fused MoE experts\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base weights.*base_is_residual=True"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16' changes the base weights"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base weights"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes the base weights"),
        ({"brand_new_option": 3}, "brand_new_option: unknown key with the value 3"),
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"r": "8"}, "r: expected a positive integer, got '8'"),
        ({"r": True}, "r: expected a positive integer, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
        ({"bias": "some"}, "bias: expected 'none', 'all' or 'lora_only'"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern: expected an object of positive integers"),
        ({"rank_pattern": {"q(": 2}}, r"rank_pattern: 'q\(' is not a regular expression"),
        ({"alpha_pattern": {"q": "2"}}, "alpha_pattern: expected an object of finite numbers"),
        ({"target_modules": 3}, "target_modules: expected a list of strings or a string"),
        ({"modules_to_save": "head"}, "modules_to_save: expected a list of strings"),
        ({"trainable_token_indices": [1, -2]}, "trainable_token_indices: expected a list of token ids"),
    ],
)
def test_refused_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(config)


def test_several_complaints_at_once() -> None:
    with pytest.raises(ValueError, match=r"2 problems\n  use_qalora.*\n  r: expected") as error:
        _load({"r": 0, "use_qalora": True})
    assert "<state dict>" in str(error.value)


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_unknown_key_without_a_value(value: Any) -> None:
    assert _load({"brand_new_option": value}).config["brand_new_option"] == value


def test_inert_keys_are_kept() -> None:
    inert = {"base_model_name_or_path": "some/base", "revision": "main", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    assert inert.items() <= _load(inert).config.items()


def test_base_is_residual() -> None:
    assert len(_load({"init_lora_weights": "pissa"}, base_is_residual=True).layers) == 2


def test_unknown_key_without_strict() -> None:
    with pytest.warns(UserWarning, match="brand_new_option: unknown key with the value 3"):
        assert len(_load({"brand_new_option": 3}, strict=False).layers) == 2


# --- tensors


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"r": 3}, {}, r"layers\.0\.q: the config gives rank 3, the tensors have rank 2"),
        ({"rank_pattern": {r"1\.q": 4}}, {}, r"layers\.1\.q: the config gives rank 4, the tensors have rank 2"),
        (
            {},
            {f"{STEM}.lora_A.weight": torch.ones(3, 5)},
            r"layers\.0\.q: the factors do not share a rank, got .*\(3, 5\)",
        ),
        ({}, {f"{STEM}.lora_A.weight": torch.ones(10)}, r"layers\.0\.q: two factors of 2 or 4 dimensions"),
        (
            {},
            {f"{STEM}.lora_A.weight": torch.ones(2, 5).long()},
            r"lora_A\.weight: expected floating point, got torch.int64",
        ),
        ({}, {f"{STEM}.lora_A.weight": torch.ones(2, 0)}, r"lora_A\.weight: is empty"),
        ({}, {f"{STEM}.lora_A.weight": torch.ones(2, 5, device="meta")}, r"lora_A\.weight: is on the meta device"),
        ({}, {f"{STEM}.lora_A.weight": [[1.0]]}, r"lora_A\.weight: expected a tensor, got list"),
        ({}, {f"{STEM}.lora_A.weight": torch.tensor([[1.0, float("nan")]] * 2)}, r"lora_A\.weight: contains NaN"),
        (
            {},
            {f"{OTHER}.lora_B.weight": torch.full((3, 2), float("-inf")).half()},
            r"layers\.1\.q\.lora_B\.weight: contains inf",
        ),
        ({}, {"base_model.model.x.q.lora_A.weight": torch.ones(2, 5)}, r"x\.q: lora_b is missing"),
        ({}, {"base_model.model.x.q.lora_B.weight": torch.ones(5, 2)}, r"x\.q: lora_a is missing"),
        (
            {"target_modules": ["q", "c"]},
            {
                "base_model.model.c.lora_A.weight": torch.ones(2, 4, 3, 3),
                "base_model.model.c.lora_B.weight": torch.ones(6, 1, 1, 1),
            },
            r"c: a convolution in 2 groups is not supported",
        ),
        (
            {"target_modules": ["q", "c"]},
            {
                "base_model.model.c.lora_A.weight": torch.ones(2, 4, 3),
                "base_model.model.c.lora_B.weight": torch.ones(6, 2, 1),
            },
            "c: Conv1d layers are not supported",
        ),
        (
            {"target_modules": ["q", "c"]},
            {
                "base_model.model.c.lora_A.weight": torch.ones(2, 4, 3, 3, 3),
                "base_model.model.c.lora_B.weight": torch.ones(6, 2, 1, 1, 1),
            },
            "c: Conv3d layers are not supported",
        ),
        (
            {"target_modules": ["q", "c"]},
            {
                "base_model.model.c.lora_A.weight": torch.ones(2, 4, 3, 3),
                "base_model.model.c.lora_B.weight": torch.ones(6, 2, 3, 3),
            },
            "c: the factors do not share a rank",
        ),
        (
            {"modules_to_save": ["head"]},
            {"base_model.model.head.bias": torch.ones(3), "head.modules_to_save.default.bias": torch.zeros(3)},
            r"head\.modules_to_save\.default\.bias: means the same tensor as base_model\.model\.head\.bias, with other",
        ),
        ({"use_dora": True}, {}, r"layers\.0\.q: use_dora is true in the config, but lora_magnitude_vector is missing"),
        (
            {},
            {f"{STEM}.lora_magnitude_vector": torch.ones(3)},
            r"use_dora is false in the config, but .* is in the file",
        ),
        (
            {"use_dora": True},
            {f"{STEM}.lora_magnitude_vector": torch.ones(4), f"{OTHER}.lora_magnitude_vector": torch.ones(3)},
            r"layers\.0\.q: expected 3 magnitudes, got .*\(4,\)",
        ),
        ({"lora_bias": True}, {}, r"layers\.0\.q: lora_bias is true in the config, but lora_B.bias is missing"),
        (
            {"lora_bias": True},
            {f"{STEM}.lora_B.bias": torch.ones(2), f"{OTHER}.lora_B.bias": torch.ones(3)},
            r"layers\.0\.q: expected a bias of shape \(3,\), got .*\(2,\)",
        ),
        ({}, {"layers.0.q.lora_A.default.weight": torch.ones(2, 5)}, "means the same tensor as"),
        ({}, {f"{STEM}.base_layer.out_proj.lora_A.weight": torch.ones(2, 5)}, "nested LoRA .*MultiheadAttention"),
        (
            {"bias": "all"},
            {f"{STEM}.base_layer.bias": torch.ones(5)},
            r"layers\.0\.q: bias of shape \(5,\) does not fit",
        ),
        (
            {},
            {f"{STEM}.base_layer.weight": torch.ones(5, 3)},
            r"layers\.0\.q: base weight of shape \(5, 3\), expected \(3, 5\)",
        ),
        (
            {"trainable_token_indices": [1, 2, 3]},
            {"base_model.model.emb.token_adapter.trainable_tokens_delta": torch.ones(2, 4)},
            r"emb: trainable_token_indices has 3 ids, the tensor has shape \(2, 4\)",
        ),
        (
            {},
            {"base_model.model.emb.token_adapter.trainable_tokens_delta": torch.ones(2, 4)},
            r"emb: trainable_token_indices has none ids",
        ),
    ],
)
def test_refused_tensors(config: dict[str, Any], tensors: dict[str, Any], message: str, strict: bool) -> None:
    """No sound adapter can be made of these, strict or not."""
    with pytest.raises(ValueError, match=message):
        _load(config, tensors, strict=strict)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {f"{STEM}.lora_B.bias": torch.ones(3)}, r"lora_B\.bias: the file has this bias, but lora_bias is false"),
        ({}, {f"{STEM}.something.weight": torch.ones(3)}, r"something\.weight: unexpected tensor, shape \(3,\)"),
        ({}, {f"{STEM}.lora_A.weight.extra.deep": torch.ones(3)}, "unexpected tensor"),
        ({}, {"base_model.model.norm.bias": torch.ones(3)}, r"norm\.bias: unexpected tensor"),
        ({"bias": "lora_only"}, {"base_model.model.norm.bias": torch.ones(3)}, r"norm\.bias: unexpected tensor"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices: the file has no rows for its tokens"),
        ({"trainable_token_indices": {"emb": [1]}}, {}, "trainable_token_indices: the file has no rows for emb"),
        (
            {"target_modules": ["layers.0.q", "layers.1.q", "layers.2.q"]},
            {},
            r"target_modules: the file has no tensors for layers\.2\.q",
        ),
        ({"modules_to_save": ["head", "score"]}, {}, r"modules_to_save: the file has no tensors for any of"),
        ({"target_modules": ["s.0.q", "s.1.q"]}, {}, r"layers\.0\.q: has LoRA tensors"),
        ({"target_modules": ["k"]}, {}, r"layers\.0\.q: has LoRA tensors, but target_modules does not name it"),
        ({"target_modules": r".*\.1\.q"}, {}, r"layers\.0\.q: has LoRA tensors, but target_modules does not name it"),
    ],
)
def test_tolerated_without_strict(config: dict[str, Any], tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(config, tensors)
    with pytest.warns(UserWarning, match=message):
        adapter = _load(config, tensors, strict=False)
    assert {path: layer.lora_bias for path, layer in adapter.layers.items()} == {"layers.0.q": None, "layers.1.q": None}
    assert adapter.num_parameters() == 2 * (10 + 6)


def test_ten_offenders_are_listed() -> None:
    strays = {f"base_model.model.stray.{i}.weight": torch.ones(1) for i in range(13)}
    with pytest.raises(ValueError, match=r"13 problems") as error:
        _load({}, strays)
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "and 3 more"


@pytest.mark.parametrize("tensors", [{}, {"base_model.model.embed_tokens.other": torch.ones(2)}])
def test_nothing_in_it(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"there are no tensors|unexpected tensor"):
        lf.load_adapter(tensors, config=CONFIG)
    if tensors:
        with pytest.raises(ValueError, match="no LoRA tensors among"):
            lf.load_adapter(tensors, config=CONFIG, strict=False)


def test_state_dict_needs_config() -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing.*pass config="):
        lf.load_adapter(_tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_among_many(dtype: torch.dtype, value: float) -> None:
    """Finite values whose sum overflows are fine; a single NaN or inf is not, wherever it is."""
    big = torch.full((2, 5000), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    config = {"target_modules": ["q", "big"]}
    small = {"base_model.model.big.lora_B.weight": torch.ones(3, 2)}
    assert _load(config, {"base_model.model.big.lora_A.weight": big, **small}).layers["big"].lora_a.dtype == dtype
    if dtype == torch.float8_e4m3fn:
        value = float("nan")  # it has no inf
    for place in (0, 4321, 9999):
        spoilt = big.clone().flatten().float()
        spoilt[place] = value
        bad = torch.where(torch.arange(10000) == place, spoilt, 0.0).to(dtype).reshape(2, 5000)
        with pytest.raises(ValueError, match=r"big\.lora_A\.weight: contains (NaN|inf)"):
            _load(config, {"base_model.model.big.lora_A.weight": bad, **small})


def test_overflow_in_cast() -> None:
    big = {f"{STEM}.lora_A.weight": torch.full((2, 5), 1e6)}
    assert _load({}, big).rank == 2
    with pytest.raises(ValueError, match=r"dtype: .* does not fit into torch.float16"):
        _load({}, big, dtype=torch.float16)


def test_loading_leaves_the_source_alone(home: Path) -> None:
    before = {p.name: p.read_bytes() for p in home.iterdir()}
    tensors = load_file(home / "adapter_model.safetensors")
    kept = {key: t.clone() for key, t in tensors.items()}
    config = {**CONFIG, "use_qalora": True}
    with pytest.raises(ValueError, match="use_qalora"):
        lf.load_adapter(tensors, config=config)
    lf.load_adapter(tensors, config=CONFIG)
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(t, kept[key]) for key, t in tensors.items())
    assert {p.name: p.read_bytes() for p in home.iterdir()} == before


def test_broken_target_regex_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules: '\(' is no regex"):
        _load({"target_modules": "("})
