"""Normal numbers by Philox: the same ones on every device for a seed, up to the rounding of log, sine and cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.ops import gpu


class Normals:
    """Draws of fp32 normal numbers, one after the other, each a function of the seed, the draw's number and its shape.

    csrc/normals.h says which counter makes which entry. A draw of more columns begins with those of fewer.

    Args:
        generator: a seed, of which 64 bits count; a ``torch.Generator``, which gives one; None: 0.
    """

    def __init__(self, generator: torch.Generator | int | None) -> None:
        if isinstance(generator, torch.Generator):
            low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
            generator = int(torch.randint(low, high, (), generator=generator, device=generator.device))
        self.seed = (generator or 0) & (2**64 - 1)
        self._draws = 0

    def next_draw(self) -> int:
        """The number of a draw that is made now, by whoever asks."""
        self._draws += 1
        return self._draws - 1

    def draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """``[..., rows, columns]``, on ``device``."""
        flat = torch.Size(shape[:-2]).numel()
        rows, columns = shape[-2:]
        if gpu.takes_kernels(device):
            from lora_fuse.kernels.normals import normals

            return normals(self.seed, self.next_draw(), (flat, rows, columns), device).view(shape)
        out = torch.empty(flat, rows, columns)
        _cpu.normals(out, self.seed, self.next_draw(), torch.get_num_threads())
        return out.view(shape).to(device)
