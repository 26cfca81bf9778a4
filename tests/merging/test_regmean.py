"""regmean and collect_grams: the least-squares problem it solves, and what the hooks see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from merge_models import dense, make_adapter, three_adapters
from torch import Tensor, nn

import lora_fuse as lf
from lora_fuse import reference

WEIGHTS = [0.5, 2.0, 1.0]
FEATURES = {"lin": 24, "wide": 50, "conv": 45, "emb": 64}


def matrix(adapter: lf.LoraAdapter, path: str) -> Tensor:
    layer = adapter.layers[path]
    return layer.scaling * (layer.lora_b.double().flatten(1) @ layer.lora_a.double().flatten(1))


def gram(features: int, rows: int = 200) -> Tensor:
    x = torch.randn(rows, features) @ torch.randn(features, features) + torch.randn(features)
    return x.mT @ x / rows


def grams_for(adapters: list[lf.LoraAdapter]) -> list[dict[str, Tensor]]:
    return [{path: gram(FEATURES[path]) for path in a.layers} for a in adapters]


OPTIONS: list[dict[str, Any]] = [{}, {"off_diagonal": 0.5, "ridge": 0.1}, {"off_diagonal": 1.0}, {"rank": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_the_dense_definition(options: dict[str, Any]) -> None:
    adapters = three_adapters()
    grams = grams_for(adapters)
    merged = lf.merge(adapters, WEIGHTS, method="regmean", grams=grams, dtype=torch.float64, **options)
    formula = {k: v for k, v in options.items() if k != "rank"}
    for path in FEATURES:
        own = [i for i, a in enumerate(adapters) if path in a.layers]
        want = reference.regmean(
            [matrix(adapters[i], path) for i in own],
            [grams[i][path].double() for i in own],
            [WEIGHTS[i] for i in own],
            **formula,
        )
        if "rank" in options:
            u, s, vh = torch.linalg.svd(want, full_matrices=False)
            want = u[:, :3] * s[:3] @ vh[:3]
            assert merged.layers[path].rank == 3
        else:
            assert merged.layers[path].rank == min(sum(adapters[i].layers[path].rank for i in own), *want.shape)
        assert (matrix(merged, path) - want).norm() <= 1e-9 * want.norm()


def test_an_adapter_without_the_layer_counts_as_zero_where_it_has_a_gram() -> None:
    adapters = [make_adapter({"lin": 3}), make_adapter({"wide": 2})]
    grams = [{"lin": gram(24)}, {"lin": gram(24), "wide": gram(50)}]
    merged = lf.merge(adapters, method="regmean", grams=grams, dtype=torch.float64)
    delta = matrix(adapters[0], "lin")
    want = reference.regmean([delta, 0 * delta], [g["lin"].double() for g in grams], [1.0, 1.0])
    torch.testing.assert_close(matrix(merged, "lin"), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix(merged, "wide"), matrix(adapters[1], "wide"), rtol=1e-9, atol=1e-9)


def test_diagonals_alone() -> None:
    adapters = [make_adapter({"lin": 3, "emb": 2}), make_adapter({"lin": 4, "emb": 2})]
    grams = [{"lin": gram(24).diagonal(), "emb": torch.rand(64)}, {"lin": gram(24), "emb": torch.rand(64)}]
    merged = lf.merge(adapters, WEIGHTS[:2], method="regmean", grams=grams, dtype=torch.float64)
    for path in ("lin", "emb"):
        full = [(g[path].diag() if g[path].ndim == 1 else g[path]).double() for g in grams]
        want = reference.regmean([matrix(a, path) for a in adapters], full, WEIGHTS[:2])
        torch.testing.assert_close(matrix(merged, path), want, rtol=1e-9, atol=1e-9)


def test_solves_the_least_squares_problem() -> None:
    """No other delta of the layer has outputs closer to the adapters' own, each on its own inputs."""
    adapters = [make_adapter({"lin": 3}), make_adapter({"lin": 5}, alpha=1.0)]
    xs = [torch.randn(100, 24).double(), torch.randn(100, 24).double() @ torch.randn(24, 24).double()]
    grams = [{"lin": x.mT @ x} for x in xs]
    options: dict[str, Any] = {"grams": grams, "off_diagonal": 1.0, "dtype": torch.float64}
    delta = matrix(lf.merge(adapters, WEIGHTS[:2], method="regmean", **options), "lin").requires_grad_()
    terms = zip(adapters, xs, WEIGHTS[:2], strict=True)
    loss = torch.stack([w * (x @ (delta - matrix(a, "lin")).mT).square().sum() for a, x, w in terms]).sum()
    (grad,) = torch.autograd.grad(loss, delta)
    assert grad.abs().max() <= 1e-9 * loss.detach()


