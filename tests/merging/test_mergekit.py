"""What recipes mean, against mergekit: a few numbers that it gave, and whole models where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_models import save_llama
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fuse as lf
from lora_fuse import cli
from lora_fuse.cli.recipe import read_recipe

BASE = torch.ones(8)
TUNED = {
    "one": BASE + torch.tensor([3.0, -5, 1, 0.5, -2, 0.25, 4, -1]),
    "two": BASE + torch.tensor([-4.0, 2.25, 6, -0.5, -1, 3, -4.5, 2]),
    "three": BASE + torch.tensor([2.0, 1.5, -3, 1, 0.5, -2, 0.75, -6]),
}
HALF, ALL = [0.5, 0.75, 0.5], [1.0, 1.0, 1.0]
# What mergekit 0.1.4 adds to the base: method, weights, densities, parameters.
GIVEN: list[tuple[str, list[float], list[float], dict[str, Any], list[float]]] = [
    (
        *("ties", [1, 0.5, 0.8], HALF, {"normalize": True}),
        [2.555556, -5.0, 6.0, 0.0, -2.0, -2.0, 4.0, -6.0],
    ),
    (
        *("ties", [1, 0.5, 0.8], HALF, {"normalize": False, "lambda": 0.5}),
        [2.3, -2.5, 1.5, 0.0, -1.0, -0.8, 2.0, -2.4],
    ),
    (
        *("ties", [1, -0.5, 0.8], ALL, {}),
        [5.076923, -12.25, -18.0, 1.192308, -2.0, -10.333333, 5.269231, -5.23077],
    ),
    (
        *("breadcrumbs", [1, 0.5, 0.8], HALF, {"gamma": 0.25}),
        [2.6, 2.325, 1.0, 0.55, -2.5, -0.1, 0.0, 0.0],
    ),
    (
        *("breadcrumbs_ties", [1, 0.5, 0.8], HALF, {"gamma": 0.25, "normalize": True}),
        [2.555556, 1.788462, 1.0, 1.0, -1.666667, -2.0, 0.0, 2.0],
    ),
    (
        *("task_arithmetic", [1, 0.5, 0.8], ALL, {"normalize": True, "lambda": 0.7}),
        [0.791304, -0.81413, 0.486956, 0.319565, -0.63913, 0.045652, 0.715217, -1.46087],
    ),
]


def write_recipe(path: Path, method: str, weights: Any, densities: Any, base: str | None, **top: Any) -> Path:
    entries = [
        {"model": name, "parameters": {"weight": w} | ({} if d is None else {"density": d})}
        for (name, w), d in zip(weights.items(), densities, strict=True)
    ]
    path.write_text(yaml.safe_dump({"models": entries, "merge_method": method, "base_model": base, **top}))
    return path


@pytest.mark.parametrize(("method", "weights", "densities", "parameters", "want"), GIVEN)
def test_recipes_mean_what_they_mean_to_mergekit(
    tmp_path: Path, method: str, weights: Any, densities: Any, parameters: Any, want: list[float]
) -> None:
    given = dict(zip(TUNED, weights, strict=True))
    path = write_recipe(tmp_path / "r.yml", method, given, densities, "base", parameters=parameters)
    recipe = read_recipe(path)
    assert (recipe.models, recipe.base, recipe.notes) == (["one", "two", "three"], "base", [])
    models: Any = [{"x": TUNED[name]} for name in recipe.models]
    merged = lf.merge(models, recipe.weights, method=recipe.method, base={"x": BASE}, **recipe.options)
    torch.testing.assert_close(merged["x"] - BASE, torch.tensor(want), rtol=1e-5, atol=1e-5)


# Runs in a process of its own: some of its classes have to be completed by hand under a newer pydantic.
_MERGEKIT = """
import sys, torch, yaml
import mergekit.architecture.base as base
for name in ("ConfiguredModuleArchitecture", "ConfiguredModelArchitecture"):
    getattr(base, name).model_rebuild(_types_namespace={**vars(base), "torch": torch})
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
run_merge(config, sys.argv[2], MergeOptions(copy_tokenizer=False))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model ``base`` and its fine-tunes ``a``, ``b``, ``c``."""
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "base")
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        (root / name).mkdir()
        for file in (root / "base").iterdir():
            if file.suffix == ".safetensors":
                state = {n: t + 0.02 * torch.randn_like(t).pow(3) for n, t in load_file(file).items()}
                save_file(state, root / name / file.name, {"format": "pt"})
            else:
                (root / name / file.name).write_bytes(file.read_bytes())
    return root


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {"parameters": {"lambda": 0.4}}),
    ("task_arithmetic", {"parameters": {"normalize": True}}),
    ("ties", {}),
    ("ties", {"parameters": {"normalize": False, "lambda": 0.7, "int8_mask": True}}),
    ("ties", {"dtype": "float32"}),
    ("breadcrumbs", {"parameters": {"gamma": 0.05}}),
    ("breadcrumbs_ties", {"parameters": {"gamma": 0.05, "normalize": True}}),
]


@pytest.mark.parametrize(("method", "top"), CASES)
def test_whole_models_as_mergekit_merges_them(folders: Path, tmp_path: Path, method: str, top: dict[str, Any]) -> None:
    pytest.importorskip("mergekit", reason="mergekit is the oracle, where somebody has installed it")
    weights = {str(folders / name): w for name, w in zip("abc", [0.7, 0.5, -0.4], strict=True)}
    densities = [None] * 3 if method in ("linear", "task_arithmetic") else [0.5, 0.3, 0.8]
    base = None if method == "linear" else str(folders / "base")
    recipe = write_recipe(tmp_path / "r.yml", method, weights, densities, base, **top)
    result = CliRunner().invoke(cli.main, ["merge", "--recipe", str(recipe), "-o", str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _MERGEKIT, recipe, tmp_path / "theirs"]
    subprocess.run([str(part) for part in command], env=env, check=True, capture_output=True)
    ours, theirs = state_of(tmp_path / "ours"), state_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype
        torch.testing.assert_close(ours[name], t, rtol=1e-5, atol=1e-6, msg=name)
