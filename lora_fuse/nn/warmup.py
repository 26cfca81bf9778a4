"""Get everything ready that serving can reach, before the first request comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.nn.select import attached_layers


@torch.no_grad()
def warmup(model: nn.Module, num_tokens: Sequence[int] = (1, 64)) -> int:
    """Run every distinct kind of attached layer's LoRA part once, on zeros.

    On a CPU this loads the native library, settles the instruction set and starts the thread pool; the kernels
    themselves were compiled when the package was built. On a device whose kernels are compiled at run time it compiles
    those for the layer sizes and dtypes of this model. It never runs the model itself, so what ``torch.compile`` makes
    of it is not warmed.

    Args:
        model: an attached model.
        num_tokens: batch sizes, in rows, to run.
    Returns:
        How many distinct (sizes, dtype, device) were run.
    Raises:
        ValueError: the model is not attached, or ``num_tokens`` holds something other than integers from 0.
    """
    if not isinstance(num_tokens, Sequence) or any(type(n) is not int or n < 0 for n in num_tokens):
        raise ValueError(f"num_tokens: got {num_tokens!r}, accepted is a sequence of integers from 0")
    seen = set()
    for layer in attached_layers(model).values():
        pool = layer.lora_pool
        a, b = pool.pool_a, pool.pool_b
        kind = (a.shape, b.shape, a.dtype, a.device)
        if kind in seen:
            continue
        seen.add(kind)
        for rows in num_tokens:
            x = torch.zeros(rows, a.shape[1], dtype=a.dtype, device=a.device)
            y = torch.zeros(rows, b.shape[1], dtype=a.dtype, device=a.device)
            slots = torch.arange(rows, device=a.device) % pool.num_slots
            multi_lora(x, pool, Routing.from_slots(slots, pool.num_slots), out=y)
    return len(seen)
