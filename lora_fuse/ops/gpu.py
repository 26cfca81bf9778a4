"""Where the Triton kernels of the SVDs take over from torch."""

from __future__ import annotations

import torch


def takes_kernels(device: torch.device) -> bool:
    """Whether tensors of this device go to ``lora_fuse.kernels``, and no step should wait for the host."""
    return device.type == "cuda"
