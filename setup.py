"""The one C++ extension; all metadata is in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()  # the units side by side, on all cores

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

units = (
    "bind_launches",
    "bind_normals",
    "bind_positions",
    "bind_routing",
    "bind_sparse",
    "bind_topk",
    "bindings",
    "dispatch",
    "eager",
    "normals",
    "routing",
    "targets",
    "tensors",
    "topk",
    "topk_write",
)

setup(
    ext_modules=[
        Pybind11Extension(
            "lora_fuse._cpu",
            [f"csrc/{unit}.cpp" for unit in units],
            depends=[*glob("csrc/*.h"), *glob("csrc/*.inl")],
            cxx_std=17,
            extra_compile_args=flags + openmp,
            extra_link_args=openmp,
        )
    ]
)
