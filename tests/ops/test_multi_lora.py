"""multi_lora on the CPU: closeness to fp64, and the properties that the docs promise."""

from __future__ import annotations

import pytest
import torch
from cases import check_linear_in_the_weights, make_case, make_pool, routing_of

from lora_fuse import _cpu
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [  # rows, in, out, max_rank, slots
    pytest.param(1, 64, 64, 1, 1, id="one-row-rank-1"),
    pytest.param(1, 1030, 2049, 16, 3, id="one-row-wide-odd"),
    pytest.param(3, 1, 1, 1, 2, id="one-feature"),
    pytest.param(63, 100, 37, 5, 4, id="odd"),
    pytest.param(100, 130, 257, 64, 1, id="one-slot"),
    pytest.param(7, 96, 48, 8, 7, id="few-rows"),
    pytest.param(260, 64, 96, 100, 3, id="rank-100"),
    pytest.param(40, 1100, 40, 19, 2, id="k-blocks"),
    pytest.param(0, 32, 32, 4, 2, id="no-rows"),
]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "in_features", "out_features", "max_rank", "slots"), SHAPES)
@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_error_is_at_most_twice_torchs_own(isa, rows, in_features, out_features, max_rank, slots, mixed, dtype):
    case = make_case(rows, in_features, out_features, max_rank, slots, dtype, mixed)
    got = multi_lora(case.x, case.pool, case.routing, out=case.out.clone())
    assert case.error(got) <= 2 * case.torch_error + FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mixed_batch_uses_a_workspace(isa, dtype):
    case = make_case(90, 48, 80, 64, 8, dtype, True)
    assert case.routing.num_pairs * 64 > _cpu.STACK_WORKSPACE
    got = multi_lora(case.x, case.pool, case.routing, out=case.out.clone())
    assert case.error(got) <= 2 * case.torch_error + FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 40])