def test_laws() -> None:
    adapters = [make_adapter({"lin": 3}, bias=True), make_adapter({"lin": 5}, alpha=1.0, bias=True)]
    one, two = gram(24), gram(24)

    def merged(which: list[int], weights: list[float], grams: list[Tensor], **options: Any) -> lf.LoraAdapter:
        chosen = {str(i): adapters[j] for i, j in enumerate(which)}
        by_name = {str(i): {"lin": g} for i, g in enumerate(grams)}
        return lf.merge(chosen, weights, method="regmean", grams=by_name, dtype=torch.float64, **options)

    def same(a: lf.LoraAdapter, b: lf.LoraAdapter, factor: float = 1.0) -> None:
        torch.testing.assert_close(matrix(a, "lin"), factor * matrix(b, "lin"), rtol=1e-8, atol=1e-8)
        layers = [x.layers["lin"] for x in (a, b)]
        biases = [layer.scaling * layer.lora_bias.double() for layer in layers]  # type: ignore[union-attr]
        torch.testing.assert_close(biases[0], factor * biases[1])

    whole = merged([0, 1], [1.0, 3.0], [one, two])
    same(merged([1, 0], [3.0, 1.0], [two, one]), whole)  # order
    same(merged([0, 1], [2.0, 6.0], [one, two]), whole)  # weights are shares
    same(merged([0, 1, 1], [1.0, 1.0, 2.0], [one, two, two]), whole)  # an adapter split in two
    same(merged([0, 1], [1.0, 3.0], [one, two], scaling=-0.5), whole, -0.5)
    same(merged([0, 1], [1.0, 0.0], [one, two]), adapters[0])
    assert torch.equal(merged([0], [1.0], [one]).layers["lin"].lora_a, adapters[0].layers["lin"].lora_a.double())
    same(merged([0], [0.3], [one]), adapters[0])
    mean = lf.merge(adapters, [0.25, 0.75], dtype=torch.float64)
    same(merged([0, 1], [1.0, 3.0], [one, one]), mean)  # equal inputs: the mean of the deltas


GOOD = make_adapter({"lin": 3})


def bad(**changes: Any) -> dict[str, Any]:
    return {"method": "regmean", "grams": [{"lin": gram(24)}, {"lin": gram(24)}], **changes}


