"""The command ``lora-fuse``. torch is imported inside the commands only."""

from __future__ import annotations

import click

from lora_fuse import __version__
from lora_fuse._terminal import example
from lora_fuse.cli import compress, demo, fuse, inspect, joint, merge


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(
        "lora-fuse inspect loras/sql",
        "lora-fuse merge loras/sql:0.7 loras/math:0.3 --method svd --rank 32 -o merged",
        "lora-fuse fuse llama-3.2-1b loras/sql -o llama-sql",
        "lora-fuse extract llama-3.2-1b llama-3.2-1b-sql --rank 64 -o sql-lora",
        "lora-fuse joint-compress loras/* --rank 64 -o bank",
        "lora-fuse peru-fft minilm mnli=minilm-mnli sst2=minilm-sst2 -o peru",
    ),
)
@click.version_option(__version__, prog_name="lora-fuse")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Merge, fuse, compress and look into LoRA adapters and full fine-tunes; no model is built for any of it."""


for _command in (
    inspect.inspect,
    merge.merge,
    fuse.fuse,
    compress.compress,
    joint.joint_compress,
    compress.extract,
    compress.peru_fft,
    demo.demo,
    demo.bench,
):
    main.add_command(_command)
