"""Layers with A behind their weights from attach to detach: files, copies, casts, other weights, ties, refusals."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from augmented_models import BOTH, PATHS, Block, block, widths
from nn_models import adapter, per_row
from packed_models import ENTRIES, close, fail_at_the_second_pack, storages
from torch import nn

import lora_fuse as lf


def augmented(model: Any) -> set[str]:
    return {path for info in lf.adapters(model).values() for path in info.augmented}


@BOTH
def test_names_files_and_what_detach_leaves(pack: bool, tmp_path: Path) -> None:
    bare, _, model = block(pack)
    keys, before = bare.state_dict(), dict(model.named_parameters())
    saved = model.state_dict()
    assert saved.keys() == keys.keys()
    assert all(torch.equal(t, keys[name]) for name, t in saved.items())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in saved.values())
    assert all(model.state_dict(keep_vars=True)[name] is p for name, p in before.items())
    for name, states in (("model", saved), ("bare", keys)):
        torch.save(states, tmp_path / f"{name}.pt")
    assert (tmp_path / "model.pt").stat().st_size <= (tmp_path / "bare.pt").stat().st_size + 1024
    x = torch.randn(2, 64)
    with torch.no_grad():  # values loaded into the views reach the product
        model.load_state_dict({name: 2 * t for name, t in keys.items()})
        bare.load_state_dict(model.state_dict())
        with lf.use_adapters(model, "a"):
            close(model(x), per_row(bare, {"a": lf_adapter(model, bare)}, ["a"] * 2, x))
    assert lf.detach(model) is model
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(torch.equal(p, bare.state_dict()[name]) for name, p in after.items())
    assert len(set(storages(model).values())) == len(after)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in after.values())
    assert all(type(m) is nn.Linear and not any(k.startswith("lora") for k in m.__dict__) for m in model.children())
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))


def lf_adapter(model: Any, bare: nn.Module) -> lf.LoraAdapter:
    """The adapter in slot "a", read back from the pools."""
    slot, layers = lf.adapter_slots(model)["a"], {}
    like = adapter(bare, PATHS, 3).layers
    for path in PATHS:
        pool = model.get_submodule(path).lora_pool
        rows = slice(slot * pool.max_rank, slot * pool.max_rank + int(pool.slot_rank[slot]))
        a, b, scaling = pool.pool_a[rows].clone(), pool.pool_b[rows].t().clone(), float(pool.slot_scaling[slot])
        layers[path] = type(like[path])(a, b, scaling)
    return lf.LoraAdapter(layers)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    bare, _, model = block(True)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    safetensors.save_file(bare.state_dict(), tmp_path / "bare.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "bare.safetensors").read_bytes()


def test_transformers(tmp_path: Path, wide: list[Any]) -> None:
    """generate with a Llama-shaped model, packed and augmented, as with none of both; saved without a trace of it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    bare = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    paths = [path for path, m in bare.named_modules() if path.rpartition(".")[2] in leaves]
    adapters = {n: adapter(bare, paths, 2) for n in "ab"}
    plain = lf.attach(copy.deepcopy(bare), adapters, num_slots=2)
    model = lf.attach(copy.deepcopy(bare), adapters, num_slots=2, pack=True, augment=True)
    assert "lm_head" not in augmented(model)  # its weight is the embedding's too
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(augmented(model)) == 14
    ids = torch.randint(0, 160, (4, 5))
    kept = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
        assert torch.equal(model.generate(ids, **kept), plain.generate(ids, **kept))
    assert {(256,), (128, 64, 64)} & set(wide)
    model.save_pretrained(tmp_path / "model")
    bare.save_pretrained(tmp_path / "bare")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "bare")]
    assert files[0] == files[1]


@BOTH
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_models_of_their_own(how: str, pack: bool, tmp_path: Path, wide: list[Any]) -> None:
    _, _, model = block(pack)
    x = torch.randn(4, 64)
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        want = model(x)
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        if how == "deepcopy":
            other = copy.deepcopy(model)
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in (*other.parameters(), *other.buffers())}  # fmt: skip
            assert sum(held.values()) <= size + 1024
        elif how == "pickle":
            text = pickle.dumps(model)
            assert len(text) < size + 32768
            other = pickle.loads(text)
        else:
            torch.save(model, tmp_path / "model.pt")
            assert (tmp_path / "model.pt").stat().st_size < size + 65536
            other = torch.load(tmp_path / "model.pt", weights_only=False)
        del wide[:]
        with lf.use_adapters(other, ENTRIES):
            close(other(x), want)
            assert wide == widths(pack)
            lf.swap_adapter(other, "a", adapter(Block(), PATHS, 4))
            assert not torch.allclose(other(x), want)
        other.q_proj.weight.zero_()
        close(model(x), want)
    lf.detach(model)
    lf.detach(other)


