"""``lora-fuse merge``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_fuse._terminal import (
    SizeType,
    Spec,
    SpecType,
    busy,
    bytes_bar,
    example,
    local_paths,
    new_table,
    size_text,
    stdout,
    user_errors,
)
from lora_fuse.cli.options import DTYPE, output, overwrite_flag, rank_text, saved, torch_dtype

if TYPE_CHECKING:
    import torch

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
    short_help="Merge adapters, or whole models, into one.",
    epilog=example(
        "lora-fuse merge loras/sql:0.7 loras/math:0.3 --method ties --density 0.2 --rank 32 -o merged",
        "lora-fuse merge llama-sql:0.5 llama-math:0.5 --base llama-3.2-1b --method dare_ties -o llama-both",
        "lora-fuse merge --recipe recipe.yml -o merged",
    ),
)
@click.argument("adapters", nargs=-1, type=SpecType(), metavar="ADAPTER[:WEIGHT]...")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="linear (the default): exact weighted sum. uniform: the mean. cat: exact, ranks add up. svd: truncated. The "
    "others: see docs/merging.md.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Model folder; merges whole models that came from it.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML file that says what is merged and how, as mergekit's; --rank, --energy and --dtype go with it.",
)
@_method_options
@click.option("--dtype", type=DTYPE, help="Of the result; default: fp32, or the base's.")
@click.option("--heads", multiple=True, metavar="PATTERN", help="Whole models: parameters that stay the base's.")
@click.option("--max-shard-size", type=SizeType(), help="Whole models: such as 5GB; default: the base's files.")
@saved
@output
@overwrite_flag
def merge(
    adapters: tuple[Spec, ...],
    method: str | None,
    base: Path | None,
    recipe: Path | None,
    dtype: str | None,
    heads: tuple[str, ...],
    max_shard_size: int | None,
    modules_to_save: Any,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Merge ADAPTER[:WEIGHT]... into one adapter that PEFT loads. WEIGHT is 1 when left out.

    With --base, model folders take the place of adapters, and OUT becomes a model folder.
    """
    with user_errors():
        if recipe is None:
            if not adapters:
                raise click.UsageError("name the adapters to merge, or give --recipe")
            job = _Job(list(adapters), method or "linear", {k: v for k, v in options.items() if v is not None}, base)
        else:
            beside = [name for name, value in options.items() if value is not None and name not in ("rank", "energy")]
            if adapters or method or base or beside:
                raise click.UsageError(
                    "--recipe says what is merged and how; --rank, --energy, --dtype, --heads, --max-shard-size and "
                    "--modules-to-save may stand beside it"
                )
            job, kept = _job_of(recipe)
            job.options.update((k, v) for k, v in options.items() if v is not None)
            dtype = dtype or kept
        if job.method == "uniform" and any(spec.weight is not None for spec in job.specs):
            raise ValueError("weights: method 'uniform' weighs every adapter alike; use 'linear' to choose weights")
        if job.base is None:
            if heads or max_shard_size:
                raise click.UsageError("--heads and --max-shard-size are about whole models, which need --base")
            write_merged_adapter(job, torch_dtype(dtype), modules_to_save, out, overwrite)
        else:
            if modules_to_save != "refuse":
                raise click.UsageError("--modules-to-save is about adapters; name the heads of whole models by --heads")
            write_merged_model(job, heads, torch_dtype(dtype), max_shard_size, out, overwrite)


@dataclass
class _Job:
    """What is merged and how; ``base`` is None for adapters."""

    specs: list[Spec]
    method: str
    options: dict[str, Any]
    base: Path | None

    @property
    def weights(self) -> list[float] | None:
        return None if self.method == "uniform" else [1.0 if s.weight is None else s.weight for s in self.specs]

    @property
    def paths(self) -> list[Path]:
        return local_paths([spec.source for spec in self.specs])


