"""Every bad input: a clear error that names the thing, and nothing at the output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import LLAMA, adapter, make_adapter, save_llama
from safetensors.torch import load_file, save_file

from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.checkpoints import fuse_checkpoint, open_checkpoint, staged_folder

Broken = tuple[Path, LoraAdapter, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    base = save_llama(root / "base")
    return base, make_adapter(LLAMA, base, root / "a", target_modules=["q_proj", "v_proj"])


@pytest.fixture
def base(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "base"))


@pytest.fixture
def lora(made: tuple[Path, Path]) -> LoraAdapter:
    return adapter(made[1])


def shard(base: Path, number: int = 1) -> Path:
    return sorted(base.glob("*.safetensors"))[number]


def truncate(base: Path) -> None:
    os.truncate(shard(base), shard(base).stat().st_size - 5)


def damage_header(base: Path) -> None:
    data = bytearray(shard(base).read_bytes())
    data[8:20] = b"x" * 12
    shard(base).write_bytes(data)


def huge_header(base: Path) -> None:
    shard(base).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def hole_in_header(base: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
    shard(base).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def wrong_bytes(base: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    shard(base).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def remove_shard(base: Path) -> None:
    shard(base).unlink()


def empty_shard(base: Path) -> None:
    shard(base).write_bytes(b"")


def edit_index(base: Path, change: Callable[[dict], None]) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def broken_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text("{")


def index_without_map(base: Path) -> None:
    edit_index(base, lambda index: index.pop("weight_map"))


def index_leaves_folder(base: Path) -> None:
    edit_index(base, lambda index: index["weight_map"].update({"model.norm.weight": "../evil.safetensors"}))


def index_promises_more(base: Path) -> None:
    edit_index(base, lambda index: index["weight_map"].update({"model.extra.weight": shard(base).name}))


def twice(base: Path) -> None:
    tensors = {**load_file(shard(base, 0)), **load_file(shard(base, 1))}
    save_file(tensors, shard(base, 1))


def no_index(base: Path) -> None:
    (base / "model.safetensors.index.json").unlink()


def only_pickled(base: Path) -> None:
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"pickle")


def quantised_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def quantised_weight(base: Path) -> None:
    for path in base.glob("*.safetensors"):
        tensors = {k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in load_file(path).items()}
        save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "cut short"),
        (damage_header, "damaged safetensors header"),
        (huge_header, "no whole header"),
        (empty_shard, "no whole header"),
        (hole_in_header, "leaves a hole"),
        (wrong_bytes, r"F32 \[3\] but has 8 bytes"),
        (remove_shard, "which the folder lacks"),
        (broken_index, "damaged JSON"),
        (index_without_map, "weight_map"),
        (index_leaves_folder, "not a file name"),
        (index_promises_more, "model.extra.weight"),
        (twice, "lies in both"),
        (no_index, "no index"),
        (only_pickled, "pickled weights"),
        (quantised_config, "quantised .*gptq"),
        (quantised_weight, "F8_E4M3"),
    ],
)
def test_damaged_base(base: Path, lora: LoraAdapter, tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    spoil(base)
    with pytest.raises(ValueError, match=says):
        fuse_checkpoint(base, [lora], out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def with_layer(lora: LoraAdapter, path: str, layer: LoraLayer) -> LoraAdapter:
    return replace(lora, layers={**lora.layers, path: layer})


def plain(out_features: int, in_features: int) -> LoraLayer:
    return LoraLayer(torch.ones(2, in_features), torch.ones(out_features, 2), 1.0)


Q0 = "model.layers.0.self_attn.q_proj"
ROW_64 = {"model.embed_tokens": (torch.tensor([64]), torch.ones(1, 32))}
HEAD = {"lm_head": {"weight": torch.ones(64, 32)}}


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda a: with_layer(a, "model.layers.7.self_attn.q_proj", plain(32, 32)), {}, "layers.7.self_attn.q_proj"),
        (lambda a: with_layer(a, Q0, plain(32, 24)), {}, r"\[32, 24\], but .* is \[32, 32\]"),
        (lambda a: with_layer(a, Q0, replace(a.layers[Q0], lora_bias=torch.ones(32))), {}, "no 'model.layers.0.*bias'"),
        (lambda a: with_layer(a, Q0, replace(a.layers[Q0], lora_b=torch.full((32, 4), torch.nan))), {}, "NaN"),
        (lambda a: with_layer(a, Q0, replace(a.layers[Q0], magnitude=torch.ones(32))), {"weights": [0.5]}, "DoRA"),
        (lambda a: replace(a, trainable_tokens=ROW_64), {}, "token ids from 64 to 64"),
        (lambda a: replace(a, modules_to_save={"lm_head": {"weight": torch.ones(64, 31)}}), {}, r"\[64, 31\]"),
        (lambda a: replace(a, modules_to_save={Q0: {"weight": torch.ones(32, 32)}}), {}, "cannot be combined"),
        (lambda a: replace(a, modules_to_save=HEAD), {"adapters": 2}, "modules_to_save"),
        (lambda a: replace(a, config={"fan_in_fan_out": True}), {"model_type": "other"}, "fan_in_fan_out"),
        (lambda a: a, {"weights": [float("nan")]}, "finite"),
        (lambda a: a, {"weights": [1.0, 2.0]}, "weights"),
        (lambda a: a, {"adapters": 0}, "adapters"),
        (lambda a: a, {"rounding": "up"}, "'up'"),
        (lambda a: a, {"dtype": torch.int8}, "dtype"),
        (lambda a: a, {"max_shard_size": 0}, "max_shard_size"),
        (lambda a: a, {"modules_to_save": "last"}, "'last'"),
        (lambda a: a, {"weights": [1e39], "dtype": torch.float16}, "not finite in F16"),
    ],
)  # fmt: skip
def test_bad_arguments(base: Path, lora: LoraAdapter, tmp_path: Path, change: Any, options: dict, says: str) -> None:
    options = dict(options)
    if "model_type" in options:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "model_type": options.pop("model_type")}))
        lora = replace(lora, layers={p: layer for p, layer in lora.layers.items() if "q_proj" in p})
    adapters = [change(lora)] * options.pop("adapters", 1)
    with pytest.raises(ValueError, match=says):
        fuse_checkpoint(base, adapters, options.pop("weights", None), tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_adapter_for_another_model_lists_up_to_ten(base: Path, tmp_path: Path) -> None:
    other = LoraAdapter({f"encoder.layer.{i}.query": plain(48, 48) for i in range(13)}, source="loras/bert")
    with pytest.raises(ValueError, match=r"13 of its 13 layers") as error:
        fuse_checkpoint(base, [other], out=tmp_path / "out")
    assert str(error.value).count("encoder.layer.") == 10
    assert "and 3 more" in str(error.value)
    assert "loras/bert" in str(error.value)


def test_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights = {"left.proj.weight": torch.ones(4, 4), "right.proj.weight": torch.ones(4, 4)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="several ways"):
        fuse_checkpoint(tmp_path / "base", [LoraAdapter({"proj": plain(4, 4)})], out=tmp_path / "out")


def test_tie_that_cannot_be_named_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"shared.weight": torch.ones(64, 8)}, tmp_path / "base" / "model.safetensors")
    config = {"tie_word_embeddings": True, "vocab_size": 64, "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    layer = LoraLayer(torch.ones(2, 64), torch.ones(8, 2), 1.0, "embedding")
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        fuse_checkpoint(tmp_path / "base", [LoraAdapter({"shared": layer})], out=tmp_path / "out")


def test_output_rules(base: Path, lora: LoraAdapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fuse_checkpoint(base, [lora], out=out)  # an empty folder is as good as none
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        fuse_checkpoint(base, [lora], [2.0], out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    fuse_checkpoint(base, [lora], [2.0], out, overwrite=True, max_shard_size=10**9)
    assert open_checkpoint(out).shards.keys() == {"model.safetensors"}  # no old shard is left beside it
    for place in (base, base / "inside", tmp_path):
        with pytest.raises(ValueError, match="apart from the input"):
            fuse_checkpoint(base, [lora], out=place, overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="other things"):
        fuse_checkpoint(base, [lora], out=precious, overwrite=True)
    (out / "checkpoint-500").mkdir()  # a training run's folder, say
    with pytest.raises(ValueError, match="other things"):
        fuse_checkpoint(base, [lora], out=out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        fuse_checkpoint(base, [lora], out=tmp_path / "file", overwrite=True)
    assert (precious / "thesis.txt").read_text() == "irreplaceable"
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out", "precious", "file"}


def test_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_folder(out) as stage:
        (stage / "config.json").write_text("old")
        (stage / "model.safetensors").write_text("old")

    def interrupted() -> None:
        with staged_folder(out, overwrite=True) as stage:
            (stage / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle(made: tuple[Path, Path], tmp_path: Path, number: signal.Signals) -> None:
    base, path = made
    script = f"""
        import signal, time, lora_fuse as lf
        from lora_fuse.checkpoints import fuse_checkpoint
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
        def progress(done, total):
            if done > total // 2:
                print("half", flush=True)
                time.sleep(60)
        lora = lf.load_adapter({str(path)!r})
        fuse_checkpoint({str(base)!r}, [lora], out={str(tmp_path / "out")!r}, progress=progress)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(number)
        process.wait(20)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []


def test_memory_stays_at_blocks_of_rows(tmp_path: Path) -> None:
    """A 256 MB tensor is fused within 100 MB (the peak over what is in memory before)."""
    rows, columns = 65536, 1024
    header = json.dumps(
        {"m.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}}
    )
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + rows * columns * 4)  # zeros, sparse on disk
    script = f"""
        import resource, torch
        from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
        from lora_fuse.checkpoints import fuse_checkpoint
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lora = LoraAdapter({{"m": LoraLayer(torch.ones(8, {columns}), torch.ones({rows}, 8), 1.0)}})
        torch.ones(1024, 1024) @ torch.ones(1024, 1024)
        before = peak()
        fuse_checkpoint({str(tmp_path / "base")!r}, [lora], out={str(tmp_path / "out")!r})
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
    (tensor,) = open_checkpoint(tmp_path / "out").tensors.values()
    assert tensor.nbytes == rows * columns * 4
    assert (load_file(tensor.path)["m.weight"] == 8).all()
