"""Results as Markdown tables, one function for each benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks.bench_multi_lora import geomean
from benchmarks.rivals import RIVALS

NAMES = {
    "peft": "PEFT mixed batch",
    "mm loop": "per-adapter mm loop",
    "bmm": "gathered bmm",
    "vllm cpu": "vLLM CPU formula",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def model(rows: list[dict[str, Any]]) -> str:
    def over(r: dict[str, Any], name: str) -> str:
        us = r["us"]
        return f"{us[name] / 1e3:.2f} ms ({us[name] / us['bare model'] - 1:+.0%})"

    body = [
        [f"{r['rows']} x {r['tokens']}", str(r["adapters"]), f"{r['us']['bare model'] / 1e3:.2f} ms",
         over(r, "PEFT mixed batch"), over(r, "lora_fuse")]
        for r in rows
    ]  # fmt: skip
    return table(["rows x tokens", "adapters", "bare model", "PEFT mixed batch", "lora_fuse"], body)


def summary(results: list[dict[str, Any]]) -> str:
    body = []
    for dtype in ("float32", "bfloat16"):
        part = [r for r in results if r["dtype"] == dtype]
        if not part:
            continue
        ratios = {n: [r["us"][n] / r["us"]["lora_fuse"] for r in part] for n in RIVALS}
        best = [min(values) for values in zip(*ratios.values(), strict=True)]
        for name, values in [("best rival of each shape", best), *((NAMES[n], v) for n, v in ratios.items())]:
            lost = sum(v < 1 for v in values)
            body.append([dtype, name, f"{geomean(values):.1f}x", f"{min(values):.2f}x", f"{lost} of {len(values)}"])
    return table(["dtype", "against", "geometric mean", "worst shape", "shapes lost"], body)


def floor(results: list[dict[str, Any]]) -> str:
    body = []
    for isa in dict.fromkeys(r["isa"] for r in results):
        cells = []
        for dtype in ("float32", "bfloat16"):
            part = [r["us"]["lora_fuse"] / r["floor_us"] for r in results if (r["isa"], r["dtype"]) == (isa, dtype)]
            cells.append(f"{geomean(part):.2f}x" if part else "")
        body.append([isa, *cells])
    return table(["instruction set", "fp32: time / floor", "bf16: time / floor"], body)


def shapes(results: list[dict[str, Any]]) -> str:
    body = [
        [r["id"], f"{r['us']['lora_fuse']:.1f}", f"{r['floor_us']:.1f}", f"{r['floor_us'] / r['us']['lora_fuse']:.0%}"]
        + [f"{r['us'][n]:.1f}" for n in RIVALS] + [f"{r['us']['linear']:.1f}", f"{r['us']['layer']:.1f}"]
        for r in results
    ]  # fmt: skip
    head = ["shape", "lora_fuse", "floor", "of roofline", *(NAMES[n] for n in RIVALS), "bare linear", "whole layer"]
    return table(head, body)


def merge(rows: list[dict[str, Any]]) -> str:
    body = [
        [r["name"], f"{r['seconds'] * 1e3:.1f} ms", f"{r['ratio']:.0f}x", f"{r['excess']:.0e}",
         f"{r['largest_buffer']:.2f} of W"]
        for r in rows
    ]  # fmt: skip
    return table(["merge of 8 rank-16 adapters", "time", "ratio", "error / optimal - 1", "largest buffer"], body)


def svds(rows: list[dict[str, Any]]) -> str:
    def cell(r: dict[str, Any], name: str) -> str:
        return f"{r['us'][name] / 1e3:.0f} ms, {r['excess'][name]:.1e}"

    names = list(rows[0]["us"])
    body = [
        [r["spectrum"], *(cell(r, name) for name in names), f"{r['floor_us'][2] / 1e3:.0f} ms"] for r in rows
    ]  # fmt: skip
    return table(["time, error / optimal - 1", *names, "floor of power_iters=2"], body)


def composition(rows: list[dict[str, Any]]) -> str:
    def over(r: dict[str, Any], name: str) -> str:
        return f"{r['ms'][name]:.1f} ms ({r['ms'][name] / r['ms']['bare model']:.2f}x)"

    body = [
        [f"{r['rows']} x {r['tokens']}", str(r["rank"]), f"{r['ms']['bare model']:.1f} ms", over(r, "lora_fuse"),
         over(r, "branch per adapter")]
        for r in rows
    ]  # fmt: skip
    head = ["rows x tokens", "rank", "bare model to its inputs", "learn_composition", "branch per adapter"]
    return table(head, body)


def peft_layers(whole: dict[str, Any]) -> str:
    return ", ".join(f"{rows} x {cols}: {seconds:.1f} s" for (rows, cols), seconds in whole["peft"].items())


def merge_model(whole: dict[str, Any]) -> str:
    body = [
        [f"`{r['method']}`", str(r["rank"] or "all directions"), f"{r['seconds']:.1f} s",
         f"{r['seconds'] / whole['layers'] * 1e3:.0f} ms", "" if r["peak"] is None else f"{r['peak'] / 1e9:.2f} GB",
         f"{whole['peft_model']:.0f} s ({whole['peft_model'] / r['seconds']:.0f}x)" if r["method"] == "svd" else "none"]
        for r in whole["rows"]
    ]  # fmt: skip
    head = ["merge of 8 rank-16 adapters", "to rank", "time", "per layer", "memory beyond the inputs", "PEFT"]
    return table(head, body)


def prune(rows: list[dict[str, Any]]) -> str:
    rivals = list(rows[0]["rival_us"])
    body = [
        [f"{r['shape'][0]} x {r['shape'][1]} {r['dtype']}", f"{r['us']['prune, out='] / 1e3:.1f} ms",
         f"{r['over_floor']:.2f}x"]
        + [f"{r['times_ours'][name]:.1f}x" for name in rivals]
        for r in rows
    ]  # fmt: skip
    return table(["magnitude_prune(out=)", "time", "time / floor", *rivals], body)


def products(rows: list[dict[str, Any]]) -> str:
    body = []
    for r in rows:
        us = r["us"]
        own, bare = us["lora_fuse"], us["bare linear"]
        body.append([
            str(r["dtype"]).removeprefix("torch."), f"{r['density']:.0%}", str(r["rows"]), f"{own / 1e3:.2f} ms",
            f"+{own / bare:.0%}", f"{us['torch.sparse csr'] / own:.1f}x", f"{us['dense residuals'] / own:.1f}x",
        ])  # fmt: skip
    head = ["dtype", "density", "rows", "lora_fuse", "over the bare linear", "torch.sparse CSR", "dense residuals"]
    return table(head, body)


def switches(rows: list[dict[str, Any]]) -> str:
    body = [
        [str(r["dtype"]).removeprefix("torch."), f"{r['density']:.0%}", f"{r['us']['lora_fuse'] / 1e3:.1f} ms",
         f"{r['us']['copies'] / 1e3:.1f} ms", f"{r['nbytes'] / 1e6:.1f} MB", f"{r['dense_nbytes'] / 1e6:.1f} MB"]
        for r in rows
    ]  # fmt: skip
    return table(["dtype", "density", "switch_task", "copies", "held per task", "a whole model"], body)


def sparsify(rows: list[dict[str, Any]]) -> str:
    body = [
        [f"`{r['name']}`", f"{r['seconds']:.2f} s", f"{r['peft']:.1f} s", f"{r['ratio']:.0f}x", f"{r['excess']:.0e}"]
        for r in rows
    ]
    return table(["method", "lora_fuse", "PEFT", "ratio", "error / optimal - 1"], body)


def joint(rows: list[dict[str, Any]]) -> str:
    body = [
        [r["kind"], r["form"], str(r["rank"]), f"{r['fewer_bytes']:.1f}x", f"{r['error']:.1%}",
         f"{r['over_dense']:.3f}x" if "over_dense" in r else "", f"{r['seconds']:.1f} s"]
        for r in rows
    ]  # fmt: skip
    head = ["adapters", "form", "rank", "fewer bytes", "relative error", "dense least squares'", "time"]
    return table(head, body)


def joint_serving(rows: list[dict[str, Any]]) -> str:
    body = []
    for r in rows:
        us, nbytes = r["us"], r["nbytes"]
        bare = us["bare linear"]
        cells = [
            f"{us[n] / 1e3:.2f} ms (+{us[n] / bare - 1:.0%}), {nbytes[n] / 1e6:.1f} MB"
            for n in ("LoRA slots", "joint slots")
        ]
        body.append([str(r["dtype"]).removeprefix("torch."), f"{bare / 1e3:.2f} ms", *cells])
    return table(["dtype", "bare linear", "LoRA slots, rank 16", "joint slots, rank 64"], body)
