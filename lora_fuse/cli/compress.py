"""``lora-fuse compress`` and ``lora-fuse peru-fft``: fine-tunes made small."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from lora_fuse._terminal import (
    NamedPathType,
    busy,
    example,
    local_paths,
    new_table,
    peru_table,
    size_text,
    stdout,
    user_errors,
)
from lora_fuse.cli.options import DTYPE, output, overwrite_flag, rank_text, torch_dtype

PERU_MERGES = ("task_arithmetic", "average", "ties")
PERU_SCOPES = ("global", "tensor", "row")


@click.command(
    short_help="Truncate adapters to a smaller rank (PERU-LoRA).",
    epilog=example("lora-fuse compress loras/sql loras/math --rank 4 -o small"),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--rank", type=int, help="Largest rank to keep.")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep, instead of --rank.")
@click.option("--dtype", type=DTYPE, help="Of the factors; default: as they came.")
@output
@overwrite_flag
def compress(
    adapters: tuple[str, ...], rank: int | None, energy: float | None, dtype: str | None, out: Path, overwrite: bool
) -> None:
    """Truncate each ADAPTER to a smaller rank (PERU-LoRA): one folder per adapter under OUT."""
    with user_errors():
        from lora_fuse.adapters.load import load_adapter
        from lora_fuse.checkpoints.output import check_output, staged_folder
        from lora_fuse.compress.peru_lora import peru_lora

        if (rank is None) == (energy is None):
            raise click.UsageError("give one of --rank and --energy")
        sources = local_paths(adapters)
        check_output(out, overwrite, sources)
        names = [Path(os.path.abspath(a)).name.removesuffix(".safetensors") for a in adapters]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"adapters: two are called {twice!r}, and each gets a folder of its name under {out}")
        with busy("reading"):
            loaded = {name: load_adapter(source) for name, source in zip(names, adapters, strict=True)}
        small = peru_lora(loaded, rank, energy=energy, dtype=torch_dtype(dtype), progress=sys.stderr.isatty())
        with staged_folder(out, overwrite, sources) as stage:
            for name, adapter in small.items():
                adapter.save_pretrained(stage / name)
    table = new_table("adapter", "rank", "energy kept", "worst layer", "size", "saved")
    for name, report in small.report.adapters.items():
        worst = min((layer.energy for layer in report.layers.values()), default=1.0)
        table.add_row(
            name,
            f"{rank_text(loaded[name])} -> {rank_text(small[name])}",
            f"{report.energy:.2%}",
            f"{worst:.2%}",
            f"{size_text(report.nbytes_before)} -> {size_text(report.nbytes_after)}",
            f"{1 - report.nbytes_after / max(1, report.nbytes_before):.0%}",
        )
    whole = small.report
    sizes = f"{size_text(whole.nbytes_before)} -> {size_text(whole.nbytes_after)}"
    saved = f"{1 - whole.nbytes_after / max(1, whole.nbytes_before):.0%}"
    table.add_row(str(out), "", f"{whole.energy:.2%}", "", sizes, saved, style="bold")
    stdout().print(table)


@click.command(
    "peru-fft",
    short_help="Merge full fine-tunes and keep what each needs (PERU-FFT).",
    epilog=example("lora-fuse peru-fft minilm mnli=minilm-mnli sst2=minilm-sst2 --density 0.1 -o peru"),
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("finetuned", nargs=-1, required=True, type=NamedPathType(), metavar="NAME=FINETUNED...")
@click.option("--density", type=float, default=0.1, show_default=True, help="Share of the entries to keep per task.")
@click.option(
    "--merge",
    type=click.Choice(PERU_MERGES),
    default="task_arithmetic",
    show_default=True,
    help="How the merged model is made.",
)
@click.option("--scaling", type=float, help="Of the merged task vectors; default: 0.3, for ties 1.")
@click.option(
    "--scope",
    type=click.Choice(PERU_SCOPES),
    default="global",
    show_default=True,
    help="What competes for the entries: a task's whole model, each tensor, each row.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Parameters that each task keeps whole.")
@click.option("--shared", multiple=True, metavar="PATTERN", help="Parameters that all tasks take from the merge.")
@click.option("--heads", multiple=True, metavar="PATTERN", help="Parameters of each task's own, such as 'classifier'.")
@click.option("--trim", type=float, default=0.2, show_default=True, help="For ties: share of a task vector to use.")
@click.option("--prefix", default="", help="Before the names of BASE, such as 'bert.' for an encoder without heads.")
@output
@overwrite_flag
def peru_fft(
    base: Path,
    finetuned: tuple[tuple[str, Path], ...],
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Merge the full fine-tunes NAME=FINETUNED... of the model BASE, and keep each one's largest differences.

    BASE and FINETUNED are model folders or safetensors files. PATTERNs are shell-style and match parameters' names or
    modules' paths; give the options several times for several. OUT gets the merged model and a folder per task.
    """
    with user_errors():
        from lora_fuse.checkpoints.output import check_output, staged_folder
        from lora_fuse.compress.peru_fft import peru_fft as make_peru
        from lora_fuse.compress.peru_report import treatment_text

        names = [name for name, _ in finetuned]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"finetuned: two are called {twice!r}, and each gets a folder of its name under {out}")
        sources = local_paths([str(base), *(str(path) for _, path in finetuned)])
        check_output(out, overwrite, sources)
        peru = make_peru(base, dict(finetuned), progress=sys.stderr.isatty(), **options)
        with busy("writing"), staged_folder(out, overwrite, sources) as stage:
            peru.save_pretrained(stage)
    for note in peru.report.notes:
        click.echo(f"Note: {note}", err=True)
    stdout().print(peru_table(peru.report, str(out)))
    stdout().print(treatment_text(peru.report.treatments), soft_wrap=True)
