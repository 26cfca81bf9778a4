"""Attach, select, detach on Linear layers: every row gets what its entry says, base rows keep their bits."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from nn_models import PATHS, Mlp, adapted_copy, adapter, per_row
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import LoraAdapter
from lora_fuse.adapters.lora import LoraLayer

ENTRY_LISTS = {
    "one-each": ["sql", "math", "chat", "part"],
    "base-between": ["sql", None, None, "math"],
    "all-base": [None] * 4,
    "mix": [{"sql": 0.7, "chat": 0.3}, "math", None, {"part": -1.5}],
    "weight-zero": [{"sql": 0.0}, {"sql": 0.0, "math": 2}, "sql", {}],
    "same": ["chat"] * 4,
    "three-on-a-row": [{"sql": 0.2, "math": 0.3, "chat": 0.5}] * 3 + [None],
}


@pytest.mark.parametrize("entries", ENTRY_LISTS.values(), ids=ENTRY_LISTS.keys())
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)], ids=["flat", "decode", "prefill", "4d"])
def test_every_row_gets_its_entry(model: Mlp, bare: Mlp, adapters: Any, entries: list[Any], lead: Any) -> None:
    x = torch.randn(4, *lead, 24)
    want = per_row(bare, adapters, entries, x)
    with torch.no_grad(), lf.use_adapters(model, entries):
        got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    base = [i for i, entry in enumerate(entries) if not entry]
    assert torch.equal(got[base], bare(x)[base])


@pytest.mark.parametrize("entry", ["sql", {"sql": 0.7, "chat": 0.3}, None], ids=["name", "mix", "base"])
def test_one_entry_for_every_row(model: Mlp, bare: Mlp, adapters: Any, entry: Any) -> None:
    for shape in [(24,), (3, 24), (2, 5, 24), (0, 24)]:
        x = torch.randn(shape)
        with lf.use_adapters(model, entry):
            got = model(x)
        torch.testing.assert_close(got, adapted_copy(bare, adapters, entry)(x), rtol=1e-5, atol=1e-5)


def test_a_slot_per_token(model: Mlp, bare: Mlp, adapters: Any) -> None:
    slots = lf.adapter_slots(model)
    entries = ["sql", None, "chat", "chat", "math", None]
    tokens = torch.tensor([-1 if e is None else slots[e] for e in entries], dtype=torch.int32)
    x = torch.randn(6, 24)
    with lf.use_adapters(model, tokens):
        flat, shaped = model(x), model(x.view(2, 3, 24))
    torch.testing.assert_close(flat, per_row(bare, adapters, entries, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(shaped.view(6, 10), flat)
    with lf.use_adapters(model, torch.full((6,), -1, dtype=torch.int32)):
        assert torch.equal(model(x), bare(x))
    with lf.use_adapters(model, torch.zeros(0, dtype=torch.int32)):
        assert model(x[:0]).shape == (0, 10)


def test_empty_batch(model: Mlp) -> None:
    with lf.use_adapters(model, []):
        assert model(torch.zeros(0, 24)).shape == (0, 10)
        assert model(torch.zeros(0, 7, 24)).shape == (0, 7, 10)


def test_lora_bias(bare: Mlp) -> None:
    adapters = {"plain": adapter(bare, ("up",), 2), "biased": adapter(bare, ("up", "down"), 3, bias=True)}
    model = lf.attach(copy.deepcopy(bare), adapters)
    entries = ["biased", None, "plain", {"biased": 0.5, "plain": 2.0}]
    x = torch.randn(4, 3, 24)
    for entry_list in (entries, entries[::-1]):
        want = per_row(bare, adapters, entry_list, x)
        with lf.use_adapters(model, entry_list):
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(x.requires_grad_()), want, rtol=1e-5, atol=1e-5)
            x.requires_grad_(False)


def test_every_layers_own_path_ran(model: Mlp) -> None:
    """Emptying any one layer's slot changes the output, so no layer is bypassed."""
    x = torch.randn(2, 24)
    for path in PATHS:
        with lf.use_adapters(model, "sql"):
            before = model(x)
            ranks = model.get_submodule(path).lora_pool.slot_rank
            kept = ranks.clone()
            ranks.zero_()
            assert not torch.equal(model(x), before), path
            ranks.copy_(kept)
            assert torch.equal(model(x), before)