@BOTH
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_keeps_what_an_optimizer_refers_to(how: str, pack: bool) -> None:
    _, _, model = block(pack)
    both = model, torch.optim.SGD(model.parameters(), lr=0.1)
    other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert {*other.parameters()} == {*copied.param_groups[0]["params"]}
    assert not {*other.parameters()} & {*model.parameters()}


@BOTH
def test_parameters_look_like_tensors_of_their_own(pack: bool) -> None:
    """To whatever saves or drops tensors by their storages, and to what writes into a state dict."""
    _, _, model = block(pack)
    tensors = [*model.state_dict().values(), *(model.get_submodule(p).lora_pool.pool_a for p in augmented(model))]
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.storage_offset() == 0 for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    for t in model.state_dict().values():
        t.fill_(0.5)
    assert all((p == 0.5).all() for p in model.parameters())
    assert model.down.lora_pack[0].holds(0, model.down)


@BOTH
@pytest.mark.parametrize("tool", ["accelerate", "safetensors"])
def test_tools_that_look_at_storages_save_everything(tool: str, pack: bool, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    bare, _, model = block(pack)
    if tool == "accelerate":
        pytest.importorskip("accelerate").Accelerator().save_model(model, tmp_path)
    else:
        safetensors.save_model(model, tmp_path / "model.safetensors")
    saved, want = safetensors.load_file(tmp_path / "model.safetensors"), bare.state_dict()
    assert saved.keys() == want.keys()
    assert all(torch.equal(t, want[name]) for name, t in saved.items())


@BOTH
def test_moves_and_casts_are_laid_out_again(pack: bool, wide: list[Any]) -> None:
    bare, adapters, model = block(pack)
    plain = lf.attach(copy.deepcopy(bare), adapters, num_slots=2)
    old = weakref.ref(model.down.lora_pack[0].weight)
    assert model.to(torch.float32) is model
    assert old() is model.down.lora_pack[0].weight  # nothing to do
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for m in (model, plain):
            m.to(dtype)
        gc.collect()
        assert old() is None  # the earlier weights are gone
        x = torch.randn(4, 64).to(dtype)
        with torch.no_grad(), lf.use_adapters(model, ENTRIES), lf.use_adapters(plain, ENTRIES):
            close(model(x), plain(x))
            assert wide == widths(pack)
        for path in augmented(model):
            layer = model.get_submodule(path)
            assert layer.lora_pack[0].holds(layer.lora_pack[1], layer)
        old = weakref.ref(model.down.lora_pack[0].weight)
        del wide[:]
    with torch.inference_mode():
        model.float()
    lf.swap_adapter(model, "a", adapter(bare, PATHS, 4))
    with torch.no_grad(), lf.use_adapters(model, "a"):
        assert torch.isfinite(model(torch.randn(2, 64))).all()
    model.down.lora_pool.half()  # A alone
    with torch.no_grad(), lf.use_adapters(model, "a"), pytest.raises((RuntimeError, ValueError), match="dtype"):
        model(torch.randn(2, 64))
    assert "down" not in augmented(model)


@BOTH
def test_other_weights_are_noticed(pack: bool, wide: list[Any]) -> None:
    bare, adapters, model = block(pack)
    x = torch.randn(4, 64)
    new = {path: torch.randn_like(bare.get_submodule(path).weight) for path in ("q_proj", "gate_proj", "down")}
    with torch.no_grad(), lf.use_adapters(model, ENTRIES):
        model(x)
        for m in (bare, model):
            m.q_proj.weight = nn.Parameter(new["q_proj"].clone(), requires_grad=False)
            m.gate_proj.weight.data = new["gate_proj"].clone()
            m.down.weight = nn.Parameter(new["down"].clone(), requires_grad=False)
        del wide[:]
        for _ in range(2):
            close(model(x), per_row(bare, adapters, ENTRIES, x))
        assert wide == ([] if pack else [(160,)] * 2)
        assert augmented(model) == (set() if pack else {"up_proj"})
        assert "A behind" not in repr(model.down)
        adapters["b"] = adapter(bare, PATHS, 4)  # A stays where it is, and can be written
        lf.swap_adapter(model, "b", adapters["b"])
        close(model(x), per_row(bare, adapters, ENTRIES, x))
    lf.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))


