"""Hot add, remove and swap: other rows never notice, slots are reused only when unread, failures change nothing."""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from nn_models import PATHS, Mlp, adapted_copy, adapter, linear_layer
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import LoraAdapter
from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.adapters.pool import AdapterPool


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer and parameter, as it is now."""
    return {name: t.clone() for name, t in (*model.named_buffers(), *model.named_parameters())}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def test_add_swap_remove(bare: Mlp) -> None:
    adapters = {name: adapter(bare, PATHS, rank) for name, rank in {"a": 2, "b": 5, "c": 4}.items()}
    adapters["d"] = adapter(bare, ("down",), 3)
    x = torch.randn(3, 24)
    want = {name: adapted_copy(bare, adapters, name)(x) for name in adapters}
    model = lf.attach(copy.deepcopy(bare), {"a": adapters["a"]}, num_slots=3, max_rank=5)

    def check(name: str, source: str) -> None:
        with lf.use_adapters(model, [name, None, "a"]):
            got = model(x)
        torch.testing.assert_close(got[0], want[source][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[2], want["a"][2], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[1], bare(x)[1])

    lf.add_adapter(model, "b", adapters["b"])
    check("b", "b")
    for source in ("c", "d", "b") * 3:  # more swaps than there are slots; "d" has fewer layers, lower rank
        lf.swap_adapter(model, "b", adapters[source])
        check("b", source)
    lf.add_adapter(model, "c", adapters["c"])
    with pytest.raises(ValueError, match=r"all 3 slots are taken by \['a', 'b', 'c'\]"):
        lf.add_adapter(model, "d", adapters["d"])
    lf.swap_adapter(model, "c", adapters["d"])  # a full pool can still swap
    check("c", "d")
    lf.remove_adapter(model, "c")
    lf.add_adapter(model, "d", adapters["d"])
    check("d", "d")
    assert set(lf.adapters(model)) == {"a", "b", "d"} == set(lf.adapter_slots(model))
    info = lf.adapters(model)["d"]
    assert (info.rank, info.layers, info.nbytes) == (3, ("down",), adapters["d"].nbytes)
    assert info.slot == lf.adapter_slots(model)["d"]
    lf.detach(model)
    assert torch.equal(model(x), bare(x))


def test_empty_attach_then_add(bare: Mlp) -> None:
    model = lf.attach(copy.deepcopy(bare), {}, max_rank=4)
    x = torch.randn(2, 24)
    assert torch.equal(model(x), bare(x))
    adapters = {"a": adapter(bare, PATHS, 4)}
    lf.add_adapter(model, "a", adapters["a"])
    with lf.use_adapters(model, "a"):
        torch.testing.assert_close(model(x), adapted_copy(bare, adapters, "a")(x), rtol=1e-5, atol=1e-5)
    assert lf.adapters(lf.attach(copy.deepcopy(bare), {})) == {}


def test_removed_adapter_that_is_still_selected(bare: Mlp) -> None:
    model = lf.attach(copy.deepcopy(bare), {n: adapter(bare, PATHS, 2) for n in "ab"})
    x = torch.randn(2, 24)
    lf.set_adapters(model, "a")
    with lf.use_adapters(model, ["b", None]):
        model(x)
        lf.remove_adapter(model, "b")
        with pytest.raises(ValueError, match=r"'b' is attached; attached are \['a'\]"):
            model(x)
    lf.remove_adapter(model, "a")
    with pytest.raises(ValueError, match=r"'a' is attached"):
        model(x)
    lf.set_adapters(model, None)
    assert torch.equal(model(x), bare(x))
    for call in (lf.remove_adapter, lambda m, n: lf.swap_adapter(m, n, adapter(bare, PATHS, 2))):
        with pytest.raises(ValueError, match="'a' is attached"):
            call(model, "a")


def test_tokens_do_not_outlive_a_swap(bare: Mlp) -> None:
    model = lf.attach(copy.deepcopy(bare), {n: adapter(bare, PATHS, 2) for n in "ab"})
    slot = lf.adapter_slots(model)["b"]
    with lf.use_adapters(model, torch.tensor([-1, slot], dtype=torch.int32)):
        model(torch.randn(2, 24))
        lf.swap_adapter(model, "b", adapter(bare, PATHS, 2))
        with pytest.raises(ValueError, match=f"row 1 asks for slot {slot}, whose adapter was swapped"):
            model(torch.randn(2, 24))
        for _ in range(12):  # until the old slot has another tenant
            lf.swap_adapter(model, "a", adapter(bare, PATHS, 2))
            if lf.adapter_slots(model)["a"] == slot:
                break
        assert lf.adapter_slots(model)["a"] == slot
        with pytest.raises(ValueError, match="row 1"):
            model(torch.randn(2, 24))


def test_a_slot_is_not_reused_while_a_forward_runs(bare: Mlp) -> None:
    adapters = {n: adapter(bare, PATHS, 2) for n in "abc"}
    model = lf.attach(copy.deepcopy(bare), {"a": adapters["a"]}, num_slots=1)
    x, inside, go = torch.randn(2, 24), threading.Event(), threading.Event()
    result: dict[str, Any] = {}

    def pause(*args: Any) -> None:
        inside.set()
        assert go.wait(10)

    hook = model.up.register_forward_hook(pause)

    def run() -> None:
        with lf.use_adapters(model, "a"):
            result["y"] = model(x)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(10)
    lf.swap_adapter(model, "a", adapters["b"])  # into the spare, while the first layer of three has run
    before = bits(model)
    with pytest.raises(RuntimeError, match="still held by a running forward"):
        lf.swap_adapter(model, "a", adapters["c"], timeout=0.05)
    assert same_bits(model, before)
    hook.remove()
    go.set()
    thread.join()
    torch.testing.assert_close(result["y"], adapted_copy(bare, adapters, "a")(x), rtol=1e-5, atol=1e-5)
    lf.swap_adapter(model, "a", adapters["c"])  # the forward is done: its slot is free again
    with lf.use_adapters(model, "a"):
        torch.testing.assert_close(model(x), adapted_copy(bare, {"a": adapters["c"]}, "a")(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("through", ["model", "layer"])
def test_a_slot_is_not_reused_before_its_backward(bare: Mlp, through: str) -> None:
    adapters = {n: adapter(bare, PATHS, 2) for n in "abc"}
    model = lf.attach(copy.deepcopy(bare), {"a": adapters["a"]}, num_slots=1)
    x = torch.randn(2, 24, requires_grad=True)
    with lf.use_adapters(model, "a"):
        y = model(x) if through == "model" else model.up(x)
    lf.swap_adapter(model, "a", adapters["b"])
    with pytest.raises(RuntimeError, match="spare slot is still held"):
        lf.swap_adapter(model, "a", adapters["c"], timeout=0.05)
    y.sum().backward()
    row = x.detach().clone().requires_grad_()
    alone = adapted_copy(bare, adapters, "a")
    (alone(row) if through == "model" else alone.up(row)).sum().backward()
    torch.testing.assert_close(x.grad, row.grad, rtol=1e-5, atol=1e-5)
    del y
    lf.swap_adapter(model, "a", adapters["c"])


def test_idle_selections_do_not_hold_slots(bare: Mlp) -> None:
    model = lf.attach(copy.deepcopy(bare), {"a": adapter(bare, PATHS, 2)}, num_slots=1)
    lf.set_adapters(model, "a")
    x = torch.randn(2, 24)
    with lf.use_adapters(model, ["a", None]):
        for _ in range(5):
            model(x)
            lf.swap_adapter(model, "a", adapter(bare, PATHS, 2), timeout=0.05)
    serving = model.up.lora_serving
    gc.collect()
    assert len(serving.allocator.live) == 1


def test_no_torn_reads_under_hammering(bare: Mlp) -> None:
    """Every forward equals one of the versions that ever had the name, for all its rows and layers together."""
    versions = [adapter(bare, PATHS, rank, scaling=1.0) for rank in (1, 3, 6, 2)]
    fixed = adapter(bare, PATHS, 4)
    model = lf.attach(copy.deepcopy(bare), {"hot": versions[0], "fixed": fixed}, num_slots=3, max_rank=6)
    x = torch.randn(4, 3, 24)
    wanted = torch.stack([adapted_copy(bare, {"hot": v}, "hot")(x) for v in versions])
    fixed_row = adapted_copy(bare, {"fixed": fixed}, "fixed")(x)[1]
    base_row = bare(x)[2]
    stop, problems, runs = threading.Event(), [], [0]

    def serve() -> None:
        entries = ["hot", "fixed", None, "hot"]
        with lf.use_adapters(model, entries), torch.inference_mode():
            while not stop.is_set():
                y = model(x)
                runs[0] += 1
                error = (y[[0, 3]] - wanted[:, [0, 3]]).abs().amax(dim=(1, 2, 3)).min()
                if error > 1e-4 or (y[1] - fixed_row).abs().max() > 1e-4 or not torch.equal(y[2], base_row):
                    problems.append(float(error))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(60):
            lf.swap_adapter(model, "hot", versions[i % len(versions)])
            if i % 3 == 0:
                lf.add_adapter(model, "extra", versions[1])
            if i % 3 == 2:
                lf.remove_adapter(model, "extra")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert runs[0] > 10


def _wrong(bare: Mlp, what: str) -> Any:
    good = adapter(bare, PATHS, 2)
    layer = good.layers["up"]
    layers = dict(good.layers)
    if what == "missing":
        return LoraAdapter({**layers, "upp": layer, "model.down": layer})
    if what == "shape":
        return LoraAdapter({**layers, "down": layer})
    if what == "rank":
        return LoraAdapter({**layers, "down": linear_layer(bare.down, 9)})
    if what == "ranks-differ":
        return LoraAdapter({**layers, "up": replace(layer, lora_a=layer.lora_a[:1])})
    if what == "kind":
        return LoraAdapter({**layers, "up": replace(layer, kind="embedding")})
    if what == "nan":
        return LoraAdapter({**layers, "up": replace(layer, lora_b=layer.lora_b * float("nan"))})
    if what.startswith("scaling"):
        return LoraAdapter({**layers, "up": replace(layer, scaling=float("nan") if what == "scaling" else 1e300)})
    if what == "base-weight":
        return LoraAdapter(layers, base_weights={"up": bare.up.weight + 1})
    if what == "dora":
        return LoraAdapter({**layers, "up": replace(layer, magnitude=torch.ones(40))})
    if what == "biases":
        return LoraAdapter(layers, base_biases={"up": torch.zeros(40)})
    if what == "tokens":
        return LoraAdapter(layers, trainable_tokens={"embed": (torch.tensor([1]), torch.zeros(1, 4))})
    if what == "lora_bias":
        return LoraAdapter({**layers, "up": replace(layer, lora_bias=torch.zeros(3))})
    if what == "act":
        return LoraAdapter({**layers, "": layer})
    if what == "parameter":
        return LoraAdapter({**layers, "up.weight": layer})
    if what == "nothing":
        return LoraAdapter({})
    if what == "many":
        return LoraAdapter({f"layer.{i}": layer for i in range(14)})
    raise AssertionError(what)


REFUSALS = {
    "missing": r"does not fit this model, 2 of 5 modules:\n  upp: no such module, nearest: up\n  model\.down: no such",
    "shape": r"down: the adapter's delta has shape \[40, 24\], the weight \[24, 40\]",
    "rank": "'bad': down has rank 9, which exceeds max_rank 4",
    "ranks-differ": "up: lora_a has rank 1, lora_b has rank 2",
    "kind": "up: the adapter's factors are for embedding, the module is linear",
    "nan": "'bad': up has factors that are not finite",
    "scaling": "'bad': up has the scaling nan, accepted is a finite number",
    "scaling-beyond-fp32": r"'bad': up has the scaling 1e\+300, accepted is a finite number",
    "base-weight": r"up: the adapter brings the base weight .* and the model's differs",
    "dora": r"'bad': up and 0 more layers are DoRA.*lora_fuse\.fuse",
    "biases": "bias='all' or 'lora_only'",
    "tokens": r"trainable_token_indices of \['embed'\]",
    "lora_bias": r"lora_bias has shape \[3\], expected \[40\]",
    "act": "Mlp is neither Linear",
    "parameter": r"up\.weight: is a parameter \[40, 24\], not a module",
    "nothing": "it has no layers",
    "many": r"14 of 14 modules:(\n.*){10}\n  and 4 more",
}


@pytest.mark.parametrize(("what", "match"), REFUSALS.items(), ids=REFUSALS.keys())
def test_refusals_change_nothing(bare: Mlp, what: str, match: str) -> None:
    bad, good = _wrong(bare, what), adapter(bare, PATHS, 4)
    before, types = bits(bare), [type(m) for m in bare.modules()]
    with pytest.raises(ValueError, match=match):
        lf.attach(bare, {"good": good, "bad": bad}, max_rank=4)
    assert same_bits(bare, before)
    assert [type(m) for m in bare.modules()] == types
    assert "lora_attachment" not in bare.__dict__
    model = lf.attach(bare, {"good": good}, max_rank=4)
    before, published = bits(model), model.up.lora_serving.published
    with pytest.raises(ValueError, match=match):
        lf.add_adapter(model, "bad", bad)
    with pytest.raises(ValueError, match=match.replace("'bad'", "'good'")):
        lf.swap_adapter(model, "good", bad)
    assert same_bits(model, before)
    assert model.up.lora_serving.published is published
    lf.add_adapter(model, "fine", good)


def test_the_base_weight_that_an_adapter_was_trained_with_may_come_along(bare: Mlp) -> None:
    good = adapter(bare, PATHS, 2)
    model = lf.attach(bare, {"good": replace(good, base_weights={"up": bare.up.weight.detach().clone()})})
    assert list(lf.adapters(model)) == ["good"]


def test_bad_arguments(bare: Mlp) -> None:
    good = adapter(bare, PATHS, 2)
    for kwargs, match in [
        ({"num_slots": 0}, "num_slots: got 0"),
        ({"num_slots": 1}, "2 adapters were given, .*at most 1"),
        ({"max_rank": True}, "max_rank: got True"),
        ({"batch_dim": -1}, "batch_dim: got -1"),
        ({"max_rank": 1}, "up has rank 2, which exceeds max_rank 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            lf.attach(bare, {"a": good, "b": good}, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="names are non-empty strings"):
        lf.attach(bare, {"": good})
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        lf.attach("model", {"a": good})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no adapters attached"):
        lf.add_adapter(bare, "a", good)
    lf.attach(bare, {"a": good})
    with pytest.raises(ValueError, match="already attached"):
        lf.attach(bare, {"a": good})
    with pytest.raises(ValueError, match="'a' is attached already; swap_adapter replaces it"):
        lf.add_adapter(bare, "a", good)


class Targets(nn.Module):
    """One of each thing that must be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv1d, self.conv3d = nn.Conv1d(8, 8, 1), nn.Conv3d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.normed = nn.Embedding(8, 8, max_norm=1.0)
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))


