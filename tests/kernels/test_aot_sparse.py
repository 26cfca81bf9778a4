"""The sparse product's plans compiled ahead of time for four devices: resources, instructions, widths of loads."""

from __future__ import annotations

import pytest
import torch
from aot import TARGETS, compiled, resources
from sparse_launches import of

from lora_fuse.adapters.sparse_runs import TABLE_FIELDS
from lora_fuse.kernels.configs import tile_capacity
from lora_fuse.kernels.exchange import launch as exchange_launch
from lora_fuse.kernels.sparse_delta import launches
from lora_fuse.ops.exchange import PIECE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # rows, in, out, dtype, mixed, kernels
    pytest.param(8, 4096, 4096, BF16, False, "gather", id="decode"),
    pytest.param(4096, 4096, 4096, BF16, False, "expand", id="prefill"),
    pytest.param(64, 14336, 4096, BF16, True, "gather expand mix", id="wide-mixed"),
    pytest.param(300, 4096, 1030, FP16, False, "gather expand", id="fp16", marks=pytest.mark.slow),
    pytest.param(32, 384, 1536, FP32, True, "gather expand mix", id="fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rows", "in_features", "out_features", "dtype", "mixed", "kernels"), CASES)
def test_plans_fit_the_device(name, rows, in_features, out_features, dtype, mixed, kernels, tmp_path, own_cache):
    target, shared = TARGETS[name]
    slots, mixes = 8, (of(rows + 1), of(rows)) if mixed else (None, None)
    routing = (of(rows), of(rows, dtype=FP32) if mixed else None, of(slots + 1), *mixes)
    out, x = of(rows, out_features, dtype=dtype), of(rows, in_features, dtype=dtype)
    table, tiles = of(slots, TABLE_FIELDS, dtype=torch.int64), of(tile_capacity(rows, slots), 4)
    asked = launches(out, x, table, routing, tiles, target.backend)
    made = {launch.kernel.__name__.removesuffix("_kernel").rpartition("_")[2]: launch for launch in asked}
    assert (set(made) == {"gather", "expand"}) == (rows > 8 and not mixed)
    for kind in kernels.split():
        kernel = compiled(made[kind], target)
        found = resources(kernel, target, tmp_path)
        assert found.spilled == 0, kind
        assert found.shared <= shared, kind
        dots = kind == "expand" and (dtype != FP32 or target.backend == "hip")
        assert bool(found.matrix_instructions) == dots, kind
        if kind == "gather" and target.backend == "cuda":  # gaps and values, 16 bytes at a time
            assert kernel.asm["ptx"].count("ld.global.v4.b32") >= 3


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("back", [False, True])
def test_the_exchange_fits_the_device(name, back, tmp_path, own_cache):
    target, _ = TARGETS[name]
    entries, owners, arena = of(5, 8, dtype=torch.int64), of(100), of(1000, dtype=torch.int16)
    assert (
        resources(compiled(exchange_launch(entries, owners, arena, back, PIECE), target), target, tmp_path).spilled == 0
    )
