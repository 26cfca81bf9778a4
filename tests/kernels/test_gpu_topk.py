"""Selection by magnitude on a device (``make test-gpu``): bit for bit as the CPU's kernels."""

from __future__ import annotations

import pytest
import torch
from gpu_runs import nothing_waits
from topk_cases import INF, KINDS, SHAPES, bits, check, run

from lora_fuse.functional import magnitude_prune, sparsify, topk_mask
from lora_fuse.kernels.topk import select
from lora_fuse.kernels.topk_plan import Plan
from lora_fuse.ops.topk_call import KERNEL_DTYPES, SCOPES, Call

pytestmark = pytest.mark.gpu
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in KERNEL_DTYPES]
WIDE = [(257, 1031), (64, 8192), (3, 9001), (1, 100_003), (12, 4096), *SHAPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", ["mask", "dense"])
@pytest.mark.parametrize("with_minus", [False, True], ids=["plain", "minus"])
def test_lists(scope, dtype, form, with_minus):
    xs = [torch.randn(s, device="cuda").to(dtype) for s in WIDE]
    minus = [torch.randn_like(x) for x in xs] if with_minus else None
    for density in (0.01, 0.1, 0.7, 1.0):
        check(xs, density, scope, minus, form)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("scope", SCOPES)
def test_values_and_several_dtypes(kind, scope):
    xs = [kind(300, 1000).cuda().to(d) for d in KERNEL_DTYPES]
    minus = [kind(300, 1000).nan_to_num(posinf=2, neginf=-2).cuda().to(d) for d in KERNEL_DTYPES]
    for subtracted in (None, minus):
        check(xs, 0.3, scope, subtracted, "dense")
        check([x[:, 1:].contiguous().view(-1)[1:] for x in xs], 0.3, scope, None, "mask")  # at odd addresses


@pytest.mark.parametrize("dtype", DTYPES)
def test_large(dtype):
    x = torch.randn(4096, 4096).to(dtype).cuda()
    minus = (x.float() + torch.randn_like(x, dtype=torch.float32) * 1e-2).to(dtype)  # few different differences
    for subtracted in (None, [minus]):
        check([x], 0.1, "tensor", subtracted)
        check([x], 0.1, "row", subtracted, "dense")
    check([x, x[:2000]], 0.02, "global", form="dense")


@pytest.mark.parametrize("margin", [5.0, -30.0], ids=["bracket", "missed"])
def test_every_rank(margin):
    n = 200_003
    for kind in ("normal", "few distinct", "mostly zeros"):
        x = KINDS[kind](n)
        order = x.abs().sort(descending=True, stable=True).indices
        for k in (0, 1, 2, 20_000, 199_999, n - 1, n):
            want = torch.zeros(n, dtype=torch.bool)
            want[order[:k]] = True
            assert torch.equal(run([x.cuda()], 1.0, "tensor", k=k, plan=Plan(margin=margin))[0].cpu(), want)


def test_more_groups_than_there_is_room_for():
    xs = [torch.randn(100, 900, device="cuda") for _ in range(7)]
    check(xs, 0.2, "tensor", plan=Plan(pool=1 << 17))
    check([torch.randn(70_000, 40, device="cuda").half()], 0.2, "row")
    check([torch.randn(600, 9000, device="cuda").bfloat16()], 0.2, "row", plan=Plan(pool=1 << 20))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_op_goes_by_the_kernels(scope):
    xs = [torch.randn(30, 400), torch.randn(5, 9000)]
    minus = [torch.randn_like(x) for x in xs]
    there, subtracted = [x.cuda() for x in xs], [m.cuda() for m in minus]
    assert Call(there, subtracted, 0.2, scope).by_gpu_kernel
    masks = topk_mask(there, 0.2, scope, minus=subtracted), topk_mask(xs, 0.2, scope, minus=minus)
    for got, want in zip(*masks, strict=True):
        assert torch.equal(got.cpu(), want)
    outs = [x.clone() for x in there]
    magnitude_prune(outs, 0.2, scope, subtracted, outs)
    for got, want in zip(outs, magnitude_prune(xs, 0.2, scope, minus), strict=True):
        assert torch.equal(bits(got.cpu()), bits(want))
    sparse = sparsify(there, 0.2, scope, minus=subtracted), sparsify(xs, 0.2, scope, minus=minus)
    for got, want in zip(*sparse, strict=True):
        assert torch.equal(got.values.cpu(), want.values)
        assert torch.equal(got.row_starts.cpu(), want.row_starts)
        assert torch.equal(got.mask().cpu(), want.mask())


@pytest.mark.parametrize("scope", SCOPES)
def test_nan_is_named_and_nothing_is_written(scope):
    xs = [torch.randn(20, 300, device="cuda"), torch.randn(3, 70_000, device="cuda"), torch.randn(41, device="cuda")]
    minus = [torch.randn_like(x) for x in xs]
    outs = [torch.ones_like(x) for x in xs]
    for i, at in ((2, (40,)), (1, (2, 69_999)), (0, (0, 0))):
        xs[i][at] = float("nan")
        with pytest.raises(ValueError, match=rf"^x\[{i}\]: has NaN entries$"):
            magnitude_prune(xs, 0.3, scope, minus, outs)
        with pytest.raises(ValueError, match=rf"^x\[{i}\]: has NaN entries$"):
            topk_mask(xs, 0.3, scope)
        xs[i][at] = minus[i][at] = INF
        with pytest.raises(ValueError, match=rf"^x\[{i}\]: x - minus has NaN .* both are infinite"):
            magnitude_prune(xs, 0.3, scope, minus, outs)
        xs[i][at] = minus[i][at] = 0
    assert all(bool((out == 1).all()) for out in outs)


@pytest.mark.parametrize("scope", SCOPES)
def test_graphs_follow_their_inputs(scope):
    """The captured launches wait for nothing, and read neither the host's memory nor old counters."""
    xs = [torch.randn(64, 512, device="cuda"), torch.randn(7, 30_000, device="cuda").bfloat16()]
    topk_mask(xs, 0.1, scope), magnitude_prune(xs, 0.1, scope)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = topk_mask(xs, 0.1, scope)
        pruned = magnitude_prune(xs, 0.1, scope)
    for _ in range(3):
        for x in xs:
            x.normal_()
        graph.replay()
        for got, want in zip(masks, topk_mask([x.cpu() for x in xs], 0.1, scope), strict=True):
            assert torch.equal(got.cpu(), want)
        for x, mask, y in zip(xs, masks, pruned, strict=True):
            assert torch.equal(y, torch.where(mask, x, 0))


def test_launches_wait_for_nothing():
    xs = [torch.randn(64, 512, device="cuda"), torch.randn(7, 30_000, device="cuda")]
    run(xs, 0.1, "tensor")
    call = Call(xs, None, 0.1, "tensor")
    outs = [torch.empty_like(x, dtype=torch.bool) for x in xs]
    with nothing_waits():
        made = select(xs, None, call.shapes, "tensor", call.ks, "mask", outs)
        made.run()
    assert made.bad_input() == -1
    assert [int(out.sum()) for out in outs] == call.ks


def test_results_do_not_hang_on_the_order_of_programs():
    x = torch.randn(3000, 3000, device="cuda").bfloat16()
    first = topk_mask(x, 0.05)
    assert all(torch.equal(topk_mask(x, 0.05), first) for _ in range(20))
