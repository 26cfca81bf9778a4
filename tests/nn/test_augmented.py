"""A behind the weight: one product yields y and every slot's shrink, and everything else stays what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from augmented_models import AUGMENTED, BOTH, PATHS, Block, block, widths
from nn_models import adapter, check_threads, per_row
from packed_models import ENTRIES, close
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import reference
from lora_fuse.nn.augmented import MOST_ROWS, has_room


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_get_their_adapters(mode: Any, dtype: torch.dtype, pack: bool, wide: list[Any]) -> None:
    bare, adapters, model = block(pack, dtype)
    taken = tuple(path for path in AUGMENTED if pack or path != "v_proj")
    assert {info.augmented for info in lf.adapters(model).values()} == {taken}
    assert [info.packed for info in lf.adapters(model).values()] == [AUGMENTED[:4] if pack else ()] * 2
    x = torch.randn(4, 3, 64, dtype=dtype)
    plain = lf.attach(copy.deepcopy(bare), adapters)
    with mode():
        for entries in (ENTRIES, "b", {"a": 2.0}):
            with lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
                close(model(x), plain(x))
                assert wide == widths(pack)
                del wide[:]
        with lf.use_adapters(model, ENTRIES):
            if dtype == torch.float32:
                close(model(x), per_row(bare, adapters, ENTRIES, x))
            odd = torch.randn(3, 4, 128, dtype=dtype).transpose(0, 1)[..., ::2]
            close(model(odd), model(odd.contiguous()))
        with lf.use_adapters(model, ["a"] * 3), pytest.raises(ValueError, match=r"4 samples.* 3 entries"):
            model(x)
        with lf.use_adapters(model, "a"):
            close(model(x[0, 0]), model(x[0, :1])[0])
            assert model(x[:0]).shape == (0, 3, 24)


def test_what_is_not_augmented_keeps_its_bits(wide: list[Any]) -> None:
    """Only base rows, or many rows: the weight's rows alone are multiplied by."""
    bare, adapters, model = block(False)
    plain = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(MOST_ROWS + 1, 64)
    with torch.no_grad():
        assert torch.equal(model(x[:5]), bare(x[:5]))
        with lf.use_adapters(model, "a"), lf.use_adapters(plain, "a"):
            assert torch.equal(model(x), plain(x))
            assert wide == []
            model(x[1:])
            assert wide == widths(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64, 256])
def test_error_is_at_most_twice_torchs_own(rows: int, dtype: torch.dtype, wide: list[Any]) -> None:
    """h is rounded to the dtype, as torch rounds it."""
    bare = nn.Linear(512, 640).requires_grad_(False).to(dtype)
    model = lf.attach(
        copy.deepcopy(nn.Sequential(bare)),
        {n: adapter(nn.Sequential(bare), ["0"], rank) for n, rank in (("a", 16), ("b", 9))},
        num_slots=3,
        augment=True,
    )
    entries = [[None, "a", "b", {"a": 0.5, "b": -1.5}][i % 4] for i in range(rows)]
    pool, slots = model[0].lora_pool, lf.adapter_slots(model)  # type: ignore[union-attr, index]
    pairs = [
        (row, slots[name], weight)
        for row, entry in enumerate(entries)
        for name, weight in ({} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry).items()
    ]
    x = torch.randn(rows, 512).to(dtype)
    truth = torch.nn.functional.linear(x.double(), bare.weight.double(), bare.bias.double())
    want = reference.multi_lora(x, *pool.tensors, pairs, out=truth)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = bare(x)
        for row, slot, weight in pairs:  # as PEFT adds adapters up
            h = torch.nn.functional.linear(x[row], pool.pool_a[16 * slot : 16 * slot + 16])  # type: ignore[index]
            plain[row] += h @ pool.pool_b[16 * slot : 16 * slot + 16] * (weight * float(pool.slot_scaling[slot]))  # type: ignore[index]
        with lf.use_adapters(model, entries):
            got = model(x)
    assert bool(wide) == (entries != [None])
    torch_error = float((plain.double() - want).abs().max())
    assert float((got.double() - want).abs().max()) <= 2 * torch_error + 1e-6


