"""What compute-sanitizer runs launches every kernel there is."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest

from lora_fuse import kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in Triton's interpreter only")


def test_every_kernel_is_launched(monkeypatch):
    import sanitize
    from triton.runtime.interpreter import InterpretedFunction

    names = [f"{kernels.__name__}.{m.name}" for m in pkgutil.iter_modules(kernels.__path__)]
    there = {  # two files may use one name
        (value.fn.__module__, value.fn.__name__)
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, InterpretedFunction) and value.fn.__name__.endswith("_kernel")
    }
    assert {"shrink_kernel", "_sort_kernel"} <= {name for _, name in there}
    launched, real = set(), InterpretedFunction.run

    def record(self, *args, **kwargs):
        launched.add((self.fn.__module__, self.fn.__name__))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    sanitize.main(planted=False)
    assert there - launched == set(), "tests/kernels/sanitize.py: no launch of these"
