"""What is written: exact scalings, exact targets, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import quiet
from torch import nn

import lora_fuse as lf
from lora_fuse.adapters._atomic import atomic_directory
from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.adapters.save import peft_config


def _layer(rank: int = 2, scaling: float = 1.0, **extra: Any) -> LoraLayer:
    return LoraLayer(torch.randn(rank, 5), torch.randn(3, rank), scaling, **extra)


def _config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


SCALINGS = [1.0, 0.1, 1 / 3, math.pi, 1e-30, 123456.789, -0.7, 0.0, 16 / math.sqrt(7), 2.0**0.5 / 3]


def test_scalings_come_back_exactly(tmp_path: Path) -> None:
    """alpha / rank has a solution for most scalings; the others differ in the last place."""
    layers = {
        f"m.{rank}.{i}.q": _layer(rank, scaling)
        for rank in (1, 3, 7, 8, 64, 100)
        for i, scaling in enumerate([*SCALINGS, *(torch.rand(20).double() * 3).tolist()])
    }
    LoraAdapter(layers).save_pretrained(tmp_path / "a")
    back = lf.load_adapter(tmp_path / "a")
    assert back.layers.keys() == layers.keys()
    exact = 0
    for path, layer in layers.items():
        got, want = back.layers[path].scaling, layer.scaling
        assert abs(got - want) <= math.ulp(want)
        exact += got == want
        assert torch.equal(back.layers[path].lora_b, layer.lora_b)
    assert exact >= 0.8 * len(layers)
    ratios = {f"{rank}.{alpha}.q": _layer(rank, alpha / rank) for rank in (3, 7, 49, 100) for alpha in (1, 5, 16, 0.3)}
    LoraAdapter(ratios).save_pretrained(tmp_path / "b")  # those that came from an alpha
    back = lf.load_adapter(tmp_path / "b")
    assert {path: x.scaling for path, x in back.layers.items()} == {path: x.scaling for path, x in ratios.items()}


def test_one_scaling_needs_no_alpha_pattern() -> None:
    """Servers that read only r and lora_alpha then scale every layer rightly."""
    config = peft_config(LoraAdapter({"a.q": _layer(4, 2.0), "a.k": _layer(8, 2.0), "b.q": _layer(2, 2.0)}))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, False)
    assert config["rank_pattern"] == {r"^a\.q": 4, r"^b\.q": 2}
    assert config["alpha_pattern"] == {r"^a\.q": 8, r"^b\.q": 4}
    uniform = peft_config(LoraAdapter({"a.q": _layer(4, 0.5), "a.k": _layer(4, 0.5)}))
    assert (uniform["rank_pattern"], uniform["alpha_pattern"], uniform["lora_alpha"]) == ({}, {}, 2)


def test_patterns_name_one_module_each(tmp_path: Path) -> None:
    """Paths that end alike, and paths that are regular expressions by accident, do not get each other's numbers."""
    layers = {
        "q": _layer(1, 1.5),
        "x.q": _layer(2, 2.5),
        "x.x.q": _layer(3, 3.5),
        "a+b.q": _layer(4, 4.5),
        "aab.q": _layer(5, 5.5),
        "x1q": _layer(6, 6.5),
    }
    LoraAdapter(layers).save_pretrained(tmp_path / "a")
    back = lf.load_adapter(tmp_path / "a")
    assert {p: (x.rank, x.scaling) for p, x in back.layers.items()} == {
        p: (x.rank, x.scaling) for p, x in layers.items()
    }


def test_built_in_memory_runs_in_peft(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.ModuleDict({"a": nn.Linear(5, 3), "c": nn.Linear(5, 3)})})
    adapter = LoraAdapter({"b.a": _layer(2, 0.3), "b.c": _layer(4, 1.7)})
    adapter.save_pretrained(tmp_path / "a")
    x = torch.randn(2, 5)
    expected = model["b"]["c"](x) + x @ adapter.delta("b.c").t()
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    layers = wrapped.base_model.model
    assert type(layers["a"]) is nn.Linear  # its path is the end of an adapted one, not adapted itself
    torch.testing.assert_close(layers["b"]["c"](x), expected)


