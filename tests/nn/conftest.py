"""Fixtures for layers."""

from __future__ import annotations

from typing import Any

import pytest
from augmented_models import record_wide

from lora_fuse.nn.packed import Pack


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The leaves that each packed product was made for, in order."""
    made: list[tuple[str, ...]] = []
    real = Pack._compute

    def record(pack: Pack, run: Any, *args: Any) -> Any:
        first = next(
            i for i in range(len(pack.sizes)) if run.weight.data_ptr() == pack._run(i, i + 1).weight.data_ptr()
        )
        made.append(tuple(path.rpartition(".")[2] for path in pack.paths[first : first + len(run.sizes)]))
        return real(pack, run, *args)

    monkeypatch.setattr(Pack, "_compute", record)
    return made


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """See ``record_wide``."""
    return record_wide(monkeypatch)
