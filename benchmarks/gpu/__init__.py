"""Benchmarks on a GPU: ``python -m benchmarks.gpu``, a part a module.

A part is a module of this package, named in ``PARTS``, with

- ``check()``: every way against fp64; raises SystemExit if one is wrong. Runs on the card where there is one, else at
  tiny sizes in Triton's CPU interpreter (``measure.device()`` tells).
- ``run(at: measure.Setting) -> Iterable[dict]``: times, prints a line a shape (``report.show``), returns or yields the
  rows (``report.row``); what was yielded is kept if a later shape fails. Asks ``at.budget.over(shape)`` before each
  shape, most important shapes first. Has to run on the CPU at tiny sizes too, where times mean nothing: that is how it
  is tested.
- ``compile_share(share: slice)``, if kernels are many: a generator that runs the launches of ``shapes[share]`` once, so
  that several processes can compile them side by side.
- ``targets(rows) -> list[dict]``: what was aimed at beside what was measured (``report.target``); may be empty.
"""

PARTS: dict[str, float] = {  # and each one's share of the time
    "multi_lora": 4.0,
    "decoder": 1.0,
    "model": 0.7,
    "fused": 0.4,
    "svd": 0.8,
    "sparse_delta": 0.6,
    "topk": 0.6,
}
