"""``lora-fuse merge``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_fuse._terminal import Spec, SpecType, busy, example, local_paths, new_table, size_text, stdout, user_errors
from lora_fuse.cli.options import DTYPE, output, overwrite_flag, rank_text, saved, torch_dtype

METHODS = (
    *("linear", "uniform", "cat", "svd", "factor_average", "ties", "magnitude_prune", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "knots_ties", "tsv", "iso_c", "iso_cts"),
)
_OPTIONS: dict[str, tuple[Any, str]] = {
    "rank": (int, "Largest rank of the result (not cat)."),
    "energy": (float, "Share of each layer's squared norm to keep, instead of --rank."),
    "density": (float, "Share of each adapter's entries that stays (ties, dare, della ...)."),
    "scaling": (float, "Factor on the merged deltas (ties and others; not linear, whose weights do that)."),
    "majority-sign": (click.Choice(["total", "frequency", "weighted"]), "How ties and others elect a sign."),
    "divisor": (click.Choice(["count", "weights", "none"]), "What the mean of ties and others divides by."),
    "scope": (click.Choice(["tensor", "row", "global"]), "What shares a density: a layer, a row, the whole adapter."),
    "seed": (int, "Of the draws of dare and della; default 0."),
    "gamma": (float, "Share of the largest entries that breadcrumbs leaves out; default 0.01."),
    "epsilon": (float, "By how much della's chances differ from the density; default 0.07."),
    "mean-over": (click.Choice(["rank", "min_dim"]), "What iso_c and iso_cts average singular values over."),
    "common-fraction": (float, "Share of iso_cts's directions that come from the sum; default 0.8."),
}
_F = TypeVar("_F", bound=Callable[..., Any])


def _method_options(command: _F) -> _F:
    for name, (kind, text) in reversed(_OPTIONS.items()):
        command = click.option(f"--{name}", type=kind, help=text)(command)
    return command


@click.command(
    short_help="Merge adapters into one.",
    epilog=example(
        "lora-fuse merge loras/sql:0.7 loras/math:0.3 --method svd --rank 32 -o merged",
        "lora-fuse merge loras/sql:0.7 loras/math:0.3 --method ties --density 0.2 --rank 32 -o merged",
    ),
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
@_method_options
@click.option("--dtype", type=DTYPE, default="fp32", show_default=True, help="Of the result.")
@saved
@output
@overwrite_flag
def merge(
    adapters: tuple[Spec, ...],
    method: str,
    dtype: str,
    modules_to_save: Any,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Merge ADAPTER[:WEIGHT]... into one adapter that PEFT loads. WEIGHT is 1 when left out."""
    with user_errors():
        from lora_fuse.checkpoints.output import check_output

        if method == "uniform" and any(spec.weight is not None for spec in adapters):
            raise ValueError("weights: method 'uniform' weighs every adapter alike; use 'linear' to choose weights")
        check_output(out, overwrite, local_paths([spec.source for spec in adapters]))
        options["dtype"] = torch_dtype(dtype)
        write_merged_adapter(adapters, method, options, modules_to_save, out, overwrite)


def write_merged_adapter(
    adapters: tuple[Spec, ...],
    method: str,
    options: Mapping[str, Any],
    modules_to_save: Any,
    out: Path,
    overwrite: bool,
) -> None:
    """Load, merge, save, and show a table of what went in and came out."""
    import torch

    from lora_fuse.adapters.load import load_adapter
    from lora_fuse.checkpoints.output import staged_folder
    from lora_fuse.merging.combine import merge_adapters
    from lora_fuse.merging.methods import method_of
    from lora_fuse.merging.options import Options

    checked = Options(**options)
    method_of(method, checked)  # before anything is read
    weights = [1.0 if spec.weight is None else spec.weight for spec in adapters]
    with busy("reading"):
        loaded = [load_adapter(spec.source) for spec in adapters]
    with torch.no_grad():
        given = None if method == "uniform" else weights
        merged = merge_adapters(loaded, given, method, checked, modules_to_save, sys.stderr.isatty())
    with staged_folder(out, overwrite, local_paths([spec.source for spec in adapters])) as stage:
        merged.save_pretrained(stage)
    table = new_table("adapter", "weight", "rank", "layers", "size")
    if method == "uniform":
        weights = [1 / len(adapters)] * len(adapters)
    for spec, adapter, weight in zip(adapters, loaded, weights, strict=True):
        table.add_row(
            spec.source, f"{weight:g}", rank_text(adapter), str(len(adapter.layers)), size_text(adapter.nbytes)
        )
    table.add_row(str(out), "", rank_text(merged), str(len(merged.layers)), size_text(merged.nbytes), style="bold")
    stdout().print(table)
    if checked.kept:
        part = "" if len(checked.kept) == len(merged.layers) else f"{len(checked.kept)} layers were truncated; there "
        stdout().print(part + _kept_text(checked.kept), soft_wrap=True)


def _kept_text(kept: Mapping[str, tuple[float, float]]) -> str:
    """Share of the merged deltas' squared norm that truncation kept: in all, and in the worst layer."""
    shares = {path: 1 - (lost / norm) ** 2 if norm > 0 else 1.0 for path, (norm, lost) in kept.items()}
    total, lost = (sum(pair[i] ** 2 for pair in kept.values()) for i in (0, 1))
    whole, worst = 1 - lost / total if total > 0 else 1.0, min(shares, key=lambda path: shares[path])
    error = max(0.0, 1 - whole) ** 0.5
    return f"energy kept {whole:.2%}, relative error {error:.3g}; worst layer {shares[worst]:.2%} ({worst})"
