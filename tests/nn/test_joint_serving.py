"""Joint adapters in a model: shared bases, a core per slot, mixed with LoRA and base rows."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import nn_models
import pytest
import torch
from nn_models import Mlp, per_row
from sparse_models import fine_tuned, sparse_adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fuse as lf
from lora_fuse import JointBank, LoraAdapter
from lora_fuse.nn.joint_site import JointSlots

PATHS = ["up", "down", "out"]
FORMS = ["full", "diagonal"]


def bank_for(model: nn.Module, form: Any = "full", clusters: int = 1, count: int = 5, rank: int = 6) -> JointBank:
    adapters = {f"j{i}": nn_models.adapter(model, PATHS if i != 2 else PATHS[:2], 3) for i in range(count)}
    return lf.joint_compress(adapters, rank=rank, num_clusters=clusters, form=form)


def as_loras(bank: JointBank, **more: LoraAdapter) -> dict[str, LoraAdapter]:
    return {**{name: bank.to_adapter(name) for name in bank.adapters}, **more}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("lead", [(), (4,)], ids=["rows", "tokens"])
def test_mixed_batch(form: str, clusters: int, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Mlp()
    bare = copy.deepcopy(model)
    bank, lora = bank_for(model, form, clusters), nn_models.adapter(model, ["up", "out"], 4)
    lf.attach(model, {**bank.adapters, "lora": lora})
    entries: list[Any] = ["j0", None, "j3", "lora", "j2", None, "j0"]
    x = torch.randn(len(entries), *lead, 24)
    with torch.no_grad(), lf.use_adapters(model, entries):
        got = model(x)
    torch.testing.assert_close(got, per_row(bare, as_loras(bank, lora=lora), entries, x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = bare(x)
        assert torch.equal(got[[1, 5]], whole[[1, 5]])  # base rows keep their bits
        assert torch.equal(model(x), whole)


@pytest.mark.parametrize("form", FORMS)
def test_weighted_mixes(form: str) -> None:
    torch.manual_seed(1)
    model = Mlp()
    bare = copy.deepcopy(model)
    bank, lora = bank_for(model, form, 2), nn_models.adapter(model, ["up"], 4)
    lf.attach(model, {**bank.adapters, "lora": lora})
    entries: list[Any] = [{"j0": 0.5, "j1": -0.25, "lora": 2.0}, None, {"j3": 0.3}, "j2", {"j0": 1.0, "j3": 1.0}]
    x = torch.randn(len(entries), 24)
    loras = as_loras(bank, lora=lora)
    for selection in (entries, [entries[2]] * 5, entries[0]):
        rows = selection if isinstance(selection, list) else [selection] * 5
        with torch.no_grad(), lf.use_adapters(model, selection):
            torch.testing.assert_close(model(x), per_row(bare, loras, rows, x), rtol=1e-4, atol=1e-5)


def test_bases_are_stored_once() -> None:
    model = Mlp()
    bank = bank_for(model, count=8)
    lf.attach(model, bank.adapters)
    slots = model.up.lora_sparse
    assert isinstance(slots, JointSlots)
    assert slots.down is not None
    assert slots.down.pool_a.shape == (6, 24)
    assert slots.cores is not None
    assert slots.cores.pool_a.shape == (9 * 6, 6)
    assert not any("lora" in key for key in model.state_dict())
    assert lf.adapters(model)["j0"].rank == 6
    assert "joint rank 6" in repr(model)


def test_heads_and_biases() -> None:
    torch.manual_seed(2)
    model = Mlp()
    bare = copy.deepcopy(model)
    adapters = {f"j{i}": nn_models.adapter(model, ["up", "down"], 3, bias=i == 1) for i in range(4)}
    head = {"out": {"weight": torch.randn(7, 24)}}
    adapters["j0"] = LoraAdapter(adapters["j0"].layers, head)
    bank = lf.joint_compress(adapters, rank=5)
    lf.attach(model, bank.adapters)
    x = torch.randn(3, 24)
    with torch.no_grad(), lf.use_adapters(model, ["j0", "j1", None]):
        got = model(x)
    assert torch.isinf(got[0, 7:]).all()
    body = nn_models.adapted_copy(bare, {"j0": LoraAdapter(bank.to_adapter("j0").layers)}, "j0")
    body.out.weight = nn.Parameter(head["out"]["weight"])
    with torch.no_grad():
        torch.testing.assert_close(got[:1, :7], body(x[:1]), rtol=1e-4, atol=1e-5)
    loras = {"j1": bank.to_adapter("j1")}
    torch.testing.assert_close(got[1:], per_row(bare, loras, ["j1", None], x[1:]), rtol=1e-4, atol=1e-5)
    for mixed in ([{"j1": 0.5, "j2": 0.5}, "j1", None],):
        with torch.no_grad(), lf.use_adapters(model, mixed):
            want = per_row(bare, as_loras(bank), mixed, x)
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = Mlp()
    bank = bank_for(model)
    want_model, entries = copy.deepcopy(model), ["j0", "j1", None, "j2"]
    model.to(dtype)
    lf.attach(model, bank.adapters)
    x = torch.randn(4, 24)
    with torch.no_grad(), lf.use_adapters(model, entries):
        got = model(x.to(dtype))
    want = per_row(want_model, as_loras(bank), entries, x)
    assert got.dtype == dtype
    assert (got - want).norm() < 0.03 * want.norm()


def test_add_swap_remove_detach() -> None:
    torch.manual_seed(4)
    model = Mlp()
    bare = copy.deepcopy(model)
    bank, other = bank_for(model), bank_for(model)
    some = dict(list(bank.adapters.items())[:2])
    lf.attach(model, some, num_slots=4)
    x = torch.randn(2, 24)

    def check(name: str, of: str, source: JointBank = bank) -> None:
        with torch.no_grad(), lf.use_adapters(model, [name, None]):
            want = per_row(bare, as_loras(source), [of, None], x)
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)

    lf.add_adapter(model, "new", bank.adapters["j3"])
    check("new", "j3")
    lf.swap_adapter(model, "j0", bank.adapters["j4"])
    check("j0", "j4")
    check("j1", "j1")
    with pytest.raises(ValueError, match="adapters of another joint bank"):
        lf.add_adapter(model, "foreign", other.adapters["j0"])
    check("j1", "j1")
    for name in ("new", "j0", "j1"):
        lf.remove_adapter(model, name)
    lf.add_adapter(model, "foreign", other.adapters["j0"])  # nothing of the first bank is left
    check("foreign", "j0", other)
    lf.detach(model)
    assert type(model.up) is nn.Linear
    assert "lora_sparse" not in dict(model.up.named_children())
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))


def test_copies(tmp_path: Any) -> None:
    torch.manual_seed(5)
    model = Mlp()
    bank = bank_for(model, clusters=2)
    bank.save_pretrained(tmp_path)
    lf.attach(model, lf.load_joint(tmp_path).adapters)
    x, entries = torch.randn(3, 24), ["j1", "j4", None]
    with torch.no_grad(), lf.use_adapters(model, entries):
        want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(), lf.use_adapters(twin, entries):
            assert torch.equal(twin(x), want)
        lf.add_adapter(twin, "more", bank.adapters["j2"])  # the copy still knows its bank
    assert "more" not in lf.adapters(model)


def test_gradients_reach_the_input() -> None:
    torch.manual_seed(6)
    model = Mlp().double()
    bank = bank_for(model)
    lf.attach(model, bank.adapters)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    with lf.use_adapters(model, ["j0", None, {"j1": 0.5, "j2": 2.0}]):
        assert torch.autograd.gradcheck(model, (x,))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled() -> None:
    torch.manual_seed(7)
    model = Mlp()
    bank = bank_for(model, clusters=2)
    lf.attach(model, {**bank.adapters, "lora": nn_models.adapter(model, ["up"], 2)})
    counter = CompileCounterWithBackend("aot_eager")
    fast: Any = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 24)
    with torch.no_grad():
        fast(x)
        compiled = counter.frame_count
        selections: list[Any] = [["j0", None, "lora", "j3"], "j1", None, [{"j0": 0.5, "lora": 1.0}, None, "j2", "j2"]]
        for selection in selections:
            with lf.use_adapters(fast, selection):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        assert counter.frame_count == compiled


def test_token_slots() -> None:
    torch.manual_seed(8)
    model = Mlp()
    bare = copy.deepcopy(model)
    bank = bank_for(model)
    lf.attach(model, bank.adapters)
    slots = lf.adapter_slots(model)
    chosen = torch.tensor([slots["j0"], -1, slots["j3"], slots["j3"]], dtype=torch.int32)
    x = torch.randn(4, 24)
    with torch.no_grad(), lf.use_adapters(model, chosen):
        want = per_row(bare, as_loras(bank), ["j0", None, "j3", "j3"], x)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(24, 40), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.norm(x))
        return out


def test_refusals() -> None:
    model = Mlp()
    bare = copy.deepcopy(model)
    bank = bank_for(model)
    with pytest.raises(ValueError, match="down: no such module"):
        lf.attach(Fused(), bank.adapters)
    wide = Mlp()
    wide.up = nn.Linear(24, 41)
    with pytest.raises(
        ValueError, match=r"up: the bases are for a linear weight \[40, 24\], this is linear \[41, 24\]"
    ):
        lf.attach(wide, bank.adapters)
    with pytest.raises(ValueError, match="adapters of another joint bank"):
        lf.attach(model, {**bank.adapters, "other": bank_for(model).adapters["j1"]})
    assert type(model.up) is nn.Linear
    lf.attach(model, bank.adapters)
    assert lf.warmup(model) == 6  # two ways down (up and out start from 24 features both), one kind of cores, three up
    tuned = sparse_adapter(model, fine_tuned(bare, 0))
    with pytest.raises(ValueError, match="has slots for joint adapters"):
        lf.add_adapter(model, "tuned", tuned)
    lf.detach(model)
    lf.attach(model, {"tuned": tuned})
    with pytest.raises(ValueError, match="holds fine-tunes as sparse adapters"):
        lf.add_adapter(model, "j0", bank.adapters["j0"])
    lf.detach(model)
    lf.attach(model, bank.adapters)
    with pytest.raises(ValueError, match="'j0' is no sparse adapter"):
        lf.switch_task(model, "j0")


def test_fuse_beneath_joint_adapters() -> None:
    """They are deltas, unlike sparse adapters, so they may ride on fused weights."""
    torch.manual_seed(2)
    model = Mlp()
    bare = copy.deepcopy(model)
    bank, lora = bank_for(model), nn_models.adapter(model, ["up", "out"], 4)
    lf.attach(model, bank.adapters)
    lf.fuse(model, [lora])
    x = torch.randn(3, 24)
    both = lf.fuse(copy.deepcopy(bare), [lora, bank.to_adapter("j0")])
    with torch.no_grad():
        with lf.use_adapters(model, "j0"):
            torch.testing.assert_close(model(x), both(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(lf.unfuse(model)(x), bare(x))