def test_detach_restores_everything(bare: Mlp, adapters: Any) -> None:
    calls = []
    for module in (bare, bare.up):
        module.register_forward_hook(lambda *args: calls.append(1))
    before = {id(m): (type(m), dict(m.__dict__), {k: dict(v) for k, v in m.__dict__.items() if isinstance(v, dict)})
              for m in bare.modules()}  # fmt: skip
    bits = {k: v.clone() for k, v in bare.state_dict().items()}
    parameters = dict(bare.named_parameters())
    modules = list(bare.modules())
    assert lf.attach(bare, adapters) is bare
    assert bare.state_dict().keys() == bits.keys()
    assert all(p is parameters[n] for n, p in bare.named_parameters())
    assert isinstance(bare.up, nn.Linear)
    assert "slots=8, max_rank=7" in repr(bare.up)
    with lf.use_adapters(bare, "sql"):
        bare(torch.randn(1, 24))
    assert len(calls) == 2
    lf.detach(bare)
    assert [id(m) for m in bare.modules()] == [id(m) for m in modules]
    for m in modules:
        kind, attributes, tables = before[id(m)]
        assert type(m) is kind
        assert m.__dict__.keys() == attributes.keys()
        for key, table in tables.items():
            assert dict(m.__dict__[key]) == table, key
    assert all(torch.equal(v, bits[k]) for k, v in bare.state_dict().items())
    with pytest.raises(ValueError, match="no adapters attached"):
        lf.detach(bare)


