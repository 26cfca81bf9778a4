"""Triton decides at import whether kernels are interpreted or compiled, so a run of pytest does one or the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

for room in ("ops", "nn"):  # the oracle and the pools of the CPU op's tests; models and the stand-in for a CUDA graph
    sys.path.insert(0, str(Path(__file__).parent.parent / room))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = (
    ["test_aot*.py", "test_direct.py", "test_launch.py", "test_reach.py"]
    if INTERPRETED
    else ["test_interpreted*.py", "test_padded.py", "test_gpu_benchmarks.py", "test_sanitize.py"]
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton cache for this test alone, so that what it compiles is compiled now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", os.fspath(tmp_path / "triton"))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """See ``record_wide``."""
    from augmented_models import record_wide

    return record_wide(monkeypatch)
