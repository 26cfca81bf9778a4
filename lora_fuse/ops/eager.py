"""When an op may skip torch's dispatcher and call its kernel directly.

The kernels ask torch themselves (csrc/eager.cpp), so that a call costs no Python frames; this module says whom to ask.
The fast path is for plain tensors in plain eager mode with nothing to record. It is left under autograd, jit or fx
tracing, functorch transforms, forward-mode AD, dispatch or function modes and autocast, and for tensor subclasses:
there the dispatcher knows what to do. ``torch.compile`` does not trace C++: its check stays with the Python callers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_fuse import _cpu

_C = torch._C
_functorch_level = _C._functorch.maybe_current_level
_compiling = torch.compiler.is_compiling
_forward_ad = torch.autograd.forward_ad

_cpu.use_exchange_api(getattr(Tensor, "__dlpack_c_exchange_api__", None))
_cpu.set_eager_queries(
    {
        "tensor_type": Tensor,
        "parameter_type": Parameter,
        "grad_enabled": torch.is_grad_enabled,
        "dispatch_modes": _C._len_torch_dispatch_stack,
        "function_mode": _C._is_torch_function_mode_enabled,
        "functorch_level": _functorch_level,
        "any_autocast": _C._is_any_autocast_enabled,
        "tracing_state": _C._get_tracing_state,
        "forward_ad": _forward_ad,
        "current_stream": getattr(_C, "_cuda_getCurrentRawStream", None),
        "increment_version": _C._increment_version,
        "num_threads": torch.get_num_threads,
    }
)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; torch raises for devices that it knows no autocast of."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def kernel_views(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same two tensors as C++ reads them: no lazy conjugate or negative, at most 8 dimensions."""
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    if x.dim() > 8:
        out, x = out.view(out.shape[:-1].numel(), out.shape[-1]), x.flatten(0, -2)
    return out, x


def passing_tensors() -> bool:
    """True where a new tensor may be a wrapper that does not outlive a dispatch mode or a functorch transform."""
    return bool(_C._len_torch_dispatch_stack()) or _functorch_level() is not None


def under_transform() -> bool:
    """True inside a functorch transform or a forward-mode AD level, outside compiled code."""
    return not _compiling() and (_functorch_level() is not None or _forward_ad._current_level >= 0)
