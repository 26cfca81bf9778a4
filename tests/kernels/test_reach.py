"""What ``lf.warmup`` compiles holds all that a serving loop asks for: the launches of many forwards, none made."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aot import TARGETS, specialization
from nn_models import adapter
from packed_models import PATHS, Block
from torch import nn

import lora_fuse as lf
from lora_fuse import functional
from lora_fuse.adapters import slab
from lora_fuse.kernels import configs, multi_lora, reach, sparse_delta
from lora_fuse.kernels.launch import Launch
from lora_fuse.kernels.routing import sort_launch, tiles_launch
from lora_fuse.nn import capture, linear, packed
from lora_fuse.nn.attachment import attachment_of
from lora_fuse.nn.warmup import reachable, reachable_beside
from lora_fuse.ops import expand
from lora_fuse.ops import multi_lora as op

MOST = 1300  # rows; from 1025 pairs on, tiles are wider
TARGET = TARGETS["sm_90"][0]


class Recorder:
    """What forwards on the CPU would launch on a GPU, by what Triton would choose kernels by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: dict[Any, str] = {}
        self.doing = ""
        for module, name in ((linear, "_serve"), (packed, "_serve_packed"), (functional, "_multi_lora_eager")):
            monkeypatch.setattr(module, name, lambda *args: False)
        monkeypatch.setattr(functional, "_dispatch", self.call)
        monkeypatch.setattr(packed, "slices_fresh_", self.call_slices)
        monkeypatch.setattr(expand, "_composite_", self.expand)
        monkeypatch.setattr(multi_lora, "run", lambda launches, *args: self.take(launches))
        monkeypatch.setattr(slab, "build_tiles", self.tiles_of)

    def take(self, launches: list[Launch]) -> None:
        for launch in launches:
            self.kernels.setdefault(specialization(launch, TARGET), self.doing)

    def tiles_of(self, rows: Any, starts: Any, out: Any = None) -> Any:
        tiles = (
            torch.empty(configs.tile_capacity(len(rows), len(starts) - 1), 4, dtype=torch.int32) if out is None else out
        )
        self.take([tiles_launch(rows, starts, tiles)])
        return tiles

    def call(self, x: Any, pool: Any, routing: Any, out: Any) -> Any:
        assert out is not None
        tiles = routing.__dict__.get("_tiles")
        tiles = self.tiles_of(routing.rows, routing.segment_starts) if tiles is None else tiles
        op._cuda_(out, x, *pool.tensors, *routing.tensors, tiles)
        return out

    def call_slices(self, out: Any, x: Any, pools: Any, starts: Any, *routing: Any) -> None:
        *tensors, tiles = routing
        if tiles is None:
            tiles = self.tiles_of(tensors[0], tensors[2])
        op._cuda_slices_(out, x, pools, starts, *tensors, tiles)

    def expand(self, out: Any, h: Any, *args: Any) -> None:
        *others, tiles = args
        expand._cuda_(out, h, *others, self.tiles_of(args[2], args[4]) if tiles is None else tiles)


def serve(model: Any, recorder: Recorder, features: int, swapped: Any) -> None:
    """Batches of all kinds: sizes, selections, swaps; eager, and as a warm-up for a capture."""
    entries = [
        ["a"],
        [None, "a", "b"],
        [{"a": 0.5}, "b"],
        [{"a": 0.5, "b": 2.0}, None],
        [{"a": 1.0, "b": 1.0}, "a", "b", "a"],
        ["b"] * 16,
    ]
    dtype = next(model.parameters()).dtype
    batches: list[tuple[Any, tuple[int, ...]]] = [
        (names, (len(names), seq, features)) for names in entries for seq in (1, 2, 3, 16, 17, 30, 64, 81)
    ]
    batches += [(None, (rows, features)) for rows in (1, 5, 129, MOST)]  # a slot for each row
    for mode in ("", "warm"):
        for names, shape in batches:
            recorder.doing = f"{mode} {shape} {names}"
            held = torch.tensor([-1, *lf.adapter_slots(model).values()], dtype=torch.int32)
            if names is None:
                slots = held[torch.arange(shape[0]) % 3]
                starts = torch.zeros(attachment_of(model).serving.physical_slots + 1, dtype=torch.int32)
                recorder.take([sort_launch(slots, slots, starts, starts[:1])])
            with capture.simulate(mode), torch.no_grad():  # type: ignore[arg-type]
                lf.set_adapters(model, slots if names is None else names)
                model(torch.zeros(shape, dtype=dtype))
        lf.swap_adapter(model, "a", swapped)


class Odd(nn.Module):
    """Sizes that are no multiples of 16, nor their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(50, 1100), nn.Linear(1100, 33)

    def forward(self, x: Any) -> Any:
        return self.down(self.up(x))


class Wide(nn.Module):
    """Room behind the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(64, 512), nn.Linear(64, 520), nn.Linear(512, 1100)

    def forward(self, x: Any) -> Any:
        return self.o_proj(self.q_proj(x) + self.k_proj(x)[..., 8:])


