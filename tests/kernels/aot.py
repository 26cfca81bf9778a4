"""Compiling a launch for a device that is not at hand, and what the result takes of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lora_fuse.kernels.launch import Launch

TARGETS = {  # and how much shared memory a program may have
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


def specialization(launch: Launch, target: GPUTarget) -> tuple[Any, ...]:
    """What Triton itself would choose a compiled kernel by, had it this device; the values of constexprs among it."""
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, make_backend(target))
    _, found, options = bind(*launch.args, **launch.constexprs, **launch.options)
    return launch.kernel, tuple(found), tuple(sorted(options.items()))


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """As a launch on that device would."""
    signature, constants, attributes = {}, {}, {}
    backend, (_, found, _) = make_backend(target), specialization(launch, target)
    for i, (name, (kind, what)) in enumerate(zip(launch.kernel.arg_names, found, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[(i,)] = what
        elif what:
            attributes[(i,)] = backend.parse_attr(what)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def products(kernel: Any) -> set[tuple[str, ...]]:
    """How each kind of product in a kernel adds up, of what hangs on no block's size: its instruction's shape, and
    how many entries in a row a thread holds of an operand, which decides which columns an instruction gets."""
    text, found = kernel.asm["ttgir"], set()
    layouts = dict(re.findall(r"(#\w+) = (#ttg\.(?:nvidia_mma|amd_mfma|blocked)<.*>)", text))
    for line in re.findall(r"tt\.dot .*", text):
        layout = layouts[re.findall(r"parent = (#\w+)", line)[0]]
        shape = re.findall(r"instrShape = (\[.*?\])", layout)
        found.add((layout.split("<")[0], *shape, *re.findall(r"kWidth = \d+", line)))
    return found


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    spilled: int
    shared: int
    matrix_instructions: frozenset[str]


def resources(kernel: Any, target: GPUTarget, scratch: Path) -> Resources:
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        # Scalar registers are spilled into lanes of vector registers: no memory.
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
        return Resources(spilled, kernel.metadata.shared, frozenset(re.findall(r"v_mfma\w+", text)))
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in shown
    spilled = len(re.findall(r"\b(?:STL|LDL)\b", shown))  # instructions on local memory
    found = re.findall(r"(mma\.sync\.aligned\.\w+|wgmma\.mma_async\S+|tcgen05\.mma\S+)", kernel.asm["ptx"])
    return Resources(spilled, kernel.metadata.shared, frozenset(found))
