"""modules_to_save heads per row: every row's logits come from the head of the adapter that it selected."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from nn_models import adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fuse as lf
from lora_fuse import LoraAdapter

INF = float("inf")


class Pooler(nn.Module):
    """A head of several parts: takes the first token, narrows, projects."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.drop, self.out_proj = nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, h: Tensor) -> Tensor:
        return self.out_proj(self.drop(torch.tanh(self.dense(h[:, 0]))))


class Classifier(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 12), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def saved(head: nn.Module, width: int) -> dict[str, Tensor]:
    """A trained copy's tensors, with another width at the end."""
    final = "out_proj." if isinstance(head, Pooler) else ""
    return {
        name: torch.randn(width, *t.shape[1:]) if name.startswith(final) else torch.randn_like(t)
        for name, t in head.state_dict().items()
    }


def make(head: nn.Module, widths: dict[str, int | None]) -> tuple[Classifier, dict[str, LoraAdapter]]:
    bare = Classifier(head).eval().requires_grad_(False)
    adapters = {}
    for name, width in widths.items():
        layers = adapter(bare, ("body",), 2).layers
        adapters[name] = LoraAdapter(layers, {} if width is None else {"head": saved(head, width)})
    return bare, adapters


def alone(bare: Classifier, adapters: Any, entry: Any, x: Tensor) -> Tensor:
    """One sample, through a model that has the entry's deltas and head put in."""
    model = copy.deepcopy(bare)
    pairs = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
    for name, weight in pairs.items():
        model.body.weight.data += weight * adapters[name].layers["body"].product()
        for key, tensor in adapters[name].modules_to_save.get("head", {}).items():
            owner = model.head.get_submodule(key.rpartition(".")[0])
            setattr(owner, key.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return model(x)


def check(got: Tensor, wants: list[Tensor]) -> None:
    widest = max(want.shape[-1] for want in wants)
    assert got.shape[-1] == widest
    for row, want in zip(got, wants, strict=True):
        torch.testing.assert_close(row[..., : want.shape[-1]], want[0], rtol=1e-5, atol=1e-5)
        assert (row[..., want.shape[-1] :] == -INF).all()


HEADS = {"linear": lambda: nn.Linear(12, 3), "no-bias": lambda: nn.Linear(12, 3, bias=False), "nested": Pooler}
WIDTHS = {"two": 2, "three": 3, "five": 5, "plain": None}
MIXES: dict[str, list[Any]] = {
    "all": ["two", "five", None, "three", "plain"],
    "narrow": ["two", "two", "two", "two", "two"],
    "narrow-and-base": ["two", None, "two", "plain", "two"],
    "mix-with-one-head": [{"five": 0.5, "plain": 0.5}, "two", {"plain": 2.0}, "five", None],
    "base": [None] * 5,
}


@pytest.mark.parametrize("entries", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS.keys())
def test_every_row_gets_its_own_head(make_head: Any, entries: list[Any]) -> None:
    bare, adapters = make(make_head(), WIDTHS)
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(5, 4, 12)
    with lf.use_adapters(model, entries):
        got = model(x)
    check(got, [alone(bare, adapters, e, x[i : i + 1]) for i, e in enumerate(entries)])
    base = [i for i, e in enumerate(entries) if e is None]
    assert all(torch.equal(got[i][..., :3], bare(x)[i]) for i in base)
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in bare.named_parameters()]
    lf.detach(model)
    assert torch.equal(model(x), bare(x))
    assert type(model.head) is type(bare.head)


@pytest.mark.parametrize("entry", ["two", "five", "plain", None, {"two": 0.5, "plain": 0.5}], ids=str)
def test_one_entry_returns_its_own_width(entry: Any) -> None:
    bare, adapters = make(nn.Linear(12, 3), WIDTHS)
    model = lf.attach(copy.deepcopy(bare), adapters)
    x = torch.randn(2, 4, 12)
    with lf.use_adapters(model, entry):
        torch.testing.assert_close(model(x), alone(bare, adapters, entry, x), rtol=1e-5, atol=1e-5)


def test_tokens_select_heads_too() -> None:
    bare, adapters = make(nn.Linear(12, 3), WIDTHS)
    model = lf.attach(copy.deepcopy(bare), adapters)
    slots = lf.adapter_slots(model)
    entries = ["two", None, "five", "plain", "two", "two"]
    tokens = torch.tensor([-1 if e is None else slots[e] for e in entries], dtype=torch.int32)
    x = torch.randn(6, 12)
    with lf.use_adapters(model, tokens):
        flat = model(x)
        assert torch.equal(model(x.view(2, 3, 12)).view(6, 5), flat)
    check(flat, [alone(bare, adapters, e, x[i : i + 1]) for i, e in enumerate(entries)])
    nested, adapters = make(Pooler(), WIDTHS)
    lf.attach(nested, adapters)
    slots = lf.adapter_slots(nested)
    with (
        lf.use_adapters(nested, torch.tensor([slots["two"], -1] * 4)),
        pytest.raises(ValueError, match=r"head: .*8 tokens"),
    ):
        nested(torch.randn(2, 4, 12))


