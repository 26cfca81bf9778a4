"""Launches by the driver's own call: what the driver would be given, for kernels compiled ahead of time."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aot import TARGETS, compiled
from test_launch import made_of, operands
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.kernels.direct import direct_launches, parameters_of
from lora_fuse.kernels.launch import arguments_of

CuLaunchKernel = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
WIDTHS = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32}


class Driver:
    """Stands where ``cuLaunchKernel`` would be called, and reads parameters as the kernel's own PTX declares them."""

    def __init__(self, declared: list[list[str]]) -> None:
        self.declared, self.calls, self.status = declared, [], 0
        self.function = CuLaunchKernel(self.launch)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def launch(self, function: int, *rest: Any) -> int:
        *shape, stream, parameters, _ = rest
        kinds = self.declared[len(self.calls) % len(self.declared)]
        values = [WIDTHS[kind].from_address(parameters[i]).value for i, kind in enumerate(kinds)]
        self.calls.append((function, shape, stream, values))
        return self.status


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build's way to ask for the device and the stream."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 4321, raising=False)


@pytest.mark.parametrize(
    "case", [{}, {"mixes": True, "weights": True, "rank": 1, "y_spread": 8}], ids=["plain", "mixed"]
)
def test_the_driver_gets_what_the_kernels_declare(case, here, own_cache):
    first, second = operands(**case), operands(**case)
    launches = made_of(first)
    kernels = [compiled(launch, TARGETS["sm_90"][0]) for launch in launches]
    declared = [re.findall(r"\.param \.(u\d+)", each.asm["ptx"].split(".entry")[1].split(")")[0]) for each in kernels]
    driver, asked = Driver(declared), []
    arguments = arguments_of(launches, first)
    assert arguments is not None
    made = SimpleNamespace(arguments=arguments, device=torch.device("cpu", 0))
    loaded = [SimpleNamespace(src=k.src, metadata=k.metadata, function=100 + i) for i, k in enumerate(kernels)]
    direct = direct_launches(made, launches, loaded, lambda: False, driver.address)  # type: ignore[arg-type]
    assert isinstance(direct, _cpu.DirectLaunches)
    addresses = [0 if t is None else t.data_ptr() for t in second]
    assert _cpu.launch_again({_cpu.operand_key(first): direct}, second)
    assert not asked
    again = made_of(second)
    assert len(driver.calls) == len(again) == 2
    for i, (launch, (function, shape, stream, values)) in enumerate(zip(again, driver.calls, strict=True)):
        assert function == 100 + i
        assert stream == 4321
        warps, shared = kernels[i].metadata.num_warps, kernels[i].metadata.shared
        assert shape == [*(*launch.grid, 1, 1)[:3], 32 * warps, 1, 1, shared]
        kinds = kernels[i].src.signature.values()
        passed = [v for v, kind in zip(launch.bound, kinds, strict=True) if kind != "constexpr"]
        assert len(values) == len(passed) + 2
        assert values[-2:] == [0, 0]
        for got, want in zip(values, passed, strict=False):
            if not isinstance(want, Tensor):
                assert got == want
            elif not any(want is t for t in launch.scratch + again[0].scratch):
                assert got == want.data_ptr()
                assert got in addresses


class TestOtherwise:
    def setup_method(self):
        self.driver, self.asked, self.hooked, self.device = Driver([["u64", "u32"]]), [], False, 0
        scratch = [lambda: torch.empty(3)]
        self.direct = _cpu.DirectLaunches(
            self.driver.address, 0, self.otherwise, lambda: self.hooked, lambda: self.device, lambda index: 7, scratch
        )
        self.direct.add(5, (2, 3, 4), 128, 1024, [(0, 16), (-1, -3)])

    def otherwise(self, addresses):
        self.asked.append(addresses)
        return True

    def test_as_a_rule_it_is_not_asked(self):
        assert self.direct((1 << 40,))
        assert self.driver.calls == [(5, [2, 3, 4, 128, 1, 1, 1024], 7, [(1 << 40) + 16, 2**32 - 3])]
        assert not self.asked

    @pytest.mark.parametrize("why", ["profiler", "other device", "no context"])
    def test_it_is_asked(self, why):
        self.hooked, self.device = why == "profiler", int(why == "other device")
        self.driver.status = 201 if why == "no context" else 0
        assert self.direct((1 << 40,))
        assert self.asked == [(1 << 40,)]
        assert len(self.driver.calls) == (why == "no context")

    def test_errors_are_raised(self):
        self.driver.status = 700
        with pytest.raises(RuntimeError, match="failed with error 700"):
            self.direct((1 << 40,))
        self.driver.status = 0
        self.direct.add(6, (1, 1, 1), 32, 0, [(2, 0), (1, 0)])
        with pytest.raises(IndexError):  # one operand and one scratch tensor
            self.direct((1 << 40,))


def test_parameters_of_unknown_types():
    assert parameters_of({"x": "*fp32", "n": "i32", "one": "constexpr"}, [(0, 4), (-1, 9), (-1, 1)]) == [
        (0, 4), (-1, 9), (-1, 0), (-1, 0),
    ]  # fmt: skip
    assert parameters_of({"x": "*fp32", "scale": "fp32"}, [(0, 0), (-1, 0.5)]) is None
