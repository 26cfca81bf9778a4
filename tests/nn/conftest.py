"""Fixtures for layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from augmented_models import record_wide
from nn_models import PATHS, Mlp, adapter

import lora_fuse as lf
from lora_fuse import LoraAdapter
from lora_fuse.nn.packed import Pack


@pytest.fixture
def bare() -> Mlp:
    return Mlp().requires_grad_(False)


@pytest.fixture
def adapters(bare: Mlp) -> dict[str, LoraAdapter]:
    """Of three ranks, and one that has not every layer."""
    ranks = {"sql": 4, "math": 1, "chat": 7}
    found = {name: adapter(bare, PATHS, rank, scaling=0.3 + rank / 10) for name, rank in ranks.items()}
    found["part"] = adapter(bare, ("down",), 3)
    return found


@pytest.fixture
def model(bare: Mlp, adapters: dict[str, LoraAdapter]) -> Mlp:
    return lf.attach(copy.deepcopy(bare), adapters)  # type: ignore[return-value]


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
