"""``lora-fuse inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lora_fuse._terminal import busy, example, facts_table, peru_table, stdout, user_errors


@click.command(
    short_help="Show what an adapter or a model folder holds.",
    epilog=example("lora-fuse inspect loras/sql", "lora-fuse inspect llama-3.2-1b --json"),
)
@click.argument("path")
@click.option("--model", type=click.Path(path_type=Path), help="Model folder; a kohya file's names need it.")
@click.option("--adapter-name", help="Which adapter, where PATH holds several.")
@click.option("--component", help="Which part of a pipeline's file, such as 'unet' or 'lora_te1'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(path: str, model: Path | None, adapter_name: str | None, component: str | None, as_json: bool) -> None:
    """Show what PATH holds: an adapter (PEFT folder, safetensors or kohya file, hub id), a model, a PERU or a bank."""
    with user_errors():
        from lora_fuse.checkpoints.describe import describe_adapter, describe_model, load_for_inspection
        from lora_fuse.checkpoints.read import is_checkpoint, open_checkpoint

        if (Path(path).expanduser() / "peru.json").is_file():
            _inspect_peru(Path(path).expanduser(), as_json)
            return
        if (Path(path).expanduser() / "joint.json").is_file():
            _inspect_joint(Path(path).expanduser(), as_json)
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


def _inspect_joint(folder: Path, as_json: bool) -> None:
    from lora_fuse.checkpoints.describe import describe_joint
    from lora_fuse.cli.joint import joint_table
    from lora_fuse.compress.joint_files import load_joint

    with busy("reading"):
        bank = load_joint(folder)
    facts = describe_joint(bank, str(folder))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    stdout().print(facts_table({name: value for name, value in facts.items() if name != "adapters"}))
    stdout().print(joint_table(bank, "all"))
