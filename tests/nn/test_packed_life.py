"""Packed siblings from attach to detach: parameters and files, copies, casts, adapters that come and go, refusals."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_models import adapter, per_row
from packed_models import ENTRIES, GATED, QKV, Block, block, close, fail_at_the_second_pack, storages
from torch import nn

import lora_fuse as lf
from lora_fuse.nn.packed import Pack


def test_storages_and_names_while_packed_and_after(tmp_path: Path) -> None:
    bare, _, model = block()
    keys, before = bare.state_dict(), dict(model.named_parameters())
    assert model.state_dict().keys() == keys.keys()
    assert all(torch.equal(t, keys[name]) for name, t in model.state_dict().items())
    where = {name: p.data_ptr() for name, p in before.items()}
    sizes = {name: p.nbytes for name, p in before.items()}
    for first, second in itertools.pairwise(f"{n}.weight" for n in QKV):
        assert where[second] == where[first] + sizes[first]
    assert where["v_proj.bias"] == where["q_proj.bias"] + sizes["q_proj.bias"] + 8 * 4  # k_proj has none
    torch.save(model.state_dict(), tmp_path / "packed.pt")
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    assert (tmp_path / "packed.pt").stat().st_size <= (tmp_path / "bare.pt").stat().st_size + 1024
    loaded = Block()
    loaded.load_state_dict(torch.load(tmp_path / "packed.pt"))
    assert all(torch.equal(t, keys[name]) for name, t in loaded.state_dict().items())
    with torch.no_grad():  # values loaded into the views reach the packed product
        model.load_state_dict({name: 2 * t for name, t in keys.items()})
        bare.load_state_dict(model.state_dict())
        x = torch.randn(2, 24)
        close(model(x), bare(x))
    assert lf.detach(model) is model
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(torch.equal(p, bare.state_dict()[name]) for name, p in after.items())
    assert len(set(storages(model).values())) == len(after)
    assert all(type(m) is nn.Linear and not any(k.startswith("lora") for k in m.__dict__) for m in model.children())


def test_safetensors_take_a_packed_model(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    bare, _, model = block()
    safetensors.save_file(model.state_dict(), tmp_path / "packed.safetensors")
    safetensors.save_file(bare.state_dict(), tmp_path / "bare.safetensors")
    assert (tmp_path / "packed.safetensors").read_bytes() == (tmp_path / "bare.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_packed_models_of_their_own(how: str, tmp_path: Path, products: list[Any]) -> None:
    _, _, model = block()
    x = torch.randn(4, 24)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        want = model(x)
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            text = pickle.dumps(model)
            assert len(text) < 16384 + sum(t.untyped_storage().nbytes() for t in model.buffers()) + sum(
                t.nbytes for t in model.parameters()
            )
            other = pickle.loads(text)
        else:
            torch.save(model, tmp_path / "model.pt")
            other = torch.load(tmp_path / "model.pt", weights_only=False)
        del products[:]
        with lf.use_adapters(other, ENTRIES):
            close(other(x), want)
            assert products == [QKV, GATED]
        other.q_proj.weight.zero_()
        close(model(x), want)
    lf.detach(model)
    lf.detach(other)


def test_moves_and_casts_are_packed_again(products: list[Any]) -> None:
    bare, adapters, model = block()
    x = torch.randn(4, 24, dtype=torch.float64)
    plain = lf.attach(copy.deepcopy(bare), adapters).double()
    old = weakref.ref(model.q_proj.lora_pack[0].weight)
    model.double()
    gc.collect()
    assert old() is None  # the fp32 weights are gone
    with torch.no_grad(), lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
        torch.testing.assert_close(model(x), plain(x))
        assert products == [QKV, GATED]
        model.k_proj.float()  # no longer one dtype
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)
    assert "packed" not in repr(model.q_proj)
    assert "packed with up_proj" in repr(model.gate_proj)


def test_other_weights_are_noticed(products: list[Any]) -> None:
    bare, _, model = block()
    x = torch.randn(4, 24)
    with torch.no_grad():
        model(x)
        new = copy.deepcopy(bare.k_proj.weight) * 3
        for m in (bare, model):
            m.k_proj.weight = nn.Parameter(new.clone(), requires_grad=False)
        close(model(x), bare(x))
        close(model(x), bare(x))
    assert lf.adapters(model)["a"].packed == GATED
    assert products == [QKV, GATED, QKV, GATED, GATED]
    lf.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))


def test_adapters_come_and_go(products: list[Any]) -> None:
    bare, adapters, model = block(paths=("q_proj", "v_proj"))  # PEFT's own default
    x = torch.randn(4, 24)
    assert {n: info.packed for n, info in lf.adapters(model).items()} == dict.fromkeys("ab", ("q_proj", "v_proj"))
    assert "lora_pool" not in model.k_proj._modules
    adapters["c"] = adapter(bare, ["k_proj", "up_proj", "out"], 4)
    lf.add_adapter(model, "c", adapters["c"])
    adapters["a"] = adapter(bare, ["k_proj", "q_proj"], 2)
    lf.swap_adapter(model, "a", adapters["a"])
    assert lf.adapters(model)["c"].packed == ("k_proj", "up_proj")
    assert lf.warmup(model) >= 8
    with torch.no_grad():
        for entries in (["a", "b", "c", None], [{"c": 1.0, "a": 0.5}, "c", "c", "c"]):
            with lf.use_adapters(model, entries):
                close(model(x), per_row(bare, adapters, entries, x))
        lf.remove_adapter(model, "c")
        with lf.use_adapters(model, ["a", "b", None, "a"]):
            close(model(x), per_row(bare, adapters, ["a", "b", None, "a"], x))
    assert set(products) == {QKV, GATED}
    with lf.use_adapters(model, "a"):
        lf.detach(model)  # in the middle of it
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))


def test_lora_bias_in_a_pack(products: list[Any]) -> None:
    bare = Block().requires_grad_(False)
    adapters = {"a": adapter(bare, ["q_proj"], 3, bias=True), "b": adapter(bare, ["v_proj", "k_proj"], 2)}
    model = lf.attach(copy.deepcopy(bare), adapters, pack=True)
    x = torch.randn(4, 24)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        plain = lf.attach(copy.deepcopy(bare), adapters)
        with lf.use_adapters(plain, ENTRIES):
            close(model(x), plain(x))
    assert products[0] == QKV


def test_full_copies_take_a_pack_apart(products: list[Any]) -> None:
    bare, adapters, model = block(paths=("k_proj", "up_proj"))
    x = torch.randn(4, 24)
    full = {"v_proj": {"weight": torch.randn(8, 24), "bias": torch.randn(8)}}
    head = lf.LoraAdapter({"up_proj": adapters["a"].layers["up_proj"]}, full)
    lf.add_adapter(model, "head", head)
    plain = lf.attach(copy.deepcopy(bare), {**adapters, "head": head})
    entries = ["a", "head", None, "b"]
    with torch.no_grad(), lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
        close(model(x), plain(x))
    assert products == [GATED]
    assert lf.adapters(model)["a"].packed == ("up_proj",)
    lf.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))


def test_sparse_deltas_keep_a_layer_apart(products: list[Any]) -> None:
    base = Block().requires_grad_(False)
    theta = base.state_dict()
    noise = {
        n: {k: 0.1 * torch.randn_like(t) for k, t in theta.items() if k.startswith(("q_proj", "out"))} for n in "st"
    }
    tuned = {n: {k: t + noise[n].get(k, 0.0) for k, t in theta.items()} for n in "st"}
    peru = lf.peru_fft(theta, tuned, density=0.2)
    base.load_state_dict(peru.merged)
    adapters = {"a": adapter(base, ["q_proj", "gate_proj"], 3)}
    x, entries = torch.randn(4, 24), ["a", "s", None, "t"]
    first = lf.attach(copy.deepcopy(base), {**adapters, **peru.adapters}, pack=True)
    later = lf.attach(copy.deepcopy(base), adapters, pack=True)
    for name, task in peru.adapters.items():
        lf.add_adapter(later, name, task)
    plain = lf.attach(copy.deepcopy(base), {**adapters, **peru.adapters})
    with torch.no_grad():
        for model in (first, later):
            with lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
                close(model(x), plain(x))
            lf.switch_task(model, "s")
            lf.switch_task(plain, "s")
            close(model(x), plain(x))
            for m in (model, plain):
                lf.switch_task(m, None)
            lf.detach(model)
            assert torch.equal(model(x), base(x))
    assert "q_proj" not in {leaf for made in products for leaf in made}


def test_joint_cores_take_a_pack_apart(products: list[Any]) -> None:
    bare, adapters, model = block(paths=("k_proj", "up_proj"))
    bank = lf.joint_compress({n: adapter(bare, ["q_proj", "out"], 3) for n in ("j", "k")}, rank=4)
    plain = lf.attach(copy.deepcopy(bare), {**adapters, **bank.adapters})
    for name, joint in bank.adapters.items():
        lf.add_adapter(model, name, joint)
    x, entries = torch.randn(4, 24), ["j", "a", None, {"k": 0.5, "b": 1.0}]
    with torch.no_grad(), lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
        close(model(x), plain(x))
    assert products == [GATED]


def test_layers_that_are_not_free_are_left_alone() -> None:
    model = nn.ModuleDict({name: Block() for name in ("tied", "hooked", "shared", "odd", "meta", "two")})
    blocks: Any = model
    blocks["tied"].q_proj.weight = blocks["tied"].k_proj.weight = nn.Parameter(torch.randn(24, 24))
    blocks["hooked"].k_proj.register_forward_pre_hook(lambda *args: None)
    blocks["hooked"].v_proj.forward = blocks["hooked"].v_proj.forward
    blocks["shared"].q_proj.weight.data = blocks["shared"].out.weight.data.view(24, 80)[:, :24]
    blocks["odd"].k_proj = nn.Linear(23, 8)
    blocks["odd"].up_proj.half()
    blocks["meta"].to("meta")
    nn.utils.parametrizations.orthogonal(blocks["two"].gate_proj)
    model = lf.attach(model, {}, pack=True)  # type: ignore[assignment]
    packs = [pack.paths for pack, _ in model.lora_attachment.packs]  # type: ignore[union-attr]
    assert packs == [
        ("tied.gate_proj", "tied.up_proj"),
        ("hooked.gate_proj", "hooked.up_proj"),
        ("shared.k_proj", "shared.v_proj"),
        ("shared.gate_proj", "shared.up_proj"),
        ("two.q_proj", "two.k_proj", "two.v_proj"),
    ]
    lf.detach(model)


def test_nothing_to_pack_and_bad_values() -> None:
    bare = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    adapters = {"a": adapter(bare, ["0"], 2)}
    for value in ("yes", 1, None):
        with pytest.raises(TypeError, match=r"pack: got .*, accepted are True and False"):
            lf.attach(bare, adapters, pack=value)
    model = lf.attach(bare, adapters, pack=True)
    assert lf.adapters(model)["a"].packed == ()
    assert "packed" not in repr(model)
    with pytest.raises(ValueError, match="already attached"):
        lf.attach(model, adapters, pack=True)
    lf.detach(model)
    _, _, packed = block()
    with pytest.raises(ValueError, match="already attached"):
        lf.attach(packed, {}, pack=True)
    lf.detach(packed)
    before = storages(packed)
    with pytest.raises(ValueError, match="does not fit"):
        lf.attach(packed, {"b": adapter(nn.ModuleDict({"other": nn.Linear(4, 4)}), ["other"], 2)}, pack=True)
    assert storages(packed) == before


def test_a_failing_attach_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, adapters, _ = block()
    fail_at_the_second_pack(monkeypatch)
    want = copy.deepcopy(bare.state_dict())
    with pytest.raises(MemoryError, match="no room"):
        lf.attach(bare, adapters, pack=True)
    assert len(set(storages(bare).values())) == len(want)
    assert all(torch.equal(t, want[name]) and type(m) is nn.Linear
               for m in bare.children() for name, t in bare.state_dict().items())  # fmt: skip


def test_a_pack_that_comes_apart_under_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """add_adapter takes packs apart while other threads may be anywhere in a forward."""
    bare, adapters, model = block()
    x, real = torch.randn(4, 24), Pack.holds

    def holds_for_the_last_time(self: Pack, index: int, layer: Any) -> bool:
        held = real(self, index, layer)
        self.dissolve()
        return held

    monkeypatch.setattr(Pack, "holds", holds_for_the_last_time)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        close(model(x), per_row(bare, adapters, ENTRIES, x))
    assert not any(info.packed for info in lf.adapters(model).values())
