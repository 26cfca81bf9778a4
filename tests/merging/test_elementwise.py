"""The rules that merge entry by entry, against PEFT's and against their formulas written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fuse import reference
from lora_fuse.merging import elementwise

SHAPES = [(24, 40), (1, 7), (9,), (3, 5, 2, 2)]
WEIGHTS = [0.7, -0.5, 1.25]


def vectors(shape: tuple[int, ...] = (24, 40), seed: int = 0) -> list[Tensor]:
    """Three, with entries that are zero in some and cancel in others."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in WEIGHTS]
    found[1].view(-1)[::3] = -found[0].view(-1)[::3]
    found[2].view(-1)[::3] = 0.0
    return found


def by_entry(xs: list[Tensor], weights: list[float], majority_sign: str, divisor: str, if_zero: float) -> Tensor:
    """``disjoint_mean`` one entry at a time."""
    result = []
    for values in zip(*(x.reshape(-1).tolist() for x in xs), strict=True):
        weighted = [w * v for w, v in zip(weights, values, strict=True)]
        judged = weighted if majority_sign == "weighted" else values
        total = sum(_sign(v) for v in values) if majority_sign == "frequency" else sum(judged)
        sign = _sign(total) or if_zero
        agree = [i for i, v in enumerate(judged) if v != 0 and _sign(v) == sign]
        divide_by = {"count": max(1, len(agree)), "weights": sum(weights[i] for i in agree), "none": 1}[divisor]
        result.append(sum(weighted[i] for i in agree) / (divide_by if abs(divide_by) >= 1e-8 else 1.0))
    return torch.tensor(result, dtype=torch.float64).view(xs[0].shape)


def _sign(value: float) -> float:
    return float((value > 0) - (value < 0))


@pytest.mark.parametrize("if_zero", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("divisor", elementwise.DIVISORS)
@pytest.mark.parametrize("majority_sign", elementwise.MAJORITY_SIGNS)
def test_disjoint_mean_is_its_definition(majority_sign: Any, divisor: Any, if_zero: float) -> None:
    for shape, weights in itertools.product(SHAPES, (WEIGHTS, [1.0, 1.0, 1.0], [1.0, -1.0, 0.5])):
        xs = vectors(shape)
        before = [x.clone() for x in xs]
        got = elementwise.disjoint_mean(xs, weights, majority_sign, divisor, if_zero)
        torch.testing.assert_close(got, by_entry(xs, weights, majority_sign, divisor, if_zero), rtol=1e-12, atol=1e-12)
        assert all(map(torch.equal, xs, before))


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 1.0, 1.0]], ids=str)
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.97])
def test_ties_is_pefts(density: float, majority_sign: Any, weights: list[float]) -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils", reason="PEFT is the oracle")
    for shape in SHAPES:
        xs = vectors(shape)
        xs = [x + 1e-3 * torch.arange(x.numel()).view(shape) for x in xs]  # no ties: PEFT leaves their order open
        theirs = merge_utils.ties(xs, torch.tensor(weights, dtype=torch.float64), density, majority_sign)
        got = elementwise.ties(xs, weights, density, majority_sign)
        torch.testing.assert_close(got, theirs, rtol=1e-12, atol=1e-12)


def test_each_vector_has_a_density_of_its_own() -> None:
    xs = vectors()
    alone = [elementwise.ties([x], [1.0], d) for x, d in zip(xs, (0.1, 0.5, 1.0), strict=True)]
    assert [int(x.count_nonzero()) for x in alone] == [96, 480, int(xs[2].count_nonzero())]
    together = elementwise.disjoint_mean(alone, WEIGHTS)
    assert torch.equal(elementwise.ties(xs, WEIGHTS, (0.1, 0.5, 1.0)), together)


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.5, 0.1), (0.9, 0.1), (0.3, 0.0), (1.0, 0.0), (0.01, 0.9), (0.2, 0.004)]
)
@pytest.mark.parametrize("n", [1, 9, 100, 4001])
def test_breadcrumbs_keeps_the_middle(n: int, density: float, gamma: float) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    order = x.abs().sort(descending=True, stable=True).indices
    top = int(gamma * n)
    want = torch.zeros(n, dtype=torch.bool).index_fill_(0, order[top : top + min(int(density * n), n - top)], True)
    assert torch.equal(elementwise.breadcrumbs_mask(x, density, gamma), want)
    assert torch.equal(elementwise.breadcrumbs_mask(x + x, density, gamma, minus=x), want)
    if n * gamma < 1 and int(density * n):  # where the slice that leaves the outliers out has to be open-ended
        assert want.any()


def test_a_stream_hangs_on_its_key_and_not_on_how_it_is_cut() -> None:
    def draw(*cuts: int, key: tuple[int, str, str] = (3, "layer", "1"), cols: int = 7) -> Tensor:
        stream = elementwise.Stream(*key)
        return torch.cat([stream.keep(rows, cols, 0.4) for rows in cuts])

    whole = draw(12)
    assert torch.equal(whole, draw(5, 1, 6))
    assert torch.equal(whole, reference.random_numbers(3, "layer", "1", 12, 7) < round(0.4 * 2**32))
    for key in [(4, "layer", "1"), (3, "layer", "2"), (3, "layers", "1")]:
        assert not torch.equal(whole, draw(12, key=key))


def test_a_stream_keeps_the_share_it_is_asked_for() -> None:
    for probability in (0.0, 0.1, 0.5, 1.0):
        kept = elementwise.Stream(0, "x", "0").keep(200, 501, probability)
        spread = (probability * (1 - probability) / kept.numel()) ** 0.5
        assert abs(kept.double().mean() - probability) <= 4 * spread
        same = elementwise.Stream(0, "x", "0").keep(200, 501, torch.full((200, 501), probability))
        assert torch.equal(kept, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cols", [1, 2, 37])
def test_larger_entries_of_a_row_have_better_chances(cols: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, cols, dtype=dtype)
    x[:, ::3] = x[:, :1].clone()  # equal magnitudes
    chances = elementwise.keep_probabilities(x, 0.6, 0.1)
    if cols == 1:
        assert torch.equal(chances, torch.full((5, 1), 0.6))
        return
    for row, chance in zip(x.abs().tolist(), chances.tolist(), strict=True):
        order = sorted(range(cols), key=lambda j: (row[j], -j))
        assert [chance[j] for j in order] == pytest.approx([0.5 + 0.2 * i / (cols - 1) for i in range(cols)])


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (2, 0)])
def test_packed_masks_unpack(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape) < 0.5
    packed = elementwise.PackedMask(mask)
    assert torch.equal(packed.rows(0, shape[0]), mask)
    assert torch.equal(packed.rows(1, 2), mask[1:2])
