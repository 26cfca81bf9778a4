"""The command lora-fuse in this process, and files for it to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoint_models import LLAMA, make_adapter, save_llama
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_fuse import cli


def write_files(root: Path) -> Path:
    """A sharded model ``base``; adapters ``a``, ``b`` and, with a copy of the head, ``head``; two fine-tunes."""
    save_llama(root / "base")
    targets: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    make_adapter(LLAMA, root / "base", root / "a", 1, **targets)
    make_adapter(LLAMA, root / "base", root / "b", 2, r=6, **targets)
    make_adapter(LLAMA, root / "base", root / "head", 3, modules_to_save=["lm_head"], **targets)
    tune(root / "base", root / "tuned1", 1)
    tune(root / "base", root / "tuned2", 2)
    return root


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def tune(base: Path, folder: Path, seed: int) -> None:
    """A full fine-tune of a model folder, with a head of its own, in one file."""
    torch.manual_seed(seed)
    state = {name: t + 0.02 * torch.randn_like(t).pow(3) for name, t in state_of(base).items()}
    folder.mkdir()
    save_file({**state, "score.weight": torch.randn(seed + 1, 4)}, folder / "model.safetensors", {"format": "pt"})


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def fail(*args: object, code: int = 2) -> str:
    """The message of a command that has to fail: on stderr, without a traceback, nothing on stdout."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr
