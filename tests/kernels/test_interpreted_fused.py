"""The linear layer and its LoRA part in one launch, in Triton's CPU interpreter: fp32 and fp16, wrong in bf16.

The interpreter runs one program after the other, so a program that waited for one of higher number would hang.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import make_case, make_pool, pairs_of, routing_of
from torch.nn.functional import linear

from lora_fuse.adapters import slab as slabs
from lora_fuse.adapters.routing import Routing
from lora_fuse.adapters.slab import SlabLayout
from lora_fuse.functional import multi_lora
from lora_fuse.kernels import fused_linear as kernels
from lora_fuse.kernels.fused_linear import launch, num_counters
from lora_fuse.kernels.fused_linear_plan import Plan
from lora_fuse.kernels.routing import build_tiles
from lora_fuse.ops.multi_lora_linear import _cuda as op_for_cuda

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOOR]
SHAPES = [  # rows, in, out, max_rank, slots, bias
    pytest.param(1, 64, 48, 8, 3, True, id="one-row"),
    pytest.param(17, 300, 40, 17, 3, False, id="odd"),
    pytest.param(40, 600, 140, 6, 3, True, id="shared-tiles"),
    pytest.param(9, 7, 5, 3, 12, True, id="tiny"),
]
SMALL = Plan(16, 1, 16, 32, 1, 64, 4, 3, 4, 2)
SHARED = Plan(32, 2, 32, 32, 2, 64, 4, 3, 4, 2)


def run(x, weight, bias, pool, routing, chosen=None, counters=None, times=1):
    """As the op does on a GPU; nothing of what was there before may matter, and the counters are zeros again."""
    tiles = routing.tiles if routing.padded else build_tiles(routing.rows, routing.segment_starts)
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype)
    if counters is None:
        counters = torch.zeros(num_counters(weight.shape[0]), dtype=torch.int32)
    made = launch(out, x, weight, bias, pool.tensors, routing.tensors, tiles, counters, chosen)
    for _ in range(times):
        made.run()
        assert not counters.any()
    return out


def layer(in_features, out_features, dtype, bias=True):
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    return weight, torch.randn(out_features).to(dtype) if bias else None


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "in_features", "out_features", "max_rank", "slots", "bias"), SHAPES)
def test_error_is_at_most_twice_torchs_own(rows, in_features, out_features, max_rank, slots, bias, dtype, mixed):
    case = make_case(rows, in_features, out_features, max_rank, slots, dtype, mixed)
    weight, bias = layer(in_features, out_features, dtype, bias)
    base = linear(case.x.double(), weight.double(), None if bias is None else bias.double())
    want = case.want - case.out.double() + base
    torch_error = float((linear(case.x, weight, bias).double() - base).abs().max()) + case.torch_error
    got = run(case.x, weight, bias, case.pool, case.routing)
    assert float((got.double() - want).abs().max()) <= 2 * torch_error + FLOOR[dtype]


@pytest.mark.parametrize("chosen", [SMALL, SHARED], ids=["alone", "shared-tiles"])
def test_a_row_does_not_see_the_others(chosen):
    """Bitwise, in any order, among any others, whatever programs there are for the shrink."""
    pool, rows = make_pool(4, 12, 130, 24, torch.float32, [12, 0, 5, 9]), chosen.block_m * chosen.blocks_m
    weight, bias = layer(130, 24, torch.float32)
    slots, x = torch.arange(rows) % 5 - 1, torch.randn(rows, 130)
    want = run(x, weight, bias, pool, Routing.from_slots(slots, 4), chosen)
    for keep in (torch.randperm(rows), torch.tensor([2]), torch.arange(0, rows, 3)):
        got = run(x[keep], weight, bias, pool, Routing.from_slots(slots[keep], 4), chosen)
        assert torch.equal(got, want[keep])


@pytest.mark.parametrize("chosen", [SMALL, SHARED], ids=["alone", "shared-tiles"])
def test_what_is_not_finite_stays_where_it_is(chosen):
    """Rows of other adapters, and of none, keep their bits beside an adapter and a row of NaN."""
    pool = make_pool(3, 4, 40, 24, torch.float32, [4, 0, 2])
    weight, bias = layer(40, 24, torch.float32)
    slots, x = torch.tensor([0, 1, -1, 2, 0]), torch.randn(5, 40)
    routing = Routing.from_slots(slots, 3)
    want = run(x, weight, bias, pool, routing, chosen)
    pool.write(2, torch.full((2, 40), torch.nan), torch.full((24, 2), torch.nan), 1.0)
    x[4] = torch.nan
    got = run(x, weight, bias, pool, routing, chosen)
    assert torch.equal(got[:3], want[:3])
    assert not got[3:].isfinite().any()


def test_base_rows_have_the_bits_of_a_batch_without_adapters():
    pool, (weight, bias) = make_pool(3, 4, 40, 24, torch.float32), layer(40, 24, torch.float32)
    x, slots = torch.randn(6, 40), torch.tensor([-1, 1, -1, 1, 0, -1])
    mixed = run(x, weight, bias, pool, Routing.from_slots(slots, 3), SMALL)
    none = Routing.from_slots(torch.full((6,), -1), 3)
    base = run(x, weight, bias, pool, none, replace(SMALL, shrinkers=0))
    assert none.num_pairs == 0
    assert torch.equal(mixed[slots < 0], base[slots < 0])
    torch.testing.assert_close(base, linear(x, weight, bias))


def test_a_mix_of_one_is_the_adapter_itself():
    """Whether another row of the batch mixes or not."""
    pool, (weight, bias) = make_pool(3, 6, 200, 40, torch.float16), layer(200, 40, torch.float16)
    x, singles = torch.randn(4, 200).half(), [(0, 1, 0.3), (1, 0, 1.0), (2, 2, -1.7)]
    alone = run(x, weight, bias, pool, routing_of(singles, 4, 3))
    beside = run(x, weight, bias, pool, routing_of([*singles, (3, 0, 0.5), (3, 1, 2.0)], 4, 3))
    assert torch.equal(alone[:3], beside[:3])
    assert not torch.equal(beside[3], alone[3])


@pytest.mark.parametrize("chosen", [SMALL, SHARED], ids=["alone", "shared-tiles"])
def test_launches_can_follow_each_other(chosen):
    """With the same counters, and with a layer of other sizes in between."""
    counters = torch.zeros(num_counters(70), dtype=torch.int32)
    results = []
    for out_features in (20, 40, 20):
        torch.manual_seed(out_features)
        pool, (weight, bias) = make_pool(3, 6, 50, out_features, torch.float32), layer(50, out_features, torch.float32)
        routing = Routing.from_slots(torch.tensor([0, 2, -1]), 3)
        results.append(run(torch.randn(3, 50), weight, bias, pool, routing, chosen, counters, times=2))
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_padding_is_never_read(mixed, monkeypatch):
    monkeypatch.setattr(slabs, "_has_kernels", lambda device: True)
    case, (weight, bias) = make_case(13, 70, 24, 6, 3, torch.float32, mixed), layer(70, 24, torch.float32)
    want = run(case.x, weight, bias, case.pool, case.routing, SMALL)
    layout = SlabLayout(13, 4, 3)
    slab = layout.empty(torch.device("cpu"))
    layout.write(slab, case.routing)
    rows, weights, starts, _, row_pairs, tiles = layout.split(slab)
    live = int(starts[-1])
    rows[live:], weights[live:], row_pairs[live:], tiles[tiles[:, 0] < 0, 1:] = 2**30, torch.nan, 2**30, 2**30
    padded = layout.routing(slab)
    assert torch.equal(run(case.x, weight, bias, case.pool, padded, SMALL), want)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
def test_ranks_beyond_the_pools_are_its_largest(mixed):
    """A tensor on a device is not read before the launch, so nothing can be raised; other slots' rows stay unread."""
    case = make_case(5, 64, 40, 6, 3, torch.float16, mixed)
    pool, (weight, bias) = make_pool(3, 6, 64, 40, torch.float16, [6] * 3), layer(64, 40, torch.float16)
    want = run(case.x, weight, bias, pool, case.routing, SMALL)
    pool.slot_rank.fill_(1000)
    assert torch.equal(run(case.x, weight, bias, pool, case.routing, SMALL), want)


