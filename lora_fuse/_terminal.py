"""What the command line says and how: specs and sizes read, errors and progress on stderr, tables on stdout."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from lora_fuse.compress.peru_report import PeruReport

BAD_INPUT, FAILED = 2, 1
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Spec(NamedTuple):
    """``ADAPTER[:WEIGHT]`` taken apart; the weight is None where it was left out."""

    source: str
    weight: float | None


def parse_spec(text: str) -> Spec:
    """Split off a trailing ``:number``; any other colon belongs to the path, as does one of a path that exists.

    Raises:
        click.BadParameter: what follows the last colon is no number, and only what precedes it exists.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not head or Path(text).expanduser().exists():
        return Spec(text, None)
    try:
        return Spec(head, float(tail))
    except ValueError:
        if Path(head).expanduser().exists():
            raise click.BadParameter(f"{tail!r} in {text!r} is not a number; write ADAPTER:WEIGHT") from None
        return Spec(text, None)


class SpecType(click.ParamType):
    name = "ADAPTER[:WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Spec:
        return value if isinstance(value, Spec) else parse_spec(value)


class NamedPathType(click.ParamType):
    name = "NAME=PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            self.fail(f"{value!r} lacks a name or a path; write NAME=PATH, for example sql=models/sql", param, ctx)
        return name, Path(path).expanduser()


class SizeType(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().upper()
        unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if text.endswith(u)), "")
        try:
            size = int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is not a size; write for example 5GB, 500MB or a number of bytes", param, ctx)
        return size


class BudgetType(click.ParamType):
    """A share, ``25%`` or ``0.25``, as a float; a number of parameters, ``200000``, as an integer."""

    name = "BUDGET"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        text = str(value).strip()
        try:
            if text.endswith("%"):
                return float(text[:-1]) / 100
            return float(text) if "." in text else int(text)
        except ValueError:
            self.fail(f"{value!r} is no budget; write for example 25% or a number of parameters", param, ctx)


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors of the input as one message on stderr and exit code 2; warnings as one line each."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        click.echo(f"Warning: {message}", err=True)

    def terminate(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)  # an exception, so that a half-written output is removed

    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.showwarning = show
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            before = signal.signal(signal.SIGTERM, terminate)
            stack.callback(signal.signal, signal.SIGTERM, before)
        except ValueError:
            pass  # not the main thread: whoever called from there has signals in hand
        try:
            yield
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            if click.get_current_context().find_root().params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(FAILED if isinstance(error, RuntimeError) else BAD_INPUT) from None


def stdout() -> Console:
    """Results go to stdout: as wide as the terminal, and never cut short in a pipe."""
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


@contextmanager
def bytes_bar(description: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar over bytes on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def busy(description: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(description):
            yield
    else:
        yield


def size_text(num_bytes: int) -> str:
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size, unit = float(num_bytes), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{size:.2f} {unit}"


def local_paths(sources: Sequence[str]) -> list[Path]:
    """The inputs that are paths (a hub id is none)."""
    return [path for path in (Path(source).expanduser() for source in sources) if path.exists()]


def example(*lines: str) -> str:
    """An epilog that keeps its lines."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def new_table(*titles: str) -> Table:
    """A table without lines: the first column is text, the others are figures."""
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title == titles[0] else "right", overflow="fold")
    return table


def peru_table(report: PeruReport, whole: str) -> Table:
    """A line per task, one for the merged model, and one called ``whole`` for all of it."""
    table = new_table("task", "kept", "of", "energy kept", "size", "fine-tune", "saved")

    def sizes(nbytes: int, before: int) -> tuple[str, str, str]:
        return size_text(nbytes), size_text(before), f"{1 - nbytes / max(1, before):.0%}"

    for name, task in report.tasks.items():
        counts = f"{task.kept:,}", f"{task.entries:,}", f"{task.energy:.2%}"
        table.add_row(name, *counts, *sizes(task.nbytes, task.nbytes_finetuned))
    table.add_row("merged", "", "", "", size_text(report.nbytes_merged))
    table.add_row(whole, "", "", "", *sizes(report.nbytes, report.nbytes_finetuned), style="bold")
    return table


def facts_table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        label = key.replace("_", " ")
        if key == "bytes":
            value = f"{size_text(value)} ({value:,})"
        elif isinstance(value, dict):
            one = len(value) == 1 and key in ("ranks", "scalings")
            value = next(iter(value)) if one else ", ".join(f"{k} {_times(key, v)}" for k, v in value.items())
        elif isinstance(value, list):
            value = ("\n" if key == "warnings" else ", ").join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        if value not in (None, ""):
            table.add_row(label, str(value))
    return table


def _times(key: str, value: Any) -> str:
    return "x".join(map(str, value)) if key == "heads" else f"({value})"
