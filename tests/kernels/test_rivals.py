"""The rivals of ``benchmarks.gpu`` compute what they are timed for, in Triton's CPU interpreter, in fp16."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch.nn.functional import linear

from benchmarks.gpu import measure, multi_lora, report, rival_ways, rivals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on CPU tensors kernels are interpreted only"),
    pytest.mark.skipif(bool(rivals.missing()), reason="LORA_FUSE_RIVALS names no folder that holds vllm/ and sglang/"),
]
LIMIT = multi_lora.LIMIT * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("shape", multi_lora.TINY, ids=str)
def test_every_way_of_a_shape(shape):
    case = multi_lora.Case(shape, 1)
    said = {name.split()[0] for name in case.ways}
    assert said >= {report.OURS, "vllm", "sglang", "mm"}
    case.check()


def sliced(slots, widths, rank=16, fan_in=64, num_slots=3):
    """A packed projection and its result in fp64."""
    a = [torch.randn(num_slots, rank, fan_in).half() / 8 for _ in widths]
    b = [torch.randn(num_slots, width, rank).half() / 4 for width in widths]
    weight = torch.randn(sum(widths), fan_in).half() / 8
    x, y = torch.randn(len(slots), fan_in).half(), torch.randn(len(slots), sum(widths)).half()
    factors = rival_ways.Factors(weight, a, b, torch.cat(a, 1), torch.cat(b, 1))
    problem = rival_ways.Problem(x, slots, [rank] * num_slots, 0.5, widths, [factors])
    want = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [p[slot].double() @ (q[slot].double() @ x[row].double()) for p, q in zip(b, a, strict=True)]
            want[row] += 0.5 * torch.cat(parts)
    return problem, y, want


@pytest.mark.parametrize("widths", [(64, 32, 32), (48, 48)], ids=["qkv", "gate-up"])
def test_slices(widths):
    problem, y, want = sliced([0, 2, -1, 1, 0], widths)
    whole = want - y.double() + linear(problem.x.double(), problem.copies[0].weight.double())
    for name, way in rival_ways.ways(problem).items():
        got = y.clone()
        way.alone(got, 0)
        measure.require(name, got, want, LIMIT)
        measure.require(name, way.with_base(problem, 0), whole, LIMIT)


def test_every_kind_of_plan_of_triton_v2(monkeypatch):
    """One row of its table for each pair of kernels, way of splitting and overlap."""
    of = rivals.sglang()
    rows = [r for r in of.plan_rows if "linear" in (r.get("kinds") or ["linear"])]

    def kind(row):
        spec = row["spec"]
        split = spec["a_tiles"].get("SPLIT_K", 1) > 1 and spec["a_tiles"].get("SPLIT_MODE", "serial")
        return str((spec["a_family"], spec["b_family"], spec["overlap"], split))

    kinds = {k: next(g) for k, g in itertools.groupby(sorted(rows, key=kind), kind)}
    assert len(kinds) >= 5
    for widths in ((96,), (64, 32, 32)):
        problem, y, want = sliced([0, 2, -1, 1, 0], widths)
        for name, row in kinds.items():
            monkeypatch.setattr(of, "plan_rows", [{**row, "max_tokens": None, "max_rank": None, "phase": "decode"}])
            for bound in ("min_in_features", "max_in_features", "min_out_features", "max_out_features"):
                of.plan_rows[0].pop(bound, None)
            got = y.clone()
            rival_ways._v2(of, problem, of.Phase.DECODE).alone(got, 0)
            measure.require(f"{name} {widths}", got, want, LIMIT)


def test_the_table_of_plans_is_read_as_theirs(monkeypatch):
    """The first row that fits, by the bounds it has; defaults where none does."""
    of = rivals.sglang()
    plan = rivals.v2_plan(of, of.Phase.DECODE, 16, 16, 4096, 4096)
    assert (plan.a_family.value, plan.b_family.value, plan.overlap.value) == ("all_slots", "per_row", "a")
    plan = rivals.v2_plan(of, of.Phase.DECODE, 64, 64, 4096, 6144)
    assert plan.a_tiles["SPLIT_K"] == 16
    assert rivals.v2_plan(of, of.Phase.PREFILL, 4096, 16, 4096, 4096).overlap.value == "none"
    monkeypatch.setattr(of, "plan_rows", [])
    assert rivals.v2_plan(of, of.Phase.DECODE, 1, 8, 64, 64) == of.plans._decode_default()


def test_nothing_stays_planted():
    import importlib.util
    import sys

    assert rivals.vllm() is not None
    assert rivals.sglang() is not None
    assert not [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang", "msgspec", "pydantic")]
    assert importlib.util.find_spec("vllm") is None
