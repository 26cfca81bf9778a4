"""compute-sanitizer finds nothing in any kernel, and does find what was planted (``make test-gpu``)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parent / "sanitize.py"
SECONDS = 200  # for one run
FOUND = 99  # the exit code that the sanitizer is told to end with


def sanitizer() -> str:
    """On the PATH, in CUDA's folder or in the wheel ``nvidia-cuda-sanitizer-api``; skips where there is none."""
    places = [Path(os.environ.get(name, "/usr/local/cuda")) / "bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    spec = importlib.util.find_spec("nvidia")
    places += [p for root in (spec.submodule_search_locations or [] if spec else []) for p in Path(root).glob("*/bin")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))
    if found is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in CUDA_HOME nor installed as a wheel")
    return found


@pytest.fixture(scope="module")
def warm() -> None:
    """Compiles what the sanitizer would otherwise watch being compiled."""
    subprocess.run([sys.executable, SCRIPT, "--planted"], env=environment(), timeout=SECONDS, check=True)


def environment() -> dict[str, str]:
    paths = [str(SCRIPT.parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def watched(tool: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The script under a tool, which looks at the kernels of Triton alone: those whose names are plain."""
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "regex=^[a-z_]+_kernel$"]
    # each tensor an allocation of its own, so that what lies beside it is nobody's
    alone = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    everything = [*command, sys.executable, str(SCRIPT), *args]
    return subprocess.run(everything, env=alone, capture_output=True, text=True, timeout=SECONDS)


def refused(run: subprocess.CompletedProcess[str]) -> None:
    """Skips where the sanitizer cannot watch this device (under some virtual machines)."""
    if "Device not supported" in run.stdout or "not supported on this device" in run.stdout:
        pytest.skip("compute-sanitizer does not support this device as it is set up here")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool, warm):
    run = watched(tool)
    refused(run)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "all kernels were launched" in run.stdout
    assert "0 errors" in run.stdout or "0 hazards" in run.stdout


def test_what_is_planted_is_found(warm):
    """Or else finding nothing would say nothing."""
    run = watched("memcheck", "--planted")
    refused(run)
    assert run.returncode == FOUND, run.stdout[-4000:] + run.stderr[-2000:]
    assert "_planted_kernel" in run.stdout
