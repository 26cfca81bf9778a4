"""lora_fuse: one base model, many fine-tunes."""

__version__ = "0.1.0"
