"""Every kind of plan compiled ahead of time for four devices, with no device at hand: resources and instructions."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_fuse.kernels.configs import tile_capacity
from lora_fuse.kernels.multi_lora import Launch, launches

TARGETS = {  # and how much shared memory a program may have
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
CASES = [  # rows, in, out, max_rank, slots, dtype, mixed
    pytest.param(16, 4096, 4096, 16, 8, torch.bfloat16, True, id="decode-mixed"),
    pytest.param(64, 14336, 4096, 32, 64, torch.bfloat16, False, id="decode-many"),
    pytest.param(16, 4096, 28672, 8, 8, torch.float16, False, id="decode-fp16"),
    pytest.param(4096, 4096, 6144, 16, 8, torch.bfloat16, False, id="prefill"),
    pytest.param(4096, 4096, 4096, 512, 8, torch.bfloat16, False, id="prefill-rank-512"),
    pytest.param(64, 4096, 4096, 64, 8, torch.float16, False, id="fp16-rank-64"),
    pytest.param(32, 384, 1536, 100, 8, torch.float32, True, id="fp32"),
]
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


def arguments(rows: int, in_features: int, out_features: int, rank: int, slots: int, dtype: torch.dtype, mixed: bool):
    def of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pool = (of(slots * rank, in_features, dtype=dtype), of(slots * rank, out_features, dtype=dtype), of(slots))
    routing = (of(rows), of(rows, dtype=torch.float32) if mixed else None, of(slots + 1))
    mixes = (of(rows + 1), of(rows)) if mixed else (None, None)
    out, x = of(rows, out_features, dtype=dtype), of(rows, in_features, dtype=dtype)
    tiles = of(tile_capacity(rows, slots), 4)
    return out, x, (*pool, of(slots, dtype=torch.float32)), (*routing, *mixes), tiles


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """With what a launch specialises on: 1, multiples of 16, None."""
    signature, constants, attributes = {}, {}, {}
    values = iter(launch.args)
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.constexprs[name] if name in launch.constexprs else next(values)
        if name in launch.constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    assert next(values, None) is None
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    spilled: int
    shared: int
    matrix_instructions: frozenset[str]


def resources(kernel: Any, target: GPUTarget, scratch: Path) -> Resources:
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
        return Resources(spilled, kernel.metadata.shared, frozenset(re.findall(r"v_mfma\w+", text)))
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in shown
    spilled = len(re.findall(r"\b(?:STL|LDL)\b", shown))  # instructions on local memory
    found = re.findall(r"(mma\.sync\.aligned\.\w+|wgmma\.mma_async\S+|tcgen05\.mma\S+)", kernel.asm["ptx"])
    return Resources(spilled, kernel.metadata.shared, frozenset(found))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", os.fspath(tmp_path / "triton"))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rows", "in_features", "out_features", "rank", "slots", "dtype", "mixed"), CASES)
def test_plans_fit_the_device(name, rows, in_features, out_features, rank, slots, dtype, mixed, tmp_path):
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
