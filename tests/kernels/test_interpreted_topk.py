"""Selection by magnitude in Triton's CPU interpreter, bit for bit as the CPU's kernels. Entries are loaded as integers,
so bf16 can be trusted here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from topk_cases import INF, KINDS, SHAPES, SMALL, bits, check, run

from lora_fuse.functional import magnitude_prune, sparsify, topk_mask
from lora_fuse.kernels.topk import select
from lora_fuse.kernels.topk_plan import FAILED, FIELDS, STATE, Plan
from lora_fuse.kernels.topk_settle import _pick_kernel
from lora_fuse.kernels.topk_tables import fills, items_of
from lora_fuse.ops.topk_call import KERNEL_DTYPES, SCOPES, Call

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in KERNEL_DTYPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("with_minus", [False, True], ids=["plain", "minus"])
def test_lists(scope, dtype, with_minus):
    xs = [torch.randn(s).to(dtype) for s in SHAPES]
    minus = [torch.randn_like(x) for x in xs] if with_minus else None
    check(xs, 0.3, scope, minus, "dense", SMALL)


@pytest.mark.parametrize("scope", SCOPES)
def test_lists_of_more_tensors_than_a_launch_serves(scope):
    xs = [torch.randn(s) for s in [(3, 401), (7,), (2, 333), (60, 9), (1, 350), (700,)]]
    check(xs, 0.3, scope, None, "dense", replace(SMALL, tensors=2))
    check(xs, 0.3, scope, [torch.randn_like(x) for x in xs], "mask", replace(SMALL, tensors=1))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_values(kind):
    """One threshold over several dtypes, and rows of one."""
    xs = [kind(3, 401), kind(2, 333).bfloat16(), kind(1, 500).half()]
    check(xs, 0.3, "global", plan=SMALL)
    check([kind(3, 53).half()], 0.4, "row", [kind(3, 53).half().nan_to_num(posinf=2, neginf=-2)], "dense", SMALL)


@pytest.mark.parametrize("kind", ["normal", "mostly zeros"])
@pytest.mark.parametrize("margin", [5.0, -30.0], ids=["bracket", "missed"])
def test_every_rank(kind, margin):
    """Whether the bracket from the sample holds the threshold, or one program has to search for it."""
    x = KINDS[kind](2000)
    order = x.abs().sort(descending=True, stable=True).indices
    plan = Plan(**{**vars(SMALL), "margin": margin})
    for k in (0, 1, 100, 1999, 2000) if margin > 0 else (1500,):
        want = torch.zeros(2000, dtype=torch.bool)
        want[order[:k]] = True
        assert torch.equal(run([x], 1.0, "tensor", plan=plan, k=k)[0], want)


def test_ties_beyond_what_one_program_picks_from():
    """fp32 entries with the few values of a coarser type: a bin holds one value many times, or some."""
    x = torch.randn(3000).bfloat16().float()
    x[::3] = (x[::3] * 256).round() / 256
    check([x], 0.3, "tensor", plan=Plan(**{**vars(SMALL), "pick": 16, "samples": 256}))  # 16: more are in the bin
    check([torch.rand(900) * 1e-3 + 1], 0.5, "tensor", plan=Plan(**{**vars(SMALL), "pick": 16, "samples": 0}))


@pytest.mark.parametrize(
    "values",
    [
        lambda n: torch.randint(0, 2, (n,)) * 2.0 - 1,
        lambda n: 1 + 1e-3 * torch.rand(n),
        lambda n: (torch.randn(n) * 2).round().clamp(-7, 7) * 0.013,
        lambda n: torch.randn(n),
    ],
    ids=["two", "close", "four bits", "normal"],
)
def test_few_values_and_close_ones_are_bracketed_too(values):
    """fp32 entries of which many are equal, or differ in their last bits: one program never has to search for all."""

    class Narrow(Plan):
        def room(self, entries: int) -> int:
            return entries // 2

    plan = Narrow(**{**vars(SMALL), "samples": 512, "draw": 512})
    made = select([values(3000)], None, [(1, 3000)], "tensor", [1000], plan=plan)
    made.run()
    state = next(launch.args[1] for launch in made.launches if launch.kernel is _pick_kernel)
    assert state[STATE.index("status")] != FAILED


def test_rows_go_in_batches():
    """Room for what is collected is for so many rows at a time as it takes, whatever the tensor's number of rows."""
    x, minus = torch.randn(7, 300), torch.randn(7, 300)
    check([x, x.half()[:2]], 0.3, "row", [minus, minus.half()[:2]], "dense", SMALL)
    shapes, ks = [(5000, 9000)], [900]
    made = select([torch.empty(shapes[0], device="meta")], None, shapes, "row", ks)
    found = {launch.kernel: launch.args[3] for launch in made.launches}[_pick_kernel]
    assert found.shape[0] <= Plan().pool
    (item,) = items_of([torch.zeros(3, 9001)], None, [(3, 9001)], "row", [900], None, Plan())
    assert [run.aligned for run in item.by_rows(1)] == [True, False, False]


