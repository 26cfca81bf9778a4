"""Fine-tunes made in memory, their sparse adapters, and a small model with every kind of layer that can be served."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint
from lora_fuse.sparse import SparseMatrix


class Mixed(nn.Module):
    """Token ids ``[batch, seq]`` -> ``[batch, 6]``: embeddings (one of them looked up once per batch), norms, Linears
    with and without bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24), nn.Embedding(16, 24)
        self.norm, self.rms = nn.LayerNorm(24), nn.RMSNorm(40)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 6)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.norm(self.words(ids) + self.places(positions))
        return self.head((x + self.down(self.rms(torch.tanh(self.up(x))))).mean(1))


class Picture(nn.Module):
    """Images ``[batch, 3, 12, 12]`` -> ``[batch, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 12, 1, bias=False)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(torch.tanh(self.stem(x)))).flatten(2).mean(2))


class Flat(nn.Module):
    """Token ids ``[batch, seq]`` -> ``[batch, seq, 4]``; the places are looked up by ids of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


def fine_tuned(model: nn.Module, seed: int, size: float = 0.3) -> nn.Module:
    """A copy whose every floating-point parameter has moved."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            spread = float(p.std()) if p.dim() > 1 else 1.0
            p += size * spread * torch.randn(p.shape, generator=generator).to(p.dtype)
    return tuned


def sparse_adapter(
    merged: nn.Module, tuned: nn.Module, density: float = 0.2, heads: Sequence[str] = (), dense: Sequence[str] = ()
) -> SparseAdapter:
    """The largest differences of every matrix; all of what is one-dimensional or matched by ``dense``."""
    matrices: dict[str, SparseMatrix] = {}
    whole: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    prints: dict[str, str] = {}
    own = {name: t.detach() for name, t in tuned.named_parameters()}
    base = {name: t.detach() for name, t in merged.named_parameters()}
    for name, t in own.items():
        if any(fnmatchcase(name, pattern) for pattern in heads):
            head[name] = t.clone()
            continue
        prints[name] = fingerprint(base[name])
        if t.dim() < 2 or any(fnmatchcase(name, pattern) for pattern in dense):
            whole[name] = t.clone()
            continue
        difference = (t.float() - base[name].float()).abs().flatten(1)
        kept = torch.zeros_like(difference, dtype=torch.bool)
        kept.view(-1)[difference.flatten().topk(int(density * t.numel())).indices] = True
        matrices[name] = SparseMatrix.from_mask(t.flatten(1), kept)
    shapes = {name: tuple(own[name].shape) for name in matrices}
    return SparseAdapter(matrices, whole, head, shapes, prints, density)


def materialised(merged: nn.Module, adapter: SparseAdapter) -> nn.Module:
    """A model of its own that is the task's: ``adapter.state_dict`` loaded, heads of any width included."""
    model = copy.deepcopy(merged)
    state = adapter.state_dict({**merged.state_dict()})
    for name in adapter.heads:
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        module._parameters[leaf] = nn.Parameter(torch.empty_like(state[name]))
    model.load_state_dict(state)
    return model


def mixture(merged: nn.Module, parts: Mapping[SparseAdapter, float]) -> nn.Module:
    """``theta* + sum of weight * (theta_t - theta*)``."""
    model = copy.deepcopy(merged)
    with torch.no_grad():
        for adapter, weight in parts.items():
            own = materialised(merged, adapter).state_dict()
            for name, p in model.state_dict().items():
                p += weight * (own[name] - merged.state_dict()[name])
    return model


def model_of(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and a batch of seven samples."""
    torch.manual_seed(seed)
    if kind == "tokens":
        return Mixed().eval(), torch.randint(50, (7, 9))
    return Picture().eval(), torch.randn(7, 3, 12, 12)