def test_a_row_does_not_see_the_others(isa, dtype, rank):
    """Bitwise: alone, in any order, on one thread or two. AMX may differ between few rows and many: held to many."""
    slots, rows = 3, 120
    pool = make_pool(slots, rank, 300, 130, dtype, [rank, max(1, rank - 5), rank])
    index = torch.arange(rows) % (slots + 1) - 1
    x, out = torch.randn(rows, 300).to(dtype), torch.randn(rows, 130).to(dtype)

    def run(keep: torch.Tensor, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return multi_lora(x[keep], pool, Routing.from_slots(index[keep], slots), out=out[keep].clone())

    every = torch.arange(rows)
    want = run(every, 2)
    assert torch.equal(want, run(every, 1))
    order = torch.randperm(rows)
    assert torch.equal(want[order], run(order, 2))
    tiles = isa == "amx_bf16" and dtype == torch.bfloat16
    some = order[:100] if tiles else order[:17]
    assert torch.equal(want[some], run(some, 2))
    if not tiles:
        for row in (1, 2, 119):
            assert torch.equal(want[row : row + 1], run(torch.tensor([row]), 2))


def test_a_mix_of_one_is_the_adapter_itself(isa):
    """A row with one pair gives the same bits, whether another row of the batch is mixed or not."""
    pool = make_pool(3, 12, 200, 72, torch.float32)
    x, out = torch.randn(4, 200), torch.randn(4, 72)
    alone = multi_lora(x, pool, routing_of([(0, 1, 1.0), (2, 2, 1.0)], 4, 3), out=out.clone())
    beside = multi_lora(
        x, pool, routing_of([(0, 1, 1.0), (2, 2, 1.0), (3, 0, 0.5), (3, 1, 2.0)], 4, 3), out=out.clone()
    )
    assert torch.equal(alone[:3], beside[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_adapter_keep_their_bits(isa, dtype):
    pool = make_pool(2, 4, 50, 60, dtype)
    x = torch.randn(40, 50).to(dtype)
    out = torch.randn(40, 60).to(dtype)
    out[::5] = float("nan")
    index = torch.where(torch.arange(40) % 5 == 0, -1, torch.arange(40) % 2)
    got = multi_lora(x, pool, Routing.from_slots(index, 2), out=out.clone())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got[::5].view(bits), out[::5].view(bits))
    assert not torch.equal(got[1::5], out[1::5])
    nobody = multi_lora(x, pool, Routing.from_slots(torch.full((40,), -1), 2), out=out.clone())
    assert torch.equal(nobody.view(bits), out.view(bits))


def test_linear_in_the_weights(isa):
    check_linear_in_the_weights(multi_lora, make_pool(3, 8, 64, 64, torch.float32))


LAYOUTS = {
    "strided rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second row": lambda t: torch.stack([t, -t], 1)[:, 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_of_x(isa, layout, dtype):
    pool = make_pool(2, 6, 70, 50, dtype)
    x = layout(torch.randn(33, 70).to(dtype))
    routing = Routing.from_slots(torch.arange(33) % 3 - 1, 2)
    assert torch.equal(multi_lora(x, pool, routing), multi_lora(x.contiguous(), pool, routing))


@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 1, 5), (1, 6, 5), (30,)], ids=str)
def test_leading_dimensions_are_rows(isa, shape):
    pool = make_pool(2, 4, 24, 40, torch.float32)
    rows = 1
    for n in shape:
        rows *= n
    x, routing = torch.randn(*shape, 24), Routing.from_slots(torch.arange(rows) % 3 - 1, 2)
    want = multi_lora(x.reshape(rows, 24), pool, routing)
    assert torch.equal(multi_lora(x, pool, routing), want.view(*shape, 40))
    swapped = x.transpose(0, -2) if len(shape) > 1 else x
    if len(shape) > 1:  # dimensions that do not collapse
        assert torch.equal(multi_lora(swapped, pool, routing), multi_lora(swapped.contiguous(), pool, routing))


def test_many_dimensions(isa):
    """Beyond the eight that C++ reads."""
    pool, routing = make_pool(2, 4, 24, 40, torch.float32), Routing.from_slots(torch.arange(30) % 3 - 1, 2)
    x = torch.randn(2, 1, 3, 1, 1, 1, 1, 5, 1, 24)
    want = multi_lora(x.view(30, 24), pool, routing)
    assert torch.equal(multi_lora(x, pool, routing).view(30, 40), want)
    out = torch.zeros(*x.shape[:-1], 40)
    multi_lora(x, pool, routing, out=out)
    assert torch.equal(out.view(30, 40), want)


def test_empty_expanded_rows(isa):
    pool, routing = make_pool(2, 4, 24, 40, torch.float32), Routing.from_slots(torch.zeros(0, dtype=torch.long), 2)
    x = torch.zeros(1, 0, 24).expand(3, 0, 24)
    assert multi_lora(x, pool, routing).shape == (3, 0, 40)


def test_strided_out(isa):
    pool = make_pool(2, 4, 24, 40, torch.float32)
    x, routing = torch.randn(20, 24), Routing.from_slots(torch.arange(20) % 2, 2)
    wide = torch.zeros(20, 100)
    multi_lora(x, pool, routing, out=wide[:, 30:70])
    assert torch.equal(wide[:, 30:70], multi_lora(x, pool, routing))
    assert not wide[:, :30].any()
    assert not wide[:, 70:].any()


def test_special_values(isa):
    """inf and NaN in a row stay in that row; fp16 overflows to inf, not to garbage."""
    pool = make_pool(1, 2, 16, 32, torch.float32)
    x = torch.randn(20, 16)
    x[3, 2], x[7, 0] = float("inf"), float("nan")
    got = multi_lora(x, pool, Routing.from_slots(torch.zeros(20, dtype=torch.long), 1))
    bad = ~got.isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [3, 7]
    big = make_pool(1, 1, 8, 48, torch.float16)
    got = multi_lora(torch.full((1, 8), 6e4, dtype=torch.float16), big, Routing.from_slots(torch.tensor([0]), 1))
    want = (big.pool_a.double() @ torch.full((8,), 6e4, dtype=torch.float64) * 0.5)[:, None] * big.pool_b.double()
    assert torch.equal(got.isinf(), want.abs() >= 65520)


def test_half_conversions_are_exact(isa):
    """Every fp16 value comes through y += 0 unchanged, and every sum is rounded to nearest even."""
    pool = make_pool(1, 1, 1, 65536, torch.float16)
    pool.write(0, torch.ones(1, 1), torch.zeros(65536, 1), 1.0)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)[None]
    got = multi_lora(
        torch.ones(1, 1, dtype=torch.float16), pool, Routing.from_slots(torch.tensor([0]), 1), out=every.clone()
    )
    keep = ~every.isnan()
    assert torch.equal((every + 0.0)[keep].view(torch.int16), got[keep].view(torch.int16))
    assert got[~keep].isnan().all()
    b = torch.randn(65536).half()
    pool.write(0, torch.ones(1, 1), b[:, None], 1.0)
    x = torch.randn(1, 1).half()
    y = torch.randn(1, 65536).half()
    got = multi_lora(x, pool, Routing.from_slots(torch.tensor([0]), 1), out=y.clone())
    want = (y.double() + x.double() * b.double()).float().half()  # both sums are exact in fp64
    assert (got.view(torch.int16).int() - want.view(torch.int16).int()).abs().max() <= 1
    assert (got == want).float().mean() > 0.999


def test_tiles_do_not_depend_on_the_number_of_threads(isa):
    """Twenty rows of one adapter beside single ones: few enough that many threads would share out features."""
    pool = make_pool(4, 8, 96, 64, torch.bfloat16)
    x, index = torch.randn(24, 96).bfloat16(), torch.tensor([0] * 20 + [1, 2, 3, -1])
    before, got = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        got.append(multi_lora(x, pool, Routing.from_slots(index, 4)))
    torch.set_num_threads(before)
    assert all(torch.equal(g, got[0]) for g in got)
