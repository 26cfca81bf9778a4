"""``generate`` repeats every sample for its beams; the calling thread's selection is repeated along."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lora_fuse.nn.serving import Serving


class _Generate:
    """Stands in for a model's ``generate``: what one call expands, the next one does not see."""

    def __init__(self, model: nn.Module, serving: Serving) -> None:
        self.model, self.serving = model, serving

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        local = self.serving.local
        before, local.expand = local.expand, 1
        try:
            return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            local.expand = before


class _ExpandInputs:
    """Stands in for ``_expand_inputs_for_generation``, which ``generate`` calls once it has the batch."""

    def __init__(self, model: nn.Module, serving: Serving) -> None:
        self.model, self.serving = model, serving

    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        self.serving.local.expand = expand_size
        cls = type(self.model)
        method = inspect.getattr_static(cls, "_expand_inputs_for_generation")  # a method, or a static one, by version
        return method.__get__(self.model, cls)(expand_size, *args, **kwargs)


_STAND_INS = (("generate", _Generate), ("_expand_inputs_for_generation", _ExpandInputs))


def install(model: nn.Module, serving: Serving) -> list[tuple[nn.Module, str]]:
    """Put the stand-ins on every module that generates; returns what ``remove`` wants."""
    installed = []
    for module in model.modules():
        if all(hasattr(type(module), name) and name not in module.__dict__ for name, _ in _STAND_INS):
            for name, stand_in in _STAND_INS:
                module.__dict__[name] = stand_in(module, serving)
                installed.append((module, name))
    return installed


def remove(installed: list[tuple[nn.Module, str]]) -> None:
    """Let the class's own methods show again."""
    for module, name in installed:
        module.__dict__.pop(name, None)