def test_config_is_kept_or_written_anew(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": True, "base_model_name_or_path": "some/base"}
    config |= {"target_modules": ["q"], "layers_to_transform": [0], "exclude_modules": ["k"], "lora_dropout": 0.1}
    tensors = {"q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(3, 2)}
    adapter = lf.load_adapter(tensors, config=config)
    adapter.save_pretrained(tmp_path / "a")
    written = _config(tmp_path / "a")
    kept = ("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "lora_dropout")
    assert {key: written[key] for key in kept} == {key: config[key] for key in kept}
    assert written["layers_to_transform"] is written["exclude_modules"] is None
    longer = LoraAdapter({"q": adapter.layers["q"], "k": _layer(4, 1.0)}, config=adapter.config)
    longer.save_pretrained(tmp_path / "b")
    written = _config(tmp_path / "b")
    assert (written["r"], written["use_rslora"], written["target_modules"]) == (4, False, ["k", "q"])
    assert lf.load_adapter(tmp_path / "b").layers["q"].scaling == pytest.approx(6 / math.sqrt(2), rel=1e-15)


def test_zero_biases_where_some_layers_have_none(tmp_path: Path) -> None:
    bias = torch.randn(3)
    LoraAdapter({"a": _layer(lora_bias=bias), "b": _layer()}).save_pretrained(tmp_path / "a")
    back = lf.load_adapter(tmp_path / "a")
    assert torch.equal(back.layers["a"].lora_bias, bias)
    assert torch.equal(back.layers["b"].lora_bias, torch.zeros(3))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "holds no tensors"),
        ({"a": _layer(magnitude=torch.ones(3)), "b": _layer()}, r"DoRA on 1 of 2 layers, .* without it is 'b'"),
        (
            {
                "a": _layer(lora_bias=torch.ones(3)),
                "e": LoraLayer(torch.ones(2, 9), torch.ones(4, 2), 1.0, "embedding"),
            },
            r"lora_bias with an adapted embedding \('e'\)",
        ),
        ({"a": _layer(scaling=math.inf)}, "a: scaling inf is not finite"),
    ],
)
def test_what_peft_cannot_express(layers: dict[str, LoraLayer], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LoraAdapter(layers).save_pretrained(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_strided_and_shared_tensors(tmp_path: Path) -> None:
    big = torch.randn(10, 10)
    strided, whole = LoraLayer(big[:2, ::2], big.t()[1:4, 2:4], 1.0), LoraLayer(big[:2], big[2:8].reshape(30, 2), 1.0)
    layers = {"a": strided, "b": strided, "c": whole, "d": whole}
    LoraAdapter(layers).save_pretrained(tmp_path / "a")
    back = lf.load_adapter(tmp_path / "a")
    for path, layer in layers.items():
        assert torch.equal(back.layers[path].lora_a, layer.lora_a)
        assert torch.equal(back.layers[path].lora_b, layer.lora_b)


def test_overwriting_keeps_foreign_files(tmp_path: Path) -> None:
    home = tmp_path / "loras" / "sql"
    LoraAdapter({"a": _layer()}).save_pretrained(home)
    (home / "README.md").write_text("mine")
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("mine too")
    new = LoraAdapter({"b": _layer(3)})
    new.save_pretrained(home)
    assert list(lf.load_adapter(home).layers) == ["b"]
    assert (home / "README.md").read_text() == "mine"
    assert (home / "other" / "notes.txt").read_text() == "mine too"
    assert sorted(p.name for p in home.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other",
    ]
    assert [p.name for p in home.parent.iterdir()] == ["sql"]


def test_saving_over_the_source(tmp_path: Path) -> None:
    LoraAdapter({"a": _layer()}).save_pretrained(tmp_path)
    adapter = lf.load_adapter(tmp_path)
    kept = adapter.delta("a")
    adapter.save_pretrained(tmp_path)
    assert torch.equal(lf.load_adapter(tmp_path).delta("a"), kept)


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "sql"
    LoraAdapter({"a": _layer()}).save_pretrained(home)
    before = {p.name: p.read_bytes() for p in home.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        LoraAdapter({"b": _layer()}).save_pretrained(home)
    with pytest.raises(OSError, match="No space left"):
        LoraAdapter({"b": _layer()}).save_pretrained(tmp_path / "new")
    assert {p.name: p.read_bytes() for p in home.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["sql"]


def test_a_kill_between_renames_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "sql"
    LoraAdapter({"a": _layer(scaling=1.0)}).save_pretrained(home)
    real, calls = os.replace, []

    def replace_once(source: Any, target: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        LoraAdapter({"a": _layer(scaling=2.0)}).save_pretrained(home)
    monkeypatch.undo()
    assert [p.name for p in home.iterdir()] == ["adapter_model.safetensors"]
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        lf.load_adapter(home)


def test_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        LoraAdapter({"a": _layer()}).save_pretrained(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_permissions_and_links(tmp_path: Path) -> None:
    """The umask decides, as for any other file; a link to a directory stays one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LoraAdapter({"a": _layer()}).save_pretrained(tmp_path / "link")
    LoraAdapter({"a": _layer()}).save_pretrained(tmp_path / "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").is_file()
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "plain", tmp_path / "new")}
    assert len(modes) == 1


def test_atomic_directory_with_folders(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "out", last="index.json") as stage:
            (stage / "part").mkdir()
            (stage / "part" / "x").write_text(text)
            (stage / "index.json").write_text(text)
    assert (tmp_path / "out" / "part" / "x").read_text() == "two"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.json", "part"]
