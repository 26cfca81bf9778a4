"""Every kind of plan compiled ahead of time for four devices, with no device at hand: resources and instructions."""

from __future__ import annotations

import pytest
import torch
from aot import TARGETS, compiled, resources
from torch import Tensor

from lora_fuse.kernels.configs import tile_capacity
from lora_fuse.kernels.multi_lora import expand_launches, launches

CASES = [  # rows, in, out, max_rank, slots, dtype, mixed
    pytest.param(16, 4096, 4096, 16, 8, torch.bfloat16, True, id="decode-mixed"),
    pytest.param(64, 14336, 4096, 32, 64, torch.bfloat16, False, id="decode-many"),
    pytest.param(16, 4096, 28672, 8, 8, torch.float16, False, id="decode-fp16"),
    pytest.param(4096, 4096, 6144, 16, 8, torch.bfloat16, False, id="prefill"),
    pytest.param(4096, 4096, 4096, 512, 8, torch.bfloat16, False, id="prefill-rank-512"),
    pytest.param(64, 4096, 4096, 64, 8, torch.float16, False, id="fp16-rank-64"),
    pytest.param(32, 384, 1536, 100, 8, torch.float32, True, id="fp32"),
]


def arguments(rows: int, in_features: int, out_features: int, rank: int, slots: int, dtype: torch.dtype, mixed: bool):
    def of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pool = (of(slots * rank, in_features, dtype=dtype), of(slots * rank, out_features, dtype=dtype), of(slots))
    routing = (of(rows), of(rows, dtype=torch.float32) if mixed else None, of(slots + 1))
    mixes = (of(rows + 1), of(rows)) if mixed else (None, None)
    out, x = of(rows, out_features, dtype=dtype), of(rows, in_features, dtype=dtype)
    tiles = of(tile_capacity(rows, slots), 4)
    return out, x, (*pool, of(slots, dtype=torch.float32)), (*routing, *mixes), tiles


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rows", "in_features", "out_features", "rank", "slots", "dtype", "mixed"), CASES)
def test_plans_fit_the_device(name, rows, in_features, out_features, rank, slots, dtype, mixed, tmp_path, own_cache):
    target, shared = TARGETS[name]
    made = launches(*arguments(rows, in_features, out_features, rank, slots, dtype, mixed), target.backend)
    assert len(made) == (3 if mixed else 2)
    for launch in made:
        found = resources(compiled(launch, target), target, tmp_path)
        kernel = launch.kernel.__name__
        assert found.spilled == 0, kernel
        assert found.shared <= shared, kernel
        dots = kernel in ("_shrink_kernel", "_expand_kernel") and (dtype != torch.float32 or target.backend == "hip")
        assert bool(found.matrix_instructions) == dots, kernel
        # the one family that tiles of every height share: what the bits of a row rest on
        assert not any("wgmma" in i or "tcgen05" in i for i in found.matrix_instructions), kernel


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("rows", "out_features", "rank", "slots", "dtype", "mixed"),
    [
        pytest.param(16, 4096, 16, 9, torch.bfloat16, True, id="mixed"),
        pytest.param(256, 6144, 64, 9, torch.bfloat16, False, id="rank-64"),
        pytest.param(64, 4096, 16, 9, torch.float16, False, id="fp16"),
    ],
)
def test_expands_beside_the_weight(name, rows, out_features, rank, slots, dtype, mixed, tmp_path, own_cache):
    """h lies behind y, in its dtype: one matrix instruction a block, no parts."""
    target, shared = TARGETS[name]
    _, _, pool, routing, tiles = arguments(rows, 4096, out_features, rank, slots, dtype, mixed)
    wide = torch.empty(rows, out_features + slots * rank, dtype=dtype, device="meta")
    made = expand_launches(wide[:, :out_features], wide[:, out_features:], pool[1:], routing, tiles, target.backend)
    assert len(made) == (2 if mixed else 1)
    for launch in made:
        found = resources(compiled(launch, target), target, tmp_path)
        assert found.spilled == 0
        assert found.shared <= shared
        assert bool(found.matrix_instructions) == (launch.kernel.__name__ == "_expand_kernel")
        assert not any("wgmma" in i or "tcgen05" in i for i in found.matrix_instructions)
