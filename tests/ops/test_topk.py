"""topk_mask, magnitude_prune and sparsify on the CPU, against sorting: one exact set, bit for bit."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch

from lora_fuse import _cpu, reference
from lora_fuse.functional import magnitude_prune, sparsify, topk_mask
from lora_fuse.ops.topk_call import KERNEL_DTYPES, SCOPES, Call

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in KERNEL_DTYPES]
INF = float("inf")


@pytest.fixture(params=[n for n in _cpu.available_isas() if n in ("baseline", "avx2", "avx512")])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set with kernels of its own; those above avx512 share its."""
    before = _cpu.isa()
    _cpu.choose_isa(request.param)
    yield request.param
    _cpu.choose_isa(before)


def lists_equal(got, want) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def difference(x, minus):
    return x if minus is None else x - minus  # torch forms it in fp32 and rounds once


def check(xs, density, scope, minus=None, *, by_kernel=True) -> None:
    """All three outputs against the reference, bit for bit."""
    want = reference.topk_mask(xs, density, scope, minus)
    call = Call(xs, minus, density, scope)
    assert call.by_kernel == by_kernel
    if scope == "global":
        assert sum(int(m.sum()) for m in want) == int(density * sum(x.numel() for x in xs))
    assert lists_equal(topk_mask(xs, density, scope, minus=minus), want)
    pruned = magnitude_prune(xs, density, scope, minus)
    outs = [torch.full_like(x, float("nan")) for x in xs]
    magnitude_prune(xs, density, scope, minus, out=outs)
    subtracted = [None] * len(xs) if minus is None else minus
    for x, m, mask, y, out in zip(xs, subtracted, want, pruned, outs, strict=True):
        dense = torch.where(mask, difference(x, m), torch.zeros((), dtype=x.dtype))
        assert torch.equal(bits(y), bits(dense))
        assert torch.equal(bits(out), bits(dense))
    if all(x.dim() >= 2 for x in xs):
        for values in ("difference", "x"):
            matrices = sparsify(xs, density, scope, minus=minus, values=values)
            for x, m, mask, matrix in zip(xs, subtracted, want, matrices, strict=True):
                matrix.check("matrix")
                assert torch.equal(matrix.mask().view(mask.shape), mask)
                entries = x if values == "x" else difference(x, m)
                assert torch.equal(bits(matrix.values), bits(entries[mask]))


