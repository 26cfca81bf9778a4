"""Where peru_fft reads from: folders, shards and files give what state dicts give, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peru_models import assert_same, make, tuned
from safetensors.torch import save_file
from torch import Tensor

import lora_fuse as lf
from lora_fuse.merging.weights import open_weights


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if name != "out.weight"}


def write(state: dict[str, Tensor], folder: Path, shards: int = 1) -> Path:
    """A model folder as transformers writes it: tied names once, and an index beside several files."""
    folder.mkdir(parents=True)
    state = untied(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        save_file({n: t for n, t in state.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_files_and_state_dicts_agree(tmp_path: Path) -> None:
    base = make()
    states: dict[str, Any] = {name: tuned(base, i).state_dict() for i, name in enumerate(("sql", "math", "chat"), 1)}
    folders = {
        "sql": write(states["sql"], tmp_path / "sql"),
        "math": str(write(states["math"], tmp_path / "math", shards=3)),
        "chat": write(states["chat"], tmp_path / "chat") / "model.safetensors",
    }
    plain = untied(base.state_dict())
    for merge in ("task_arithmetic", "ties"):
        want = lf.peru_fft(plain, states | {"sql": untied(states["sql"])}, merge=merge)  # type: ignore[arg-type]
        got = lf.peru_fft(write(plain, tmp_path / merge, shards=2), folders, merge=merge)  # type: ignore[arg-type]
        assert_same(dict(sorted(got.merged.items())), dict(sorted(want.merged.items())))
        for task in states:
            for name, tensor in want.state_dict(task).items():
                # names come in another order from files, which moves ties only; there are none here
                assert torch.equal(got.state_dict(task)[name], tensor)
            assert got.adapters[task].source == str(folders[task])
    tied = lf.peru_fft(base, folders)  # the module's second name for a tensor that the files hold once
    assert tied.merged["out.weight"] is tied.merged["emb.weight"]
    assert_same(lf.peru_fft(base, folders, density=1.0).state_dict("math"), states["math"])


def test_tensors_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes and options are checked before any tensor is read."""
    from lora_fuse.checkpoints import read

    base = write(make().state_dict(), tmp_path / "base")
    task = write(tuned(make(), 1).state_dict(), tmp_path / "task")
    asked: list[str] = []
    plain = read.read_tensor

    def counted(info: Any) -> Tensor:
        asked.append(info.name)
        return plain(info)

    monkeypatch.setattr(read, "read_tensor", counted)
    weights = open_weights("base", base)
    assert "emb.weight" in weights
    assert "nothing" not in weights
    with pytest.raises(ValueError, match="matches no parameter"):
        lf.peru_fft(base, {"a": task}, exclude="nothing")
    assert asked == []
    lf.peru_fft(base, {"a": task, "b": task})
    assert asked.count("emb.weight") == 1 + 2 * 2  # the base once; each task for the merge and for its mask


def test_sources_that_are_refused(tmp_path: Path) -> None:
    state = make().state_dict()
    good = write(state, tmp_path / "good")
    whole = (good / "model.safetensors").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(whole[:-10])
    adapter = write(state, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    pickled = tmp_path / "pytorch_model.bin"
    torch.save(state, pickled)
    only_pickled = tmp_path / "old"
    only_pickled.mkdir()
    torch.save(state, only_pickled / "pytorch_model.bin")
    several = tmp_path / "several"
    several.mkdir()
    for name in ("one", "two"):
        (several / f"{name}.safetensors").write_bytes(whole)
    nan = tmp_path / "nan"
    write(state | {"norm.bias": torch.full((5,), torch.nan)}, nan)
    renamed = write({f"net.{n}": t for n, t in state.items()} | {"net.out.weight": torch.ones(1)}, tmp_path / "renamed")
    for place, message in (
        (tmp_path / "none", r"base: .*none: no such file or folder"),
        (cut, r"cut/model.safetensors: cut short"),
        (adapter, r"base: .*adapter holds a LoRA adapter; expected a whole model"),
        (pickled, r"pytorch_model.bin: pickled weights are not read"),
        (only_pickled, r"old: no model weights .*pickled weights such as pytorch_model.bin are refused"),
        (several, r"several weight files and no index"),
        (nan, r"base: 'norm.bias' has NaN or infinite entries"),
    ):
        with pytest.raises(ValueError, match=message):
            lf.peru_fft(place, {"a": good})
        with pytest.raises(ValueError, match=message.replace("base:", r"finetuned\['a'\]:")):
            lf.peru_fft(good, {"a": place})
    with pytest.raises(ValueError, match=r"the fine-tune's names start with 'net.': give prefix='net.'"):
        lf.peru_fft(good, {"a": renamed})
    with pytest.raises(ValueError, match=r"the base's names start with 'net.': give models of the same class"):
        lf.peru_fft(renamed, {"a": good})


def test_load_adapter_points_to_load_peru(tmp_path: Path) -> None:
    lf.peru_fft(make(), {"sql": tuned(make(), 1)}).save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "sql"):
        with pytest.raises(ValueError, match=r"not a LoRA; use lora_fuse.load_peru"):
            lf.load_adapter(place)


def test_real_models_from_folder_to_folder(tmp_path: Path) -> None:
    """An encoder, classifiers around it with heads of several widths, saved by transformers; shards, prefix, logits."""
    transformers = pytest.importorskip("transformers", reason="writes the folders")
    sizes = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=40))
    encoder.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    ids, tasks = torch.randint(0, 97, (3, 9)), {"sql": 2, "math": 3}
    models, logits = {}, {}
    for task, width in tasks.items():
        config = transformers.BertConfig(**sizes, intermediate_size=40, num_labels=width)
        models[task] = transformers.BertForSequenceClassification(config).eval()
        models[task].bert.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            for parameter in models[task].parameters():
                parameter.add_(torch.randn_like(parameter).pow(3), alpha=0.02)
            logits[task] = models[task](ids).logits
        models[task].save_pretrained(tmp_path / task)
    folders = {task: tmp_path / task for task in tasks}
    with pytest.raises(ValueError, match=r"start with 'bert.': give prefix='bert.', and name heads in heads="):
        lf.peru_fft(tmp_path / "base", folders)
    for density in (0.1, 1.0):
        made = lf.peru_fft(tmp_path / "base", folders, density=density, prefix="bert.", heads="classifier")
        made.save_pretrained(tmp_path / f"peru{density}")
        peru = lf.load_peru(tmp_path / f"peru{density}")
        assert all(name.startswith("bert.") for name in peru.merged)
        for task, model in models.items():
            fresh = transformers.BertForSequenceClassification(model.config).eval()
            fresh.load_state_dict(peru.state_dict(task))
            with torch.no_grad():
                got = fresh(ids).logits
            error = float((got - logits[task]).norm() / logits[task].norm())
            assert error == 0.0 if density == 1.0 else 0.0 < error < 1.0
