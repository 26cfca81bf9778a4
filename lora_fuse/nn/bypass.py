"""Fast paths of torch's own modules that read a child's weight and never call the child: off while adapters are in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

Switched = tuple[nn.Module, str, Any]

_FLAGS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # 0 = "an activation that the fused kernel lacks"
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def switch_off(model: nn.Module, paths: Iterable[str]) -> list[Switched]:
    """Make every encoder layer on the way to one of these paths call its children.

    Returns:
        ``(module, attribute, value before)``, for ``restore``.
    """
    switched: list[Switched] = []
    seen: set[int] = set()
    for path in paths:
        module = model
        for name in path.split("."):
            for kind, flag, off in _FLAGS:
                if isinstance(module, kind) and id(module) not in seen and getattr(module, flag, off) != off:
                    seen.add(id(module))
                    switched.append((module, flag, getattr(module, flag)))
                    setattr(module, flag, off)
            module = getattr(module, name) if name else module  # "" is the model itself
    return switched


def restore(switched: Iterable[Switched]) -> None:
    """Put the flags back."""
    for module, flag, value in switched:
        setattr(module, flag, value)
