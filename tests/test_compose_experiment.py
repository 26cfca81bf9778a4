"""benchmarks/experiments/compose_text.py end to end on a tiny random encoder, and the figures of its report."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from test_peru_fft_experiment import tiny_encoder, tiny_tasks

from benchmarks.experiments import compose_report, compose_text
from lora_fuse import LoraAdapter
from lora_fuse.adapters.lora import LoraLayer

STEPS = {"2": 4, "all": 4}


def tiny_adapters(encoder):
    paths = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)]

    def layer(module):
        return LoraLayer(torch.randn(2, module.in_features) / 8, torch.randn(module.out_features, 2) / 8, 1.0)

    return {n: LoraAdapter({f"encoder.{p}": layer(encoder.get_submodule(p)) for p in paths}) for n in ("x", "y")}


def test_runs_and_reports(tmp_path):
    encoder = tiny_encoder()
    before = copy.deepcopy(encoder.state_dict())
    adapters, tasks = tiny_adapters(encoder), tiny_tasks()
    results = {
        "tasks": {n: compose_text.run_task(encoder, t, adapters, list(STEPS), (0, 1), STEPS) for n, t in tasks.items()},
        "steps": STEPS,
        "batch": 16,
        "lr": {"weights": 0.05, "head": 1e-3, "lora": 2e-3},
        "limits": {"train": 64, "validation": 40},
        "seconds": 60,
        "threads": 1,
    }
    assert all(torch.equal(t, before[k]) for k, t in encoder.state_dict().items())
    compose_text.write(results, tmp_path)
    text = (tmp_path / "composition_experiment.md").read_text()
    for name, task in results["tasks"].items():
        assert task["examples"] == {"2": 2 * task["classes"], "all": 64}
        assert {m: len(s) for m, s in task["accuracy"]["2"].items()} == dict.fromkeys(compose_report.METHODS, 2)
        assert {len(s) for s in task["accuracy"]["all"].values()} == {1}
        assert sum(task["weights"]["all"].values()) == pytest.approx(1, abs=2e-3)
        assert f"| {name} | 2 per class" in text
    assert compose_report.verdict(results) in text
    assert json.loads((tmp_path / "composition_experiment.json").read_text())["seconds"] == 60


def test_few_shot_choice_is_balanced_and_seeded():
    task = tiny_tasks()["second"]
    chosen = compose_text.choose(task, "4", 0)
    assert torch.bincount(task.labels["train"][chosen]).tolist() == [4, 4, 4]
    assert chosen == compose_text.choose(task, "4", 0) != compose_text.choose(task, "4", 1)


def test_gain_counts_every_task_alike():
    tasks = {
        "a": {"accuracy": {"8": {"p": [0.5, 0.7], "q": [0.4, 0.8]}}},
        "b": {"accuracy": {"8": {"p": [0.9], "q": [0.5]}}},
        "c": {"accuracy": {"all": {"p": [0.0], "q": [1.0]}}},
    }
    assert compose_report.gain(tasks, "8", "p", "q") == (pytest.approx(20.0), 2, 3)
