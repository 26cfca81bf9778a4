"""A saved sparse adapter by its path: attach, add and swap tell it from a LoRA's, and refuse what is neither."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import nn_models
import pytest
import torch
from sparse_models import fine_tuned, materialised, model_of
from torch import nn

import lora_fuse as lf
from lora_fuse.adapters.sparse_files import load_sparse_adapter


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, torch.Tensor, Path]:
    """The merged model, a batch, and a PERU of three tasks; one of them has a head of its own width."""
    model, x = model_of("tokens")
    tuned = {name: fine_tuned(model, i) for i, name in enumerate(("sql", "math", "chat"))}
    tuned["chat"].head = nn.Linear(24, 9)
    peru = lf.peru_fft(model, {n: t.state_dict() for n, t in tuned.items()}, density=0.2, heads=["head"])
    peru.save_pretrained(tmp_path / "peru")
    model.load_state_dict(peru.merged, strict=False)
    return model, x, tmp_path / "peru"


@torch.no_grad()
def test_attach_add_and_swap_by_path(saved: tuple[nn.Module, torch.Tensor, Path], tmp_path: Path) -> None:
    bare, x, peru = saved
    nn_models.adapter(bare, ["up"], 2).save_pretrained(tmp_path / "lora")
    by_path, by_object = copy.deepcopy(bare), copy.deepcopy(bare)
    adapters = lf.load_peru(peru).adapters
    lf.attach(by_path, {"a": peru / "sql", "lora": str(tmp_path / "lora")})
    lf.attach(by_object, {"a": adapters["sql"], "lora": lf.load_adapter(tmp_path / "lora")})
    lf.add_adapter(by_path, "b", f"{peru}/math/")
    lf.add_adapter(by_object, "b", adapters["math"])
    lf.swap_adapter(by_path, "a", str(peru / "chat"))
    lf.swap_adapter(by_object, "a", adapters["chat"])
    entries = ["a", None, "b", "lora", "a", "b", None]
    got = []
    for model in (by_path, by_object):
        with lf.use_adapters(model, entries):
            got.append(model(x))
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0][::4, :9], materialised(bare, adapters["chat"])(x[::4]))
    about = lf.adapters(by_path)
    assert (about["a"].source, about["a"].density, about["lora"].density) == (str(peru / "chat"), 0.2, None)
    lf.switch_task(by_path, "b")
    assert torch.equal(by_path(x), materialised(bare, adapters["math"])(x))


def test_a_home_folder_is_expanded(
    saved: tuple[nn.Module, torch.Tensor, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, _, peru = saved
    monkeypatch.setenv("HOME", str(peru.parent))
    assert list(lf.adapters(lf.attach(bare, {"a": "~/peru/sql"}))) == ["a"]


def test_folders_that_are_refused(saved: tuple[nn.Module, torch.Tensor, Path], tmp_path: Path) -> None:
    bare, _, peru = saved
    no_json, no_weights, cut, both = (tmp_path / name for name in ("no_json", "no_weights", "cut", "both"))
    moved, none = tmp_path / "moved", tmp_path / "none"
    for place in (no_json, no_weights, cut, both):
        shutil.copytree(peru / "sql", place)
    (no_json / "sparse_adapter.json").unlink()
    (no_weights / "sparse_adapter.safetensors").unlink()
    whole = (cut / "sparse_adapter.safetensors").read_bytes()
    (cut / "sparse_adapter.safetensors").write_bytes(whole[:-40])
    nn_models.adapter(bare, ["up"], 2).save_pretrained(both)
    shutil.copytree(peru, moved)
    (moved / "peru.json").unlink()
    none.mkdir()
    shutil.copy(peru / "peru.json", none)
    model = lf.attach(copy.deepcopy(bare), {"a": peru / "sql"})
    before = lf.adapters(model)
    tasks = "holds a whole PERU, not one adapter; give the folder of one of its tasks: 'chat', 'math', 'sql'"
    for place, why in (
        (peru, tasks),
        (moved, tasks),
        (none, "holds a whole PERU, not one adapter; it has no tasks"),
        (no_json, "sparse_adapter.json: no such file"),
        (no_weights, "sparse_adapter.safetensors: no such file"),
        (cut, "sparse_adapter.safetensors: not a readable safetensors file"),
        (both, "holds both sparse_adapter.json and adapter_config.json"),
        (tmp_path / "nowhere", "is neither a file or directory nor a hub id"),
    ):
        for call in (
            lambda place=place: lf.attach(copy.deepcopy(bare), {"a": place}),
            lambda place=place: lf.add_adapter(model, "b", place),
            lambda place=place: lf.swap_adapter(model, "a", str(place)),
        ):
            with pytest.raises(ValueError) as caught:
                call()
            assert why in str(caught.value)
            assert place.name in str(caught.value)
    assert lf.adapters(model) == before


def test_a_task_of_another_model(saved: tuple[nn.Module, torch.Tensor, Path]) -> None:
    bare, _, peru = saved
    with torch.no_grad():
        bare.up.weight += 1
    with pytest.raises(ValueError, match=r"adapter 'a' \(.*sql\): the model's up.weight .* is not the merged weight"):
        lf.attach(bare, {"a": peru / "sql"})


def test_the_other_loaders_say_who_takes_it(saved: tuple[nn.Module, torch.Tensor, Path]) -> None:
    _, _, peru = saved
    with pytest.raises(ValueError, match=r"only one task; attach takes it, load_peru its parent folder"):
        lf.load_peru(peru / "sql")
    with pytest.raises(ValueError, match=r"not a LoRA; .* give the folder of one task to lora_fuse.attach"):
        lf.load_adapter(peru / "sql")
    assert load_sparse_adapter(peru / "sql").source == str(peru / "sql")
