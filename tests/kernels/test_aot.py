"""Every kind of plan compiled ahead of time for four devices, with no device at hand: resources and instructions."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from aot import TARGETS, compiled, products, resources
from torch import Tensor

from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.kernels.configs import plan, tile_capacity
from lora_fuse.kernels.multi_lora import Slice, expand_launches, launches

QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)
CASES = [  # rows, in, widths of the slices, max_rank, slots, dtype; captured: weights, mixes and padding
    pytest.param(16, 4096, (4096,), 16, 8, torch.bfloat16, True, id="decode-captured"),
    pytest.param(64, 14336, (4096,), 32, 64, torch.bfloat16, False, id="decode-many"),
    pytest.param(16, 4096, (28672,), 8, 8, torch.float16, False, id="decode-fp16"),
    pytest.param(16, 4096, QKV, 16, 9, torch.bfloat16, True, id="decode-qkv-captured"),
    pytest.param(64, 4096, GATE_UP, 64, 9, torch.bfloat16, True, id="decode-gate-up-captured"),
    pytest.param(4096, 4096, (6144,), 16, 8, torch.bfloat16, False, id="prefill"),
    pytest.param(4096, 4096, QKV, 64, 8, torch.bfloat16, False, id="prefill-qkv"),
    pytest.param(4096, 4096, (4096,), 512, 8, torch.bfloat16, False, id="prefill-rank-512"),
    pytest.param(64, 4096, (4096,), 64, 8, torch.float16, False, id="fp16-rank-64"),
    pytest.param(32, 384, (1536,), 100, 8, torch.float32, True, id="fp32-captured"),
    pytest.param(64, 384, (384, 384, 384), 64, 8, torch.float32, False, id="fp32-qkv"),
]


def of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(rows, in_features, widths, rank, slots, dtype, captured):
    """Of ``launches``, as a call on a device has them."""
    pools, start = [], 0
    for width in widths:
        a, b = (of(slots * rank, n, dtype=dtype) for n in (in_features, width))
        pools.append(Slice(a, b, of(slots), of(slots, dtype=torch.float32), start))
        start += width
    if captured:
        layout = SlabLayout(rows, 4, slots)
        *routing, tiles = layout.split(of(layout.size))
    else:
        routing, tiles = (of(rows), None, of(slots + 1), None, None), of(tile_capacity(rows, slots), 4)
    return of(rows, start, dtype=dtype), of(rows, in_features, dtype=dtype), pools, routing, tiles


QUICK = ("decode-qkv-captured", "prefill-qkv", "fp32-qkv")  # on every target; the others on one, and on all when slow
COMPILED = [
    pytest.param(
        name,
        *case.values,
        id=f"{name}-{case.id}",
        marks=() if name == "sm_90" or case.id in QUICK else pytest.mark.slow,
    )
    for name in TARGETS
    for case in CASES
]


@pytest.mark.parametrize(("name", "rows", "in_features", "widths", "rank", "slots", "dtype", "captured"), COMPILED)
def test_plans_fit_the_device(name, rows, in_features, widths, rank, slots, dtype, captured, tmp_path, own_cache):
    target, shared = TARGETS[name]
    made = launches(*arguments(rows, in_features, widths, rank, slots, dtype, captured), target.backend)
    assert [launch.kernel.__name__ for launch in made] == ["shrink_kernel", "expand_kernel"]
    for launch in made:
        found = resources(compiled(launch, target), target, tmp_path)
        kernel = launch.kernel.__name__
        assert found.spilled == 0, kernel
        assert found.shared <= shared, kernel
        assert bool(found.matrix_instructions) == (dtype != torch.float32 or target.backend == "hip"), kernel
        # the one family that tiles of every height share: what the bits of a row rest on
        assert not any("wgmma" in i or "tcgen05" in i for i in found.matrix_instructions), kernel


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("rows", "widths", "rank", "slots", "dtype", "captured"),
    [
        pytest.param(16, (4096,), 16, 9, torch.bfloat16, True, id="captured"),
        pytest.param(256, (4096, 1024, 1024), 64, 9, torch.bfloat16, False, id="qkv"),
        pytest.param(64, (4096,), 16, 9, torch.float16, False, id="fp16", marks=pytest.mark.slow),
    ],
)
def test_expands_beside_the_weight(name, rows, widths, rank, slots, dtype, captured, tmp_path, own_cache):
    """h lies behind y, in its dtype: one matrix instruction a block, no parts."""
    target, shared = TARGETS[name]
    _, _, slices, routing, tiles = arguments(rows, 4096, widths, rank, slots, dtype, captured)
    wide = torch.empty(rows, sum(widths) + len(widths) * slots * rank, dtype=dtype, device="meta")
    made = expand_launches(wide, wide[:, sum(widths) :], slices, routing, tiles, target.backend)
    assert len(made) == 1
    found = resources(compiled(made[0], target), target, tmp_path)
    assert found.spilled == 0
    assert found.shared <= shared
    assert found.matrix_instructions
    assert not any("wgmma" in i or "tcgen05" in i for i in found.matrix_instructions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_sum_is_in_an_order_that_the_batch_decides(dtype, own_cache):
    """How Triton adds up along a dimension hangs on how many columns a thread has, and that on the number of rows. So
    matrix instructions do it, and loops."""
    target, _ = TARGETS["sm_90"]
    for launch in launches(*arguments(16, 4096, (4096,), 20, 8, dtype, True), "cuda"):
        reduced = re.findall(r'"tt\.reduce".*?tt\.reduce\.return', compiled(launch, target).asm["ttir"], re.DOTALL)
        assert not [r for r in reduced if "arith.addf" in r], launch.kernel.__name__


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_add_up_alike_in_batches_of_any_size(name, dtype, own_cache):
    """Tiles of 16 rows and of 32, narrow blocks of columns and wide ones: what a row's bits rest on."""
    target, _ = TARGETS[name]
    found = {}
    for rows in (16, 1100):
        for launch in launches(*arguments(rows, 4096, (4096,), 64, 8, dtype, rows == 16), target.backend):
            found.setdefault(launch.kernel.__name__, []).append(products(compiled(launch, target)))
    assert all(few == many and len(few) == 1 for few, many in found.values()), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_add_up_alike_ahead(dtype, own_cache, tmp_path):
    """A rule may start some batches ahead, and others not."""
    target, _ = TARGETS["sm_90"]
    for rank in (16, 64):
        given = arguments(16, 4096, (4096,), rank, 8, dtype, rank == 16)
        made = plan(4096, 4096, rank, given[3][0].shape[0], 8, str(dtype).removeprefix("torch."), "cuda", 1, 16)
        kernels = []
        for ahead, steps in ((False, 1), (True, 1), (True, 4)):
            chosen = replace(made, expand=replace(made.expand, ahead=ahead, steps=steps))
            kernels.append(compiled(launches(*given, "cuda", chosen)[1], target))
            assert resources(kernels[-1], target, tmp_path).spilled == 0
        assert products(kernels[0]) == products(kernels[1]) == products(kernels[2])


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("rows", "widths", "rank", "dtype", "captured"),
    [
        pytest.param(16, (4096,), 16, torch.bfloat16, True, id="captured", marks=pytest.mark.slow),
        pytest.param(16, (28672,), 64, torch.float16, False, id="fp16"),
        pytest.param(64, QKV, 100, torch.bfloat16, False, id="qkv-rank-100", marks=pytest.mark.slow),
    ],
)
def test_an_expand_that_starts_ahead(name, rows, widths, rank, dtype, captured, tmp_path, own_cache):
    """The shrink lets it start; y and B are under way when it waits, and h is not."""
    target, shared = TARGETS[name]
    given = arguments(rows, 4096, widths, rank, 9, dtype, captured)
    made = plan(
        4096, sum(widths), rank, given[3][0].shape[0], 9, str(dtype).removeprefix("torch."), "cuda", len(widths)
    )
    chosen = replace(made, expand=replace(made.expand, ahead=True))
    shrink, expand = (compiled(launch, target) for launch in launches(*given, "cuda", chosen))
    assert expand.metadata.launch_pdl
    assert not shrink.metadata.launch_pdl
    assert "griddepcontrol.launch_dependents" in shrink.asm["ptx"]
    found = resources(expand, target, tmp_path)
    assert found.spilled == 0
    assert found.shared <= shared
    pieces = re.split(r"griddepcontrol\.wait", expand.asm["ptx"])
    assert len(pieces) >= 3 + captured  # programs with nothing to do wait, too
    at = max(i for i, piece in enumerate(pieces) if "mma.sync" in piece)
    assert "ld.global" in pieces[at].split("mma.sync")[0]
    if rank <= 64:
        assert re.search(r"ld\.global\S*\.v4\.b32", pieces[at - 1])
