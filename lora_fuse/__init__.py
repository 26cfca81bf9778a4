"""lora_fuse: one base model, many fine-tunes."""

from lora_fuse.adapters.load import load_adapter
from lora_fuse.adapters.lora import LoraAdapter

__all__ = ["LoraAdapter", "load_adapter"]
__version__ = "0.1.0"
