"""The one C++ extension; all metadata is in pyproject.toml."""

import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

flags = [
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
# OpenMP comes from the libgomp that torch has already loaded (same soname), never from a copy of our own.
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

sources = [f"csrc/{name}.cpp" for name in ("bindings", "dispatch", "eager", "routing", "targets", "tensors")]

setup(
    ext_modules=[
        Pybind11Extension(
            "lora_fuse._cpu",
            sources,
            depends=[
                "csrc/dlpack_abi.h",
                "csrc/tensors.h",
                "csrc/eager.h",
                "csrc/routing.h",
                "csrc/views.h",
                "csrc/parallel.h",
                "csrc/dispatch.h",
                "csrc/simd.inl",
                "csrc/shrink.inl",
                "csrc/expand.inl",
                "csrc/lora.inl",
                "csrc/lora_amx.inl",
            ],
            cxx_std=17,
            extra_compile_args=flags + openmp,
            extra_link_args=openmp,
        )
    ]
)
