"""What kernels compute under ``override_plans``, in Triton's CPU interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import make_case

import lora_fuse as lf
from lora_fuse.kernels.configs import plan
from lora_fuse.kernels.multi_lora import Slice, launches
from lora_fuse.kernels.routing import build_tiles


@pytest.fixture(autouse=True)
def shipped_again():
    yield
    lf.override_plans(None)


def run(case, chosen=None):
    routing = case.routing
    tiles, out = build_tiles(routing.rows, routing.segment_starts), case.out.clone()
    for each in launches(out, case.x, [Slice(*case.pool.tensors)], routing.tensors, tiles, "cuda", chosen):
        each.run()
    return out


def test_the_bits_of_a_row_under_rules():
    """The same where only the batch's share of a plan changes; right where sums are cut elsewhere."""
    case = make_case(20, 1300, 130, 20, 3, torch.float32, True)
    want = run(case)
    lf.override_plans([{"shrink": {"planes": 1}, "expand": {"block_n": 32, "steps": 2}}])
    assert torch.equal(run(case), want)
    lf.override_plans([{"shrink": {"split_len": 256, "block_k": 32}}])
    assert case.error(run(case)) <= 2 * case.torch_error + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ahead_has_the_same_bits(dtype, monkeypatch):
    """With the device's signals, which the interpreter has none of, left out. fp16 has B before it waits."""
    from triton.language.extra import cuda

    waits = []
    monkeypatch.setattr(cuda, "gdc_wait", lambda: waits.append("wait"))
    monkeypatch.setattr(cuda, "gdc_launch_dependents", lambda: waits.append("go"))
    for mixed, rank, rows in ((False, 20, 20), (True, 20, 9), (False, 100, 5)):
        case = make_case(rows, 300, 130, rank, 3, getattr(torch, dtype), mixed)
        shipped = plan(300, 130, rank, case.routing.num_pairs, 3, dtype, "cuda", 1, rows)
        for block_n, steps in ((64, 1), (16, 3)):
            plain = replace(shipped, expand=replace(shipped.expand, block_n=block_n, steps=steps))
            want = run(case, plain)
            assert not waits
            assert torch.equal(run(case, replace(plain, expand=replace(plain.expand, ahead=True))), want)
            assert set(waits) == {"wait", "go"}
            waits.clear()
