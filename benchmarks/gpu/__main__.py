"""Benchmarks on a GPU: ``make bench-gpu``, one run of under 8 minutes.

Every part checks all of its ways against fp64, then times them under CUDA graphs over 32 copies of the data,
interleaved, medians. A part that is wrong is not timed. Each part has a share of the time; what did not fit is named.
Where there is no card, ``TRITON_INTERPRET=1 python -m benchmarks.gpu --dry`` sees that everything runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
import traceback
from typing import Any

import torch

from benchmarks.gpu import PARTS, measure, report

SECONDS = 450.0  # for all parts together
_COMPILE_SECONDS = 90.0


def compile_together(names: list[str], processes: int) -> None:
    """Fill Triton's cache by several processes at once, each with a share of each part's launches.

    Compiling is the host's work, most of a second a kernel; this process then finds them all done. Whatever goes wrong
    here goes wrong again, and is told, where it counts.
    """
    started = time.perf_counter()
    own = [sys.executable, "-m", "benchmarks.gpu", "--only", ",".join(names), "--compile"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    helpers = [subprocess.Popen([*own, f"{i}/{processes}"], **quiet) for i in range(processes)]
    for helper in helpers:
        left = started + _COMPILE_SECONDS - time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            helper.wait(max(left, 0.0))
        helper.kill()
        helper.wait()
    print(f"compiled by {processes} processes in {time.perf_counter() - started:.0f} s", flush=True)


def compile_share(names: list[str], share: str) -> None:
    """What one of those processes does: ``share`` is ``i/n``."""
    first, step = map(int, share.split("/"))
    for name in names:
        part = importlib.import_module(f"benchmarks.gpu.{name}")
        with contextlib.suppress(Exception, SystemExit), torch.no_grad():
            for _ in part.compile_share(slice(first, None, step)) if hasattr(part, "compile_share") else ():
                pass


def run_part(name: str, seconds: float, quick: bool, bandwidth: float) -> dict[str, Any]:
    """One part, checked, timed and held against its targets; what goes wrong in it is told and ends it alone."""
    torch.manual_seed(0)
    started = time.perf_counter()
    made: dict[str, Any] = {"commit": report.commit(), "versions": report.versions(), "copy_bytes_per_s": bandwidth}
    made |= {"rows": [], "targets": [], "left_out": [], "failed": None}
    try:
        part = importlib.import_module(f"benchmarks.gpu.{name}")
        with torch.no_grad():
            part.check()
            print(f"[{name}] all ways are right ({time.perf_counter() - started:.0f} s)", flush=True)
            budget = measure.Budget(seconds - (time.perf_counter() - started), made["left_out"])
            for row in part.run(measure.Setting(bandwidth, budget, quick)):
                made["rows"].append(row)
        made["targets"] = part.targets(made["rows"])
    except (Exception, SystemExit) as problem:
        traceback.print_exc()
        made["failed"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    for aimed in made["targets"]:
        print(f"[{name}] {' / '.join(report.told(aimed))}")
    if made["left_out"]:
        print(f"[{name}] left out for want of time: {', '.join(made['left_out'])}")
    made["seconds"] = round(time.perf_counter() - started, 1)
    print(f"[{name}] {made['seconds']:.0f} s{', FAILED: ' + made['failed'] if made['failed'] else ''}", flush=True)
    return made


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, of %(default)s")
    parser.add_argument("--quick", action="store_true", help="the shapes that matter most")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together; %(default)s")
    parser.add_argument("--dry", action="store_true", help="without a card: tiny shapes, nothing is written")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is at hand; TRITON_INTERPRET=1 and --dry see that everything runs")
    if args.compile:
        return compile_share(names, args.compile)
    deadline = time.perf_counter() + args.seconds
    if torch.cuda.is_available():
        compile_together(names, max(1, min(12, (os.cpu_count() or 2) - 2)))
    bandwidth, card = measure.copy_bandwidth(), report.card()
    print(f"{card}; {report.versions()}; copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    parts: dict[str, Any] = {}
    for i, name in enumerate(names):
        share = PARTS[name] / sum(PARTS[n] for n in names[i:])
        parts[name] = run_part(name, (deadline - time.perf_counter()) * share, args.quick, bandwidth)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not args.dry:  # after each part: a fault of the card ends the process
            print(f"written to {report.keep(card, parts)}", flush=True)
    if failed := [name for name in names if parts[name]["failed"]]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