MODELS: dict[str, tuple[Any, tuple[str, ...], int]] = {
    "packed": (Block, PATHS, 24),
    "odd": (Odd, ("up", "down"), 50),
    "augmented": (Wide, ("q_proj", "k_proj", "o_proj"), 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_serving_asks_for_nothing_else(kind, dtype, monkeypatch):
    nothing_else(kind, dtype, monkeypatch)


@pytest.mark.parametrize("kind", ["packed", "augmented"])
def test_with_plans_of_ones_own(kind, monkeypatch):
    """Some for one size of batch alone; the expand that starts ahead, and the one after a join of streams."""
    monkeypatch.setattr(multi_lora, "starts_ahead", lambda *args: True)
    rules = [
        {"where": {"pairs": [n, n]}, "shrink": {"num_stages": 1}, "expand": {"ahead": True}} for n in (3, 40, 1300)
    ]
    lf.override_plans([*rules, {"where": {"in_features": 64}, "expand": {"ahead": True, "block_n": 16}}])
    try:
        nothing_else(kind, torch.bfloat16, monkeypatch, 6)
        assert reach.sizes_of_each(lambda n: [SimpleNamespace(variant=n in (40, 1300))], 1, 2000)[1:5] == [
            40,
            41,
            1300,
            1301,
        ]
    finally:
        lf.override_plans(None)


def nothing_else(kind, dtype, monkeypatch, times=3):
    made, paths, features = MODELS[kind]
    bare = made().requires_grad_(False).to(dtype)
    adapters = {name: adapter(bare, paths, rank) for name, rank in (("a", 3), ("b", 5), ("c", 2))}
    swapped = adapters.pop("c")
    model = lf.attach(bare, adapters, pack=kind != "odd", augment=kind == "augmented")
    device = torch.device("cpu")
    of = attachment_of(model), device, MOST, "cuda"
    ready = {specialization(each, TARGET) for each in (*reachable(*of), *reachable_beside(*of))}
    recorder = Recorder(monkeypatch)
    serve(model, recorder, features, swapped)
    late = {f"{key[0].__name__} at {when}": key for key, when in recorder.kernels.items() if key not in ready}
    assert not late
    assert {key[0].__name__ for key in recorder.kernels} == {key[0].__name__ for key in ready}
    assert len(recorder.kernels) > 10
    assert len(ready) < times * len(recorder.kernels)  # what nothing asks for costs time as well


def test_a_batch_that_is_too_large_is_another_kernel():
    """So the test above can fail."""
    model = lf.attach(bare := Odd().requires_grad_(False), {"a": adapter(bare, ("up", "down"), 3)})
    few = {each.variant for each in reachable(attachment_of(model), torch.device("cpu"), 64, "cuda")}
    many = {each.variant for each in reachable(attachment_of(model), torch.device("cpu"), MOST, "cuda")}
    assert few < many


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(64, 512), (50, 33)], ids=str)
def test_sparse_layers_ask_for_nothing_else(sizes, dtype):
    def of(*shape: int, dtype: torch.dtype = torch.int32) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    ready = {specialization(each, TARGET) for each in reach.sparse_reach(5, sizes, dtype, 600, 3, "cuda")}
    asked = set()
    table = of(5, 8, dtype=torch.int64)
    for rows, pairs, weights in itertools.product(
        (1, 2, 16, 100, 257, 600), (1, 8, 9, 48, 256, 257, 1500), (False, True)
    ):
        if pairs > 3 * rows:
            continue
        weighted, mixes = of(pairs, dtype=torch.float32) if weights else None, (of(rows + 1), of(pairs))
        x, out = of(rows, sizes[0], dtype=dtype), of(rows, sizes[1], dtype=dtype)
        for lists in [mixes] if pairs > rows else [mixes, (None, None)]:
            tiles = of(configs.tile_capacity(pairs, 5), 4)
            made = sparse_delta.launches(out, x, table, (of(pairs), weighted, of(6), *lists), tiles, "cuda")
            asked.update(specialization(launch, TARGET) for launch in made)
    assert asked <= ready
    assert len(asked) > 8


@pytest.mark.parametrize(("sizes", "most"), [((4096, 6144, 16, 9), 8192), ((384, 1536, 100, 65), 4000)], ids=str)
def test_bounds_of_plans_are_found(sizes, most):
    """As if every size were tried."""

    def made(num_pairs: int) -> list[Any]:
        return [SimpleNamespace(variant=configs.plan(*sizes[:3], num_pairs, sizes[3], "bfloat16", "cuda"))]

    every = [1] + [n for n in range(2, most + 1) if made(n)[0].variant != made(n - 1)[0].variant]
    assert reach.sizes_of_each(made, 1, most) == every
    assert len(every) > 2
    assert reach.sizes_of_each(made, every[1], every[1]) == [every[1]]
