"""Launches by the driver's own call, all of an op in one call into C++. Opt-in, by ``LORA_FUSE_DIRECT_LAUNCH=1``.

Triton's launcher parses its arguments anew for every launch. What the driver wants is known beforehand: addresses and
integers in the order of the kernel's parameters that are no constants, and two null pointers for scratch memory that
these kernels have none of.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from lora_fuse import _cpu

if TYPE_CHECKING:
    from lora_fuse.kernels.launch import Launch, Prepared

_WIDTHS = {"i32": 32, "i64": 64}
_HIDDEN = 2  # parameters that Triton adds: global and profile scratch


def direct_launches(
    made: Prepared,
    launches: Sequence[Launch],
    kernels: Sequence[Any],
    hooked: Callable[[], bool],
    address: int | None = None,
) -> Prepared | _cpu.DirectLaunches:
    """The same launches without Triton's launcher, or ``made`` itself where they need what only that does.

    Args:
        hooked: whether somebody wants to see launches, which only Triton's launcher shows.
        address: of ``cuLaunchKernel``; None: the driver's.
    """
    address = _driver() if address is None else address
    if address is None:
        return made
    parameters = []
    for kernel, places in zip(kernels, made.arguments.places, strict=True):
        found = parameters_of(kernel.src.signature, places)
        if found is None or not _is_plain(kernel.metadata):
            return made
        parameters.append(found)
    empty = [partial(torch.empty, s, dtype=dtype, device=made.device) for s, dtype in made.arguments.scratch]
    stream, current = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    direct = _cpu.DirectLaunches(address, made.device.index, made, hooked, current, stream, empty)
    for launch, kernel, found in zip(launches, kernels, parameters, strict=True):
        x, y, z, *_ = (*launch.grid, 1, 1)
        direct.add(kernel.function, (x, y, z), 32 * kernel.metadata.num_warps, kernel.metadata.shared, found)
    return direct


def parameters_of(signature: dict[str, str], places: Sequence[tuple[int, Any]]) -> list[tuple[int, int]] | None:
    """``Arguments.places`` of what the compiled kernel has parameters for; None: one has a type not known here."""
    found = []
    for kind, (base, value) in zip(signature.values(), places, strict=True):
        if kind == "constexpr":
            continue
        if kind not in _WIDTHS and not kind.startswith("*"):
            return None
        found.append((base, int(value)))
    return [*found, *[(-1, 0)] * _HIDDEN]


def _is_plain(metadata: Any) -> bool:
    """Whether a grid and shared memory are all that a launch takes."""
    extras = ("launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size", "tensordesc_meta")
    return metadata.num_ctas == 1 and not any(getattr(metadata, name, None) for name in extras)


@cache
def _driver() -> int | None:
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