def test_default_selection_is_seen_by_all_threads_and_a_block_by_its_own(model: Mlp, bare: Mlp, adapters: Any) -> None:
    x = torch.randn(2, 24)
    want = {e: adapted_copy(bare, adapters, e)(x) for e in (None, "sql", "math")}
    seen: dict[str, Tensor] = {}
    assert torch.equal(model(x), want[None])  # attaching selects nothing
    lf.set_adapters(model, "math")
    with lf.use_adapters(model, "sql"):
        thread = threading.Thread(target=lambda: seen.update(other=model(x)))
        thread.start()
        thread.join()
        seen["own"] = model(x)
        with lf.use_adapters(model, None):
            assert torch.equal(model(x), want[None])
        torch.testing.assert_close(model(x), seen["own"], rtol=0, atol=0)
    torch.testing.assert_close(seen["other"], want["math"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["own"], want["sql"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), want["math"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", [["sql"], ["sql"] * 3, []], ids=len)
def test_wrong_length_is_refused_once_with_both_numbers(model: Mlp, entries: list[str]) -> None:
    with lf.use_adapters(model, entries), pytest.raises(ValueError, match=f"2 samples.* {len(entries)} entries"):
        model(torch.randn(2, 5, 24))
    with lf.use_adapters(model, entries), pytest.raises(ValueError, match="up: the selection has"):
        model.up(torch.randn(2, 5, 24))  # a layer called on its own holds its input to the same rule
    with lf.use_adapters(model, "sql"):
        model(torch.randn(2, 24))  # the failed forwards left nothing behind


BAD_SELECTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": ("sq", ValueError, r"'sq' is attached; attached are \['chat', 'math', 'part', 'sql'\]"),
    "unknown-in-list": (["sql", "nope"], ValueError, "'nope'"),
    "unknown-in-mix": ({"sql": 1, "nope": 1}, ValueError, "'nope'"),
    "nan": ({"sql": float("nan")}, ValueError, "finite"),
    "inf": ([{"sql": float("inf")}], ValueError, r"selection\[0\]\['sql'\].*finite"),
    "beyond-fp32": ({"sql": 1e39}, ValueError, "finite fp32"),
    "bool": ({"sql": True}, TypeError, "True"),
    "text": ({"sql": "1"}, TypeError, "finite number"),
    "int": (3, TypeError, "accepted is a name"),
    "nested": ([["sql"]], TypeError, r"selection\[0\]: got list"),
    "float-slots": (torch.zeros(3), TypeError, "1-d int32.*float32"),
    "2d-slots": (torch.zeros(1, 3, dtype=torch.int32), TypeError, r"shape \(1, 3\)"),
    "slot-out-of-range": (torch.tensor([0, -1, 99]), ValueError, "row 2 asks for slot 99, which is out of range"),
    "slot-negative": (torch.tensor([0, -2]), ValueError, "row 1 asks for slot -2"),
    "slot-empty": (torch.tensor([6, 0]), ValueError, "row 0 asks for slot 6, which holds no adapter"),
}


@pytest.mark.parametrize(("selection", "error", "match"), BAD_SELECTIONS.values(), ids=BAD_SELECTIONS.keys())
def test_bad_selections(model: Mlp, selection: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match), lf.use_adapters(model, selection):
        pass
    with pytest.raises(error, match=match):
        lf.set_adapters(model, selection)
    assert torch.isfinite(model(torch.randn(2, 24))).all()


@pytest.mark.parametrize("slot", [0, -1])
def test_tokens_must_match_the_rows(model: Mlp, slot: int) -> None:
    tokens = torch.full((5,), slot, dtype=torch.int32)
    with lf.use_adapters(model, tokens), pytest.raises(ValueError, match=r"5 tokens.* 4"):
        model(torch.randn(2, 2, 24))


class Folded(nn.Module):
    """Folds batch and sequence, as many models do, or transposes them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.how = nn.Linear(24, 24), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "fold":
            return self.lin(x.flatten(0, 1)).view(x.shape)
        if self.how == "transpose":
            return self.lin(x.transpose(0, 1)).transpose(0, 1)
        return self.lin(x.flatten(0, 1).repeat(3, 1))  # "strange"


@pytest.mark.parametrize(("how", "batch_dim"), [("fold", 0), ("transpose", 1), ("strange", 0), ("transpose", 0)])
def test_where_the_batch_axis_is(how: str, batch_dim: int) -> None:
    bare = Folded(how).requires_grad_(False)
    adapters = {n: adapter(bare, ("lin",), 2) for n in "ab"}
    entries = ["a", None, {"a": 0.5, "b": 0.5}, "b"]
    x = torch.randn(4, 7, 24)
    model = lf.attach(copy.deepcopy(bare), adapters, batch_dim=batch_dim)
    if (how, batch_dim) in {("strange", 0), ("transpose", 0)}:
        with lf.use_adapters(model, entries), pytest.raises(ValueError, match=r"^lin: .*4 samples.*batch_dim"):
            model(x)
        with lf.use_adapters(model, "a"):
            model(x)  # one entry for all needs no batch axis
        return
    want = per_row(bare, adapters, entries, x)
    if batch_dim == 1:  # then the model's own input is [seq, batch, ...] too
        bare.how = model.how = "none"
        model.forward = model.lin.__call__  # type: ignore[method-assign]
        x, want = x.transpose(0, 1), want.transpose(0, 1)
        with lf.use_adapters(model, entries[:3]), pytest.raises(ValueError, match="4 samples"):
            model(x)
    with lf.use_adapters(model, entries):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_inputs_without_a_plain_view(model: Mlp, bare: Mlp, adapters: Any) -> None:
    """Other layouts run as in the bare model while nothing is selected; ten dimensions run with adapters too."""
    x = torch.randn(3, 24)
    with torch.no_grad():
        assert torch.equal(model(x.to_mkldnn()).to_dense(), bare(x.to_mkldnn()).to_dense())
        many = torch.randn(3, 1, 1, 2, 1, 1, 1, 1, 1, 24)
        want = per_row(bare, adapters, ["sql", None, "math"], many)
        with lf.use_adapters(model, ["sql", None, "math"]):
            torch.testing.assert_close(model(many), want, rtol=1e-5, atol=1e-5)
            assert model(torch.zeros(1, 0, 24).expand(3, 0, 24)).shape == (3, 0, 10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("entry", [None, "sql"])
def test_jit_trace_is_refused(model: Mlp, entry: Any) -> None:
    lf.set_adapters(model, entry)
    x = torch.randn(3, 24)
    for traced in (model, model.up):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot .* use torch\.compile"):
            torch.jit.trace(traced, x)
    want = model(x)
    lf.detach(model)
    if entry is None:
        assert torch.equal(torch.jit.trace(model, x)(x), want)


def test_negative_zero_of_a_base_row_keeps_its_sign() -> None:
    class NegativeZero(nn.Module):
        in_features = out_features = 2

        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -0.0)

    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    model = lf.attach(nn.Sequential(NegativeZero()), {"a": LoraAdapter({"0": layer})})
    for grad in (False, True):
        with lf.use_adapters(model, ["a", None]):
            y = model(torch.ones(2, 2, requires_grad=grad))
        assert y[0].tolist() == [2.0, 2.0]
        assert torch.signbit(y[1]).all()
