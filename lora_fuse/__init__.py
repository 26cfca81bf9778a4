"""lora_fuse: one base model, many fine-tunes."""

from lora_fuse import functional
from lora_fuse.adapters.load import load_adapter
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.compress.peru_lora import peru_lora
from lora_fuse.merging.combine import merge
from lora_fuse.merging.fuse import fuse, unfuse

__all__ = ["LoraAdapter", "functional", "fuse", "load_adapter", "merge", "peru_lora", "unfuse"]
__version__ = "0.1.0"
