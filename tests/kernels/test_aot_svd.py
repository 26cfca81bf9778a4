"""The SVDs' kernels compiled ahead of time for four devices: no spills, matrix instructions, none of wgmma's family."""

from __future__ import annotations

import itertools

import pytest
import torch
from aot import TARGETS, compiled, resources
from torch import Tensor

from lora_fuse.kernels.normals import normals_launch
from lora_fuse.kernels.sketch import Source, product_launch, squares_launch

SIDE = 4096


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dense(dtype: torch.dtype) -> Source:
    return Source((1, SIDE, SIDE), of(1, SIDE, SIDE, dtype=dtype))


def difference(a: torch.dtype, b: torch.dtype) -> Source:
    return Source((1, SIDE, SIDE), of(1, SIDE, SIDE, dtype=a), of(1, SIDE, SIDE, dtype=b), (1.0, -1.0))


def pruned() -> Source:
    words = of(SIDE, SIDE // 32, dtype=torch.int32)
    return Source((1, SIDE, SIDE), of(1_700_000), words=words, starts=words)


SOURCES = {
    "fp32": dense(torch.float32),
    "bf16": dense(torch.bfloat16),
    "fp16": dense(torch.float16),
    "difference": difference(torch.bfloat16, torch.bfloat16),
    "pruned": pruned(),
}


WAYS = ("sketch", "X Q", "X^T Q")
QUICK = {  # the others take a minute and a half
    ("sm_90", "difference", "sketch"),
    ("sm_90", "bf16", "X Q"),
    ("sm_90", "fp32", "X^T Q"),
    ("sm_90", "pruned", "X Q"),
    ("sm_80", "bf16", "X^T Q"),
    ("sm_100", "fp32", "X Q"),
    ("gfx942", "difference", "X^T Q"),
    ("gfx942", "bf16", "X Q"),
}
CASES = [
    pytest.param(*case, id=" ".join(case), marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(TARGETS, SOURCES, WAYS)
]


@pytest.mark.parametrize(("name", "source", "way"), CASES)
def test_products_fit_the_device(name, source, way, tmp_path, own_cache):
    target, shared = TARGETS[name]
    transposed = way == "X^T Q"
    q = None if way == "sketch" else of(1, 72, SIDE)
    launch, _ = product_launch(SOURCES[source], q, 72, transposed, (5, 0), target.backend)
    found = resources(compiled(launch, target), target, tmp_path)
    assert found.spilled == 0
    assert found.shared <= shared
    assert found.matrix_instructions
    assert not any("wgmma" in i or "tcgen05" in i for i in found.matrix_instructions)
    if target.backend == "cuda":
        assert found.matrix_instructions == {
            "mma.sync.aligned.m16n8k16" if source == "bf16" else "mma.sync.aligned.m16n8k8"
        }


@pytest.mark.parametrize("name", TARGETS)
def test_draws_and_norms_fit_the_device(name, tmp_path, own_cache):
    target, shared = TARGETS[name]
    for launch in (normals_launch(of(1, SIDE, 72), 3, 1), squares_launch(SOURCES["difference"])[0]):
        found = resources(compiled(launch, target), target, tmp_path)
        assert found.spilled == 0
        assert found.shared <= shared