@pytest.mark.parametrize(
    ("path", "match"),
    {
        "attention.out_proj": "MultiheadAttention reads this module's weight and never calls it",
        "attention": "nn.MultiheadAttention is not supported",
        "conv1d": "Conv1d is not supported",
        "conv3d": "Conv3d is not supported",
        "grouped": "Conv2d with groups=2 is not supported",
        "norm": "LayerNorm is neither",
        "normed": "max_norm rewrites its weight",
        "gate_up_proj": r"is a stack of expert weights \[4, 8, 8\]",
    }.items(),
)
def test_targets_refused_by_name(path: str, match: str) -> None:
    layer = LoraLayer(torch.ones(1, 8), torch.ones(8, 1), 1.0)
    with pytest.raises(ValueError, match=f"{path}: .*{match}"):
        lf.attach(Targets(), {"a": LoraAdapter({path: layer})})


def test_pool_and_warmup_arguments(bare: Mlp) -> None:
    sizes = {"num_slots: got 0": (0, 4, 8, 8), "max_rank: got 0": (2, 0, 8, 8), "max_rank: got 16385": (1, 16385, 1, 1)}
    for match, size in sizes.items():
        with pytest.raises(ValueError, match=match):
            AdapterPool(*size, torch.float32)
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        AdapterPool(2, 4, 8, 8, torch.int8)
    pool = AdapterPool(2, 4, 8, 8, torch.float32)
    pool.write(0, torch.ones(2, 8), torch.ones(8, 2), 1.0)
    before = [t.clone() for t in pool.tensors]
    with pytest.raises(ValueError, match=r"lora_bias: expected shape \(8,\), got \(3,\)"):
        pool.write(0, torch.zeros(1, 8), torch.zeros(8, 1), 2.0, torch.zeros(3))
    with pytest.raises(ValueError, match="slot: 2 is out of range, this pool has slots 0 to 1"):
        pool.clear(2)
    assert all(torch.equal(t, b) for t, b in zip(pool.tensors, before, strict=True))
    model = lf.attach(bare, {"a": adapter(bare, PATHS, 2)})
    for wrong in (5, [-1], ["1"], "12"):
        with pytest.raises(ValueError, match=r"num_tokens: got .*accepted is a sequence of integers"):
            lf.warmup(model, wrong)  # type: ignore[arg-type]
    for wrong in (0, 1.0, True):
        with pytest.raises(ValueError, match=r"max_tokens: got .*accepted is an integer from 1"):
            lf.warmup(model, max_tokens=wrong)  # type: ignore[arg-type]


def test_the_argument_of_a_missing_adapter_is_named(bare: Mlp) -> None:
    model = lf.attach(bare, {})
    with pytest.raises(ValueError, match="name: no adapter 'x' is attached"):
        lf.remove_adapter(model, "x")
    with pytest.raises(ValueError, match="name: no adapter 'x' is attached"):
        lf.swap_adapter(model, "x", adapter(bare, ["up"], 2))
