"""Streaming over (sharded) safetensors model folders: plan, read, transform, write."""

from lora_fuse.checkpoints.fuse import FuseReport, fuse_checkpoint
from lora_fuse.checkpoints.output import check_output, staged_folder
from lora_fuse.checkpoints.read import Checkpoint, is_checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "FuseReport",
    "check_output",
    "fuse_checkpoint",
    "is_checkpoint",
    "open_checkpoint",
    "staged_folder",
]
