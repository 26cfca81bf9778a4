"""The one library that every op registers into."""

import torch

LIBRARY = torch.library.Library("lora_fuse", "DEF")