HOLES = torch.diag(torch.tensor([0.0] * 4 + [1.0] * 20))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (bad(grams=None), ValueError, r"grams: method 'regmean' needs .* lf.collect_grams"),
        (bad(grams=[{"lin": gram(24)}]), ValueError, "got 1 for 2 adapters"),
        (bad(grams={"a": {}, "b": {}}), ValueError, r"got \['a', 'b'\] for \['0', '1'\]"),
        (bad(grams=[{"lin": gram(24)}, gram(24)]), TypeError, "got Tensor for adapter #1"),
        (bad(grams=[{"lin": gram(24)}, {}]), ValueError, "grams: adapter #1, layer 'lin': missing"),
        (bad(grams=[{"lin": gram(24)}, {"lin": gram(25)}]), ValueError, r"expected shape \(24, 24\).* got \(25, 25\)"),
        (bad(grams=[{"lin": gram(24)}, {"lin": torch.randn(24, 24)}]), ValueError, "adapter #1.*is not symmetric"),
        (bad(grams=[{"lin": gram(24) * float("nan")}, {"lin": gram(24)}]), ValueError, "adapter #0.*has NaN"),
        (bad(grams=[{"lin": -gram(24)}, {"lin": gram(24)}]), ValueError, "negative numbers on its diagonal"),
        (bad(grams=[{"lin": gram(24).int()}, {"lin": gram(24)}]), TypeError, "floating-point tensor, got torch.int32"),
        (bad(grams=[{"lin": HOLES}] * 2), ValueError, "layer 'lin': the Gram matrices add up to a singular.*ridge="),
        (bad(grams=[{"lin": HOLES.diagonal()}] * 2), ValueError, "add up to a singular one"),
        (bad(grams=[{"lin": gram(24, 5)}] * 2, off_diagonal=1.0), ValueError, "add up to a singular one"),
        (bad(weights=[1.0, -1.0]), ValueError, "takes none below 0, got -1.0 for adapter #1"),
        (bad(off_diagonal=1.1), ValueError, "off_diagonal: expected 0 <= off_diagonal <= 1"),
        (bad(ridge=-1.0), ValueError, "ridge: expected a number of at least 0"),
        (bad(method="tsv"), ValueError, "grams: method 'tsv' does not take it; regmean do"),
    ],
)
def test_bad_input(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lf.merge([GOOD, GOOD], **kwargs)


def test_ridge_gives_dead_features_the_mean() -> None:
    adapters = [make_adapter({"lin": 3}), make_adapter({"lin": 2})]
    merged = lf.merge(adapters, method="regmean", grams=[{"lin": HOLES}] * 2, ridge=1e-3, dtype=torch.float64)
    mean = lf.merge(adapters, [0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(matrix(merged, "lin"), matrix(mean, "lin"), rtol=1e-8, atol=1e-8)


class Net(nn.Module):
    def __init__(self, **conv: Any) -> None:
        super().__init__()
        self.emb, self.q, self.k = nn.Embedding(10, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out, self.conv, self.spare = nn.Linear(6, 4), nn.Conv2d(3, 5, (3, 2), **conv), nn.Linear(2, 2)

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.emb(ids)
        if image is not None:
            self.conv(image)
        return self.out(self.q(x) * self.k(x))


PATHS = ["emb", "q", "k", "out"]


def test_grams_of_linear_layers_and_embeddings() -> None:
    net = Net().eval()
    batches = [torch.randint(10, (2, 7)), torch.randint(10, (1, 3))]
    grams = lf.collect_grams(net, PATHS, batches)
    ids = torch.cat([b.flatten() for b in batches])
    x = net.emb(ids)
    for path, inputs in {"q": x, "k": x, "out": net.q(x) * net.k(x)}.items():
        torch.testing.assert_close(grams[path], (inputs.mT @ inputs / 17).detach())
    assert torch.equal(grams["emb"], ids.bincount(minlength=10) / 17)
    assert grams["q"].data_ptr() != grams["k"].data_ptr()
    by_name = lf.collect_grams(net, PATHS, [{"ids": b} for b in batches])
    by_call = lf.collect_grams(net, PATHS, batches, forward=lambda model, batch: model(batch))
    half = lf.collect_grams(net.bfloat16(), PATHS, [(b,) for b in batches])
    for path in PATHS:
        assert torch.equal(by_name[path], grams[path])
        assert torch.equal(by_call[path], grams[path])
        assert half[path].dtype == torch.float32
        torch.testing.assert_close(half[path], grams[path], rtol=0.1, atol=0.1)


def test_a_layer_called_by_keyword() -> None:
    net, ids = Net(), torch.randint(10, (2, 7))
    grams = lf.collect_grams(net, ["k"], [ids], forward=lambda model, batch: model.k(input=model.emb(batch)))
    assert torch.equal(grams["k"], lf.collect_grams(net, ["k"], [ids])["k"])


@pytest.mark.parametrize(
    "conv",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": (0, 1), "padding_mode": "circular"},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_grams_of_a_convolution(conv: dict[str, Any]) -> None:
    net, image = Net(**conv), torch.randn(2, 3, 9, 8)
    grams = lf.collect_grams(net, ["conv"], [(torch.randint(10, (1, 3)), image)])
    probe = nn.Conv2d(3, 18, (3, 2), bias=False, **conv)  # one output channel for each entry of the kernel's window
    probe.weight.data.copy_(torch.eye(18).reshape(18, 3, 3, 2))
    patches = probe(image).detach().movedim(1, -1).reshape(-1, 18)
    torch.testing.assert_close(grams["conv"], patches.mT @ patches / len(patches))


@torch.no_grad()
def test_from_attached_adapters_to_the_merge() -> None:
    net = Net().eval()
    adapters = {
        name: lf.LoraAdapter({p: lf.LoraLayer(torch.randn(2, 8), torch.randn(6, 2), 0.5) for p in ("q", "k")})
        for name in "ab"
    }
    data = {"a": torch.randint(10, (40, 5)), "b": torch.randint(10, (40, 5))}
    lf.attach(net, adapters)
    grams = {}
    for name, adapter in adapters.items():
        with lf.use_adapters(net, name):
            grams[name] = lf.collect_grams(net, adapter, [data[name]])
    merged = lf.merge(adapters, method="regmean", grams=grams)
    lf.detach(net)
    error = {}
    for label, candidate in {"regmean": merged, "mean": lf.merge(adapters, [0.5, 0.5])}.items():
        error[label] = sum(
            float((net.emb(data[n]) @ (candidate.delta("q") - a.delta("q")).mT).square().sum())
            for n, a in adapters.items()
        )
    assert error["regmean"] < error["mean"]


def test_hooks_are_gone_after_an_exception() -> None:
    net = Net()
    with pytest.raises(IndexError):
        lf.collect_grams(net, PATHS, [torch.tensor([[11]])])
    assert not any(m._forward_pre_hooks for m in net.modules())
    net.emb.weight.data[3, 2] = torch.inf
    with pytest.raises(ValueError, match="layer 'q': its inputs have NaN or infinite"):
        lf.collect_grams(net, PATHS, [torch.tensor([[3, 1]])])


@pytest.mark.parametrize(
    ("paths", "batches", "message"),
    [
        (["q"], [], "batches: expected at least one"),
        ([], [torch.tensor([[1]])], "paths: expected an adapter or module paths"),
        ("q", [torch.tensor([[1]])], "paths: expected an adapter or module paths"),
        (["qq"], [torch.tensor([[1]])], "no module at 1 path.*'qq'"),
        (["spare"], [torch.tensor([[1]])], "layer 'spare': no batch reaches it"),
    ],
)
def test_bad_calls_of_collect_grams(paths: Any, batches: list[Tensor], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        lf.collect_grams(net, paths, batches)


def test_grouped_convolutions_are_refused() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.raises(ValueError, match="'conv': a grouped convolution"):
        lf.collect_grams(net, ["conv"], [torch.zeros(1)])


def test_dora_alone() -> None:
    layers = {"lin": replace(GOOD.layers["lin"], magnitude=torch.rand(40))}
    adapter = replace(GOOD, layers=layers)
    merged = lf.merge([adapter], method="regmean", grams=[{"lin": gram(24)}])
    assert torch.equal(merged.layers["lin"].magnitude, layers["lin"].magnitude)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adapter #0: uses DoRA"):
        lf.merge([adapter, GOOD], method="regmean", grams=[{"lin": gram(24)}] * 2)
    assert dense(merged, "lin").shape == (40, 24)
