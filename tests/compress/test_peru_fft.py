"""peru_fft on state dicts and modules: against plain torch in fp64, bit for bit where nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fuse as lf

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


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def nets(request: pytest.FixtureRequest) -> tuple[Net, dict[str, Net]]:
    base = make(dtype=request.param)
    return base, {"sql": tuned(base, 1), "math": tuned(base, 2), "chat": tuned(base, 3)}


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


def reference_merge(base: dict[str, Tensor], tasks: list[dict[str, Tensor]], merge: str, scaling: float) -> Any:
    if merge == "average":
        return {n: torch.stack([t[n] for t in tasks]).mean(0) for n in base}
    if merge == "task_arithmetic":
        return {n: w + scaling * torch.stack([t[n] - w for t in tasks]).sum(0) for n, w in base.items()}
    names = [n for n in base if n != "out.weight"]
    flat = torch.stack([torch.cat([(t[n] - base[n]).flatten() for n in names]) for t in tasks])
    k = int(0.2 * flat.shape[1])
    for row in flat:
        order = row.float().abs().argsort(descending=True, stable=True)
        row[order[k:]] = 0
    sign = flat.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = torch.where(flat.sign() == sign, flat, 0)
    mean = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
    parts = mean.split([base[n].numel() for n in names])
    merged = {n: base[n] + scaling * part.view_as(base[n]) for n, part in zip(names, parts, strict=True)}
    return merged | {"out.weight": merged["emb.weight"]}


def reference_kept(own: list[Tensor], merged: list[Tensor], density: float, scope: str) -> list[Tensor]:
    """Masks by a stable sort of the fp32 magnitudes (fp64 for fp64)."""
    keys = [
        ((a.double() - b.double()) if a.dtype == torch.float64 else (a.float() - b.float())).abs()
        for a, b in zip(own, merged, strict=True)
    ]

    def keep(key: Tensor) -> Tensor:
        mask = torch.zeros_like(key, dtype=torch.bool)
        mask[key.argsort(descending=True, stable=True)[: int(density * key.numel())]] = True
        return mask

    if scope == "global":
        parts = keep(torch.cat([k.flatten() for k in keys])).split([k.numel() for k in keys])
        return [p.view_as(k) for p, k in zip(parts, keys, strict=True)]
    if scope == "tensor":
        return [keep(k.flatten()).view_as(k) for k in keys]
    return [torch.stack([keep(row) for row in k.flatten(1)]).view_as(k) for k in keys]


@pytest.mark.parametrize("merge", ["task_arithmetic", "average", "ties"])
def test_merges_agree_with_plain_torch(nets: tuple[Net, dict[str, Net]], merge: Any) -> None:
    base, tasks = nets
    scaling = None if merge == "average" else 0.7
    peru = lf.peru_fft(base, tasks, merge=merge, scaling=scaling)
    want = reference_merge(wide(base.state_dict()), [wide(t.state_dict()) for t in tasks.values()], merge, 0.7)
    assert peru.merged.keys() == base.state_dict().keys()
    for name, tensor in peru.merged.items():
        ours = base.state_dict()[name]
        assert (tensor.dtype, tensor.shape) == (ours.dtype, ours.shape)
        if name not in want:
            assert torch.equal(tensor, ours)  # the step counter
            continue
        # one rounding of the fp64 sum; sums in another order may fall on the other side of a rounding boundary
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), want[name], rtol=0.5001 * eps, atol=1e-12)
    base.load_state_dict(peru.merged)
    assert peru.settings["merge"] == merge


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("density", [0.005, 0.1, 0.5, 1.0])
def test_kept_values_are_the_finetunes_own(nets: tuple[Net, dict[str, Net]], scope: Any, density: float) -> None:
    base, tasks = nets
    peru = lf.peru_fft(base, tasks, density=density, scope=scope)
    merged = [peru.merged[name] for name in PRUNED]
    for task, net in tasks.items():
        adapter, own = peru.adapters[task], net.state_dict()
        masks = reference_kept([own[n] for n in PRUNED], merged, density, scope)
        state = peru.state_dict(task)
        report = peru.report.tasks[task]
        kept = whole = 0.0
        for name, mask in zip(PRUNED, masks, strict=True):
            assert torch.equal(adapter.matrices[name].mask().view_as(mask), mask)
            want = torch.where(mask, own[name], peru.merged[name])
            assert torch.equal(bits(state[name]), bits(want))
            square = (own[name].double() - peru.merged[name].double()).square()
            assert report.parameters[name].kept == int(mask.sum()) == adapter.matrices[name].nnz
            assert report.parameters[name].entries == mask.numel()
            assert report.parameters[name].squared_norm == pytest.approx(float(square.sum()), rel=1e-12)
            assert report.parameters[name].squared_kept == pytest.approx(float(square[mask].sum()), rel=1e-12)
            kept, whole = kept + float(square[mask].sum()), whole + float(square.sum())
        assert report.energy == adapter.energy == pytest.approx(kept / whole, rel=1e-12)
        if scope == "global":
            assert report.kept == adapter.nnz == int(density * sum(m.numel() for m in masks))
        assert state["out.weight"] is state["emb.weight"]  # tied
        for name in own:
            if name not in (*PRUNED, "out.weight"):
                assert torch.equal(bits(state[name]), bits(own[name])), name
        net.load_state_dict(state)
        if density == 1.0:
            assert_same(state, own)
            assert report.energy == 1.0