def test_the_shipped_plan():
    xs = [torch.randn(2, 4099), torch.randn(1, 9000), torch.randn(5, 1024)]
    check(xs, 0.1, "row")
    check([xs[1].half()], 0.1, "tensor", form="dense")


def test_rows_on_chip():
    for cols in (1, 31, 300):
        x = KINDS["few distinct"](9, cols)
        check([x, x.bfloat16()], 0.4, "row")
    wide = torch.where(torch.rand(4, 200) < 0.5, 1e30, 1e-30) * torch.rand(4, 200)
    check([wide], 0.6, "row", form="dense")
    wide[1, 7] = INF
    check([wide], 0.002, "row")
    check([wide], 1.0, "row")


@pytest.mark.parametrize("cols", [40, 700], ids=["on-chip", "tiles"])
def test_in_place(cols):
    x, minus = torch.randn(4, cols).bfloat16(), torch.randn(4, cols).bfloat16()
    want = magnitude_prune(x, 0.3, minus=minus)
    for target in (0, 1):
        pair = [x.clone(), minus.clone()]
        run([pair[0]], 0.3, "tensor", [pair[1]], "dense", [pair[target]], True, SMALL)
        assert torch.equal(pair[target], want)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # inf - inf, as numpy sees it
@pytest.mark.parametrize("scope", SCOPES)
def test_nan_is_named_and_nothing_is_written(scope):
    xs = [torch.randn(2, 30), torch.randn(2, 700)]
    minus = [torch.randn_like(x) for x in xs]
    outs = [torch.ones_like(x) for x in xs]
    for i, at in ((1, (1, 699)), (0, (0, 0))):
        xs[i][at] = float("nan")
        with pytest.raises(ValueError, match=rf"^x\[{i}\]: has NaN"):
            run(xs, 0.3, scope, minus, "dense", outs, True, SMALL)
        xs[i][at] = minus[i][at] = INF
        with pytest.raises(ValueError, match=rf"^x\[{i}\]: x - minus has NaN .* both are infinite"):
            run(xs, 1.0, scope, minus, "dense", outs, True, SMALL)
        xs[i][at] = minus[i][at] = 0
    assert all(bool((out == 1).all()) for out in outs)
    run(xs, 0.3, scope, minus, "dense", outs, True, SMALL)
    assert not any(bool((out == 1).any()) for out in outs)


