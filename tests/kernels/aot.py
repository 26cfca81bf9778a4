"""Compiling a launch for a device that is not at hand, and what the result takes of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_fuse.kernels.launch import Launch

TARGETS = {  # and how much shared memory a program may have
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


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
