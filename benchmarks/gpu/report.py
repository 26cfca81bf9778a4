"""Rows of results: made, shown, and kept under ``benchmarks/results/`` as JSON and as tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"
OURS = "lora_fuse"
_WHOLE = " + base"


def row(
    op: str,
    shape: str,
    us: Mapping[str, float],
    nbytes: float,
    bandwidth: float,
    base: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One shape's results.

    Args:
        us: microseconds of a call by way; ours is called ``lora_fuse`` (and ours with the base, if there is one,
            ``lora_fuse + base``; likewise for the others).
        nbytes: what has to move at least.
        bandwidth: of a copy on this device.
        base: the way in ``us`` that overheads are counted over.
        more: kept in the row as it is.
    """
    made: dict[str, Any] = {"op": op, "shape": shape, "us": dict(us), "bytes": nbytes, **more}
    made["floor_us"] = nbytes / bandwidth * 1e6
    made["gb_per_s"] = {n: nbytes / t / 1e3 for n, t in us.items() if n != base and not n.endswith(_WHOLE)}
    made["of_bandwidth"] = {n: g * 1e9 / bandwidth for n, g in made["gb_per_s"].items()}
    if base is not None:
        made["overhead"] = {n.removesuffix(_WHOLE): t / us[base] - 1 for n, t in us.items() if n.endswith(_WHOLE)}
    return made


def names(made: Mapping[str, Any]) -> list[str]:
    """The ways of a row, whether they were timed alone, with the base, or both."""
    return list(dict.fromkeys(n.removesuffix(_WHOLE) for n in made["us"]))


def cell(made: Mapping[str, Any], way: str) -> str:
    """A way's time, rate and share of the bandwidth if it was timed alone; its time with the base, and overhead."""
    us, said = made["us"], []
    if way in us:
        said.append(f"{us[way]:.1f}")
    if way in made["gb_per_s"]:
        said.append(f"{made['gb_per_s'][way]:.0f} GB/s {made['of_bandwidth'][way]:.0%}")
    if way + _WHOLE in us:
        over = made.get("overhead", {}).get(way)
        said.append(f"whole {us[way + _WHOLE]:.1f}" + (f" {over:+.1%}" if over is not None else ""))
    return ", ".join(said)


def line(made: Mapping[str, Any]) -> str:
    """A row for reading."""
    cells = [f"{name} {cell(made, name)}" for name in names(made)]
    return f"{made['op']} {made['shape']}: floor {made['floor_us']:.1f} us | {' | '.join(cells)}"


def show(made: Mapping[str, Any]) -> None:
    print(line(made), flush=True)


def target(name: str, limit: float, measured: float | None, at_least: bool = False, note: str = "") -> dict[str, Any]:
    """What was aimed at and what came of it; ``measured`` None: its shapes or rivals were left out."""
    met = None if measured is None else bool(measured >= limit if at_least else measured <= limit)
    return {"name": name, "limit": limit, "measured": measured, "at_least": at_least, "met": met, "note": note}


def told(aimed: Mapping[str, Any]) -> list[str]:
    """Its name, limit, measurement and verdict."""
    measured = "not measured" if aimed["measured"] is None else f"{aimed['measured']:.3g}"
    note = f" ({aimed['note']})" if aimed["note"] else ""
    verdict = {None: "-", True: "met", False: "MISSED"}[aimed["met"]]
    return [aimed["name"], f"{'>=' if aimed['at_least'] else '<='} {aimed['limit']:.3g}", measured + note, verdict]


def commit() -> str:
    """Of this checkout; a copy without git may be told by LORA_FUSE_COMMIT."""
    if given := os.environ.get("LORA_FUSE_COMMIT"):
        return given
    here = Path(__file__).parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def card() -> str:
    if not torch.cuda.is_available():
        return "no card: in Triton's CPU interpreter times mean nothing"
    return torch.cuda.get_device_name()


def versions() -> dict[str, str]:
    """Of what drives the card."""
    import triton

    made = {"torch": torch.__version__, "triton": triton.__version__, "Python": platform.python_version()}
    if not torch.cuda.is_available():
        return made
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        driver = "unknown"
    return {"driver": driver, **made}


def keep(card: str, parts: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<card>.json`` and ``<card>.md``; parts measured before and not now stay, with the commit they are of.

    Args:
        parts: by name ``{commit, versions, copy_bytes_per_s, rows, targets, left_out, failed}``.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{card.replace(' ', '_')}.json"
    before = json.loads(path.read_text())["parts"] if path.exists() else {}
    results = {"card": card, "parts": {**before, **parts}}
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(results))
    return path


def tables(results: Mapping[str, Any]) -> str:
    """All parts as Markdown."""
    out = [f"# {results['card']}", "", "Written by `make bench-gpu`.", ""]
    for name, part in results["parts"].items():
        bandwidth = part["copy_bytes_per_s"] / 1e12
        versions = ", ".join(f"{n} {v}" for n, v in part["versions"].items())
        out += [f"## {name}", "", f"Commit {part['commit']}, {versions}; a copy moves {bandwidth:.2f} TB/s.", ""]
        if part.get("failed"):
            out += [f"Failed: {part['failed']}", ""]
        if part["targets"]:
            out += ["| target | limit | measured | |", "| --- | --- | --- | --- |"]
            out += [f"| {' | '.join(told(aimed))} |" for aimed in part["targets"]]
            out.append("")
        if part["rows"]:
            out += _table(part["rows"])
        if part["left_out"]:
            out += [f"Left out for want of time: {', '.join(part['left_out'])}.", ""]
    return "\n".join(out)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(n for r in rows for n in names(r)))
    out = [
        "Cells: microseconds, rate and share of the copy bandwidth alone; microseconds with the base, and over it.",
        "",
        f"| shape | floor us | {' | '.join(columns)} |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for r in rows:
        cells = [cell(r, name) for name in columns]
        out.append(f"| {r['op']} {r['shape']} | {r['floor_us']:.1f} | {' | '.join(cells)} |")
    return [*out, ""]