CASES = {
    "normal": lambda *s: torch.randn(*s),
    "few distinct": lambda *s: torch.randint(-3, 4, s).float(),
    "all equal": lambda *s: torch.full(s, -1.5),
    "zeros": lambda *s: torch.zeros(*s),
    "signed zeros": lambda *s: torch.where(torch.rand(*s) < 0.5, 0.0, -0.0),
    "mostly zeros": lambda *s: torch.randn(*s) * (torch.rand(*s) < 0.07),
    "infinities": lambda *s: torch.where(torch.rand(*s) < 0.3, INF, -1.0) * torch.randn(*s).sign(),
    "denormals": lambda *s: torch.randn(*s) * 1e-40,
    "small halves": lambda *s: torch.randn(*s) * 1e-7,
    "powers": lambda *s: torch.randn(*s).mul(8).exp2(),
    "rising": lambda *s: torch.arange(float(torch.Size(s).numel())).view(s),
    "two": lambda *s: torch.where(torch.arange(torch.Size(s).numel()).view(s) % 7 < 3, 2.0, -1.0),
}
LISTS = {
    "one": [(33, 65)],
    "odd": [(7, 13), (1, 1), (3, 5, 11), (33, 1)],
    "with empty": [(4, 0), (5, 9), (0, 3), (0, 0), (2, 2)],
    "all empty": [(0, 3), (2, 0)],
    "wide row": [(2, 20011)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("scope", SCOPES)
def test_against_sorting(isa, kind, scope, dtype):
    for name, shapes in LISTS.items():
        if name == "wide row" and (kind not in (CASES["normal"], CASES["few distinct"]) or scope == "tensor"):
            continue
        xs = [kind(*s).to(dtype) for s in shapes]
        minus = [torch.randn(s).mul(2).round().to(dtype) for s in shapes]
        for density in (0.1, 0.5, 1.0) if name == "odd" else (0.25,):
            check(xs, density, scope)
            check(xs, density, scope, minus)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_and_cooperative_selection(isa, dtype):
    """Large enough for samples, several chunks and the team; a torch sort is the reference here."""
    before = torch.get_num_threads()
    xs = [torch.randn(300, 257).to(dtype), torch.randn(70, 4000).to(dtype).mul(3), torch.zeros(50, 64, dtype=dtype)]
    minus = [torch.randn_like(x).round() for x in xs]
    try:
        for m in (None, minus):
            flat = torch.cat(
                [difference(x.float(), None if m is None else m[i].float()).abs().view(-1) for i, x in enumerate(xs)]
            )
            for density in (0.01, 0.1, 0.7):
                order = flat.sort(descending=True, stable=True).indices[: int(density * flat.numel())]
                want = torch.zeros(flat.shape, dtype=torch.bool)
                want[order] = True
                parts = want.split([x.numel() for x in xs])
                masks = [p.view(x.shape) for p, x in zip(parts, xs, strict=True)]
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    assert lists_equal(topk_mask(xs, density, "global", minus=m), masks)
                    for mask, matrix in zip(masks, sparsify(xs, density, "global", minus=m), strict=True):
                        matrix.check("matrix")
                        assert torch.equal(matrix.mask(), mask)
    finally:
        torch.set_num_threads(before)


ADVERSE = {
    "few distinct": lambda n: torch.randint(0, 5, (n,)).float(),
    "one in the middle": lambda n: torch.where(torch.arange(n) % 3 == 0, 1.0, torch.rand(n) * 2),
    "sorted": lambda n: torch.arange(float(n)),
    "sorted down": lambda n: torch.arange(float(n)).flip(0),
    "in two halves": lambda n: torch.cat([torch.rand(n // 2), 100 + torch.rand(n - n // 2)]),
    "one huge": lambda n: torch.rand(n).index_fill(0, torch.tensor([n // 3]), INF),
    "all but one zero": lambda n: torch.zeros(n).index_fill(0, torch.tensor([n - 1]), 1.0),
    "tiny and huge": lambda n: torch.where(torch.arange(n) % 16 == 5, 1e30, 1e-30) * (1 + torch.rand(n)),
}


@pytest.mark.parametrize("kind", ADVERSE.values(), ids=ADVERSE.keys())
@pytest.mark.parametrize("histogram", [False, True], ids=["bracket", "histogram"])
def test_both_methods_find_the_same_set(isa, kind, histogram):
    n = 40_003
    for dtype in KERNEL_DTYPES:
        x = kind(n).clamp(max=6e4).to(dtype) if dtype == torch.float16 else kind(n).to(dtype)
        order = x.float().abs().sort(descending=True, stable=True).indices
        for k in (1, 2, 4_001, 13_334, n - 1):
            call = Call(x, None, 1.0, "tensor")
            call.ks = [k]
            mask = torch.empty(n, dtype=torch.bool)
            call.select(histogram).write_mask([mask], 2)
            want = torch.zeros(n, dtype=torch.bool)
            want[order[:k]] = True
            assert torch.equal(mask, want)


def test_a_sample_that_misleads(isa):
    """Entries that the sample's places avoid: the bracket misses the threshold, the histograms find it."""
    n = 1 << 18
    x = torch.rand(n) + 1
    call = Call(x, None, 0.5, "tensor")
    call.ks = [1000]
    x[torch.randperm(n)[:3000]] = 0.5 + torch.rand(3000) * 1e-3  # 1.1 %, far below the rest
    for k in (n - 1500, n - 2999, n - 1):
        call.ks = [k]
        mask = torch.empty(n, dtype=torch.bool)
        call.select().write_mask([mask], 1)
        order = x.sort(descending=True, stable=True).indices
        assert not mask[order[k:]].any()
        assert mask.sum() == k


@pytest.mark.parametrize("scope", SCOPES)
def test_k_is_pythons_int(scope):
    for n, density in ((30, 0.1), (100, 0.29), (9, 0.1), (1, 1.0), (7, 1.0), (1000, 1e-9), (10, 0.3)):
        mask = topk_mask(torch.randn(n), density, scope)
        assert int(mask.sum()) == int(density * n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
def test_nan_at_every_position(isa, dtype, scope):
    n = 83
    for at in range(n):
        x = torch.randn(n).to(dtype)
        x[at] = float("nan")
        out = torch.ones(n, dtype=dtype)
        for density in (0.1, 1.0, 1e-6):
            with pytest.raises(ValueError, match=r"^x: has NaN"):
                topk_mask(x, density, scope)
        with pytest.raises(ValueError, match=r"^x: has NaN"):
            magnitude_prune(x, 0.5, scope, out=out)
        assert bool((out == 1).all())


@pytest.mark.parametrize("scope", SCOPES)
def test_nan_names_the_tensor_and_changes_nothing(isa, scope):
    xs = [torch.randn(300, 200) for _ in range(5)]
    outs = [torch.ones(300, 200) for _ in range(5)]
    minus = [torch.randn(300, 200) for _ in range(5)]
    xs[3][299, 199] = float("nan")
    xs[4][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"x\[3\]: has NaN"):
        magnitude_prune(xs, 0.1, scope, out=outs)
    xs[3][299, 199] = xs[4][0, 0] = INF
    minus[4][0, 0] = INF
    with pytest.raises(ValueError, match=r"x\[4\]: x - minus has NaN .* both are infinite"):
        magnitude_prune(xs, 0.1, scope, minus, outs)
    minus[2][7, 7] = float("nan")
    with pytest.raises(ValueError, match=r"minus\[2\]: has NaN"):
        sparsify(xs, 0.1, scope, minus=minus)
    assert all(bool((out == 1).all()) for out in outs)
    kept = topk_mask(xs, 0.1, scope)
    assert kept[3][299, 199]
    assert kept[4][0, 0]


def test_threads_and_isas_agree():
    before_threads, before = torch.get_num_threads(), _cpu.isa()
    x, minus = torch.randn(500, 700).bfloat16(), torch.randn(500, 700).bfloat16()
    results = []
    try:
        for name in _cpu.available_isas():
            _cpu.choose_isa(name)
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append([magnitude_prune(x, 0.05, scope, minus) for scope in SCOPES])
    finally:
        _cpu.choose_isa(before)
        torch.set_num_threads(before_threads)
    assert all(lists_equal(r, results[0]) for r in results)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
    "negative bit": lambda t: torch._neg_view(t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(layout, dtype):
    x, minus = layout(torch.randn(40, 90).to(dtype)), layout(torch.randn(40, 90).to(dtype))
    for scope in SCOPES:
        check([x, x], 0.2, scope)
        check([x], 0.2, scope, [minus])
    base = torch.full((40, 180), 7.0, dtype=dtype)
    magnitude_prune(x, 0.2, out=base[:, ::2])
    assert torch.equal(base[:, ::2], magnitude_prune(x, 0.2))
    assert bool((base[:, 1::2] == 7).all())


def test_more_dimensions_than_the_kernels_read():
    flat = torch.randn(40, 90)
    x, minus = flat.view(5, 8, 1, 1, 3, 1, 5, 1, 6), torch.randn(5, 8, 1, 1, 3, 1, 5, 1, 6)
    check([x], 0.2, "tensor", [minus])
    assert torch.equal(topk_mask(x, 0.2), topk_mask(flat, 0.2).view(x.shape))
    assert torch.equal(sparsify(x, 0.2).values, sparsify(flat, 0.2).values)
    out = torch.empty_like(x)
    version = out._version
    magnitude_prune(x, 0.2, minus=minus, out=out)
    assert torch.equal(out, magnitude_prune(x, 0.2, minus=minus))
    assert out._version > version


@pytest.mark.parametrize("threads", [0, -3])
def test_a_selection_has_a_thread_at_least(threads):
    x, mask = torch.randn(300, 200), torch.empty(300, 200, dtype=torch.bool)
    selection = _cpu.Selection([x], None, [(300, 200)], "tensor", [6000])
    assert selection.select(threads, False) == -1
    selection.write_mask([mask], threads)
    assert torch.equal(mask, topk_mask(x, 0.1))


def test_bitmaps_are_written_whole(isa, monkeypatch):
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **k: plain(*s, **k).view(torch.uint8).fill_(255).view(k["dtype"]))
    for shape in ((5, 70), (3, 64), (4, 1), (2, 40_001)):
        x = torch.randn(shape)
        matrix = sparsify(x, 0.6)
        assert matrix.bitmap is not None or shape[1] == 1
        matrix.check("matrix")
        assert torch.equal(matrix.mask(), topk_mask(x, 0.6))


def test_row_scope_of_one_and_more_dimensions():
    x = torch.randn(6, 4, 10)
    assert torch.equal(topk_mask(x, 0.5, "row").view(6, 40).sum(1), torch.full((6,), 20))
    assert int(topk_mask(torch.randn(10), 0.3, "row").sum()) == 3
    assert topk_mask(torch.tensor(2.0), 1.0).shape == ()
    assert topk_mask([], 0.5, "global") == []


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16, torch.float16)], ids=["mixed"])
def test_one_threshold_over_several_dtypes(isa, dtypes):
    xs = [torch.randn(20, 30).to(d) for d in dtypes]
    check(xs, 0.3, "global")
    check(xs, 0.3, "global", [torch.randn_like(x) for x in xs])


@pytest.mark.parametrize("scope", SCOPES)
def test_plain_torch_path(scope):
    xs = [torch.randn(20, 30, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)]
    check(xs, 0.3, scope, by_kernel=False)
    check(xs, 0.3, scope, [torch.randn_like(x).round() for x in xs], by_kernel=False)
    x = torch.randn(20, 30).bfloat16()
    minus = torch.randn(20, 30)  # another dtype
    got = magnitude_prune(x, 0.25, scope, minus)
    want = reference.topk_mask([x], 0.25, scope, [minus])[0]
    assert torch.equal(got, torch.where(want, x.float() - minus, 0.0).bfloat16())
    with pytest.raises(ValueError, match=r"x\[1\]: has NaN"):
        topk_mask([xs[0], xs[1] * float("nan")], 0.5, scope)


def test_in_place(isa):
    x, minus = torch.randn(300, 400), torch.randn(300, 400)
    want = magnitude_prune(x, 0.1, minus=minus)
    for target in (0, 1):
        pair = [x.clone(), minus.clone()]
        before = pair[target]._version
        assert magnitude_prune(pair[0], 0.1, minus=pair[1], out=pair[target]) is pair[target]
        assert torch.equal(pair[target], want)
        assert pair[target]._version > before


def test_denormal_differences_count_under_flush_denormal():
    x = torch.randn(400, 300) * 1e-39
    minus = x.roll(1, 0)
    want = [topk_mask(x, 0.3, minus=minus), magnitude_prune(x, 0.3, minus=minus)]
    try:
        torch.set_flush_denormal(True)
        got = [topk_mask(x, 0.3, minus=minus), magnitude_prune(x, 0.3, minus=minus)]
    finally:
        torch.set_flush_denormal(False)
    assert int(want[0].sum()) == 36_000
    assert torch.equal(got[0], want[0])
    assert torch.equal(bits(got[1]), bits(want[1]))


def test_shared_memory_is_refused():
    whole = torch.randn(3, 100)
    xs = [whole[0], whole[1]]
    magnitude_prune(xs, 0.5, "global", out=xs)
    x = torch.randn(200)
    for out in ([whole[1], whole[2]], [whole[2], whole[0]], [whole[2], whole[2]]):
        with pytest.raises(ValueError, match=r"out\[.\]: shares memory"):
            magnitude_prune(xs, 0.5, "global", out=out)
    with pytest.raises(ValueError, match="shares memory"):
        magnitude_prune(x[:150], 0.5, out=x[50:])


def test_memory_of_a_global_call():
    """Scratch stays far below the tensors': 6 M entries take a few MB."""
    xs = [torch.randn(1000, 1000) for _ in range(6)]
    outs = [torch.zeros(1000, 1000) for _ in range(6)]
    magnitude_prune(xs[:1], 0.1, "global", out=outs[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    magnitude_prune(xs, 0.1, "global", out=outs)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 12e6


BAD = {
    "density 0": ({"density": 0.0}, "density: expected 0 < density <= 1"),
    "density above": ({"density": 1.5}, "density"),
    "density nan": ({"density": float("nan")}, "density"),
    "density bool": ({"density": True}, "density"),
    "density text": ({"density": "0.5"}, "density: expected 0 < density <= 1, got '0.5'"),
    "density None": ({"density": None}, "density: expected 0 < density <= 1, got None"),
    "scope": ({"scope": "column"}, "scope: expected one of tensor, row, global, got 'column'"),
    "integers": ({"x": torch.ones(3, dtype=torch.int32)}, "x: torch.int32"),
    "sparse": ({"x": torch.ones(3, 3).to_sparse()}, "x: .*sparse"),
    "minus shape": ({"minus": torch.ones(4)}, r"minus: shape \[4\] on cpu, expected \[3\]"),
    "minus list": ({"minus": [torch.ones(3)]}, "minus: expected a tensor"),
    "minus dtype": ({"minus": torch.ones(3, dtype=torch.int64)}, "minus: torch.int64"),
    "list lengths": ({"x": [torch.ones(3)] * 2, "minus": [torch.ones(3)]}, "minus: has 1 tensors, x has 2"),
    "devices": (
        {"x": [torch.ones(3), torch.ones(3, device="meta")]},
        r"x\[1\]: on meta, accepted is one device for all, as cpu",
    ),
    "minus device": (
        {"minus": torch.ones(3, device="meta")},
        r"minus: shape \[3\] on meta, expected \[3\] on cpu as x has",
    ),
    "list member": ({"x": [torch.ones(3), torch.ones(2, dtype=torch.bool)]}, r"x\[1\]: torch.bool"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(change, message):
    args = {"x": torch.ones(3), "density": 0.5, "scope": "tensor", "minus": None} | change
    for call in (topk_mask, magnitude_prune, sparsify):
        with pytest.raises(ValueError, match=message):
            call(**args)


def test_other_bad_arguments():
    x = torch.ones(3, 3)
    with pytest.raises(TypeError, match="x: expected a tensor or a list of tensors, got int"):
        topk_mask(3, 0.5)
    with pytest.raises(ValueError, match=r"out: torch\.bfloat16, expected torch\.float32"):
        magnitude_prune(x, 0.5, out=x.bfloat16())
    with pytest.raises(ValueError, match=r"out: shape \[9\]"):
        magnitude_prune(x, 0.5, out=torch.ones(9))
    with pytest.raises(ValueError, match="x: expected at least two dimensions"):
        sparsify(torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="values: expected 'difference' or 'x', got 'y'"):
        sparsify(x, 0.5, values="y")
