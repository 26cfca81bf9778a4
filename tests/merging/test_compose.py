"""learn_composition: the gradient, the sum, what is learned, what is given back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composed_models import ALL, Net, batches, branched, cross_entropy, make_adapter, three_adapters
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse.merging.compose import _SharedWeights
from lora_fuse.merging.stacked import make_stack


def by_name(comp: lf.Composition) -> dict[str, dict[str, float]]:
    return {p: dict(zip(comp.adapters, w.tolist(), strict=True)) for p, w in comp.weights.items()}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("per", ["layer", "kind", "global"])
def test_gradient_against_finite_differences(per: Any) -> None:
    model = Net().double().eval().requires_grad_(False)
    stack = make_stack(model, three_adapters(model, dtype=torch.float64), "test")
    weights = _SharedWeights(stack, per)
    batch = batches(1)[0]

    def loss(logits: Tensor) -> Tensor:
        weights.logits = logits  # type: ignore[assignment]
        weights.use()
        return cross_entropy(model, batch)

    start = torch.randn(weights.logits.shape, dtype=torch.float64, requires_grad=True)
    with stack.on():
        assert torch.autograd.gradcheck(loss, (start,))
        loss(start).backward()
    assert start.grad is not None
    assert torch.equal(start.grad == 0, weights.absent)  # a true softmax: every adapter that is there feels the others


def test_one_step_equals_naive_branches() -> None:
    """Loss and the update of one step against a branch per adapter and autograd through torch.softmax."""
    model = Net().eval()
    adapters, batch = three_adapters(model), batches(1)[0]
    paths = [p for p, _ in model.named_modules() if p in ALL]
    logits = {p: torch.zeros(3, requires_grad=True) for p in paths}
    shares: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        there = [i for i, a in enumerate(adapters.values()) if path in a.layers]
        shares[path] = dict(zip([[*adapters][i] for i in there], logits[path][there].softmax(0), strict=True))
    naive = branched(model, adapters, shares)
    loss = cross_entropy(naive, batch)
    loss.backward()
    torch.optim.Adam(logits.values(), lr=0.1).step()
    comp = lf.learn_composition(model, adapters, cross_entropy, [batch], steps=1, lr=0.1)
    assert comp.history.loss == pytest.approx([loss.item()], rel=1e-5)
    for path, weights in comp.weights.items():
        there = [i for i, a in enumerate(adapters.values()) if path in a.layers]
        want = torch.zeros(3)
        want[there] = logits[path].detach()[there].softmax(0)
        close(weights, want, 1e-4)


@pytest.mark.parametrize("per", ["layer", "kind", "global"])
def test_weights_are_shared_as_asked_and_sum_to_1(per: Any) -> None:
    model = Net()
    adapters = three_adapters(model)
    comp = lf.learn_composition(model, adapters, cross_entropy, batches(), per=per, steps=8, lr=0.1)
    assert set(comp.weights) == set(ALL)
    sets = {tuple(w.tolist()) for w in comp.weights.values()}
    assert len(sets) == {"layer": 7, "kind": 5, "global": 1}[per]
    for path, weights in comp.weights.items():
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-6)
        assert (weights >= 0).all()
        if per == "layer":
            assert torch.equal(weights > 0, torch.tensor([path in a.layers for a in adapters.values()]))
    if per == "kind":
        assert torch.equal(comp.weights["blocks.0.up"], comp.weights["blocks.1.up"])


@pytest.mark.parametrize("per", ["layer", "global"])
def test_learns_the_adapter_that_the_target_is(per: Any) -> None:
    model = Net().eval()
    adapters = {n: make_adapter(model, dict.fromkeys(ALL, 2)) for n in ("a", "b", "c")}
    ones = {p: {"a": 0.0, "b": 1.0, "c": 0.0} for p in ALL}
    teacher = branched(model, adapters, ones).eval().requires_grad_(False)

    def distance(student: nn.Module, ids: Tensor) -> Tensor:
        return (student(ids) - teacher(ids)).square().mean()

    ids = [torch.randint(30, (16, 6)) for _ in range(4)]
    comp = lf.learn_composition(model, adapters, distance, ids, per=per, steps=250, lr=0.1)
    assert comp.history.loss[-1] < 1e-3 * comp.history.loss[0]
    assert all(w[1] > 0.9 for w in comp.weights.values())


@pytest.mark.parametrize("per", ["layer", "global"])
def test_adapter_live_slots_and_naive_branches_agree(per: Any) -> None:
    model = Net().eval()
    adapters, ids = three_adapters(model), torch.randint(30, (5, 6))
    comp = lf.learn_composition(model, adapters, cross_entropy, batches(), per=per, steps=10, lr=0.2)
    with torch.no_grad():
        bare = model(ids)
        want = branched(model, adapters, by_name(comp))(ids)
        assert (want - bare).abs().max() > 0.05

        adapter = comp.to_adapter()
        assert adapter.layers["mix"].rank == 3
        fused = copy.deepcopy(model)
        lf.fuse(fused, adapter)
        close(fused(ids), want)

        fresh = copy.deepcopy(model)
        assert comp.attach(fresh, "new") == "new"
        with lf.use_adapters(fresh, ["new", None, "new", None, "new"]):
            close(fresh(ids), torch.where((torch.arange(5) % 2 == 0)[:, None], want, bare))

        roomy = lf.attach(copy.deepcopy(model), adapters, max_rank=16)
        assert comp.attach(roomy, "new") == "new"
        tight = lf.attach(copy.deepcopy(model), adapters)  # slots of rank 4: one for each adapter then
        entry = comp.attach(tight, "new")
        assert entry == {"new/a": 1.0, "new/b": 1.0, "new/c": 1.0}
        for served, selection in ((roomy, "new"), (tight, entry)):
            with lf.use_adapters(served, selection):
                close(served(ids), want)
        if per == "global":
            with lf.use_adapters(tight, comp.selection):
                close(tight(ids), want)
            lf.fuse(fused := copy.deepcopy(model), lf.merge(adapters, comp.selection))
            close(fused(ids), want)


def test_a_live_selection_that_does_not_fit_changes_nothing() -> None:
    model = Net()
    adapters = three_adapters(model)
    comp = lf.learn_composition(model, adapters, cross_entropy, batches(), steps=1)
    with pytest.raises(ValueError, match="selection: the weights were learned per layer"):
        _ = comp.selection
    lf.attach(model, adapters, num_slots=5)
    with pytest.raises(ValueError, match=r"its slots hold rank 4 and 2 are free; 'new' needs one of rank 7 or 3"):
        comp.attach(model, "new")
    lf.detach(model)
    lf.attach(model, {"new/c": adapters["c"], "a": adapters["a"], "b": adapters["b"]})
    with pytest.raises(ValueError, match="'new/c' is attached already"):
        comp.attach(model, "new")
    assert set(lf.adapters(model)) == {"new/c", "a", "b"}


def test_truncation_is_merges() -> None:
    model = Net()
    comp = lf.learn_composition(model, three_adapters(model), cross_entropy, batches(), steps=3, lr=0.2)
    exact, small = comp.to_adapter(), comp.to_adapter(rank=2, dtype=torch.float64)
    assert max(layer.rank for layer in small.layers.values()) == 2
    for path in ALL:
        values = torch.linalg.svdvals(exact.layers[path].product(torch.float64).flatten(1))
        difference = small.layers[path].product(torch.float64) - exact.layers[path].product(torch.float64)
        assert difference.norm() <= values[2:].norm() * 1.001 + 1e-6 * values.norm()
    assert comp.to_adapter(energy=0.5).rank < exact.rank


def test_saved_composition_loads_again(tmp_path: Path) -> None:
    model = Net()
    adapters = {"a": make_adapter(model, {"emb": 2, "conv": 3, "mix": 2}), "b": make_adapter(model, {"mix": 1})}
    comp = lf.learn_composition(model, adapters, cross_entropy, batches(), steps=3, trainable=["classifier"])
    comp.to_adapter().save_pretrained(tmp_path / "composed")
    again = lf.load_adapter(tmp_path / "composed")
    for path, layer in comp.to_adapter().layers.items():
        close(again.layers[path].product(), layer.product())
    assert torch.equal(again.modules_to_save["classifier"]["bias"], comp.trained["classifier"]["bias"])


def test_one_adapter_keeps_its_factors() -> None:
    model = Net()
    adapter = make_adapter(model, {"mix": 2, "conv": 3})
    comp = lf.learn_composition(model, {"only": adapter}, cross_entropy, batches(), steps=3)
    assert all(w.tolist() == [1.0] for w in comp.weights.values())
    composed = comp.to_adapter()
    assert torch.equal(composed.layers["conv"].lora_a, adapter.layers["conv"].lora_a)
    assert composed.layers["conv"].scaling == adapter.layers["conv"].scaling


def test_the_start_is_the_uniform_merge() -> None:
    model = Net().eval()
    adapters = {n: make_adapter(model, dict.fromkeys(ALL, 2)) for n in "abc"}
    batch = batches(1)
    comp = lf.learn_composition(model, adapters, cross_entropy, batch, steps=1)
    lf.fuse(fused := copy.deepcopy(model), lf.merge(adapters, method="uniform"))
    assert comp.history.loss[0] == pytest.approx(cross_entropy(fused, batch[0]).item(), rel=1e-5)


def test_trained_head_comes_back_and_the_models_stays() -> None:
    model = Net().eval()
    adapters, data = three_adapters(model), batches()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    comp = lf.learn_composition(
        model, adapters, cross_entropy, data, steps=30, lr=0.05, trainable=["classifier"], trainable_lr=0.02
    )
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())
    assert all(p is parameters[k] for k, p in model.named_parameters())
    head = comp.trained["classifier"]
    assert head["weight"].shape == (4, 12)
    assert not torch.equal(head["weight"], before["classifier.weight"])
    alone = lf.learn_composition(model, adapters, cross_entropy, data, steps=30, lr=0.05)
    assert comp.history.loss[-1] < alone.history.loss[-1]
    want = branched(model, adapters, by_name(comp))
    want.classifier.load_state_dict(head)  # type: ignore[operator, union-attr]
    ids = data[0][0]
    tight = lf.attach(copy.deepcopy(model), {"a": adapters["b"]})  # head in one of several slots
    for served in (copy.deepcopy(model), tight):
        with lf.use_adapters(served, comp.attach(served, "new")), torch.no_grad():
            close(served(ids), want(ids))


def test_same_seed_same_result_and_callers_random_state_stays() -> None:
    model = Net().train()
    adapters, data = three_adapters(model), batches(8, 1)
    dataset = torch.utils.data.TensorDataset(torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data]))
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=3, shuffle=True)

    def learn(seed: int) -> lf.Composition:
        return lf.learn_composition(model, adapters, cross_entropy, loader, steps=7, lr=0.1, seed=seed, train_mode=True)

    state = torch.random.get_rng_state()
    first = learn(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(5)
    second, other = learn(3), learn(4)
    assert first.history.loss == second.history.loss != other.history.loss
    assert all(torch.equal(w, second.weights[p]) for p, w in first.weights.items())


def test_validation_keeps_the_best_and_patience_stops() -> None:
    model = Net()
    adapters, data = three_adapters(model), batches(2)
    against: list[Any] = [(ids, (labels + 1) % 4) for ids, labels in data]  # gets worse as training goes on

    comp = lf.learn_composition(
        model, adapters, cross_entropy, data, steps=200, lr=0.3, validation=against, evaluate_every=4, patience=3
    )
    history = comp.history
    assert history.stopped_early
    assert len(history.loss) < 200
    assert history.step == min(history.validation, key=history.validation.__getitem__)
    assert [*history.validation][:2] == [0, 4]
    assert len(history.loss) == history.step + 3 * 4
    shares = branched(model.eval(), adapters, by_name(comp))
    with torch.no_grad():
        score = sum(cross_entropy(shares, b).item() for b in against) / 2
    assert score == pytest.approx(history.validation[history.step], rel=1e-4)

    flat = lf.learn_composition(
        model, adapters, lambda m, b: 0 * cross_entropy(m, b), data, evaluate_every=2, patience=2
    )
    assert flat.history.stopped_early
    assert len(flat.history.loss) == flat.history.step == 6


def test_conv_forms_padding_modes_and_half_precision() -> None:
    for conv in (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 3, (3, 1), padding="same", dilation=(2, 1), bias=False),
    ):
        model = Net(conv).eval()
        adapters = three_adapters(model)
        comp = lf.learn_composition(model, adapters, cross_entropy, [_first()], steps=2)
        naive = branched(model, adapters, {p: dict(zip("abc", _start(adapters, p), strict=True)) for p in ALL})
        assert comp.history.loss[0] == pytest.approx(cross_entropy(naive, _first()).item(), rel=1e-5)
    half = copy.deepcopy(model).bfloat16()
    comp = lf.learn_composition(half, adapters, cross_entropy, batches(), steps=4, lr=0.1)
    assert comp.weights["conv"].dtype == torch.float32
    assert comp.weights["conv"].sum().item() == pytest.approx(1.0, abs=1e-6)

    def autocast(m: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(m, batch)

    stack = make_stack(model, adapters, "test")
    stack.set_weights(torch.full((7, 3), 0.5))
    with stack.on(), torch.autocast("cpu", torch.bfloat16):
        assert model.emb(_first()[0]).dtype == torch.float32  # as without adapters
    mixed = lf.learn_composition(model, adapters, autocast, [_first()], steps=1)
    full = lf.learn_composition(model, adapters, cross_entropy, [_first()], steps=1)
    assert mixed.history.loss[0] == pytest.approx(full.history.loss[0], rel=0.05)


def _first() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return batches(1)[0]


def _start(adapters: dict[str, lf.LoraAdapter], path: str) -> Iterator[float]:
    have = [path in a.layers for a in adapters.values()]
    return iter([h / sum(have) for h in have])
