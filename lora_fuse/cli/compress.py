"""``lora-fuse compress``, ``extract`` and ``peru-fft``: fine-tunes made small."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_fuse._terminal import (
    BudgetType,
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
from lora_fuse.cli.options import DTYPE, adapter_names, output, overwrite_flag, rank_text, refuse_twice, torch_dtype

if TYPE_CHECKING:
    from lora_fuse.compress.extract import ExtractReport

PERU_LORA_SPREADS = ("layer", "adapter")
PERU_MERGES = ("task_arithmetic", "average", "ties")
PERU_SCOPES = ("global", "tensor", "row")


@click.command(
    short_help="Truncate adapters to a smaller rank (PERU-LoRA).",
    epilog=example(
        "lora-fuse compress loras/sql loras/math --rank 4 -o small",
        "lora-fuse compress loras/sql --budget 25% -o small",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--rank", type=int, help="Largest rank to keep.")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep, instead of --rank.")
@click.option(
    "--budget",
    type=BudgetType(),
    help="Instead: parameters of each adapter's factors, such as 25% (of what they have) or 200000, spread over its "
    "layers where they save most error.",
)
@click.option(
    "--spread",
    type=click.Choice(PERU_LORA_SPREADS),
    default="layer",
    show_default=True,
    help="adapter: --energy holds for all layers together.",
)
@click.option("--dtype", type=DTYPE, help="Of the factors; default: as they came.")
@output
@overwrite_flag
def compress(
    adapters: tuple[str, ...],
    rank: int | None,
    energy: float | None,
    budget: float | int | None,
    spread: Any,
    dtype: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Truncate each ADAPTER to a smaller rank (PERU-LoRA): one folder per adapter under OUT."""
    with user_errors():
        from lora_fuse.adapters.load import load_adapter
        from lora_fuse.checkpoints.output import check_output, staged_folder
        from lora_fuse.compress.peru_lora import peru_lora

        if sum(value is not None for value in (rank, energy, budget)) != 1:
            raise click.UsageError("give one of --rank, --energy and --budget")
        sources = local_paths(adapters)
        check_output(out, overwrite, sources)
        names = adapter_names(adapters)
        refuse_twice(names, "adapters", f"each gets a folder of its name under {out}")
        with busy("reading"):
            loaded = {name: load_adapter(source) for name, source in zip(names, adapters, strict=True)}
        small = peru_lora(
            loaded,
            rank,
            energy=energy,
            budget=budget,
            spread=spread,
            dtype=torch_dtype(dtype),
            progress=sys.stderr.isatty(),
        )
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
    short_help="Make a LoRA adapter of a full fine-tune.",
    epilog=example("lora-fuse extract minilm minilm-mnli --rank 64 --modules-to-save classifier -o mnli-lora"),
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("finetuned", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="Largest rank of a layer; default: 64.")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep, instead of --rank.")
@click.option("--targets", multiple=True, metavar="NAME", help="Modules to factor, by name or end of path.")
@click.option("--modules-to-save", multiple=True, metavar="NAME", help="Modules to copy whole, such as 'classifier'.")
@click.option("--prefix", default="", help="Before the names of BASE, such as 'bert.' for an encoder without heads.")
@click.option("--dtype", type=DTYPE, default="fp32", show_default=True, help="Of the factors and copies.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised SVD.")
@output
@overwrite_flag
def extract(
    base: Path,
    finetuned: Path,
    rank: int | None,
    energy: float | None,
    targets: tuple[str, ...],
    modules_to_save: tuple[str, ...],
    prefix: str,
    dtype: str,
    seed: int,
    out: Path,
    overwrite: bool,
) -> None:
    """Approximate the full fine-tune FINETUNED of the model BASE by a LoRA adapter that PEFT loads.

    Both are model folders or safetensors files. Without --targets every linear layer that changed gets factors; what
    changed besides is listed. Give --targets and --modules-to-save several times for several.
    """
    with user_errors():
        from lora_fuse.checkpoints.output import check_output, staged_folder
        from lora_fuse.compress.extract import extract as make_adapter

        sources = local_paths([str(base), str(finetuned)])
        check_output(out, overwrite, sources)
        adapter = make_adapter(
            base,
            finetuned,
            rank,
            energy=energy,
            targets=list(targets) or None,
            modules_to_save=list(modules_to_save) or None,
            prefix=prefix,
            dtype=torch_dtype(dtype),  # type: ignore[arg-type]
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        with staged_folder(out, overwrite, sources) as stage:
            adapter.save_pretrained(stage)
    report = adapter.report
    table = new_table("layers", "rank", "energy kept", "copied whole", "size")
    kinds: dict[str, list[str]] = {}
    for path in report.layers:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    for kind, paths in kinds.items():
        layers = [report.layers[path] for path in paths]
        low, high = min(layer.rank for layer in layers), max(layer.rank for layer in layers)
        total = sum(layer.squared_norm for layer in layers)
        kept = 1 - sum(layer.squared_error for layer in layers) / total
        nbytes = sum(t.nbytes for path in paths for t in adapter.layers[path].tensors())
        ranks = str(low) if low == high else f"{low}-{high}"
        table.add_row(f"{len(paths)} x {kind}", ranks, f"{kept:.2%}", "", size_text(nbytes))
    copied = ", ".join(report.saved) or "-"
    table.add_row(str(out), rank_text(adapter), f"{report.energy:.2%}", copied, size_text(adapter.nbytes), style="bold")
    stdout().print(table)
    _print_uncovered(report)


def _print_uncovered(report: ExtractReport) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, left in report.uncovered.items():
        by_reason.setdefault(left.reason, []).append(name)
    if by_reason:
        click.echo(f"Changed, but not in the adapter: {len(report.uncovered)} tensors", err=True)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        click.echo(f"  {reason}: {shown}", err=True)


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

        refuse_twice([name for name, _ in finetuned], "finetuned", f"each gets a folder of its name under {out}")
        sources = local_paths([str(base), *(str(path) for _, path in finetuned)])
        check_output(out, overwrite, sources)
        peru = make_peru(base, dict(finetuned), progress=sys.stderr.isatty(), **options)
        with busy("writing"), staged_folder(out, overwrite, sources) as stage:
            peru.save_pretrained(stage)
    for note in peru.report.notes:
        click.echo(f"Note: {note}", err=True)
    stdout().print(peru_table(peru.report, str(out)))
    stdout().print(treatment_text(peru.report.treatments), soft_wrap=True)
