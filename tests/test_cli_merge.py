"""lora-fuse merge: options of methods, whole models, recipes, refusals; nothing is written where it fails."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import torch
import yaml
from checkpoint_models import LLAMA, load, make_adapter, save_llama
from cli_runs import state_of
from safetensors.torch import save_file

import lora_fuse as lf

run, succeed = partial(cli_runs.run, "merge"), partial(cli_runs.succeed, "merge")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model ``base`` with a tokenizer file, fine-tunes ``one`` and ``two``, adapters ``a`` and ``b``."""
    root = tmp_path_factory.mktemp("files")
    save_llama(root / "base")
    (root / "base" / "tokenizer_config.json").write_text("{}")
    for seed, name in ((1, "one"), (2, "two")):
        torch.manual_seed(seed)
        tuned = {n: t + 0.02 * torch.randn_like(t).pow(3) for n, t in state_of(root / "base").items()}
        (root / name).mkdir()
        save_file(tuned, root / name / "model.safetensors", {"format": "pt"})
        (root / name / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
    for seed, name in ((1, "a"), (2, "b")):
        make_adapter(LLAMA, root / "base", root / name, seed, r=3 + seed, target_modules=["q_proj", "v_proj"])
    return root


def recipe(path: Path, files: Path, method: str, entries: dict[str, Any], **top: Any) -> Path:
    models = [
        {"model": str(files / name), "parameters": p} if p else {"model": str(files / name)}
        for name, p in entries.items()
    ]
    path.write_text(yaml.safe_dump({"models": models, "merge_method": method, **top}))
    return path


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.3, "majority_sign": "frequency", "rank": 8}),
        ("dare_ties", {"density": 0.4, "seed": 3, "divisor": "weights"}),
        ("della", {"epsilon": 0.1, "scaling": 0.5, "energy": 0.7}),
        ("breadcrumbs", {"gamma": 0.02}),
        ("magnitude_prune", {"density": 0.3, "scope": "row"}),
        ("knots_ties", {"density": 0.3, "scope": "tensor"}),
        ("iso_cts", {"common_fraction": 0.5, "mean_over": "min_dim"}),
    ],
)
def test_adapters_by_every_option(files: Path, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    out = succeed(f"{files}/a:0.7", f"{files}/b:0.5", "--method", method, *flags, "-o", tmp_path / "out").stdout
    merged = lf.merge([files / "a", files / "b"], [0.7, 0.5], method=method, **options)
    written = lf.load_adapter(tmp_path / "out")
    for path, layer in merged.layers.items():
        assert all(map(torch.equal, written.layers[path].tensors(), layer.tensors()))
    if method in ("ties", "dare_ties", "della"):
        found = re.search(r"energy kept ([\d.]+)%, relative error ([\d.]+); worst layer ([\d.]+)%", out)
        assert found
        assert float(found[3]) <= float(found[1])
        whole = lf.merge(
            [files / "a", files / "b"], [0.7, 0.5], method=method, **(options | {"rank": 99, "energy": None})
        )
        lost = sum(float((whole.delta(p) - merged.delta(p)).norm() ** 2) for p in merged.layers)
        total = sum(float(whole.delta(p).norm() ** 2) for p in merged.layers)
        assert float(found[1]) == pytest.approx(100 * (1 - lost / total), abs=0.02)


@pytest.mark.parametrize("method", ["linear", "uniform", "ties", "dare_linear"])
def test_whole_models(files: Path, tmp_path: Path, method: str) -> None:
    weights = ["", ""] if method == "uniform" else [":0.7", ":0.5"]
    specs = [f"{files}/{name}{w}" for name, w in zip(("one", "two"), weights, strict=True)]
    out = succeed(*specs, "--base", files / "base", "--method", method, "-o", tmp_path / "out").stdout
    given = None if method == "uniform" else [0.7, 0.5]
    want = lf.merge([files / "one", files / "two"], given, method=method, base=files / "base")
    written = state_of(tmp_path / "out")
    assert written.keys() == want.keys()
    assert all(torch.equal(t, written[name]) for name, t in want.items())
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (files / "base").iterdir()}
    assert f"{len(want)} of {len(want)} tensors merged" in out
    ids = torch.arange(8)[None]
    load(LLAMA, tmp_path / "out")(input_ids=ids)


