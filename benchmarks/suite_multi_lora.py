"""The same shapes as bench_multi_lora under pytest-benchmark: ``pytest benchmarks/suite_multi_lora.py``.

A group per shape; ``extra_info`` carries bytes, flops and the fraction of this machine's measured roofline.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from benchmarks import roofline
from benchmarks.bench_multi_lora import Case, Shape, all_shapes, arithmetic_of
from benchmarks.rivals import RIVALS
from lora_fuse import _cpu

machine = functools.cache(roofline.measure)


@functools.lru_cache(maxsize=1)  # a case holds hundreds of megabytes; its variants run one after another
def checked_case(shape: Shape) -> Case:
    case = Case(shape, list(RIVALS))
    case.check()
    return case


@pytest.mark.parametrize("variant", ["lora_fuse", *RIVALS])
@pytest.mark.parametrize("shape", all_shapes(quick=True), ids=lambda s: s.id)
def test_multi_lora(benchmark, shape: Shape, variant: str) -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        case = checked_case(shape)
        sets = itertools.cycle(range(case.sets))
        benchmark.group = shape.id
        benchmark.pedantic(lambda: case.variants[variant](next(sets)), rounds=30, warmup_rounds=2)
    floor = machine().floor_us(shape.nbytes, shape.flops, arithmetic_of(shape.dtype, _cpu.isa()))
    benchmark.extra_info |= {
        "bytes": shape.nbytes,
        "flops": shape.flops,
        "isa": _cpu.isa(),
        "of_roofline": floor / (benchmark.stats.stats.median * 1e6),
    }