def test_layers_without_room_or_of_others_are_left_alone() -> None:
    bare = nn.ModuleDict({name: Block() for name in ("tied", "hooked", "shared", "odd", "many")}).requires_grad_(False)
    blocks: Any = bare
    blocks["tied"].gate_proj.weight = blocks["tied"].up_proj.weight
    blocks["hooked"].q_proj.register_forward_hook(lambda *args: None)
    blocks["shared"].down.weight.data = blocks["shared"].q_proj.weight.data[:128]
    blocks["odd"].q_proj = nn.Linear(60, 192)  # rows of 240 bytes
    blocks["odd"].gate_proj = nn.Linear(60, 160).double()  # of 480
    paths = [f"{name}.{path}" for name in bare for path in ("q_proj", "gate_proj", "up_proj", "down")]
    model = lf.attach(bare, {"a": adapter(bare, paths, 5)}, num_slots=2, augment=True)
    want = {"tied.q_proj", "tied.down", "hooked.gate_proj", "hooked.up_proj", "hooked.down", "shared.gate_proj",
            "shared.up_proj", "odd.up_proj", "odd.down", *(p for p in paths if p.startswith("many"))}  # fmt: skip
    assert augmented(model) == want
    assert blocks["tied"].gate_proj.weight is blocks["tied"].up_proj.weight
    lf.detach(model)
    model = lf.attach(bare, {"a": adapter(bare, paths, 6)}, num_slots=2, augment=True)  # 18 rows
    assert augmented(model) == {p for p in want if not p.endswith("down")}
    lf.detach(model)
    few = lf.attach(nn.Sequential(nn.Linear(64, 64)), {}, augment=True)
    lf.add_adapter(few, "a", adapter(few, ["0"], 1))
    assert augmented(few) == set()  # slots that came later


def test_weights_are_fused_into_in_place(wide: list[Any]) -> None:
    bare, adapters, model = block(True)
    x = torch.randn(4, 64)
    lf.fuse(model, [adapters["a"]])
    lf.fuse(bare, [adapters["a"]])
    with torch.no_grad():
        with lf.use_adapters(model, ENTRIES):
            close(model(x), per_row(bare, adapters, ENTRIES, x))
        assert wide == widths(True)
        lf.unfuse(model)
        lf.unfuse(bare)
        assert all(torch.equal(p, bare.state_dict()[name]) for name, p in model.named_parameters())


@BOTH
def test_sparse_deltas_and_full_copies_keep_a_layer_apart(pack: bool, wide: list[Any]) -> None:
    bare, adapters, model = block(pack)
    full = {name: torch.randn_like(p) for name, p in bare.down.named_parameters()}
    head = lf.LoraAdapter({"up_proj": adapters["a"].layers["up_proj"]}, {"down": full})
    only = {n: lf.LoraAdapter({p: la for p, la in a.layers.items() if p != "down"}) for n, a in adapters.items()}
    lf.detach(model)
    model = lf.attach(model, only, num_slots=3, max_rank=5, pack=pack, augment=True)
    lf.add_adapter(model, "h", head)
    plain = lf.attach(copy.deepcopy(bare), {**only, "h": head})
    x, entries = torch.randn(4, 64), ["a", "h", None, "b"]
    with torch.no_grad(), lf.use_adapters(model, entries), lf.use_adapters(plain, entries):
        close(model(x), plain(x))
    assert wide
    lf.detach(model)
    theta = bare.state_dict()
    tuned = {"t": {k: v + 0.1 * torch.randn_like(v) if k.startswith("q_proj") else v for k, v in theta.items()}}
    peru = lf.peru_fft(theta, tuned, density=0.2)
    model.load_state_dict(peru.merged)
    plain = lf.attach(copy.deepcopy(model), {**adapters, **peru.adapters})
    first = lf.attach(copy.deepcopy(model), {**adapters, **peru.adapters}, num_slots=3, pack=pack, augment=True)
    later = lf.attach(model, adapters, num_slots=3, max_rank=5, pack=pack, augment=True)
    lf.add_adapter(later, "t", peru.adapters["t"])
    entries = ["a", "t", None, "b"]
    with torch.no_grad():
        for m in (first, later):
            with lf.use_adapters(m, entries), lf.use_adapters(plain, entries):
                close(m(x), plain(x))
            assert "q_proj" not in augmented(m)
            lf.detach(m)


def test_bad_values_and_a_failing_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, adapters, _ = block(False)
    for value in ("yes", 1, None):
        with pytest.raises(TypeError, match=r"augment: got .*, accepted are True and False"):
            lf.attach(bare, adapters, augment=value)
    fail_at_the_second_pack(monkeypatch)
    want, places = copy.deepcopy(bare.state_dict()), dict(bare.named_parameters())
    with pytest.raises(MemoryError, match="no room"):
        lf.attach(bare, adapters, augment=True, num_slots=2)
    assert all(torch.equal(p, want[name]) and places[name] is p for name, p in bare.named_parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in bare.parameters())
    assert all(type(m) is nn.Linear for m in bare.children())