def test_dtype_heads_and_shards_of_whole_models(files: Path, tmp_path: Path) -> None:
    flags = ["--dtype", "bf16", "--heads", "lm_head", "--max-shard-size", "1GB", "--method", "ties"]
    succeed(files / "one", files / "two", "--base", files / "base", *flags, "-o", tmp_path / "out")
    written, base = state_of(tmp_path / "out"), state_of(files / "base")
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(written["lm_head.weight"], base["lm_head.weight"].bfloat16())
    want = lf.merge(
        [files / "one", files / "two"], method="ties", base=files / "base", heads="lm_head", dtype=torch.bfloat16
    )
    assert all(torch.equal(t, want[name]) for name, t in written.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_recipe_for_whole_models(files: Path, tmp_path: Path) -> None:
    entries: dict[str, Any] = {"one": {"weight": 0.7, "density": 0.5}, "two": {"weight": 0.3}, "base": None}
    shared = {"normalize": False, "lambda": 0.9, "density": 0.25, "int8_mask": True}
    path = recipe(
        *(tmp_path / "r.yml", files, "ties", entries),
        base_model=str(files / "base"), parameters=shared, dtype="float16", tokenizer_source="base",
    )  # fmt: skip
    succeed("--recipe", path, "-o", tmp_path / "out")
    want = lf.merge(
        [files / "one", files / "two"], [0.7, 0.3], method="ties", base=files / "base", density=[0.5, 0.25],
        majority_sign="weighted", divisor="none", scaling=0.9, scope="tensor", dtype=torch.float16,
    )  # fmt: skip
    written = state_of(tmp_path / "out")
    assert all(torch.equal(t, written[name]) for name, t in want.items())


def test_recipe_without_a_base_is_an_average(files: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yml", files, "linear", {"one": {"weight": 3}, "two": {"weight": 1}})
    succeed("--recipe", path, "-o", tmp_path / "out")
    one, two = state_of(files / "one"), state_of(files / "two")
    for name, t in state_of(tmp_path / "out").items():
        torch.testing.assert_close(t, 0.75 * one[name] + 0.25 * two[name], rtol=1e-6, atol=1e-7)


def test_recipe_for_adapters(files: Path, tmp_path: Path) -> None:
    entries = {"a": {"weight": 0.7}, "b": {"weight": 0.5}}
    path = recipe(
        *(tmp_path / "r.yml", files, "dare_ties", entries),
        base_model="some/base", parameters={"density": 0.4, "seed": 5, "lambda": 1.2},
    )  # fmt: skip
    result = succeed("--recipe", path, "--rank", 6, "-o", tmp_path / "out")
    assert "Note: dare_ties: entries that stay are divided by their chance to stay" in result.stderr
    merged = lf.merge(
        [files / "a", files / "b"], [0.7, 0.5], method="dare_ties", density=0.4, seed=5, scaling=1.2, rank=6,
        majority_sign="weighted", divisor="none",
    )  # fmt: skip
    written = lf.load_adapter(tmp_path / "out")
    for name, layer in merged.layers.items():
        assert all(map(torch.equal, written.layers[name].tensors(), layer.tensors()))


W = {"weight": 1.0}
OK: dict[str, Any] = {"models": [{"model": "one", "parameters": W}], "merge_method": "ties", "base_model": "base"}


def changed(**keys: Any) -> dict[str, Any]:
    return {name: value for name, value in (OK | keys).items() if value is not None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "the recipe: expected keys and values"),
        (changed(slices=[{}]), "slices: is not supported: layers cannot be picked"),
        (changed(modules={}), "modules: is not supported"),
        (changed(chat_template="auto"), "chat_template: is not supported"),
        (changed(tokenizer_source="union"), "tokenizer_source: 'union' is not supported"),
        (changed(tokenizer={"source": "base"}), "tokenizer: is not supported"),
        (changed(extra=1), "extra: is not supported; supported are models"),
        (changed(merge_method="slerp"), "merge_method: expected one of task_arithmetic, linear, ties"),
        (changed(merge_method=None), "merge_method: expected the name of a method, got None"),
        (changed(models=[]), "models: expected a list of models"),
        (changed(models=[{"model": "base"}]), "models: there is nothing beside the base model"),
        (changed(models=[{"model": {"path": "x"}}]), r"models\[0\].model: expected a path"),
        (changed(models=[{"model": "one"}]), r"models\[0\].parameters.weight: is missing"),
        (changed(models=[{"model": "one", "layers": [1]}]), r"models\[0\].layers: is not supported"),
        (changed(models=[{"model": "one", "parameters": {"weight": [0.1, 0.2]}}]), "gradients over layers and filters"),
        (changed(models=[{"model": "one", "parameters": {"weight": "high"}}]), "expected a number, got 'high'"),
        (changed(models=[{"model": "one", "parameters": W | {"gamma": 0.1}}]), "parameters.gamma: is not supported"),
        (changed(parameters={"density": 1.5}), "density: expected 0 < density <= 1, got 1.5"),
        (changed(parameters={"rescale": True}), "parameters.rescale: True is not supported with ties"),
        (changed(parameters={"normalize": 1}), "parameters.normalize: expected true or false, got 1"),
        (changed(parameters={"filter": 1}), "parameters.filter: is not supported"),
        (changed(parameters={"epsilon": 0.1}), "parameters.epsilon: is not supported"),
        (changed(merge_method="dare_ties", parameters={"rescale": False}), "rescale: False is not supported"),
        (changed(merge_method="task_arithmetic", parameters={"density": 0.5}), "density: task_arithmetic keeps every"),
        (changed(merge_method="linear", parameters={"lambda": 0.5}), "parameters.lambda: is not supported"),
        (changed(merge_method="breadcrumbs"), "density, gamma: 1.0 of the entries cannot stay"),
        (changed(merge_method="della"), "density, epsilon: chances from 0.85 to 1.15"),
        (changed(dtype="int8"), "dtype: expected one of float32, float16"),
        (changed(dtype=["float16"]), "dtype: expected one of float32, float16"),
        (changed(base_model=None), "base_model: is missing"),
        (changed(parameters={"rank": 4}), "rank: method 'ties' does not take it"),
        (
            changed(merge_method="linear", parameters={"normalize": False, "weight": 1},
                    models=[{"model": "one"}, {"model": "two"}]),
            "false with weights that do not add up to 1",
        ),
    ],
)  # fmt: skip
def test_recipes_that_are_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, message: str
) -> None:
    monkeypatch.chdir(files)
    (tmp_path / "r.yml").write_text(yaml.safe_dump(config))
    result = run("--recipe", tmp_path / "r.yml", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()
    assert result.stdout == ""


def test_a_recipe_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text("models: !!python/object/apply:os.mkdir [made]\n")
    result = run("--recipe", tmp_path / "r.yml", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "damaged YAML" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("-o {o}", "name the adapters to merge, or give --recipe"),
        ("{f}/a --recipe {f}/base/config.json -o {o}", "--recipe says what is merged"),
        ("--recipe {f}/base/config.json --density 0.5 -o {o}", "--recipe says what is merged"),
        ("{f}/one {f}/two -o {o}", "holds a whole model; to merge models, name the one they came from by --base"),
        ("{f}/a {f}/b --method magnitude_prune -o {o}", "density: method 'magnitude_prune' has no default"),
        ("{f}/a {f}/b --method ties --density 2 -o {o}", "density: expected 0 < density <= 1"),
        ("{f}/a:0 {f}/b:0 --method ties -o {o}", "weights: all are 0"),
        ("{f}/a {f}/b --density 0.5 -o {o}", "density: method 'linear' does not take it"),
        ("{f}/a {f}/b --heads x -o {o}", "are about whole models, which need --base"),
        ("{f}/one --base {f}/base --method svd -o {o}", "'svd' works on adapters only"),
        ("{f}/one --base {f}/base --method ties --rank 3 -o {o}", "no merge of whole models does"),
        ("{f}/one --base {f}/base --modules-to-save first -o {o}", "name the heads of whole models by --heads"),
        ("{f}/a --base {f}/base -o {o}", "holds no model"),
        ("{f}/none --base {f}/base -o {o}", "no such model folder"),
        ("{f}/one --base {f}/base -o {f}/one/out", "must lie apart from the input"),
        ("{f}/one --base {f}/base --heads none -o {o}", "heads: 'none' matches no parameter"),
    ],
)
def test_bad_input(files: Path, tmp_path: Path, args: str, message: str) -> None:
    result = run(*args.format(f=files, o=tmp_path / "out").split())
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == []


def test_a_quantised_or_broken_model_leaves_nothing(files: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    state = state_of(files / "one")
    save_file(state, tmp_path / "q" / "model.safetensors")
    (tmp_path / "q" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    result = run(tmp_path / "q", "--base", files / "base", "-o", tmp_path / "out")
    assert "its weights are quantised (quantization_config: gptq)" in result.stderr
    (tmp_path / "q" / "config.json").write_text("{}")
    state["lm_head.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "q" / "model.safetensors")
    result = run(tmp_path / "q", "--base", files / "base", "--method", "dare_ties", "-o", tmp_path / "out")
    assert "models[0]: 'lm_head.weight' has NaN or infinite entries" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
