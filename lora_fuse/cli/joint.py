"""``lora-fuse joint-compress``: many adapters as one bank that shares its bases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_fuse._terminal import busy, example, local_paths, new_table, size_text, stdout, user_errors
from lora_fuse.cli.options import DTYPE, adapter_names, output, overwrite_flag, rank_text, refuse_twice, torch_dtype

if TYPE_CHECKING:
    from rich.table import Table

    from lora_fuse.compress.joint import JointBank

FORMS = ("full", "diagonal")


@click.command(
    "joint-compress",
    short_help="Compress many adapters together (Compress then Serve).",
    epilog=example("lora-fuse joint-compress loras/* --rank 64 -o bank"),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--rank", type=int, default=16, show_default=True, help="Columns of the shared bases.")
@click.option("--clusters", type=int, default=1, show_default=True, help="Groups of adapters with bases of their own.")
@click.option("--form", type=click.Choice(FORMS), default="full", show_default=True, help="Of an adapter's own cores.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random starts.")
@click.option("--dtype", type=DTYPE, help="Of bases and cores; default: the first adapter's.")
@output
@overwrite_flag
def joint_compress(
    adapters: tuple[str, ...],
    rank: int,
    clusters: int,
    form: Any,
    seed: int,
    dtype: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Compress ADAPTER... into one bank: bases that all share, a small core for each. ``load_joint`` reads it."""
    with user_errors():
        from lora_fuse.adapters.load import load_adapter
        from lora_fuse.checkpoints.output import check_output, staged_folder
        from lora_fuse.compress import joint

        sources = local_paths(adapters)
        check_output(out, overwrite, sources)
        names = adapter_names(adapters)
        refuse_twice(names, "adapters", "a bank holds one of each name")
        with busy("reading"):
            loaded = {name: load_adapter(source) for name, source in zip(names, adapters, strict=True)}
        bank = joint.joint_compress(
            loaded, rank, clusters, form, seed=seed, dtype=torch_dtype(dtype), progress=sys.stderr.isatty()
        )
        with staged_folder(out, overwrite, sources) as stage:
            bank.save_pretrained(stage)
    table = joint_table(bank, str(out), {name: rank_text(adapter) for name, adapter in loaded.items()})
    stdout().print(table)


def joint_table(bank: JointBank, label: str, ranks: dict[str, str] | None = None) -> Table:
    """A line per adapter and one for the bank.

    Args:
        ranks: of the adapters before, by name.
    """
    table = new_table("adapter", "rank", "cluster", "relative error", "worst layer", "own size")
    for name, adapter in bank.adapters.items():
        errors = list(bank.report.errors[name].values())
        table.add_row(
            name,
            f"{ranks[name]} -> {adapter.rank}" if ranks else str(adapter.rank),
            str(adapter.cluster),
            f"{bank.report.error_of(name):.2%}",
            f"{max(errors, default=0.0):.2%}",
            size_text(adapter.nbytes),
        )
    before, after = bank.report.nbytes_before, bank.report.nbytes_after
    sizes = f"{size_text(before)} -> {size_text(after)}"
    table.add_row(label, "", "", f"{bank.report.error:.2%}", "", sizes, style="bold")
    return table
