"""The command ``lora-fuse``. torch is imported inside the commands only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_fuse import __version__
from lora_fuse._terminal import (
    NamedPathType,
    SizeType,
    Spec,
    SpecType,
    busy,
    bytes_bar,
    example,
    facts_table,
    local_paths,
    new_table,
    peru_table,
    size_text,
    stdout,
    user_errors,
)

if TYPE_CHECKING:
    import torch

    from lora_fuse.adapters.lora import LoraAdapter

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
METHODS = ("linear", "uniform", "cat", "svd")
PERU_MERGES = ("task_arithmetic", "average", "ties")
PERU_SCOPES = ("global", "tensor", "row")


def _torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, _DTYPES[name])


_output = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace a model's or adapter's folder that exists there.")
_saved = click.option(
    "--modules-to-save",
    type=click.Choice(["refuse", "first", "average"]),
    default="refuse",
    show_default=True,
    help="Where several adapters bring a copy of one module (a head): which to take.",
)
_dtype = click.Choice(sorted(_DTYPES))


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(
        "lora-fuse inspect loras/sql",
        "lora-fuse merge loras/sql:0.7 loras/math:0.3 --method svd --rank 32 -o merged",
        "lora-fuse fuse llama-3.2-1b loras/sql -o llama-sql",
        "lora-fuse peru-fft minilm mnli=minilm-mnli sst2=minilm-sst2 -o peru",
    ),
)
@click.version_option(__version__, prog_name="lora-fuse")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Merge, fuse, compress and look into LoRA adapters and full fine-tunes; no model is built for any of it."""


@main.command(
    short_help="Show what an adapter or a model folder holds.",
    epilog=example("lora-fuse inspect loras/sql", "lora-fuse inspect llama-3.2-1b --json"),
)
@click.argument("path")
@click.option("--model", type=click.Path(path_type=Path), help="Model folder; a kohya file's names need it.")
@click.option("--adapter-name", help="Which adapter, where PATH holds several.")
@click.option("--component", help="Which part of a pipeline's file, such as 'unet' or 'lora_te1'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(path: str, model: Path | None, adapter_name: str | None, component: str | None, as_json: bool) -> None:
    """Show what PATH holds: an adapter (PEFT folder, safetensors or kohya file, hub id), a model or a PERU folder."""
    with user_errors():
        from lora_fuse.checkpoints.describe import describe_adapter, describe_model, load_for_inspection
        from lora_fuse.checkpoints.read import is_checkpoint, open_checkpoint

        if (Path(path).expanduser() / "peru.json").is_file():
            _inspect_peru(Path(path).expanduser(), as_json)
            return
        if is_checkpoint(Path(path).expanduser()):
            facts = describe_model(open_checkpoint(Path(path).expanduser()))
        else:
            skeleton = None if model is None else open_checkpoint(model).skeleton()
            adapter, notes = load_for_inspection(path, model=skeleton, adapter_name=adapter_name, component=component)
            facts = describe_adapter(adapter, path, notes)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        stdout().print(facts_table(facts))


def _inspect_peru(folder: Path, as_json: bool) -> None:
    from lora_fuse.checkpoints.describe import describe_peru
    from lora_fuse.compress.peru_files import load_peru

    with busy("reading"):
        peru = load_peru(folder)
    if as_json:
        click.echo(json.dumps(describe_peru(peru, str(folder)), indent=2))
        return
    facts = {"kind": "PERU", "path": str(folder), **peru.settings, "warnings": list(peru.report.notes)}
    stdout().print(facts_table(facts))
    stdout().print(peru_table(peru.report, "all"))


@main.command(
    short_help="Merge adapters into one.",
    epilog=example("lora-fuse merge loras/sql:0.7 loras/math:0.3 --method svd --rank 32 -o merged"),
)
@click.argument("adapters", nargs=-1, required=True, type=SpecType(), metavar="ADAPTER[:WEIGHT]...")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    help="linear: exact weighted sum. uniform: the mean. cat: exact, ranks add up. svd: truncated.",
)
@click.option("--rank", type=int, help="Largest rank of the result (linear, uniform, svd).")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep, instead of --rank.")
@click.option("--dtype", type=_dtype, default="fp32", show_default=True, help="Of the result.")
@_saved
@_output
@_overwrite
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
            dtype=_torch_dtype(dtype) or _torch_dtype("fp32"),  # type: ignore[arg-type]
            modules_to_save=modules_to_save,
            progress=sys.stderr.isatty(),
        )
        kept = None
        if method == "svd" or rank is not None or energy is not None:
            with busy("measuring what was kept"):
                kept = _energy_kept(loaded, weights, merged)
        with staged_folder(out, overwrite, sources) as stage:
            merged.save_pretrained(stage)
    table = new_table("adapter", "weight", "rank", "layers", "size")
    for spec, adapter, weight in zip(adapters, loaded, weights, strict=True):
        table.add_row(spec.source, f"{weight:g}", _rank(adapter), str(len(adapter.layers)), size_text(adapter.nbytes))
    table.add_row(str(out), "", _rank(merged), str(len(merged.layers)), size_text(merged.nbytes), style="bold")
    console = stdout()
    console.print(table)
    if kept is not None:
        total, worst, path = kept
        console.print(
            f"energy kept {total:.2%}, relative error {max(0.0, 1 - total) ** 0.5:.3g}; "
            f"worst layer {worst:.2%} ({path})",
            soft_wrap=True,
        )


def _rank(adapter: LoraAdapter) -> str:
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    return "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


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


@main.command(
    short_help="Write a model folder with adapters added in.",
    epilog=example("lora-fuse fuse llama-3.2-1b loras/sql:0.8 -o llama-sql --dtype bf16"),
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, type=SpecType(), metavar="ADAPTER[:WEIGHT]...")
@_output
@click.option("--dtype", type=_dtype, help="Of every floating-point tensor written; default: each keeps its own.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="From the fp32 sum to the stored dtype.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--max-shard-size", type=SizeType(), help="Such as 5GB; default: the base's files.")
@_saved
@_overwrite
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
                dtype=_torch_dtype(dtype),
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


@main.command(
    short_help="Truncate adapters to a smaller rank (PERU-LoRA).",
    epilog=example("lora-fuse compress loras/sql loras/math --rank 4 -o small"),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--rank", type=int, help="Largest rank to keep.")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep, instead of --rank.")
@click.option("--dtype", type=_dtype, help="Of the factors; default: as they came.")
@_output
@_overwrite
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
        small = peru_lora(loaded, rank, energy=energy, dtype=_torch_dtype(dtype), progress=sys.stderr.isatty())
        with staged_folder(out, overwrite, sources) as stage:
            for name, adapter in small.items():
                adapter.save_pretrained(stage / name)
    table = new_table("adapter", "rank", "energy kept", "worst layer", "size", "saved")
    for name, report in small.report.adapters.items():
        worst = min((layer.energy for layer in report.layers.values()), default=1.0)
        table.add_row(
            name,
            f"{_rank(loaded[name])} -> {_rank(small[name])}",
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


@main.command(
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
@_output
@_overwrite
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


@main.command(
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


@main.command(short_help="Time multi_lora against its rivals.", epilog=example("lora-fuse bench --quick"))
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


if __name__ == "__main__":
    main()
