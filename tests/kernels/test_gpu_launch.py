"""Launches made again, on a device: the same bits as Triton's own way, from wherever they are asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import make_pool
from nn_models import Mlp, adapter
from packed_models import PATHS as PACKED
from packed_models import Block
from triton import knobs

import lora_fuse as lf
from lora_fuse import _cpu
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.kernels import launch
from lora_fuse.kernels import multi_lora as kernels
from lora_fuse.nn.serving import Serving
from lora_fuse.ops import multi_lora as op

pytestmark = pytest.mark.gpu
PATHS = ("up", "down", "out")


class TestMadeAgain:
    def setup_method(self):
        op._READY.clear()
        self.pool = make_pool(3, 16, 512, 256, torch.bfloat16).cuda()
        self.routing = Routing.from_slots(torch.tensor([0, 2, 2, -1, 1], device="cuda"), 3)

    def both(self, x, y, direct, monkeypatch):
        """By Triton's own way, then by what was kept."""
        op._READY.clear()
        monkeypatch.setattr(launch, "DIRECT", direct)
        want, got = y.clone(), y.clone()
        args = (*self.pool.tensors, *self.routing.tensors, self.routing.tiles)
        torch.ops.lora_fuse.multi_lora_(want, x, *args)
        assert [isinstance(kept, _cpu.DirectLaunches) for kept in op._READY.values()] == [direct]
        monkeypatch.setattr(kernels, "multi_lora_", None)  # the slow way would fail
        torch.ops.lora_fuse.multi_lora_(got, x, *args)
        monkeypatch.undo()
        return got, want

    @pytest.mark.parametrize("way", ["dense", "slices", "misaligned", "three dimensions"])
    @pytest.mark.parametrize("direct", [False, True], ids=["by Triton's launcher", "by the driver's call"])
    def test_same_bits(self, way, direct, monkeypatch):
        x, y = torch.randn(5, 512, device="cuda").bfloat16(), torch.randn(5, 256, device="cuda").bfloat16()
        if way == "slices":
            x, y = torch.randn(5, 600, device="cuda").bfloat16()[:, 8:520], y.repeat(1, 2)[:, 256:]
        elif way == "misaligned":
            x = torch.randn(5 * 512 + 1, device="cuda").bfloat16()[1:].view(5, 512)
        elif way == "three dimensions":
            x, y = x[:, None], y[:, None]
        got, want = self.both(x, y, direct, monkeypatch)
        assert torch.equal(got, want)
        assert not torch.equal(got, y)

    def test_what_cannot_be_kept_is_not(self):
        x = torch.randn(512, 5, device="cuda").bfloat16().t()  # copied before the launch
        y = torch.zeros(5, 256, device="cuda").bfloat16()
        for _ in range(2):
            multi_lora(x, self.pool, self.routing, out=y.zero_())
            assert torch.equal(y, multi_lora(x.contiguous(), self.pool, self.routing))
        assert len(op._READY) == 1

    def test_the_version_is_bumped_and_other_streams_work(self):
        x, y = torch.randn(5, 512, device="cuda").bfloat16(), torch.zeros(5, 256, device="cuda").bfloat16()
        want = multi_lora(x, self.pool, self.routing)
        multi_lora(x, self.pool, self.routing, out=y)
        y.zero_()
        before, side = y._version, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            multi_lora(x, self.pool, self.routing, out=y)
        torch.cuda.current_stream().wait_stream(side)
        assert y._version == before + 1
        assert torch.equal(y, want)

    def test_profilers_see_every_launch(self):
        x, seen = torch.randn(5, 512, device="cuda").bfloat16(), []
        want = multi_lora(x, self.pool, self.routing)

        def hook(metadata):
            seen.append(metadata.get()["name"])

        knobs.runtime.launch_enter_hook.add(hook)
        try:
            for _ in range(3):
                assert torch.equal(multi_lora(x, self.pool, self.routing), want)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert len(seen) == 6

    def test_bad_input_is_named_the_second_time_too(self):
        x = torch.randn(5, 512, device="cuda").bfloat16()
        for _ in range(2):
            multi_lora(x, self.pool, self.routing)
            with pytest.raises(ValueError, match="511 and 256 features"):
                multi_lora(x[:, 1:], self.pool, self.routing)
            with pytest.raises(ValueError, match="has 4 rows"):
                multi_lora(x[1:], self.pool, self.routing)
            with pytest.raises(ValueError, match="out: is on cpu"):
                multi_lora(x, self.pool, self.routing, out=torch.zeros(5, 256).bfloat16())


def test_nothing_is_compiled_after_warmup(monkeypatch):
    model = lf.attach(
        Mlp().requires_grad_(False).cuda(), {n: adapter(Mlp(), PATHS, r) for n, r in (("a", 2), ("b", 5))}
    )
    lf.warmup(model, max_tokens=200)
    asked, before = [], launch.compilations()
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **compiling: bool(asked.append(compiling["repr"])))
    side = torch.cuda.Stream()
    for stream in (torch.cuda.default_stream(), side):
        with torch.cuda.stream(stream), torch.no_grad():
            for names in (["a"], ["a", None, "b"], [{"a": 0.5, "b": 1.0}, "b"], [{"a": 0.5}], ["b"] * 16):
                for rows in (1, 2, 12, 16, 50, 200):
                    lf.set_adapters(model, [names[i % len(names)] for i in range(rows)])
                    model(torch.randn(rows, 24, device="cuda"))
            for rows in (1, 100, 129, 200):
                slots = torch.tensor([-1, *lf.adapter_slots(model).values()], dtype=torch.int32, device="cuda")
                lf.set_adapters(model, slots[torch.arange(rows, device="cuda") % 3])
                model(torch.randn(rows, 24, device="cuda"))
            lf.set_adapters(model, None)
            lf.swap_adapter(model, "b", adapter(Mlp(), PATHS, 1))
    assert not asked
    assert launch.compilations() == before
    assert before > 10


@pytest.mark.parametrize("pack", [False, True], ids=["alone", "packed"])
def test_layers_launch_again_without_python(pack, monkeypatch):
    """Nor do they look up a routing, once a batch like this was there."""
    torch.manual_seed(0)
    bare = Block().requires_grad_(False).cuda()
    model = lf.attach(
        copy.deepcopy(bare), {"a": adapter(Block(), PACKED, 3), "b": adapter(Block(), PACKED, 5)}, pack=pack
    )
    x = torch.randn(4, 24, device="cuda")
    with torch.no_grad():
        for _ in range(3):  # siblings are seen to share their input
            lf.set_adapters(model, ["a", None, "b", "a"])
            want = model(x)
        monkeypatch.setattr(Serving, "routing", None)
        assert torch.equal(model(x), want)
        assert not torch.equal(want, bare(x))
