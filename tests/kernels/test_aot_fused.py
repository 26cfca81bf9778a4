"""The linear layer and its LoRA part in one launch, compiled ahead of time for NVIDIA's devices: resources, and loads
that stay on the way while a program waits."""

from __future__ import annotations

import re

import pytest
import torch
from aot import TARGETS, compiled, resources
from torch import Tensor

from lora_fuse.kernels.configs import tile_capacity
from lora_fuse.kernels.fused_linear import launch, num_counters

CASES = [  # rows, in, out, slots, dtype, mixed
    pytest.param(16, 4096, 4096, 8, torch.bfloat16, False, id="o"),
    pytest.param(1, 4096, 28672, 64, torch.bfloat16, True, id="one-row"),
    pytest.param(32, 4096, 6144, 8, torch.float16, True, id="fp16"),
    pytest.param(64, 14336, 4096, 64, torch.bfloat16, True, id="shared-tiles"),
]


def made(rows: int, in_features: int, out_features: int, slots: int, dtype: torch.dtype, mixed: bool, rank: int = 16):
    def of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pool = (of(slots * rank, in_features, dtype=dtype), of(slots * rank, out_features, dtype=dtype), of(slots))
    routing = (of(rows), of(rows, dtype=torch.float32) if mixed else None, of(slots + 1))
    mixes = (of(rows + 1), of(rows)) if mixed else (None, None)
    y, x = of(rows, out_features, dtype=dtype), of(rows, in_features, dtype=dtype)
    weight, bias = of(out_features, in_features, dtype=dtype), of(out_features, dtype=dtype) if mixed else None
    tiles, counters = of(tile_capacity(rows, slots), 4), of(num_counters(out_features))
    return launch(y, x, weight, bias, (*pool, of(slots, dtype=torch.float32)), (*routing, *mixes), tiles, counters)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("rows", "in_features", "out_features", "slots", "dtype", "mixed"), CASES)
def test_plans_fit_the_device(name, rows, in_features, out_features, slots, dtype, mixed, tmp_path, own_cache):
    target, shared = TARGETS[name]
    kernel = compiled(made(rows, in_features, out_features, slots, dtype, mixed), target)
    found = resources(kernel, target, tmp_path)
    assert found.spilled == 0
    assert 2 * (found.shared + 1024) <= shared or name == "sm_80"  # two programs to a processor
    assert found.shared <= shared
    # the one family that all heights share: what the bits of a row rest on
    assert found.matrix_instructions == {"mma.sync.aligned.m16n8k16"}
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", kernel.asm["ptx"])]
    assert max(waits) >= 6  # groups, of W or of x, that the product does not wait for
    loop = loop_around(kernel.asm["ttgir"], "atomic_rmw add, acquire, gpu")
    assert "async_copy_global_to_local" in loop  # the next ones are on their way while it waits for h
    assert "tt.dot" in loop


def loop_around(ttgir: str, op: str) -> str:
    """The text of the ``for`` that an op stands in."""
    lines = ttgir.splitlines()
    at = next(i for i, line in enumerate(lines) if op in line)
    depth = len(lines[at])
    for first in range(at, -1, -1):
        indent = len(lines[first]) - len(lines[first].lstrip())
        depth = min(depth, indent)
        if "scf.for" in lines[first] and indent <= depth:
            last = next(i for i in range(at, len(lines)) if lines[i].startswith(" " * indent + "}"))
            return "\n".join(lines[first:last])
    raise AssertionError(f"{op} is in no loop")