class TestTheOp:
    """What the public functions do for tensors on a GPU."""

    @pytest.fixture(autouse=True)
    def on_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Call, "by_gpu_kernel", property(lambda call: call.by_kernel))

    def test_results_are_the_cpus(self, monkeypatch):
        x, minus = torch.randn(5, 4, 9), torch.randn(5, 4, 9)
        got = [topk_mask(x, 0.3, "row", minus=minus), magnitude_prune(x, 0.3, minus=minus)]
        strided = torch.zeros(5, 4, 18)[..., ::2]
        magnitude_prune(x.transpose(0, 1).contiguous().transpose(0, 1), 0.3, minus=minus, out=strided)
        out = x.clone()
        version = out._version
        assert magnitude_prune(out, 0.3, minus=minus, out=out) is out
        assert out._version > version
        assert topk_mask([], 0.5) == []
        assert topk_mask(torch.zeros(0, 3), 0.5).shape == (0, 3)
        monkeypatch.undo()
        assert torch.equal(got[0], topk_mask(x, 0.3, "row", minus=minus))
        want = magnitude_prune(x, 0.3, minus=minus)
        assert all(torch.equal(y, want) for y in (got[1], strided, out))

    @pytest.mark.parametrize("scope", SCOPES)
    def test_sparse_forms_are_the_cpus(self, scope, monkeypatch):
        xs = [torch.randn(3, 130), torch.randn(2, 5000).bfloat16(), torch.zeros(3, 0), torch.randn(2, 3, 7).half()]
        minus = [torch.randn_like(x) for x in xs]
        calls = [(0.4, None, "difference"), (0.02, minus, "difference"), (0.02, minus, "x")]
        got = [sparsify(xs, d, scope, minus=m, values=v) for d, m, v in calls]
        monkeypatch.undo()
        forms = set()
        for matrices, (d, m, v) in zip(got, calls, strict=True):
            for ours, theirs in zip(matrices, sparsify(xs, d, scope, minus=m, values=v), strict=True):
                ours.check("ours")
                forms.add(None if ours.columns is None else ours.columns.dtype)
                assert torch.equal(bits(ours.values), bits(theirs.values))
                for a, b in ((ours.row_starts, theirs.row_starts), (ours.columns, theirs.columns)):
                    assert a is None if b is None else torch.equal(a, b)
                assert ours.bitmap is None if theirs.bitmap is None else torch.equal(ours.bitmap, theirs.bitmap)
        assert forms == {None, torch.uint16}

    def test_columns_of_wide_matrices(self, monkeypatch):
        x = torch.zeros(1, 66_000)
        x[0, ::220] = torch.randn(300)
        got = sparsify(x, 0.001)
        monkeypatch.undo()
        assert got.columns.dtype == torch.int32
        assert torch.equal(got.columns, sparsify(x, 0.001).columns)

    def test_errors_are_the_cpus(self):
        x = torch.randn(4, 5)
        x[3, 4] = float("nan")
        out = torch.ones(4, 5)
        with pytest.raises(ValueError, match=r"^x: has NaN entries$"):
            topk_mask(x, 0.5)
        with pytest.raises(ValueError, match=r"^x: has NaN entries$"):
            magnitude_prune(x, 0.5, out=out)
        assert bool((out == 1).all())
        for scope in SCOPES:
            with pytest.raises(ValueError, match=r"^x: has NaN entries$"):
                sparsify(x, 0.5, scope)

    def test_shared_memory_is_refused(self, monkeypatch):
        """What one program has written another would read."""
        whole, x = torch.randn(3, 100), torch.randn(200)
        xs, before = [whole[0], whole[1]], whole.clone()
        calls = [(xs, None, out) for out in ([whole[1], whole[2]], [whole[2], whole[0]], [whole[2], whole[2]])]
        calls += [(xs, [whole[2], whole[1]], [whole[0], whole[2]]), (x[:150], None, x[50:]), (x[50:], x[:150], x[:150])]
        ours = [refusal(*call) for call in calls]
        assert torch.equal(whole, before)
        magnitude_prune([whole[0], whole[1]], 0.5, minus=[whole[2], whole[2]], out=xs)
        monkeypatch.undo()
        assert ours == [refusal(*call) for call in calls]


def refusal(x, minus, out) -> str:
    with pytest.raises(ValueError, match=r"out\[.\]: shares memory with ") as found:
        magnitude_prune(x, 0.5, "global", minus, out)
    return str(found.value)


def test_tables_are_written_by_launches_too():
    numbers = [[i * 2**40 - j for j in range(len(FIELDS))] for i in range(3)]
    table = torch.zeros(3, len(FIELDS), dtype=torch.int64)
    for launch in fills(table, numbers):
        launch.run()
    assert table.tolist() == numbers
