"""Fixtures for layers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lora_fuse.nn import packed
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
    """The widths of the layers that each product with A behind the weights was made for, in order."""
    made: list[tuple[int, ...]] = []
    real = packed.linear_with_lora

    def record(x: Tensor, beside: Any, sizes: Any, *rest: Any) -> Any:
        made.append(tuple(sizes))
        return real(x, beside, sizes, *rest)

    monkeypatch.setattr(packed, "linear_with_lora", record)
    return made
