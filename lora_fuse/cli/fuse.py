"""``lora-fuse fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_fuse._terminal import SizeType, Spec, SpecType, busy, bytes_bar, example, local_paths, size_text, user_errors
from lora_fuse.cli.options import DTYPE, output, overwrite_flag, saved, torch_dtype


@click.command(
    short_help="Write a model folder with adapters added in.",
    epilog=example("lora-fuse fuse llama-3.2-1b loras/sql:0.8 -o llama-sql --dtype bf16"),
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, type=SpecType(), metavar="ADAPTER[:WEIGHT]...")
@output
@click.option("--dtype", type=DTYPE, help="Of every floating-point tensor written; default: each keeps its own.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="From the fp32 sum to the stored dtype.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--max-shard-size", type=SizeType(), help="Such as 5GB; default: the base's files.")
@saved
@overwrite_flag
def fuse(
    base: Path,
    adapters: tuple[Spec, ...],
    out: Path,
    dtype: str | None,
    rounding: Any,
    seed: int,
    max_shard_size: int | None,
    modules_to_save: Any,
    overwrite: bool,
) -> None:
    """Write the model folder BASE with ADAPTER[:WEIGHT]... added to its weights, streaming shard by shard."""
    with user_errors():
        from lora_fuse.adapters.load import load_adapter
        from lora_fuse.checkpoints import check_output, fuse_checkpoint, open_checkpoint

        sources = local_paths([spec.source for spec in adapters])
        check_output(out, overwrite, [base, *sources])
        skeleton = open_checkpoint(base).skeleton()
        with busy("reading adapters"):
            loaded = [load_adapter(spec.source, model=skeleton) for spec in adapters]
        with bytes_bar("fuse") as progress:
            report = fuse_checkpoint(
                base,
                loaded,
                [1.0 if spec.weight is None else spec.weight for spec in adapters],
                out,
                dtype=torch_dtype(dtype),
                rounding=rounding,
                seed=seed,
                max_shard_size=max_shard_size,
                modules_to_save=modules_to_save,
                overwrite=overwrite,
                progress=progress,
            )
    for note in report.notes:
        click.echo(f"Note: {note}", err=True)
    files = f"{len(report.files)} file{'s' if len(report.files) > 1 else ''}"
    click.echo(
        f"{out}: {len(report.changed)} of {report.tensors} tensors changed, {size_text(report.nbytes)} in {files}"
    )
