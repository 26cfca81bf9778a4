"""``lora-fuse merge``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_fuse._terminal import Spec, SpecType, busy, example, local_paths, new_table, size_text, stdout, user_errors
from lora_fuse.cli.options import DTYPE, output, overwrite_flag, rank_text, saved, torch_dtype

if TYPE_CHECKING:
    from lora_fuse.adapters.lora import LoraAdapter

_SUMS = ("linear", "uniform", "cat", "svd")
METHODS = (*_SUMS, "factor_average", "knots_ties", "tsv", "iso_c", "iso_cts")


@click.command(
    short_help="Merge adapters into one.",
    epilog=example("lora-fuse merge loras/sql:0.7 loras/math:0.3 --method svd --rank 32 -o merged"),
)
@click.argument("adapters", nargs=-1, required=True, type=SpecType(), metavar="ADAPTER[:WEIGHT]...")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    help="linear: exact weighted sum. uniform: the mean. cat: exact, ranks add up. svd: truncated. The others: see "
    "docs/merging.md.",
)
@click.option("--rank", type=int, help="Largest rank of the result (not cat).")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep, instead of --rank.")
@click.option("--dtype", type=DTYPE, default="fp32", show_default=True, help="Of the result.")
@saved
@output
@overwrite_flag
def merge(
    adapters: tuple[Spec, ...],
    method: str,
    rank: int | None,
    energy: float | None,
    dtype: str,
    modules_to_save: Any,
    out: Path,
    overwrite: bool,
) -> None:
    """Merge ADAPTER[:WEIGHT]... into one adapter that PEFT loads. WEIGHT is 1 when left out."""
    with user_errors():
        from lora_fuse.adapters.load import load_adapter
        from lora_fuse.checkpoints.output import check_output, staged_folder
        from lora_fuse.merging.combine import merge as merge_adapters

        sources = local_paths([spec.source for spec in adapters])
        check_output(out, overwrite, sources)
        weights = [1.0 if spec.weight is None else spec.weight for spec in adapters]
        if method == "uniform":
            if any(spec.weight is not None for spec in adapters):
                raise ValueError("weights: method 'uniform' weighs every adapter alike; use 'linear' to choose weights")
            weights = [1 / len(adapters)] * len(adapters)
        with busy("reading"):
            loaded = [load_adapter(spec.source) for spec in adapters]
        merged = merge_adapters(
            loaded,
            None if method == "uniform" else weights,
            method=method,
            rank=rank,
            energy=energy,
            dtype=torch_dtype(dtype) or torch_dtype("fp32"),  # type: ignore[arg-type]
            modules_to_save=modules_to_save,
            progress=sys.stderr.isatty(),
        )
        kept = None
        if method == "svd" or (method in _SUMS and (rank is not None or energy is not None)):
            with busy("measuring what was kept"):
                kept = _energy_kept(loaded, weights, merged)
        with staged_folder(out, overwrite, sources) as stage:
            merged.save_pretrained(stage)
    table = new_table("adapter", "weight", "rank", "layers", "size")
    for spec, adapter, weight in zip(adapters, loaded, weights, strict=True):
        table.add_row(
            spec.source, f"{weight:g}", rank_text(adapter), str(len(adapter.layers)), size_text(adapter.nbytes)
        )
    table.add_row(str(out), "", rank_text(merged), str(len(merged.layers)), size_text(merged.nbytes), style="bold")
    console = stdout()
    console.print(table)
    if kept is not None:
        total, worst, path = kept
        console.print(
            f"energy kept {total:.2%}, relative error {max(0.0, 1 - total) ** 0.5:.3g}; "
            f"worst layer {worst:.2%} ({path})",
            soft_wrap=True,
        )


def _energy_kept(adapters: Sequence[LoraAdapter], weights: Sequence[float], merged: LoraAdapter) -> Any:
    """Share of the squared norm of the exact sum that the truncation kept: in all, and in the worst layer."""
    from lora_fuse.functional import lowrank_svd
    from lora_fuse.merging.terms import layer_terms, make_terms

    total = lost = 0.0
    worst, where = 1.0, "-"
    active = [term for term in make_terms(list(adapters), list(weights)) if term.weight != 0]
    for path, parts in layer_terms(active).items():
        bs = [part.layer.lora_b.flatten(1) for part in parts]
        as_ = [part.layer.lora_a.flatten(1) for part in parts]
        svd = lowrank_svd(bs, as_, [part.coef for part in parts], merged.layers[path].rank)
        total, lost = total + float(svd.norm) ** 2, lost + float(svd.residual) ** 2
        if where == "-" or float(svd.energy) < worst:
            worst, where = float(svd.energy), path
    return (1 - lost / total if total > 0 else 1.0), worst, where
