"""Launch plans for the card at hand: ``python -m benchmarks.gpu.tune --layer 4096x4096 --rank 16 -o plans.json``.

Per layer and number of rows: from the shipped plan on, one field after the other, whatever is faster is kept. What
comes out is a file of rules for ``lora_fuse.override_plans``, with those only that were faster in a last comparison,
too. What decides a row's bits is left as it is. Every candidate is checked against fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import measure, report
from benchmarks.gpu.multi_lora import LIMIT, SITES, Case, Shape
from lora_fuse import override_plans

GAIN = 0.02  # less is within the noise
FIELDS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("shrink", "planes", (1, "all")),
    ("expand", "block_n", (32, 64, 128, 256)),
    ("expand", "steps", (1, 2, 4, 8)),
    ("expand", "num_warps", (2, 4, 8)),
    ("shrink", "num_warps", (2, 4, 8)),
    ("shrink", "num_stages", (2, 3, 4, 5)),
    ("expand", "num_stages", (1, 2, 3)),
    ("expand", "ahead", (True,)),
]

Changes = dict[str, dict[str, Any]]  # "shrink" and "expand": fields and their values


@contextlib.contextmanager
def rules(changes: Changes) -> Iterator[None]:
    override_plans([changes])
    try:
        yield
    finally:
        override_plans(None)


def times(case: Case, candidates: dict[str, Changes], seconds: float) -> dict[str, float]:
    """Microseconds of the base and its LoRA part under each; those that are wrong or do not run are left out."""

    def call(changes: Changes, i: int) -> torch.Tensor:
        with rules(changes):
            return case.ways[report.OURS].with_base(case.problem, i)

    limit = LIMIT * torch.finfo(case.x.dtype).eps
    want = case.want(case.x.double() @ case.problem.copies[0].weight.double().t())
    right = {}
    for name, changes in candidates.items():
        try:
            measure.require(f"{case.shape}: {name}", call(changes, 0), want, limit)
            right[name] = lambda i, changes=changes: call(changes, i)
        except (Exception, SystemExit) as problem:
            measure.tell(f"{name} of {case.shape}", problem)
    return measure.device_us(right, case.copies, seconds=seconds, may_fail=right.keys())


def tuned(shape: Shape, seconds: float = 0.4, copies: int = measure.COPIES) -> tuple[Changes, float, float]:
    """What to change for a shape, and microseconds before and after."""
    case, best = Case(shape, copies), Changes()
    for part, field, values in FIELDS:
        candidates = {"as it is": best}
        for value in values:
            candidates[f"{part} {field} {value}"] = {**best, part: {**best.get(part, {}), field: value}}
        us = times(case, candidates, seconds)
        fastest = min(us, key=us.__getitem__)
        if us[fastest] < us["as it is"] * (1 - GAIN):
            best = candidates[fastest]
    us = times(case, {"shipped": {}, "tuned": best}, 2 * seconds) if best else times(case, {"shipped": {}}, seconds)
    after = us.get("tuned", us["shipped"])
    if after < us["shipped"] * (1 - GAIN):
        return best, us["shipped"], after
    return {}, us["shipped"], us["shipped"]


def rule_of(shape: Shape, above: int, changes: Changes, dtype: str) -> dict[str, Any]:
    """For more rows than ``above``, up to the shape's."""
    fan_in, fan_out = SITES[shape.site]
    where = {"in_features": fan_in, "out_features": fan_out, "max_rank": shape.rank, "slices": 1, "dtype": dtype}
    return {"where": {**where, "pairs": [above + 1, shape.rows]}, **changes}


def tune(layers: list[str], ranks: list[int], rows: list[int], adapters: int, to: Path | None) -> list[dict[str, Any]]:
    """Rules for every layer (``"INxOUT"``), rank and number of rows; written to ``to`` as they come."""
    dtype = "bfloat16" if measure.device().type == "cuda" else "float16"
    found: list[dict[str, Any]] = []
    for layer in layers:
        fan_in, fan_out = map(int, layer.split("x"))
        SITES[layer] = fan_in, fan_out
        for rank in ranks:
            for above, most in zip([0, *sorted(rows)], sorted(rows), strict=False):
                shape = Shape(layer, rank, most, min(adapters, most))
                changes, before, after = tuned(shape)
                print(f"{shape}: {before:.1f} us -> {after:.1f} us {changes or 'as shipped'}", flush=True)
                if changes:
                    found.append(rule_of(shape, above, changes, dtype))
                    if to is not None:
                        to.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", action="append", metavar="INxOUT", help="in and out features; may be given again")
    parser.add_argument("--rank", type=int, action="append", help="max_rank of the pools; may be given again")
    parser.add_argument("--rows", default="1,4,16,64,256,1024", help="rows of a batch; default %(default)s")
    parser.add_argument("--adapters", type=int, default=8, help="that the rows fall to; default %(default)s")
    parser.add_argument("-o", "--output", type=Path, help="where the rules go")
    args = parser.parse_args(given)
    for layer in args.layer or ():
        if [part.isdecimal() and int(part) > 0 for part in layer.split("x")] != [True, True]:
            parser.error(f"--layer: got {layer!r}, accepted is INxOUT, for example 4096x4096")
    rows = args.rows.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in rows):
        parser.error(f"--rows: got {args.rows!r}, accepted are whole numbers above 0 between commas")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is at hand: there is nothing to tune for")
    with torch.no_grad():
        layers, ranks = args.layer or ["4096x4096"], args.rank or [16]
        found = tune(layers, ranks, [int(n) for n in rows], args.adapters, args.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
