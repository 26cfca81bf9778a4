"""Forwards captured once and replayed: the next replay sees new selections, swaps, added and removed adapters.

The CPU passes for a GPU and ``recorded.Graph`` for a CUDA graph; the kernels' part is in tests/kernels.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from nn_models import PATHS, Kinds, Mlp, adapted_copy, adapter, kinds_adapter, per_row
from recorded import Graph
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.nn import capture, warmup


@pytest.fixture
def adapters(bare: Mlp) -> dict[str, Any]:
    return {name: adapter(bare, PATHS, rank) for name, rank in (("a", 2), ("b", 5), ("c", 1))}


@pytest.fixture
def model(bare: Mlp, adapters: dict[str, Any]) -> Any:
    return lf.attach(copy.deepcopy(bare), {n: adapters[n] for n in "ab"}, num_slots=3, max_rank=6)


def captured(model: nn.Module, x: Tensor, mode: Any = torch.no_grad) -> Graph:
    """As users capture: a warm-up on a side stream, then the capture."""
    with mode():
        with capture.simulate("warm"):
            warm = model(x)
        graph = Graph(lambda: model(x))
    assert torch.equal(warm, graph.output)
    return graph


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


SELECTIONS: list[Any] = [
    ["a", None, "b"],
    [{"a": 0.3, "b": 0.7}, "b", None],
    [None] * 3,
    ["b"] * 3,
    "a",
    {"a": 2.0, "b": -1.0},
    None,
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", SELECTIONS[:5], ids=str)
def test_replays_follow_the_selection(model: Any, bare: Mlp, adapters: Any, first: Any, mode: Any) -> None:
    x = torch.randn(3, 4, 24)
    lf.set_adapters(model, first)
    graph = captured(model, x, mode)
    for selection in SELECTIONS:
        lf.set_adapters(model, selection)
        x.normal_()
        entries = selection if isinstance(selection, list) else [selection] * 3
        with mode():
            got = graph.replay().clone()
        close(got, per_row(bare, adapters, entries, x))
        base = [i for i, entry in enumerate(entries) if entry is None]
        assert torch.equal(got[base], bare(x)[base])
        assert torch.equal(got, model(x))


def test_replays_follow_a_slot_per_token(model: Any, bare: Mlp, adapters: Any) -> None:
    x, slots = torch.randn(6, 24), lf.adapter_slots(model)
    graph = captured(model, x)
    for entries in (["a", None, "b", "b", "a", None], ["b"] * 6, [None] * 6):
        tokens = torch.tensor([-1 if e is None else slots[e] for e in entries], dtype=torch.int32)
        lf.set_adapters(model, tokens)
        close(graph.replay(), per_row(bare, adapters, entries, x))
        with capture.simulate("gpu"):  # the same from a tensor that nobody reads back
            lf.set_adapters(model, tokens.flip(0))
            close(graph.replay(), per_row(bare, adapters, entries[::-1], x))
            lf.check(model)


def test_replays_follow_swaps_additions_and_removals(model: Any, bare: Mlp, adapters: Any) -> None:
    x = torch.randn(3, 24)
    lf.set_adapters(model, ["a", "b", None])
    graph = captured(model, x)
    for rank in (6, 1, 3):  # more swaps than there are slots: none stays on loan
        adapters["b"] = adapter(bare, PATHS, rank)
        lf.swap_adapter(model, "b", adapters["b"], timeout=0.5)
        close(graph.replay(), per_row(bare, adapters, ["a", "b", None], x))
    lf.add_adapter(model, "c", adapters["c"])
    lf.set_adapters(model, ["c", "a", {"b": 0.5, "c": 2.0}])
    close(graph.replay(), per_row(bare, adapters, ["c", "a", {"b": 0.5, "c": 2.0}], x))
    lf.remove_adapter(model, "c")  # rows that selected it are base rows, as is said
    got = graph.replay()
    close(got, per_row(bare, adapters, [None, "a", None], x))
    assert torch.equal(got[[0, 2]], bare(x)[[0, 2]])
    lf.add_adapter(model, "d", adapters["c"], timeout=0.5)
    lf.set_adapters(model, "d")
    close(graph.replay(), adapted_copy(bare, {"d": adapters["c"]}, "d")(x))


def test_a_token_whose_slot_changes_hands_becomes_base(model: Any, bare: Mlp, adapters: Any) -> None:
    x, slots = torch.randn(3, 24), lf.adapter_slots(model)
    lf.set_adapters(model, torch.tensor([slots["a"], slots["b"], -1], dtype=torch.int32))
    graph = captured(model, x)
    lf.swap_adapter(model, "b", adapters["c"])
    lf.swap_adapter(model, "b", adapters["c"])  # somebody else lives in the old slot of b by now
    close(graph.replay(), per_row(bare, adapters, ["a", None, None], x))


def test_the_context_of_the_capture_counts(model: Any, bare: Mlp, adapters: Any) -> None:
    x = torch.randn(3, 24)
    lf.set_adapters(model, ["a", None, "b"])
    default = captured(model, x)
    with lf.use_adapters(model, ["b", "b", None]):
        block = captured(model, x)
        lf.set_adapters(model, ["a", "a", "a"])
        close(default.replay(), per_row(bare, adapters, ["a"] * 3, x))
        close(block.replay(), per_row(bare, adapters, ["b", "b", None], x))
    with lf.use_adapters(model, "a"):
        close(block.replay(), per_row(bare, adapters, ["b", "b", None], x))
    adapters["b"] = adapters["c"]
    lf.swap_adapter(model, "b", adapters["b"])  # the block is left, but its graph may be replayed
    close(block.replay(), per_row(bare, adapters, ["b", "b", None], x))
    lf.remove_adapter(model, "b")
    assert torch.equal(block.replay(), bare(x))


def test_what_does_not_fit_is_refused_before_anything_changes(model: Any, bare: Mlp, adapters: Any) -> None:
    narrow = lf.attach(copy.deepcopy(bare), {n: adapters[n] for n in "abc"}, max_pairs=2)
    x = torch.randn(3, 2, 24)
    lf.set_adapters(narrow, ["a", None, "b"])
    graph = captured(narrow, x)
    want = graph.replay().clone()
    for match, selection in [
        ("has 2 entries, the captured batch has 3 samples", ["a", "b"]),
        ("has 4 entries, the captured batch has 3 samples", ["a"] * 4),
        ("mixes 3 adapters, captured forwards take at most 2", ["a", {"a": 1, "b": 1, "c": 1}, None]),
        ("slot for each of 5 tokens", torch.zeros(5, dtype=torch.int32)),
        ("no adapter 'z'", ["z", None, None]),
    ]:
        with pytest.raises(ValueError, match=match):
            lf.set_adapters(narrow, selection)
        assert torch.equal(graph.replay(), want)
        assert torch.equal(narrow(x), want)


def test_several_sizes(model: Any, bare: Mlp, adapters: Any) -> None:
    """A graph per batch size: those of other sizes than the selection's compute base rows, never an old tenant's."""
    inputs = {n: torch.randn(n, 24) for n in (1, 2, 4)}
    graphs = {}
    for n, x in inputs.items():
        lf.set_adapters(model, ["a"] * n) if not graphs else lf.set_adapters(model, "a")
        graphs[n] = captured(model, x)
    for n in (2, 4, 1):
        lf.set_adapters(model, ["b"] * n)
        for other, graph in graphs.items():
            close(graph.replay(), per_row(bare, adapters, [("b" if other == n else None)] * other, inputs[other]))
    lf.set_adapters(model, "b")
    for n, graph in graphs.items():
        close(graph.replay(), per_row(bare, adapters, ["b"] * n, inputs[n]))
    with pytest.raises(ValueError, match="has 3 entries"):
        lf.set_adapters(model, ["a"] * 3)


def test_adapters_with_parts_that_the_graph_lacks(bare: Mlp, adapters: Any) -> None:
    model_adapters = {"up": adapter(bare, ("up",), 2)}
    model = lf.attach(copy.deepcopy(bare), model_adapters, num_slots=4, max_rank=6)
    x = torch.randn(2, 24)
    lf.set_adapters(model, "up")
    graph = captured(model, x)
    with pytest.raises(ValueError, match="brings layers"):
        lf.swap_adapter(model, "up", adapters["a"])
    biased = adapter(bare, ("up",), 2, bias=True)
    with pytest.raises(ValueError, match="biases"):
        lf.swap_adapter(model, "up", biased)
    lf.add_adapter(model, "a", adapters["a"])
    want = graph.replay().clone()
    with pytest.raises(ValueError, match=r"'a' came with layers .* capture it again"):
        lf.set_adapters(model, ["up", "a"])
    assert torch.equal(graph.replay(), want)
    again = captured(model, x)
    lf.set_adapters(model, ["up", "a"])
    every = {"up": model_adapters["up"], "a": adapters["a"]}
    close(again.replay(), per_row(bare, every, ["up", "a"], x))
    full = lf.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {}, max_rank=2)
    lora = adapter(full, ("0",), 2)
    lf.add_adapter(
        full, "head", lf.LoraAdapter(lora.layers, {"1": {"weight": torch.randn(2, 4), "bias": torch.zeros(2)}})
    )
    lf.set_adapters(full, "head")
    with pytest.raises(ValueError, match="more than LoRA factors"):
        captured(full, torch.randn(3, 4))


def test_no_warm_up(model: Any) -> None:
    x = torch.randn(2, 24)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"up: no buffers .* dimensions \[2\]; run the same forward"),
    ):
        Graph(lambda: model(x))
    captured(model, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"dimensions \[3\]"):
        Graph(lambda: model(torch.randn(3, 24)))


def test_warm_ups_keep_their_own_routing_for_the_backward(model: Any, bare: Mlp, adapters: Any) -> None:
    x = torch.randn(2, 24, requires_grad=True)
    lf.set_adapters(model, ["a", None])
    with capture.simulate("warm"):
        y = model(x)
    lf.set_adapters(model, ["b", "b"])
    y.sum().backward()
    for i, entry in enumerate(["a", None]):
        row = x.detach()[i : i + 1].requires_grad_()
        adapted_copy(bare, adapters, entry)(row).sum().backward()
        close(x.grad[i : i + 1], row.grad)  # type: ignore[index,arg-type]


@pytest.mark.parametrize("mode", ["warm", "gpu"])
def test_what_a_stream_builds_is_for_that_stream(mode: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of another stream might read a routing before it is written."""
    lf.set_adapters(model, ["a", None])
    device, read = model.up.weight.device, []
    for stream in (0, 7, 8, 7):
        for module in ("capture", "fixed", "selection"):
            monkeypatch.setattr(f"lora_fuse.nn.{module}.stream_of", lambda device, stream=stream: stream)
        with torch.no_grad(), capture.simulate(mode):
            model(torch.randn(2, 24))
            read.append(model.up.lora_serving.routing((2,), device, "up"))
    assert len({id(routing) for routing in read}) == 3
    assert read[1] is read[3]