def test_two_heads_cannot_mix_on_a_row() -> None:
    bare, adapters = make(nn.Linear(12, 3), WIDTHS)
    model = lf.attach(bare, adapters)
    with (
        lf.use_adapters(model, {"two": 0.5, "five": 0.5}),
        pytest.raises(ValueError, match="'two' and 'five' both bring"),
    ):
        model(torch.randn(2, 12))


def test_head_sizes_follow_what_is_attached() -> None:
    bare, adapters = make(nn.Linear(12, 3), WIDTHS)
    model = lf.attach(copy.deepcopy(bare), adapters)
    assert lf.head_sizes(model) == {"head": {None: 3, "two": 2, "three": 3, "five": 5}}
    assert lf.adapters(model)["two"].heads == ("head",)
    lf.remove_adapter(model, "five")
    lf.swap_adapter(model, "two", adapters["five"])
    assert lf.head_sizes(model) == {"head": {None: 3, "two": 5, "three": 3}}
    lf.swap_adapter(model, "two", adapters["plain"])
    assert lf.head_sizes(model) == {"head": {None: 3, "three": 3}}
    x = torch.randn(2, 12)
    with lf.use_adapters(model, ["two", "three"]):
        check(model(x), [alone(bare, adapters, e, x[i : i + 1]) for i, e in enumerate(["plain", "three"])])
    assert len(model.head.lora_heads.copies) == 1  # what nothing selects any more is freed
    late = lf.attach(copy.deepcopy(bare), {"plain": adapters["plain"]})
    assert lf.head_sizes(late) == {}
    lf.add_adapter(late, "five", adapters["five"])  # the first head of this module arrives while serving
    assert lf.head_sizes(late) == {"head": {None: 3, "five": 5}}
    with lf.use_adapters(late, ["plain", "five"]):
        check(late(x), [alone(bare, adapters, e, x[i : i + 1]) for i, e in enumerate(["plain", "five"])])


def test_regression_and_classification_never_share() -> None:
    bare, adapters = make(nn.Linear(12, 3), {"score": 1, "other": 1, "two": 2})
    with pytest.raises(ValueError, match=r"head: a head of width 1 .*'score': 1.*'two': 2"):
        lf.attach(bare, adapters)
    assert type(bare.head) is nn.Linear
    two = adapters.pop("two")
    model = lf.attach(bare, adapters)
    with pytest.raises(ValueError, match="head of width 1"):
        lf.add_adapter(model, "two", two)
    with pytest.raises(ValueError, match="head of width 1"):
        lf.swap_adapter(model, "other", two)
    lf.remove_adapter(model, "other")
    lf.swap_adapter(model, "score", two)  # what goes does not count
    lf.swap_adapter(model, "score", adapters["other"])
    x = torch.randn(2, 12)
    with lf.use_adapters(model, ["score", "score"]):
        assert model(x).shape == (2, 1)
    with (
        lf.use_adapters(model, ["score", None]),
        pytest.raises(ValueError, match=r"width 1 \(regression\) with .* width 3"),
    ):
        model(x)  # the base model's own head is a classifier


def test_heads_follow_the_module() -> None:
    bare, adapters = make(Pooler(), WIDTHS)
    model = lf.attach(copy.deepcopy(bare), adapters)
    entries, x = ["two", "five", None], torch.randn(3, 4, 12)
    lf.set_adapters(model, entries)
    want = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), want)
        lf.swap_adapter(twin, "two", adapters["three"])
        lf.remove_adapter(twin, "three")
        assert torch.equal(model(x), want)
    assert model.double()(x.double()).dtype is torch.float64
    lf.swap_adapter(model, "three", adapters["two"])  # a copy made after the move
    lf.set_adapters(model, ["three", "five", None])
    torch.testing.assert_close(model(x.double())[0, :2].float(), alone(bare, adapters, "two", x[:1])[0])
    copies = model.head.lora_heads.copies.values()
    model.train()
    assert all(c.drop.training for c in copies)
    model.eval()
    assert not any(c.drop.training for c in copies)


def test_gradients_flow_through_heads() -> None:
    bare, adapters = make(nn.Linear(12, 3), WIDTHS)
    model = lf.attach(copy.deepcopy(bare), adapters)
    entries, x = ["two", "five", None, "three"], torch.randn(4, 12, requires_grad=True)
    with lf.use_adapters(model, entries):
        got = model(x)
    torch.where(got.isinf(), 0.0, got).square().sum().backward()
    for i, entry in enumerate(entries):
        row = x.detach()[i : i + 1].requires_grad_()
        alone(bare, adapters, entry, row).square().sum().backward()
        torch.testing.assert_close(x.grad[i : i + 1], row.grad, rtol=1e-4, atol=1e-4)  # type: ignore[index]


