"""The draws of a sketch: Philox's known answers, the layout of counters, and the distribution."""

from __future__ import annotations

import pytest
import torch
from philox import normal, philox

from lora_fuse import _cpu
from lora_fuse.ops.normals import Normals


def drawn(shape: tuple[int, int, int], seed: int, draw: int = 0, threads: int = 1) -> torch.Tensor:
    out = torch.empty(shape)
    _cpu.normals(out, seed, draw, threads)
    return out


def test_known_answers() -> None:
    """Those that the authors publish with their code."""
    ones = 2**32 - 1
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**64 - 1])
def test_every_entry_is_the_one_of_its_counter(seed: int, isa: str) -> None:
    shape = 2, 300, 21
    got = drawn(shape, seed, draw=3)
    want = [[[normal(seed, 3, b, r, c) for c in range(shape[2])] for r in range(shape[1])] for b in range(shape[0])]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_an_entry_hangs_on_its_place_alone() -> None:
    whole = drawn((3, 515, 77), 9)
    for shape in ((1, 515, 77), (3, 33, 77), (2, 130, 5), (3, 1, 1), (1, 0, 4), (0, 5, 4), (2, 3, 0)):
        assert torch.equal(drawn(shape, 9), whole[: shape[0], : shape[1], : shape[2]])
    assert torch.equal(drawn((3, 515, 77), 9, threads=2), whole)
    assert not torch.equal(drawn((3, 515, 77), 9, draw=1), whole)


def test_they_are_independent_normal_numbers() -> None:
    x = drawn((4, 2000, 100), 1).double().flatten()
    spread = x.numel() ** -0.5
    for power, want, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((x**power).mean()) - want) <= 4 * deviation * spread
    within = torch.special.ndtr(x)
    for edge in torch.linspace(0.05, 0.95, 19).tolist():
        assert abs(float((within < edge).double().mean()) - edge) <= 4 * 0.5 * spread
    for lag in (1, 32 * 100, 64 * 100, 100, 128 * 100, 2000 * 100):  # columns, words of a call, rows, matrices
        assert abs(float((x[:-lag] * x[lag:]).mean())) <= 4 * spread


def test_draws_follow_each_other() -> None:
    shape, cpu = (2, 3, 40, 5), torch.device("cpu")
    random, again = Normals(7), Normals(7)
    first, second = random.draw(shape, cpu), random.draw(shape, cpu)
    assert not torch.equal(first, second)
    assert again.next_draw() == 0
    assert torch.equal(again.draw(shape, cpu), second)
    assert torch.equal(first.view(6, 40, 5), drawn((6, 40, 5), 7))


def test_bad_input() -> None:
    for wrong in (torch.empty(3, 4), torch.empty(1, 3, 4).double(), torch.empty(1, 3, 8)[..., ::2]):
        with pytest.raises(ValueError, match="out: expected contiguous float32"):
            _cpu.normals(wrong, 0, 0, 1)