def test_a_warm_up_may_mix_more_than_a_capture(bare: Mlp, adapters: Any) -> None:
    model = lf.attach(copy.deepcopy(bare), adapters, max_pairs=1)
    entry = {"a": 0.5, "b": 1.0}
    lf.set_adapters(model, entry)
    x = torch.randn(2, 24)
    with torch.no_grad(), capture.simulate("warm"):
        close(model(x), adapted_copy(bare, adapters, entry)(x))
    with torch.no_grad(), pytest.raises(ValueError, match="mixes 2 adapters"):
        Graph(lambda: model(x))


def test_biases_embeddings_and_convolutions() -> None:
    plain = Kinds().requires_grad_(False)
    adapters = {name: kinds_adapter(plain) for name in "ab"}
    model = lf.attach(copy.deepcopy(plain), adapters)
    ids = torch.randint(0, 13, (3, 5))
    graph = captured(model, ids)
    for entries in (["a", None, {"a": 0.5, "b": 0.5}], ["b", "a", None], [None] * 3):
        lf.set_adapters(model, entries)
        ids.random_(0, 13)
        got = graph.replay()
        torch.testing.assert_close(got, per_row(plain, adapters, entries, ids), rtol=1e-4, atol=1e-4)
        base = [i for i, entry in enumerate(entries) if entry is None]
        assert torch.equal(got[base], plain(ids)[base])


