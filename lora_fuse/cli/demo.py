"""``lora-fuse demo`` and ``lora-fuse bench``: the package shown and timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from lora_fuse._terminal import example, user_errors


@click.command(
    short_help="Serve real adapters on a real model, and check it.",
    epilog=example("lora-fuse demo -o demo", "lora-fuse demo --quick"),
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("lora_fuse_demo"),
    show_default=True,
    help="Folder for the picture and the figures.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder that keeps downloads.")
@click.option("--quick", is_flag=True, help="Fewer examples and shorter timing.")
def demo(out: Path, data: Path | None, quick: bool) -> None:
    """Serve real adapters on a real encoder in one mixed batch; check it against PEFT, time it, score it."""
    with user_errors():
        from lora_fuse.demo import run

        run(out, data=data, quick=quick)


@click.command(short_help="Time multi_lora against its rivals.", epilog=example("lora-fuse bench --quick"))
@click.option("--quick", is_flag=True, help="A few of the shapes, less time on each.")
def bench(quick: bool) -> None:
    """Time multi_lora against its rivals; needs a checkout of the repository."""
    with user_errors():
        import lora_fuse

        root = Path(lora_fuse.__file__).resolve().parent.parent
        if not (root / "benchmarks" / "bench_multi_lora.py").is_file():
            raise ValueError(f"the benchmarks come with the repository, not with the package: there are none in {root}")
        command = [sys.executable, "-m", "benchmarks.bench_multi_lora", *(["--quick"] if quick else [])]
        code = subprocess.run(command, cwd=root, check=False).returncode
    raise SystemExit(code)
