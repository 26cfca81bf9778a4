"""Where adapters come from: directories, single files, diffusers' pipelines, the hub's cache."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import Written, quiet
from safetensors.torch import load_file, save_file

import lora_fuse as lf

LLAMA = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]}
PATH = "model.layers.0.self_attn.q_proj"


def _metadata(config: dict, prefix: str = "") -> dict[str, str]:
    return {"format": "pt", "lora_adapter_metadata": json.dumps({prefix + key: value for key, value in config.items()})}


def _two_adapters(write: Callable[..., Written]) -> Written:
    """default in the directory itself, "sql" one level down, as PEFT lays them."""
    written = write("llama", **LLAMA)
    with quiet():
        settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["k_proj"], init_lora_weights=False)
        written.model.add_adapter("sql", settings)
        written.model.save_pretrained(written.directory)
    return written


def test_directory_of_adapters(write: Callable[..., Written], tmp_path: Path) -> None:
    home = _two_adapters(write).directory
    assert (lf.load_adapter(home).rank, lf.load_adapter(home, adapter_name="sql").rank) == (4, 2)
    assert lf.load_adapter(str(home / "sql")).layers["model.layers.0.self_attn.k_proj"].scaling == 3.0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (home / name).unlink()
    assert lf.load_adapter(home).rank == 2  # the only one
    shutil.copytree(home / "sql", home / "math")
    with pytest.raises(ValueError, match=r"adapter_name: .* holds several adapters, choose one of \['math', 'sql'\]"):
        lf.load_adapter(home)
    with pytest.raises(ValueError, match=r"adapter_name: .* holds no adapter 'chat'"):
        lf.load_adapter(home, adapter_name="chat")


def test_single_file(write: Callable[..., Written], tmp_path: Path) -> None:
    written = write("llama", **LLAMA)
    file = written.directory / "adapter_model.safetensors"
    config = json.loads((written.directory / "adapter_config.json").read_text())
    expected = lf.load_adapter(written.directory).delta(PATH)
    assert torch.equal(lf.load_adapter(file).delta(PATH), expected)  # the config lies beside it
    elsewhere = shutil.copy(file, tmp_path / "lora.safetensors")
    assert torch.equal(lf.load_adapter(elsewhere, config=config).delta(PATH), expected)
    with pytest.raises(ValueError, match=r"adapter_config.json is missing, so r and lora_alpha are not known"):
        lf.load_adapter(elsewhere)


def test_header_config_without_component(write: Callable[..., Written], tmp_path: Path) -> None:
    """What diffusers' model.save_lora_adapter writes."""
    written = write("llama", **LLAMA)
    tensors = load_file(written.directory / "adapter_model.safetensors")
    plain = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    save_file(plain, tmp_path / "pytorch_lora_weights.safetensors", metadata=_metadata({"r": 4, "lora_alpha": 10}))
    adapter = lf.load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(adapter.delta(PATH), lf.load_adapter(written.directory).delta(PATH))


def test_pipeline_file(write: Callable[..., Written], tmp_path: Path) -> None:
    written, text = write("llama", **LLAMA), write("bert", name="bert", r=3, lora_alpha=9, target_modules=["query"])
    parts, metadata = {}, {}
    for prefix, source in {"transformer.": written, "text_encoder.": text}.items():
        tensors = load_file(source.directory / "adapter_model.safetensors")
        parts |= {prefix + key.removeprefix("base_model.model."): t for key, t in tensors.items()}
        config = json.loads((source.directory / "adapter_config.json").read_text())
        metadata |= json.loads(_metadata(config, prefix)["lora_adapter_metadata"])
    home = tmp_path / "pipeline"
    home.mkdir()
    file = home / "pytorch_lora_weights.safetensors"
    save_file(parts, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(ValueError, match=r"component: .* has several, choose one of \['text_encoder', 'transformer'\]"):
        lf.load_adapter(home)
    with pytest.raises(ValueError, match=r"component: .* has no tensors of 'unet'"):
        lf.load_adapter(file, component="unet")
    for component, source in {"transformer": written, "text_encoder": text}.items():
        ours, theirs = lf.load_adapter(home, component=component), lf.load_adapter(source.directory)
        assert ours.layers.keys() == theirs.layers.keys()
        assert all(torch.equal(ours.delta(path), theirs.delta(path)) for path in ours.layers)
    # without a header: diffusers' own rule, alpha = rank
    save_file(parts, file)
    ours = lf.load_adapter(file, component="transformer")
    assert {layer.scaling for layer in ours.layers.values()} == {1.0}
    parts[f"transformer.{PATH}.alpha"] = torch.tensor(10.0)
    save_file(parts, file)
    ours = lf.load_adapter(file, component="transformer")
    assert torch.equal(ours.delta(PATH), lf.load_adapter(written.directory).delta(PATH))
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(lf.load_adapter(tmp_path / "ours").delta(PATH), ours.delta(PATH))


def test_saved_for_a_pipeline(write: Callable[..., Written], tmp_path: Path) -> None:
    written = write("llama", **LLAMA, alpha_pattern={"v_proj": 3})
    adapter = lf.load_adapter(written.directory)
    adapter.save_pretrained(tmp_path / "out", component="transformer")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    for component in (None, "transformer"):
        back = lf.load_adapter(tmp_path / "out", component=component)
        assert back.layers.keys() == adapter.layers.keys()
        assert all(torch.equal(back.delta(path), adapter.delta(path)) for path in adapter.layers)


def test_diffusers_itself(tmp_path: Path) -> None:
    """A tiny UNet: what diffusers saves is read, and what is saved here runs in diffusers."""
    with quiet():
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

        def unet() -> torch.nn.Module:
            torch.manual_seed(0)
            return diffusers.UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                layers_per_block=1,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=8,
                attention_head_dim=4,
            ).eval()

        model = unet()
        settings = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_k": 3}, "rank_pattern": {"to_k": 2}}
        settings |= {"target_modules": ["to_q", "to_k", "conv1"], "init_lora_weights": False}
        model.add_adapter(peft.LoraConfig(**settings), adapter_name="mine")
        model.save_lora_adapter(tmp_path / "theirs", adapter_name="mine")
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8)
        with torch.no_grad():
            expected = model(*inputs).sample
    adapter = lf.load_adapter(tmp_path / "theirs")
    assert {layer.kind for layer in adapter.layers.values()} == {"linear", "conv2d"}
    assert {layer.scaling for layer in adapter.layers.values()} == {1.5}
    adapter.save_pretrained(tmp_path / "ours", component="unet")
    with quiet(), torch.no_grad():
        fresh = unet()
        assert not torch.equal(fresh(*inputs).sample, expected)
        fresh.load_lora_adapter(tmp_path / "ours", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(fresh(*inputs).sample, expected)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in the header is not valid JSON"),
        ({"lora_adapter_metadata": "[1]"}, "lora_adapter_metadata in the header is not a JSON object"),
    ],
)
def test_damaged_header_config(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    save_file(
        {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}, tmp_path / "a.safetensors", metadata
    )
    with pytest.raises(ValueError, match=message):
        lf.load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["unet.mid.to_q_lora.down.weight", "text_encoder.q.lora_linear_layer.up.weight"])
def test_old_diffusers_layouts(key: str) -> None:
    with pytest.raises(ValueError, match=r"in a layout that diffusers gave up"):
        lf.load_adapter({key: torch.ones(2, 2)})


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, which is kept off the network."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs lora-fuse[hub]")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def _put(cache: Path, repo: str, source: Path) -> None:
    """Lay a directory into the cache the way the hub client does."""
    home = cache / ("models--" + repo.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, home / "snapshots" / ("0" * 40))


def test_hub_id(write: Callable[..., Written], hub_cache: Path) -> None:
    written = _two_adapters(write)
    _put(hub_cache, "someone/sql-lora", written.directory)
    adapter = lf.load_adapter("someone/sql-lora")
    assert (adapter.source, adapter.rank) == ("someone/sql-lora", 4)
    assert lf.load_adapter("someone/sql-lora", adapter_name="sql").rank == 2
    (hub_cache / "models--someone--sql-lora" / "refs" / "v1").write_text("1" * 40)
    old = write("llama", name="old", **{**LLAMA, "r": 3})
    shutil.copytree(old.directory, hub_cache / "models--someone--sql-lora" / "snapshots" / ("1" * 40))
    assert lf.load_adapter("someone/sql-lora", revision="v1").rank == 3
    with pytest.raises(ValueError, match="'someone/other' could not be read from the Hugging Face hub"):
        lf.load_adapter("someone/other")


def test_hub_without_client(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "huggingface_hub" else real(name, *a)
    )
    with pytest.raises(ValueError, match=r"someone/sql-lora.*pip install 'lora-fuse\[hub\]'"):
        lf.load_adapter("someone/sql-lora")


@pytest.mark.parametrize(
    "source", ["sql", "./loras/sql", "loras/a/b", "/no/such/place", "a/b.safetensors", "", "a//b", "x y/z"]
)
def test_no_such_source(source: str) -> None:
    with pytest.raises(ValueError, match=r"neither a file or directory nor a hub id|adapter_model.safetensors"):
        lf.load_adapter(source) if source else lf.load_adapter("nothing here")


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"source: expected a path, a hub id, .* got int"):
        lf.load_adapter(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="string keys"):
        lf.load_adapter({1: torch.ones(2)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"config: expected a dict or a peft.LoraConfig, got str"):
        lf.load_adapter({}, config="adapter_config.json")
    with pytest.raises(TypeError, match="dtype: expected a floating-point"):
        lf.load_adapter({}, dtype=torch.int8)
    with pytest.raises(ValueError, match="format: expected one of auto, peft, kohya, got 'pickle'"):
        lf.load_adapter({}, format="pickle")  # type: ignore[arg-type]


def test_import_stays_light() -> None:
    code = (
        "import sys, lora_fuse; lora_fuse.load_adapter; "
        "print([m for m in ('peft', 'transformers', 'huggingface_hub', 'click', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