def test_packed_siblings() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, n) for n in (16, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    plain = Attention().requires_grad_(False)
    adapters = {"a": adapter(plain, ("q_proj", "v_proj"), 2), "b": adapter(plain, ("q_proj", "k_proj", "v_proj"), 3)}
    model = lf.attach(copy.deepcopy(plain), adapters, pack=True)
    assert lf.adapters(model)["b"].packed
    x = torch.randn(3, 16)
    graph = captured(model, x)
    for entries in (["a", None, "b"], [{"a": 0.5, "b": 0.5}, "b", None]):
        lf.set_adapters(model, entries)
        close(graph.replay(), per_row(plain, adapters, entries, x))


class TestUnreadSlots:
    """A tensor of slots on a device is not read back; what is wrong in it comes out later."""

    def test_in_inference_mode_and_after_it(self, model: Any, bare: Mlp, adapters: Any) -> None:
        x, slots = torch.randn(2, 24), lf.adapter_slots(model)
        want = per_row(bare, adapters, ["b", "a"], x)
        with capture.simulate("gpu"):
            with torch.inference_mode():
                lf.set_adapters(model, torch.tensor([slots["b"], slots["a"]], dtype=torch.int32))
                close(model(x), want)
            close(model(x.view(2, 1, 24)).view(2, 10), want)
            y = model(x.clone().requires_grad_())
            y.sum().backward()
            close(y.detach(), want)

    def test_rows_get_their_slots(self, model: Any, bare: Mlp, adapters: Any) -> None:
        x, slots = torch.randn(2, 3, 24), lf.adapter_slots(model)
        entries = ["a", None, "b", "b", "a", None]
        tokens = torch.tensor([-1 if e is None else slots[e] for e in entries], dtype=torch.int32)
        with capture.simulate("gpu"), torch.no_grad(), lf.use_adapters(model, tokens):
            tokens.fill_(99)  # a selection keeps a copy
            close(model(x).view(6, 10), per_row(bare, adapters, entries, x.view(6, 24)))
            with pytest.raises(ValueError, match="slot for each of 6 tokens"):
                model(x[:1])
            assert torch.equal(model(x[:, :, :]).view(6, 10)[1], bare(x).view(6, 10)[1])
        lf.check(model)

    @pytest.mark.parametrize("wrong", [3, 99, -2, 2**31 - 1, -(2**31)])
    def test_a_wrong_slot_is_a_base_row_and_raises_later(
        self, model: Any, bare: Mlp, adapters: Any, wrong: int
    ) -> None:
        x, slots = torch.randn(4, 24), lf.adapter_slots(model)
        tokens = torch.tensor([slots["b"], wrong, -1, slots["a"]], dtype=torch.int32)
        with capture.simulate("gpu"), torch.no_grad():
            outputs = []
            late = pytest.raises(ValueError, match=rf"row 1 .* asked for slot {wrong}; accepted were")
            with late, lf.use_adapters(model, tokens):
                outputs.append(model(x))
            got = outputs[0]
            close(got, per_row(bare, adapters, ["b", None, None, "a"], x))
            assert torch.equal(got[1:3], bare(x)[1:3])
            lf.check(model)  # raised once
            for safe_point in (lambda: model(x), lambda: lf.set_adapters(model, None), lambda: lf.check(model)):
                lf.set_adapters(model, tokens)
                close(model(x), got)
                with pytest.raises(ValueError, match="row 1"):
                    safe_point()
                lf.set_adapters(model, None)
                assert torch.equal(model(x), bare(x))

    def test_a_slot_that_changed_hands(self, model: Any, bare: Mlp, adapters: Any) -> None:
        x, slots = torch.randn(2, 24), lf.adapter_slots(model)
        with capture.simulate("gpu"), torch.no_grad():
            lf.set_adapters(model, torch.tensor([slots["a"], slots["b"]], dtype=torch.int32))
            lf.swap_adapter(model, "b", adapters["c"])
            got = model(x)
            with pytest.raises(ValueError, match=rf"row 1 .* slot {slots['b']}"):
                lf.check(model)
        close(got, per_row(bare, adapters, ["a", None], x))

    def test_in_a_captured_forward(self, model: Any, bare: Mlp, adapters: Any) -> None:
        x, slots = torch.randn(3, 24), lf.adapter_slots(model)
        graph = captured(model, x)
        with capture.simulate("gpu"):
            lf.set_adapters(model, torch.tensor([slots["b"], 99, slots["a"]], dtype=torch.int32))
            close(graph.replay(), per_row(bare, adapters, ["b", None, "a"], x))
            with pytest.raises(ValueError, match=r"row 1 .* slot 99"):
                lf.check(model)
            lf.check(model)

    def test_nothing_is_raised_before_the_device_got_there(self, model: Any) -> None:
        class Event:
            happened = False

            def query(self) -> bool:
                return self.happened

            def synchronize(self) -> None:
                self.happened = True

        errors = model.up.lora_serving.slot_errors
        with capture.simulate("gpu"), torch.no_grad():
            for wait in (False, True):
                lf.set_adapters(model, torch.tensor([99, 99], dtype=torch.int32))
                model.up(torch.randn(2, 24))
                event = Event()
                errors.pending[0] = replace(errors.pending[0], event=event)
                errors.check()
                model(torch.randn(2, 24))
                event.happened = not wait
                with pytest.raises(ValueError, match="row 0"):
                    errors.check(wait)
                lf.set_adapters(model, None)


def test_warmup_runs_what_captured_forwards_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = []
    real = warmup.multi_lora
    monkeypatch.setattr(
        warmup, "multi_lora", lambda *args, **kwargs: (padded.append(args[2].padded), real(*args, **kwargs))
    )
    assert lf.warmup(model, (1, 8)) == 3
    assert padded == [False] * 6
    padded.clear()
    with capture.simulate("gpu"):
        assert lf.warmup(model, (1, 8)) == 3
    assert padded == [False, True] * 6


def test_how_a_stream_tells_what_a_forward_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, capturing = 0, False
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    assert capture.mode_of(device) == "gpu"
    stream = 1
    assert capture.mode_of(device) == "warm"
    capturing = True
    assert capture.mode_of(device) == "capture"
    assert capture.mode_of(torch.device("cpu")) == capture.mode_of(torch.device("meta")) == ""


def test_bad_max_pairs(bare: Mlp) -> None:
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="max_pairs: got"):
            lf.attach(bare, {}, max_pairs=wrong)  # type: ignore[arg-type]


def test_copies_start_without_graphs(model: Any, bare: Mlp, adapters: Any) -> None:
    x = torch.randn(2, 24)
    lf.set_adapters(model, ["a", "b"])
    graph = captured(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        lf.set_adapters(other, "b")
        close(graph.replay(), per_row(bare, adapters, ["a", "b"], x))
        close(captured(other, x).replay(), adapted_copy(bare, adapters, "b")(x))