def test_bad_heads() -> None:
    bare, adapters = make(nn.Linear(12, 3), {"a": 2})
    body = adapters["a"].layers
    good = dict(adapters["a"].modules_to_save["head"])
    cases: list[tuple[dict[str, dict[str, Tensor]], str]] = [
        ({"head": {"weight": good["weight"]}}, r"head: the saved copy lacks \['bias'\]"),
        ({"head": {**good, "gamma": good["bias"]}}, r"has \['gamma'\]"),
        ({"head": {**good, "weight": torch.zeros(2, 11)}}, r"head: the saved weight has shape \[2, 11\], .*\[3, 12\]"),
        ({"head": {**good, "bias": torch.zeros(3)}}, "different widths"),
        ({"head": {**good, "bias": torch.full((2,), float("nan"))}}, "saved bias is not finite"),
        ({"heads": good}, "heads: no such module, nearest: head"),
        ({"body": {"weight": torch.zeros(12, 12), "bias": torch.zeros(12)}}, "body: one adapter has LoRA factors here"),
    ]
    for modules, match in cases:
        with pytest.raises(ValueError, match=match):
            lf.attach(bare, {"bad": LoraAdapter(body, modules)})
        assert not any("lora" in key for m in bare.modules() for key in m.__dict__)


def test_pefts_mixed_batch_agrees() -> None:
    peft = pytest.importorskip("peft")
    bare, adapters = make(nn.Linear(12, 3), {"two": 2, "five": 5})
    adapters = {n: LoraAdapter(a.layers, {"head": saved(bare.head, 3)}) for n, a in adapters.items()}
    oracle: Any = None
    for name, source in adapters.items():
        layer = source.layers["body"]
        config = peft.LoraConfig(
            r=layer.rank, lora_alpha=layer.rank * layer.scaling, target_modules=["body"], modules_to_save=["head"]
        )
        if oracle is None:
            oracle = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name=name)
        else:
            oracle.add_adapter(name, config)
        body, head = oracle.base_model.model.body, oracle.base_model.model.head
        body.lora_A[name].weight.data.copy_(layer.lora_a)
        body.lora_B[name].weight.data.copy_(layer.lora_b)
        head.modules_to_save[name].load_state_dict(source.modules_to_save["head"])
    names, x = ["two", "__base__", "five", "two"], torch.randn(4, 12)
    model = lf.attach(copy.deepcopy(bare), adapters)
    with torch.no_grad(), lf.use_adapters(model, [None if n == "__base__" else n for n in names]):
        torch.testing.assert_close(model(x), oracle.eval()(x, adapter_names=names), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [WIDTHS, {"a": 3, "b": 3, "plain": None}], ids=["widths-differ", "one-width"])
def test_linear_heads_compile_in_inference(widths: dict[str, int | None]) -> None:
    torch._dynamo.reset()
    bare, adapters = make(nn.Linear(12, 3), widths)
    model = lf.attach(copy.deepcopy(bare), adapters)
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    names = [*widths, None]
    with torch.no_grad():
        for shift in range(3):
            entries = names[shift:] + names[:shift]
            x = torch.randn(len(entries), 4, 12)
            for selection in (entries, names[0], None):
                with lf.use_adapters(model, selection):
                    assert torch.equal(fast(x), model(x))
        first = next(iter(widths))
        lf.swap_adapter(model, first, adapters[first])
        with lf.use_adapters(model, names):
            assert torch.equal(fast(x), model(x))
        assert counter.frame_count == 1
        twin = copy.deepcopy(model)
        lf.set_adapters(twin, names)
        lf.remove_adapter(model, first)
        check(
            torch.compile(twin, backend="eager")(x),
            [alone(bare, adapters, e, x[i : i + 1]) for i, e in enumerate(names)],
        )
    torch._dynamo.reset()


def test_refusals_beside_a_head_name_the_reason() -> None:
    bare = Classifier(nn.Linear(12, 3))
    copies = {"head": {"weight": torch.randn(3, 12), "bias": torch.randn(3)}}
    model = lf.attach(bare, {"a": LoraAdapter({}, modules_to_save=copies)})
    with pytest.raises(ValueError, match=r"head: another adapter has a full copy of it \(modules_to_save\)"):
        lf.add_adapter(model, "b", adapter(bare, ["head"], 1))
    with pytest.raises(ValueError, match=r"hea: no such module, nearest: head$"):
        lf.add_adapter(model, "b", LoraAdapter({}, modules_to_save={"hea": copies["head"]}))
    assert lf.head_sizes(model) == {"head": {None: 3, "a": 3}}
