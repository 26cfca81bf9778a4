"""A behind the weight on a device (``make test-gpu``): one product, one expand, in eager and captured forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from augmented_models import AUGMENTED, BOTH, PATHS, Block, block, widths
from cases import make_pool, mixed_pairs, pairs_of, routing_of
from gpu_runs import capture, nothing_waits, warm_up
from nn_models import adapter, per_row
from packed_models import ENTRIES
from test_gpu import moved

import lora_fuse as lf
from lora_fuse import reference
from lora_fuse.ops import expand as op

pytestmark = pytest.mark.gpu
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@pytest.mark.parametrize("mixed", [False, True], ids=["one-each", "mixed"])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize(("rows", "out_features", "max_rank"), [(1, 4096, 16), (64, 4096, 16), (256, 1000, 33)])
def test_error_is_at_most_twice_torchs_own(rows, out_features, max_rank, dtype, mixed):
    slots, in_features = 3, 1024
    pool = make_pool(slots, max_rank, in_features, out_features, dtype, [max_rank, 0, max_rank - 3])
    pool.pool_a.nan_to_num_(0.0)
    weight = torch.randn(out_features, in_features).to(dtype) / in_features**0.5
    x = torch.randn(rows, in_features).to(dtype)
    pairs = mixed_pairs(rows, slots) if mixed else pairs_of(torch.arange(rows) % (slots + 1) - 1)
    routing = moved(routing_of(pairs, rows, slots))
    want = reference.multi_lora(x, *pool.tensors, pairs, out=x.double() @ weight.double().t())
    ranks, scalings = pool.slot_rank.tolist(), pool.slot_scaling.tolist()
    x, weight, pool = x.cuda(), weight.cuda(), pool.cuda()
    plain = x @ weight.t()
    for row, slot, scale in pairs:  # as PEFT does it
        used = slice(slot * max_rank, slot * max_rank + ranks[slot])
        plain[row] += x[row] @ pool.pool_a[used].t() @ pool.pool_b[used] * (scale * scalings[slot])
    wide = x @ torch.cat([weight, pool.pool_a]).t()
    y, h = wide[:, :out_features], wide[:, out_features:]
    before = y.clone()
    torch.ops.lora_fuse.expand_(y, h, pool.tensors[1:], [0], *routing.tensors, routing.tiles)
    torch_error = float((plain.cpu().double() - want).abs().max())
    assert float((y.cpu().double() - want).abs().max()) <= 2 * torch_error + FLOOR[dtype]
    served = {row for row, slot, _ in pairs if ranks[slot]}
    base = [row for row in range(rows) if row not in served]
    assert torch.equal(y[base], before[base])
    assert not served or not torch.equal(y, before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_in_eager_mode(dtype, pack, wide, monkeypatch):
    bare, adapters, model = block(pack, dtype)
    plain = lf.attach(copy.deepcopy(bare), adapters).cuda()
    model.cuda()
    ran = []
    real = op.expand_fresh_
    monkeypatch.setattr("lora_fuse.nn.augmented.expand_fresh_", lambda *args: (ran.append(1), real(*args)))
    x = torch.randn(4, 3, 64, device="cuda").to(dtype)
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    with torch.no_grad():
        for entries in (ENTRIES, "b", ENTRIES):
            with lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
                got = model(x)
                torch.testing.assert_close(got, plain(x), rtol=bound, atol=bound)
                assert torch.equal(got, model(x))
                assert wide == widths(pack) * 2
                del wide[:]
        assert ran
        torch.cuda.synchronize()
        with lf.use_adapters(model, ENTRIES):
            model(x)
            with nothing_waits():
                model(x)


@BOTH
def test_captured_forwards_follow_selections_and_adapters(pack, wide):
    bare, adapters, model = block(pack)
    lf.detach(model)
    model = lf.attach(model, adapters, num_slots=3, max_rank=5, pack=pack, augment=True).cuda()
    bare.cuda()
    x = torch.randn(4, 64, device="cuda")

    def want(entries):
        return per_row(bare, {n: a.to(device="cuda") for n, a in adapters.items()}, entries, x)

    warm_up(model, x)
    del wide[:]
    graph, y = capture(model, x)
    assert wide  # the graph has the wide products
    places = {p: model.get_submodule(p).lora_pool.pool_a.data_ptr() for p in AUGMENTED}

    def check(entries):
        lf.set_adapters(model, entries)
        graph.replay()
        torch.testing.assert_close(y, want(entries), rtol=1e-3, atol=1e-3)

    for entries in (ENTRIES, [None] * 4, ["b", "a", None, {"a": 0.3, "b": -1.0}], ["a"] * 4):
        check(entries)
    for rank in (5, 1, 3):
        adapters["b"] = adapter(Block(), PATHS, rank)
        lf.swap_adapter(model, "b", adapters["b"])
        check(["b", None, "a", "b"])
    adapters["c"] = adapter(Block(), PATHS, 4)
    lf.add_adapter(model, "c", adapters["c"])
    check(["c", "a", {"c": 1.0, "b": 0.5}, None])
    lf.remove_adapter(model, "c")
    graph.replay()
    torch.testing.assert_close(y, want([None, "a", None, None]), rtol=1e-3, atol=1e-3)
    assert places == {p: model.get_submodule(p).lora_pool.pool_a.data_ptr() for p in AUGMENTED}


@BOTH
def test_moves_between_devices_and_back(pack, wide):
    bare, _, model = block(pack)
    x = torch.randn(4, 64)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        want = model(x)
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
        other = copy.deepcopy(model)
        with lf.use_adapters(other, ENTRIES):
            torch.testing.assert_close(other(x.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.cpu()(x), want)
    assert wide == widths(pack) * 4
    lf.detach(model)
    assert all(torch.equal(p, bare.state_dict()[name]) for name, p in model.named_parameters())
