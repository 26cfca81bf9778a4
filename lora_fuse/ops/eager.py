"""When an op may skip torch's dispatcher and call its kernel directly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

_C = torch._C
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = _C._len_torch_dispatch_stack
_function_mode = _C._is_torch_function_mode_enabled
_functorch_level = _C._functorch.maybe_current_level
_autocast = torch.is_autocast_enabled
_compiling = torch.compiler.is_compiling
_tracing = _C._get_tracing_state
_forward_ad = torch.autograd.forward_ad


def may_bypass(x: Tensor, out: Tensor | None, weights: Tensor | None) -> bool:
    """True for plain tensors in plain eager mode with nothing to record.

    False under autograd, torch.compile, jit or fx tracing, functorch transforms, forward-mode AD, dispatch or function
    modes and autocast, and for tensor subclasses: there the dispatcher knows what to do.
    """
    if _compiling():
        return False
    kind = type(x)
    if (kind is not Tensor and kind is not Parameter) or (out is not None and type(out) is not Tensor):
        return False
    if _grad_enabled() and (
        x.requires_grad or (weights is not None and weights.requires_grad) or (out is not None and out.requires_grad)
    ):
        return False
    if x.is_neg() or (out is not None and out.is_neg()):  # the memory holds the negative
        return False
    return not (
        _dispatch_modes()
        or _function_mode()
        or _functorch_level() is not None
        or _forward_ad._current_level >= 0  # a dual tensor may be among the arguments
        or _autocast("cpu")
        or _tracing() is not None
    )


def under_transform() -> bool:
    """True inside a functorch transform or a forward-mode AD level, outside compiled code."""
    return not _compiling() and (_functorch_level() is not None or _forward_ad._current_level >= 0)
