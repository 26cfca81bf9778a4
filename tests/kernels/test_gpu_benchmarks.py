"""``python -m benchmarks.gpu``: every part runs, at tiny sizes; what is wrong is not timed; results kept by part."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch

import lora_fuse as lf
from benchmarks.gpu import PARTS, measure, multi_lora, own_ways, report, rival_ways, tune
from benchmarks.gpu.__main__ import main, run_part

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on CPU tensors kernels run in the interpreter only"
)


@interpreted
@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs(name):
    made = run_part(name, 60.0, True, 1e9)
    assert made["failed"] is None
    assert made["rows"]
    assert not made["left_out"]
    for row in made["rows"]:
        assert report.OURS in report.names(row)
    assert report.tables({"card": "x", "parts": {name: made}})


@interpreted
def test_a_part_that_is_wrong_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(own_ways, "in_interpreter", lambda y, *args: y.add_(1e-2))
    with pytest.raises(SystemExit, match="failed: multi_lora"):
        main(["--dry", "--only", "multi_lora", "--quick"])
    said = capsys.readouterr().out
    assert "lora_fuse: error" in said
    assert "floor" not in said


@interpreted
def test_rivals_that_are_wrong_or_fail_are_told_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(rival_ways, "_mm_loop", lambda problem: rival_ways.Way(lambda y, i: y.add_(1e-2)))
    monkeypatch.setattr(rival_ways, "_gathered_bmm", lambda problem: rival_ways.Way(lambda y, i: y.no_such_thing))
    case = multi_lora.Case(multi_lora.TINY[0], 1)
    case.check()
    said = capsys.readouterr().out
    assert report.OURS in case.ways
    assert not {"mm loop", "gathered bmm"} & set(case.ways)
    assert "left out: mm loop of tiny" in said
    assert "left out: gathered bmm of tiny" in said


@interpreted
def test_tuning_makes_rules_that_are_taken(monkeypatch, tmp_path, capsys):
    """By what times say, of candidates that run and are right; here times that a table makes up."""
    fields = [("expand", "block_n", (32, 128)), ("shrink", "planes", (1, "all")), ("expand", "num_warps", (2, 3))]
    monkeypatch.setattr(tune, "FIELDS", fields)
    monkeypatch.setattr(measure, "device_us", made_up_us)
    found = tune.tune(["64x96"], [16], [9, 2], 3, tmp_path / "plans.json")
    where = {"in_features": 64, "out_features": 96, "max_rank": 16, "slices": 1, "dtype": "float16"}
    assert found == [
        {"where": {**where, "pairs": [low, high]}, "expand": {"block_n": 32}, "shrink": {"planes": 1}}
        for low, high in ((1, 2), (3, 9))
    ]
    assert "left out: expand num_warps 3" in capsys.readouterr().out
    lf.override_plans(tmp_path / "plans.json")
    lf.override_plans(None)


def made_up_us(calls, copies, **options):
    for call in calls.values():
        call(0)
    gains = {"as it is": 0, "expand block_n 32": 10, "shrink planes 1": 1, "expand num_warps 2": 0.1, "tuned": 5}
    return {name: 20 - gains.get(name, -1) for name in calls}


@interpreted
def test_tuning_that_does_not_last_is_no_rule(monkeypatch):
    monkeypatch.setattr(tune, "FIELDS", [("expand", "block_n", (32,))])
    monkeypatch.setattr(
        measure, "device_us", lambda calls, *args, **more: {n: 1 + (n != "expand block_n 32") for n in calls}
    )
    assert tune.tune(["64x96"], [16], [2], 3, None) == []


def test_what_tuning_is_asked_for():
    for args in (["--layer", "64"], ["--layer", "0x4"], ["--rows", "1,x"]):
        with pytest.raises(SystemExit, match="2"):
            tune.main(args)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            tune.main([])


def test_the_augmented_way_is_there_and_right():
    case = multi_lora.Case(multi_lora.Shape("wide", 16, 12, 3, "half"), 1)
    way = case.ways[own_ways.AUGMENTED]
    want = case.want(case.x.double() @ case.problem.copies[0].weight.double().t())
    measure.require("augmented", way.with_base(case.problem, 0), want, 4 * torch.finfo(torch.float16).eps)


def test_targets_of_an_option_that_does_not_apply_are_the_default_ways():
    def row(shape, over):
        us = {"linear": 100.0, report.OURS: 5.0, **{f"{name} + base": 100 * (1 + o) for name, o in over.items()}}
        return report.row("multi_lora", str(shape), us, 1e3, 1e12, "linear")

    rows = [
        row(multi_lora.DECODE[0], {"lora_fuse": 0.2, "lora_fuse overlap": 0.1, "sglang v2": 0.3}),
        row(multi_lora.DECODE[1], {"lora_fuse": 0.25, "sglang v2": 0.2}),
    ]
    told = {aimed["name"]: aimed for aimed in multi_lora.targets(rows)}
    what = "o_proj, rank 16, 1-64 rows, up to 8 adapters: most over the linear"
    for name in ("lora_fuse", "lora_fuse overlap"):
        assert told[f"{name}: {what}"]["measured"] == pytest.approx(0.25)
        assert told[f"{name}: {what}"]["note"] == str(multi_lora.DECODE[1])
    ratios = {"lora_fuse": (1.5 * 0.8) ** 0.5, "lora_fuse overlap": (3 * 0.8) ** 0.5}
    for name, ratio in ratios.items():
        assert told[f"sglang v2's overhead over {name}'s, geometric mean"]["measured"] == pytest.approx(ratio)
    worst = told["lora_fuse: base and LoRA, the best rival's time over ours, worst"]
    assert worst["measured"] == pytest.approx(1.2 / 1.25)
    assert worst["met"]
    assert told["LoRA part: PEFT's time over ours"]["met"] is None


def test_rows_before_a_failure_are_kept(monkeypatch):
    part = types.ModuleType("benchmarks.gpu.failing")

    def run(at):
        yield {"shape": "first"}
        raise RuntimeError("the card is lost")

    part.check, part.run = lambda: None, run
    monkeypatch.setitem(sys.modules, part.__name__, part)
    made = run_part("failing", 1.0, True, 1e9)
    assert made["rows"] == [{"shape": "first"}]
    assert made["failed"] == "RuntimeError: the card is lost"


def test_a_budget_that_is_spent_names_what_it_left_out():
    budget = measure.Budget(0.0)
    assert budget.over("a")
    assert budget.over("b")
    assert budget.left_out == ["a", "b"]
    assert not measure.Budget(60.0).over("c")


def test_an_error_that_is_not_a_number_is_refused():
    want = torch.ones(3)
    assert measure.require("x", want, want, 0.0) == 0.0
    for got in (want + 0.1, want * torch.nan):
        with pytest.raises(SystemExit, match="x: error"):
            measure.require("x", got, want, 0.05)


def test_results_are_kept_by_part(tmp_path):
    def part(commit, us):
        row = report.row("op", "s", {report.OURS: us, "lora_fuse + base": 3 * us, "base": 2.0}, 1e6, 1e12, "base")
        aimed = [report.target("t", 1.0, us), report.target("u", 1.0, None, at_least=True)]
        made = {"commit": commit, "versions": {"torch": "1"}, "copy_bytes_per_s": 1e12}
        return made | {"rows": [row], "targets": aimed, "left_out": ["z"], "failed": None}

    report.keep("A card", {"p": part("one", 2.0), "q": part("one", 1.0)}, tmp_path)
    path = report.keep("A card", {"p": part("two", 0.5)}, tmp_path)
    kept = json.loads(path.read_text())
    assert path.name == "A_card.json"
    assert [kept["parts"][name]["commit"] for name in "pq"] == ["two", "one"]
    row = kept["parts"]["p"]["rows"][0]
    assert row["gb_per_s"] == {"lora_fuse": 2000.0}
    assert row["overhead"] == {"lora_fuse": -0.25}
    text = path.with_suffix(".md").read_text()
    for said in ("| t | <= 1 | 0.5 | met |", "| t | <= 1 | 1 | met |", "| u | >= 1 | not measured | - |"):
        assert said in text
    assert "| op s | 1.0 | 0.5, 2000 GB/s 200%, whole 1.5 -25.0% | 2.0 |" in text
    assert "Left out for want of time: z." in text