class TestTheOp:
    """What runs for CUDA tensors: which calls take the one launch, and what is refused before it."""

    def setup_method(self):
        self.pool = make_pool(3, 4, 32, 10, torch.float16)
        self.routing = routing_of(pairs_of(torch.tensor([0, 2, -1, 1, 1, 0])), 6, 3)
        self.tiles = build_tiles(self.routing.rows, self.routing.segment_starts)
        self.weight, self.bias = layer(32, 10, torch.float16)
        self.x = torch.randn(2, 3, 32).half()

    def call(self, x, weight=None, tiles=None, counters=None, bias=None):
        args = (*self.pool.tensors, *self.routing.tensors, self.tiles if tiles is None else tiles, counters)
        bias = self.bias if bias is None else bias
        return op_for_cuda(x, self.weight if weight is None else weight, bias, *args)

    @pytest.fixture
    def launched(self, monkeypatch):
        ran, real = [], kernels.multi_lora_linear_
        monkeypatch.setattr(kernels, "multi_lora_linear_", lambda *args: (ran.append(1), real(*args)))
        return ran

    def want(self, x):
        return linear(x, self.weight, self.bias) + multi_lora(x, self.pool, self.routing)

    def test_any_activation_is_taken(self, launched):
        wide, odd = torch.zeros(2, 3, 64).half(), torch.zeros(6 * 32 + 1).half()[1:].view(2, 3, 32)
        wide[..., ::2], odd[:] = self.x, self.x
        for x in (self.x, wide[..., ::2], odd, self.x.permute(1, 0, 2).contiguous().permute(1, 0, 2)):
            torch.testing.assert_close(self.call(x), self.want(self.x), rtol=1e-3, atol=4e-3)
        assert len(launched) == 4

    def test_what_one_launch_does_not_serve_runs_in_turn(self, launched):
        skewed = torch.zeros(10, 33).half()[:, 1:].copy_(self.weight)
        close = {"rtol": 1e-3, "atol": 4e-3}  # a rounding more
        torch.testing.assert_close(self.call(self.x, skewed), self.want(self.x), **close)
        self.routing = Routing.from_slots(torch.arange(66) % 4 - 1, 3)
        self.tiles = build_tiles(self.routing.rows, self.routing.segment_starts)
        many = torch.randn(66, 32).half()
        torch.testing.assert_close(self.call(many), self.want(many), **close)
        assert not launched

    def test_bad_input(self, launched):
        for match, given in [
            ("x, weight: shapes", {"x": self.x[..., :16]}),
            ("bias: shape", {"bias": torch.zeros(9).half()}),
            ("counters: got .* accepted are 3 or more", {"counters": torch.zeros(2, dtype=torch.int32)}),
            ("counters: got", {"counters": torch.zeros(9)}),
            ("counters: is on meta", {"counters": torch.zeros(9, dtype=torch.int32, device="meta")}),
            ("tiles: is on meta", {"tiles": self.tiles.to("meta")}),
            ("tiles: strides", {"tiles": self.tiles.repeat(1, 2)[:, ::2]}),
        ]:
            with pytest.raises(ValueError, match=match):
                self.call(**{"x": self.x, **given})
        assert not launched