def _job_of(recipe: Path) -> tuple[_Job, str | None]:
    """The job of a recipe, and the dtype that it names."""
    from lora_fuse.checkpoints.read import is_checkpoint
    from lora_fuse.cli.recipe import read_recipe

    found = read_recipe(recipe)
    whole = [is_checkpoint(Path(model).expanduser()) for model in found.models]
    if any(whole) and not all(whole):
        odd = found.models[whole.index(False)]
        raise ValueError(f"{recipe}: models: {odd!r} is no model folder, others are; merge adapters or whole models")
    base = None
    if any(whole):
        if found.base is None and found.method != "linear":
            raise ValueError(f"{recipe}: base_model: is missing; whole models are merged as differences from it")
        base = Path(found.base or found.models[0]).expanduser()
    for note in found.notes:
        click.echo(f"Note: {note}", err=True)
    specs = [Spec(model, weight) for model, weight in zip(found.models, found.weights, strict=True)]
    return _Job(specs, found.method, found.options, base), found.dtype


def write_merged_model(
    job: _Job, heads: tuple[str, ...], dtype: torch.dtype | None, max_shard_size: int | None, out: Path, overwrite: bool
) -> None:
    """Merge model folders tensor by tensor, and say what was written."""
    from lora_fuse.checkpoints.merge import merge_checkpoints
    from lora_fuse.merging.options import Options

    with bytes_bar("merge") as progress:
        report = merge_checkpoints(
            job.base,  # type: ignore[arg-type]
            [Path(spec.source).expanduser() for spec in job.specs],
            job.weights,
            out,
            method=job.method,
            options=Options(**job.options),
            heads=heads,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    files = f"{len(report.files)} file{'s' if len(report.files) > 1 else ''}"
    click.echo(f"{out}: {report.merged} of {report.tensors} tensors merged, {size_text(report.nbytes)} in {files}")


def write_merged_adapter(
    job: _Job, dtype: torch.dtype | None, modules_to_save: Any, out: Path, overwrite: bool
) -> None:
    """Load, merge, save, and show a table of what went in and came out."""
    import torch

    from lora_fuse.adapters.load import load_adapter
    from lora_fuse.checkpoints.output import check_output, staged_folder
    from lora_fuse.checkpoints.read import is_checkpoint
    from lora_fuse.merging.combine import merge_adapters
    from lora_fuse.merging.methods import method_of
    from lora_fuse.merging.options import Options

    check_output(out, overwrite, job.paths)
    options = Options(**job.options, dtype=dtype or torch.float32)
    method_of(job.method, options)  # before anything is read
    if whole := next((path for path in job.paths if is_checkpoint(path)), None):
        raise ValueError(f"{whole}: holds a whole model; to merge models, name the one they came from by --base")
    adapters = [spec.source for spec in job.specs]
    with busy("reading"):
        loaded = [load_adapter(source) for source in adapters]
    with torch.no_grad():
        merged = merge_adapters(loaded, job.weights, job.method, options, modules_to_save, sys.stderr.isatty())
    with staged_folder(out, overwrite, job.paths) as stage:
        merged.save_pretrained(stage)
    weights = job.weights or [1 / len(adapters)] * len(adapters)
    table = new_table("adapter", "weight", "rank", "layers", "size")
    for source, adapter, weight in zip(adapters, loaded, weights, strict=True):
        table.add_row(source, f"{weight:g}", rank_text(adapter), str(len(adapter.layers)), size_text(adapter.nbytes))
    table.add_row(str(out), "", rank_text(merged), str(len(merged.layers)), size_text(merged.nbytes), style="bold")
    stdout().print(table)
    if options.kept:
        part = "" if len(options.kept) == len(merged.layers) else f"{len(options.kept)} layers were truncated; there "
        stdout().print(part + _kept_text(options.kept), soft_wrap=True)


def _kept_text(kept: Mapping[str, tuple[float, float]]) -> str:
    """Share of the merged deltas' squared norm that truncation kept: in all, and in the worst layer."""
    shares = {path: 1 - (lost / norm) ** 2 if norm > 0 else 1.0 for path, (norm, lost) in kept.items()}
    total, lost = (sum(pair[i] ** 2 for pair in kept.values()) for i in (0, 1))
    whole, worst = 1 - lost / total if total > 0 else 1.0, min(shares, key=lambda path: shares[path])
    error = max(0.0, 1 - whole) ** 0.5
    return f"energy kept {whole:.2%}, relative error {error:.3g}; worst layer {shares[worst]:.2%} ({worst})"
