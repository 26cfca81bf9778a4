"""A small model with one of everything, fine-tunes of it, and comparisons bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

PRUNED = ["emb.weight", "conv.weight", "block.0.weight", "block.2.weight", "head.weight"]


class Net(nn.Module):
    """Embedding, convolution, linear layers, norms, an integer buffer, and a tied output."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.emb = nn.Embedding(19, 12)
        self.conv = nn.Conv2d(3, 6, (3, 2))
        self.block = nn.Sequential(nn.Linear(12, 70), nn.Tanh(), nn.Linear(70, 5, bias=False))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, classes)
        self.out = nn.Linear(12, 19)
        self.out.weight = self.emb.weight


def make(seed: int = 0, classes: int = 3, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(classes).to(dtype)


def tuned(base: nn.Module, seed: int, scale: float = 0.05) -> Net:
    """A fine-tune: every float moved, most of them a little and some a lot."""
    net = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in dict.fromkeys(t for t in net.state_dict(keep_vars=True).values() if t.is_floating_point()):
            t.add_(torch.randn(t.shape, generator=generator).pow(3).to(t.dtype), alpha=scale)
    net.norm.num_batches_tracked += seed
    return net  # type: ignore[return-value]


def wide(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in state.items() if t.is_floating_point()}


def bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert torch.equal(bits(got[name]), bits(want[name])), name
