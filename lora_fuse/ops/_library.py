"""The one library that every op registers into, and what ops share beyond registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lora_fuse", "DEF")


def transformable(
    op: Callable[..., Tensor],
    setup_context: Callable[[Any, tuple[Any, ...], Any], tuple[Any, ...]],
    backward: Callable[..., tuple[Any, ...]],
    jvp: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """``op`` for functorch transforms and forward-mode AD, which ``register_autograd`` does not serve.

    Args:
        setup_context: as ``register_autograd`` takes it; returns the tensors that it saved, for ``jvp`` to read.
        backward: ``backward(ctx, grad, op)``, with the op that its products go through: it is differentiated again.
        jvp: ``jvp(ctx, *tangents)``.
    """

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():  # this Function is the autograd; not the registered one as well
                return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_forward(*setup_context(ctx, inputs, output))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            return backward(ctx, grad, apply)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            return jvp(ctx, *tangents)

    def apply(*args: Any) -> Tensor:
        return Transformable.apply(*args)  # type: ignore[no-any-return]

    return apply
