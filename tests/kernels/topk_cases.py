"""Lists of tensors for a selection by magnitude, and how its kernels are driven without its op."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fuse.functional import magnitude_prune, topk_mask
from lora_fuse.kernels.topk import select
from lora_fuse.kernels.topk_plan import Plan
from lora_fuse.ops.topk_call import Call

INF = float("inf")
SMALL = Plan(tile=512, row=64, samples=128, draw=64, whole=500, pick=64, pool=1500)  # every step at small sizes
SHAPES = [(7, 13), (1, 1), (3, 533), (4, 0), (3, 60)]
KINDS = {
    "normal": lambda *s: torch.randn(*s),
    "few distinct": lambda *s: torch.randint(-3, 4, s).float(),
    "all equal": lambda *s: torch.full(s, -1.5),
    "signed zeros": lambda *s: torch.where(torch.rand(*s) < 0.5, 0.0, -0.0),
    "mostly zeros": lambda *s: torch.randn(*s) * (torch.rand(*s) < 0.07),
    "infinities": lambda *s: torch.where(torch.rand(*s) < 0.3, INF, -1.0) * torch.randn(*s).sign(),
    "denormals": lambda *s: torch.randn(*s) * 1e-40,
    "small halves": lambda *s: torch.randn(*s) * 1e-7,
    "powers": lambda *s: torch.randn(*s).mul(4).exp2(),
}


def bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def run(xs, density, scope, minus=None, form="mask", outs=None, guarded=False, plan=None, k=None) -> list[Tensor]:
    """What the op has launched; raises where there is NaN."""
    call = Call(xs, minus, density, scope)
    ks = call.ks if k is None else [k] * len(call.ks)
    if outs is None:
        dtypes = [torch.bool if form == "mask" else x.dtype for x in xs]
        outs = [torch.empty(x.shape, dtype=d, device=x.device) for x, d in zip(xs, dtypes, strict=True)]
    made = select(xs, minus, call.shapes, scope, ks, form, outs, guarded, plan=plan)
    made.run()
    bad = made.bad_input()
    if bad >= 0:
        call.refuse_nan(bad)
    return outs


def check(xs, density, scope, minus=None, form="mask", plan=None) -> None:
    """Bit for bit what the CPU's kernels make."""
    host = [x.cpu() for x in xs]
    host_minus = None if minus is None else [m.cpu() for m in minus]
    got = run(xs, density, scope, minus, form, plan=plan)
    by_cpu = topk_mask if form == "mask" else magnitude_prune
    for ours, theirs in zip(got, by_cpu(host, density, scope, minus=host_minus), strict=True):
        assert torch.equal(bits(ours.cpu()), bits(theirs))
