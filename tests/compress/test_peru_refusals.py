"""What peru_fft and the merges of whole state dicts refuse, by name, and leave as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peru_models import assert_same, make, tuned
from torch import Tensor

import lora_fuse as lf
from lora_fuse.merging import full


def _without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if name not in names}


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"net.{name}": t for name, t in state.items()}


STATE = tuned(make(), 1).state_dict()
NAN, INF, UNTIED = copy.deepcopy(STATE), copy.deepcopy(STATE), copy.deepcopy(STATE)
NAN["conv.weight"][1, 2, 0, 1] = torch.nan
INF["norm.bias"][2] = torch.inf
UNTIED["out.weight"] = UNTIED["out.weight"] + 1
TRANSPOSED = {"a": torch.ones(4, 3)}
TRANSPOSED["b"] = TRANSPOSED["a"].t()


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({}, {}, "finetuned: expected at least one"),
        ({"a": STATE}, {"density": 0}, "density: expected 0 < density <= 1, got 0"),
        ({"a": STATE}, {"density": 1.01}, "density: expected"),
        ({"a": STATE}, {"density": float("nan")}, "density: expected"),
        ({"a": STATE}, {"density": "0.1"}, "density: expected"),
        ({"a": STATE}, {"trim": 0.0, "merge": "ties"}, "trim: expected 0 < trim <= 1"),
        ({"a": STATE}, {"scope": "layer"}, "scope: expected one of global, tensor, row, got 'layer'"),
        ({"a": STATE}, {"merge": "tie"}, "merge: expected one of task_arithmetic, average, ties, a function or"),
        ({"a": STATE}, {"scaling": float("inf")}, "scaling: expected a finite number"),
        ({"a": STATE}, {"merge": "average", "scaling": 0.5}, "scaling: 0.5 has no meaning for merge='average'"),
        ({"a": _without(STATE, "conv.bias")}, {}, r"finetuned\['a'\]: lacks 'conv.bias' of the base"),
        ({"a": {**STATE, "new": torch.ones(2)}}, {}, "has 'new', which the base lacks; if every task .* heads="),
        ({"a": _prefixed(STATE)}, {}, "the fine-tune's names start with 'net.': give prefix='net.'"),
        (
            {"a": {**STATE, "head.bias": torch.ones(4)}},
            {},
            r"'head.bias' has shape \[4\], the base's is \[3\]; .*heads=",
        ),
        (
            {"a": {**STATE, "conv.bias": torch.ones(6).int()}},
            {},
            "'conv.bias' is torch.int32, the base's is torch.float32",
        ),
        (
            {"a": {**STATE, "norm.num_batches_tracked": torch.tensor(1.0)}},
            {},
            "is torch.float32, the base's is torch.int64",
        ),
        ({"a": {**STATE, "norm.num_batches_tracked": torch.tensor(1).int()}}, {}, "is torch.int32, the base's is"),
        ({"a": NAN}, {}, r"finetuned\['a'\]: 'conv.weight' has NaN or infinite entries"),
        ({"a": INF}, {}, r"finetuned\['a'\]: 'norm.bias' has NaN or infinite entries"),
        ({"a": INF}, {"merge": "ties"}, r"finetuned\['a'\]: 'norm.bias' has NaN or infinite entries"),
        ({"a": UNTIED}, {}, "'emb.weight', 'out.weight' are one tensor in the base .*but differ here"),
        ({"a": TRANSPOSED}, {}, "'a' and 'b' overlap in memory without being the same"),
        ({"a": STATE}, {"exclude": "embed"}, "exclude: 'embed' matches no parameter; names look like 'emb.weight'"),
        ({"a": STATE}, {"shared": ["emb", "emb.weigth"]}, "shared: 'emb.weigth' matches no"),
        ({"a": STATE}, {"heads": "classifier.*"}, "heads: 'classifier.*' matches no"),
        ({"a": STATE}, {"heads": "head", "exclude": "*.bias"}, "exclude and heads: both match 'head.bias'"),
        ({"a": STATE}, {"heads": "out.weight"}, "'emb.weight', 'out.weight' are one tensor in the base"),
        ({"../a": STATE}, {}, "'../a' cannot be a task's name"),
        ({"Peru.json": STATE}, {}, "a file of a PERU folder is called so"),
        ({"": STATE}, {}, "'' cannot be a task's name"),
        ({"a.": STATE}, {}, "'a.' cannot be a task's name"),
        ({"a": STATE, "A": STATE}, {}, "'a' and 'A' differ in case only"),
        ({"a": STATE}, {"merge": _without(STATE, "conv.bias")}, "merge: lacks 'conv.bias' of the base"),
        ({"a": STATE}, {"merge": {**STATE, "new": torch.ones(2)}}, "merge: has 'new', which the base lacks"),
        ({"a": STATE}, {"merge": {**STATE, "conv.bias": torch.ones(7)}}, r"merge: 'conv.bias' is .* shape \[7\]"),
        ({"a": STATE}, {"merge": NAN}, "merge: 'conv.weight' has NaN"),
        ({"a": STATE}, {"merge": UNTIED}, "merge: 'emb.weight', 'out.weight' are one tensor in the base, but differ"),
        ({"a": {n: t.to("meta") for n, t in STATE.items()}}, {}, "'emb.weight' is on the meta device"),
        ({"a": {}}, {}, r"finetuned\['a'\]: holds no tensors"),
        ({"a": {**STATE, "conv.bias": torch.ones(6).to(torch.float8_e4m3fn)}}, {}, "quantised model has to be dequ"),
    ],
)
def test_bad_values(tasks: Any, options: dict[str, Any], message: str) -> None:
    base = make()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=message):
        lf.peru_fft(base, tasks, **options)
    assert_same(base.state_dict(), before)


@pytest.mark.parametrize(
    ("base", "tasks", "options", "message"),
    [
        (STATE, STATE, {}, r"finetuned\['emb.weight'\]: expected a state dict, an nn.Module"),
        (STATE, [STATE], {}, "finetuned: expected a dict of fine-tunes by task, got list"),
        (STATE, {1: STATE}, {}, "finetuned: expected task names, got 1"),
        (3, {"a": STATE}, {}, "base: expected a state dict, an nn.Module, or the path .* got int"),
        (STATE, {"a": {"x": 3}}, {}, "expected tensors by name, got int for 'x'"),
        (STATE, {"a": STATE}, {"merge": 3}, "merge: expected one of .* got int"),
        (STATE, {"a": STATE}, {"merge": lambda base, others: None}, "merge: the function returned NoneType"),
        (STATE, {"a": STATE}, {"prefix": None}, "prefix: expected a string such as 'bert.', got NoneType"),
        (STATE, {"a": STATE}, {"exclude": [3]}, "exclude: expected patterns for parameter names, got int"),
    ],
)
def test_bad_types(base: Any, tasks: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lf.peru_fft(base, tasks, **options)


@pytest.mark.parametrize("merge", ["task_arithmetic", "average", "ties"])
def test_overflow_is_refused(merge: Any) -> None:
    base = {"w": torch.full((4, 4), 6e4).half()}
    tasks = {str(i): {"w": torch.full((4, 4), 6.5e4)} for i in range(3)}
    options: dict[str, Any] = {} if merge == "average" else {"scaling": 3.0}
    if merge == "average":
        tasks["0"]["w"] = tasks["0"]["w"] + 1e5  # overflows as it is rounded to the base's dtype
    with pytest.raises(ValueError, match=r"'w' (has NaN or infinite entries, or )?overflows torch.float16"):
        lf.peru_fft(base, tasks, merge=merge, **options)


def test_full_merges_refuse_what_does_not_fit() -> None:
    for call, message in (
        (lambda: full.average(STATE, []), "finetuned: expected at least one"),
        (lambda: full.average(STATE, [_without(STATE, "conv.bias")]), r"finetuned\[0\]: lacks 'conv.bias'"),
        (lambda: full.ties(STATE, [{**STATE, "conv.bias": torch.ones(5)}]), r"'conv.bias' has shape \[5\]"),
        (lambda: full.task_arithmetic(STATE, [NAN]), "'conv.weight' has NaN"),
        (lambda: full.task_arithmetic(STATE, [STATE], True), "scaling: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_adapter_knows_its_merged_weights() -> None:
    base = make()
    peru = lf.peru_fft(base, {"sql": tuned(base, 1)})
    adapter = peru.adapters["sql"]
    adapter.check_merged(peru.merged)
    changed = dict(peru.merged)
    changed["norm.weight"] = changed["norm.weight"].nextafter(torch.tensor(9.0))
    for wrong, name in (
        (changed, "norm.weight"),
        (base.state_dict(), "emb.weight"),
        ({n: t.bfloat16() for n, t in peru.merged.items()}, "emb.weight"),
    ):
        with pytest.raises(ValueError, match=f"merged: '{name}' .* is not what the sparse adapter"):
            adapter.state_dict(wrong)
    with pytest.raises(ValueError, match=r"merged: has no 'conv.bias'"):
        adapter.state_dict({n: t for n, t in peru.merged.items() if n != "conv.bias"})
    with pytest.raises(ValueError, match="task: no 'slq'; there are 'sql'"):
        peru.state_dict("slq")
    assert_same(peru.state_dict(None), peru.merged)
