"""The kernels of a selection by magnitude, compiled ahead of time for four devices with none at hand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from aot import TARGETS, compiled, resources

from lora_fuse.kernels.topk import select
from lora_fuse.kernels.topk_sparse import Compact, Parts

CASES = [  # dtypes, shape, scope, form, minus
    pytest.param(["bfloat16"], (4096, 4096), "tensor", "mask", False, id="bf16-mask"),
    pytest.param(["float32"], (4096, 4096), "tensor", "dense", True, id="fp32-pruned-difference"),
    pytest.param(
        ["float16", "float32"], (4096, 4096), "global", "dense", False, id="mixed-global", marks=pytest.mark.slow
    ),
    pytest.param(["float32"], (4096, 4096), "row", "dense", False, id="fp32-rows"),
    pytest.param(["bfloat16"], (4096, 8192), "row", "mask", True, id="bf16-rows-difference"),
]


def launches(dtypes, shape, scope, form, with_minus, backend):
    def of(dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    xs = [of(getattr(torch, name)) for name in dtypes]
    n = shape[1] if scope == "row" else shape[0] * shape[1]
    outs = [of(torch.bool if form == "mask" else x.dtype) for x in xs]
    shapes, ks = [shape] * len(xs), [n // 10] * len(xs)
    return select(xs, xs if with_minus else None, shapes, scope, ks, form, outs, True, backend).launches


QUICK = ("sm_90", "gfx942")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TARGETS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtypes", "shape", "scope", "form", "with_minus"), CASES)
def test_kernels_fit_the_device(name, dtypes, shape, scope, form, with_minus, tmp_path, own_cache):
    target, shared = TARGETS[name]
    made = launches(dtypes, shape, scope, form, with_minus, target.backend)
    on_chip = scope == "row"
    assert [launch.kernel.__name__ for launch in made] == (
        ["_check_kernel", "_rows_kernel"]
        if on_chip
        else [
            *["_sample_kernel"] * len(dtypes),
            *["_count_kernel"] * len(dtypes),
            "_pick_kernel",
            "_cut_kernel",
            *["_write_kernel"] * len(dtypes),
        ]
    )
    for launch in {launch.kernel.__name__: launch for launch in made}.values():
        kernel = launch.kernel.__name__
        built = compiled(launch, target)
        found = resources(built, target, tmp_path)
        spilled = found.spilled
        if target.backend == "hip":  # scalar registers go to lanes of vector registers, not to memory
            spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"])[1])
        assert spilled == 0, kernel
        assert found.shared <= min(shared, 8 << 10), kernel  # entries stay in the threads that loaded them
        if kernel in ("_count_kernel", "_write_kernel", "_rows_kernel", "_check_kernel"):
            loads, stores = accesses(built, target, tmp_path)
            assert 16 in loads, kernel
            if kernel in ("_write_kernel", "_rows_kernel"):
                assert max(stores) >= (16 if target.backend == "cuda" else 8), kernel
            elif target.backend == "cuda":  # collected keys lie anywhere
                assert max(stores, default=0) <= 8, kernel
        if target.backend == "hip" and kernel in ("_sample_kernel", "_count_kernel", "_pick_kernel", "_cut_kernel"):
            assert counted_after_all_stores(built.asm["amdgcn"]), kernel


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "scope", "form"), [("bfloat16", "tensor", "columns"), ("float32", "row", "bitmap")])
def test_compact_forms_fit_the_device(name, dtype, scope, form, tmp_path, own_cache):
    target, shared = TARGETS[name]
    x = torch.empty(4096, 4096, dtype=getattr(torch, dtype), device="meta")
    made = select([x], [x], [(4096, 4096)], scope, [400], backend=target.backend)
    compact = Compact(made, [(4096, 4096)], scope)
    starts = torch.empty(4097, dtype=torch.int64, device="meta")
    compact.ends = starts
    places = starts.short().view(torch.uint16) if form == "columns" else None
    parts = Parts(x.view(-1), starts, places, None if form == "columns" else starts.byte())
    for launch in (*compact.counting(), *compact.writing([parts], False)):
        found = resources(compiled(launch, target), target, tmp_path)
        assert found.spilled == 0, launch.kernel.__name__
        assert found.shared <= shared, launch.kernel.__name__


def counted_after_all_stores(text: str) -> bool:
    """Whether each wave waits for its stores, and then for the others, before the program is counted."""
    _, *after = re.split(r"s_waitcnt vmcnt\(0\)\n\s*;;#ASMEND", text)
    until = [re.split("(?:global|buffer)_atomic", rest)[0] for rest in after]
    return len(until) == 1 and "s_barrier" in until[0] and not re.search("(?:global|buffer)_store", until[0])


def accesses(built, target, scratch: Path) -> tuple[set[int], set[int]]:
    """Bytes of a thread's wider loads, and of its stores."""
    if target.backend == "hip":
        text = built.asm["amdgcn"]
        loads, stores = (re.findall(rf"(?:global|buffer)_{what}_dwordx(\d)", text) for what in ("load", "store"))
        return {4 * int(n) for n in loads}, {4 * int(n) for n in stores}
    cubin = scratch / "accesses.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    loads, stores = (re.findall(rf"\b{what}\.E[.\w]*?\.(64|128)\b", shown) for what in ("LDG", "STG"))
    return {int(n) // 8 for n in loads}, {int(n) // 8 for n in stores}


@pytest.mark.parametrize("scope", ["tensor", pytest.param("row", marks=pytest.mark.slow)])
def test_many_tensors(scope, tmp_path, own_cache):
    """Launches serve as many as a program can look through; one for all of 3000 would spill its registers."""
    target, _ = TARGETS["sm_90"]
    shape = (64, 64) if scope == "tensor" else (4, 512)
    made = launches(["float32"] * 3000, shape, scope, "dense", False, target.backend)
    kernels = {(each.kernel, each.constexprs["TENSORS"]): each for each in made}
    assert {tensors for _, tensors in kernels} == {512}
    assert len(made) == 6 * len(kernels)
    for launch in kernels.values():
        assert resources(compiled(launch, target), target, tmp_path).spilled == 0, launch.kernel.__name__
