"""Streaming over (sharded) safetensors model folders: plan, read, transform, write."""

from .fuse import FuseReport, fuse_checkpoint
from .output import check_output, staged_folder
from .read import Checkpoint, is_checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "FuseReport",
    "check_output",
    "fuse_checkpoint",
    "is_checkpoint",
    "open_checkpoint",
    "staged_folder",
]