@BOTH
def test_adapters_come_and_go_in_place(pack: bool, wide: list[Any]) -> None:
    bare, adapters, model = block(pack)
    x = torch.randn(4, 64)
    layers = {path: model.get_submodule(path) for path in AUGMENTED if pack or path != "v_proj"}

    def places() -> dict[str, tuple[int, int]]:
        return {path: (m.weight.data_ptr(), m.lora_pool.pool_a.data_ptr()) for path, m in layers.items()}

    before = places()
    for m in layers.values():
        pool = m.lora_pool
        assert m.lora_pack[0].holds(m.lora_pack[1], m)
        assert pool.pool_a.data_ptr() % 64 == 0
        assert pool.pool_a.stride() == m.weight.stride() == (64, 1)
    with torch.no_grad():
        for rank in (1, 5, 2):
            adapters["b"] = adapter(bare, PATHS, rank)
            lf.swap_adapter(model, "b", adapters["b"])
            with lf.use_adapters(model, ENTRIES):
                close(model(x), per_row(bare, adapters, ENTRIES, x))
        lf.remove_adapter(model, "a")
        adapters["c"] = adapter(bare, ("q_proj", "k_proj", "down"), 4)
        lf.add_adapter(model, "c", adapters["c"])  # gives k_proj slots; its weight stays where it is
        entries = ["c", {"c": 0.5, "b": 2.0}, None, "b"]
        with lf.use_adapters(model, entries):
            close(model(x), per_row(bare, adapters, entries, x))
        assert places() == before
        assert set(wide) == set(widths(pack))
        assert "k_proj" not in lf.adapters(model)["c"].augmented
        pool = model.down.lora_pool
        slot = lf.adapter_slots(model)["c"]
        pool.clear(slot)
        with lf.use_adapters(model, "c"):
            torch.testing.assert_close(model.down(x), bare.down(x))
        assert lf.warmup(model) >= 5
    assert all(torch.equal(p, bare.state_dict()[name]) for name, p in model.named_parameters())


def test_lora_bias(wide: list[Any]) -> None:
    bare = Block().requires_grad_(False)
    adapters = {"a": adapter(bare, ["q_proj", "down"], 3, bias=True), "b": adapter(bare, ["v_proj", "down"], 2)}
    x = torch.randn(4, 64)
    for pack in (False, True):
        model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, pack=pack, augment=True)
        plain = lf.attach(copy.deepcopy(bare), adapters)
        with torch.no_grad(), lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
            close(model(x), plain(x))
    assert wide == [(192,), (128,), (192, 32, 32), (128,)]


class Cross(nn.Module):
    """k and v see another input than q."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 240), nn.Linear(64, size), nn.Linear(64, size)

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(-1)
        return self.q_proj(x)[..., :32] + (self.k_proj(other) * self.v_proj(other))[..., :32]


@pytest.mark.parametrize("size", [32, 160])
def test_part_of_a_pack(size: int, wide: list[Any]) -> None:
    """k and v end the pack, so A is behind them too: behind v's if they are wide enough for all of A."""
    bare = Cross(size).requires_grad_(False)
    adapters = {n: adapter(bare, ["q_proj", "v_proj"], r) for n, r in (("a", 3), ("b", 5))}
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, pack=True, augment=True)
    x = torch.randn(4, 64)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        for _ in range(4):
            close(model(x), per_row(bare, adapters, ENTRIES, x))
    whole, rest = (240, size, size), (size, size)
    assert wide == [whole, whole] * 2 + ([rest] * 2 if size == 160 else [])


def test_threads() -> None:
    bare, adapters, model = block(True)
    check_threads(bare, adapters, model, torch.randn(1, 7, 64), times=30)


@BOTH
def test_gradients_autocast_and_transforms_compute_as_usual(pack: bool, wide: list[Any]) -> None:
    bare, adapters, model = block(pack)
    plain = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(4, 64, requires_grad=True)
    with lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
        (got,) = torch.autograd.grad(model(x).square().sum(), x)
        (want,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.equal(got, want)
        for m in (model, plain):
            m.requires_grad_(True)
            m(x).square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), plain(x))
        with torch.no_grad():
            (got, want) = (torch.func.jvp(m, (x.detach(),), (torch.ones_like(x),))[1] for m in (model, plain))
            assert torch.equal(got, want)
        assert wide == []
        with torch.no_grad():  # a step of an optimizer goes through the views
            for m in (model, plain):
                torch.optim.SGD(m.parameters(), lr=0.1).step()
            close(model(x), plain(x))
        assert wide == widths(pack)


def test_compiled_code_computes_as_usual(fresh_dynamo: None, wide: list[Any]) -> None:
    bare, adapters, model = block(True)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    with torch.no_grad():
        for entries in (ENTRIES, ["b"] * 4):
            with lf.use_adapters(model, entries):
                close(fast(x), per_row(bare, adapters, entries, x))
    assert wide == []


@pytest.mark.parametrize(
    ("in_features", "out_features", "rows", "itemsize", "want"),
    [
        (4096, 4096, 144, 2, True),
        (4096, 4096, 512, 2, True),
        (4096, 4096, 513, 2, False),  # more than an eighth
        (4096, 4096, 0, 2, False),
        (4112, 4096, 16, 2, False),  # 8224 bytes
        (4112, 4096, 16, 4, True),
        (16, 128, 16, 4, True),
        (8, 128, 16, 4, False),
        (8, 128, 16, 8, True),
    ],
)
def test_has_room(in_features: int, out_features: int, rows: int, itemsize: int, want: bool) -> None:
    assert has_room(in_features, out_features, rows, itemsize) is want
