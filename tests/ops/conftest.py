"""What the op tests share: unwritten memory that shows, and every instruction set this CPU has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_fuse.ops import multi_lora as _  # noqa: F401  (torch before the extension)

from lora_fuse import _cpu  # isort: skip


@pytest.fixture(autouse=True)
def _nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` called from the package comes back full of NaN, so an output that is not written shows."""
    plain = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = plain(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return t.fill_(float("nan")) if caller.startswith("lora_fuse") and t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the best one is back afterwards."""
    before = _cpu.isa()
    _cpu.choose_isa(request.param)
    assert _cpu.isa() == request.param
    yield request.param
    _cpu.choose_isa(before)
