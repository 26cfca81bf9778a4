"""Each rival's way to add the LoRA part of one linear layer (of one or several slices), as its users run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import rivals


@dataclass(frozen=True)
class Factors:
    """One copy of a layer's weights.

    Args:
        weight: ``[out_features, in_features]`` of the base.
        a: by slice, ``[num_slots, max_rank, in_features]``.
        b: by slice, ``[num_slots, out_features of the slice, max_rank]``; zero beyond an adapter's rank, as A is.
        all_a, all_b: the slices behind one another.
    """

    weight: Tensor
    a: list[Tensor]
    b: list[Tensor]
    all_a: Tensor
    all_b: Tensor


@dataclass(frozen=True)
class Problem:
    """A batch and the copies of the layer that it may be run on.

    Args:
        slots: of each row; -1: none.
        ranks: of each slot.
        scaling: of every slot.
        widths: output features of each slice.
    """

    x: Tensor
    slots: list[int]
    ranks: list[int]
    scaling: float
    widths: tuple[int, ...]
    copies: Sequence[Factors]

    @property
    def max_rank(self) -> int:
        return int(self.copies[0].a[0].shape[1])

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(sum(self.widths[:i]) for i in range(len(self.widths) + 1))

    def int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.x.device)


@dataclass(frozen=True)
class Way:
    """``alone(y, i)`` adds to ``y`` with the i-th copy; ``whole(i)`` is base and all, if not one after the other.

    ``alone`` is None where the two cannot be told apart.
    """

    alone: Callable[[Tensor, int], Any] | None
    whole: Callable[[int], Tensor] | None = None

    def with_base(self, problem: Problem, i: int) -> Tensor:
        if self.whole is not None:
            return self.whole(i)
        assert self.alone is not None
        y = linear(problem.x, problem.copies[i].weight)
        self.alone(y, i)
        return y


def _vllm_configs(rows: int, rank: int) -> dict[str, tuple[dict[str, int] | None, dict[str, int] | None]]:
    """A small sweep, in place of the tuned files that its wheel does not bring."""
    wide = min(64, max(16, 1 << (rank - 1).bit_length()))

    def shrink(m: int, n: int, k: int, splits: int, warps: int, stages: int) -> dict[str, int]:
        made = {"block_m": m, "block_n": n, "block_k": k, "split_k": splits, "num_warps": warps, "num_stages": stages}
        return {**made, "num_ctas": 1, "group_size_m": 8}

    def expand(m: int, n: int, k: int, warps: int) -> dict[str, int]:
        return {"block_m": m, "block_n": n, "block_k": k, "num_warps": warps, "num_stages": 2, "num_ctas": 1}

    if rows <= 128:
        return {
            "split 16": (shrink(16, wide, 128, 16, 4, 3), expand(16, 128, wide, 4)),
            "split 8": (shrink(16, wide, 256, 8, 4, 3), expand(16, 64, wide, 4)),
        }
    return {
        "split 4": (shrink(32, wide, 128, 4, 4, 3), expand(32, 128, wide, 4)),
        "split 1": (shrink(64, wide, 64, 1, 4, 3), expand(64, 128, wide, 8)),
    }


def _vllm(of: SimpleNamespace, problem: Problem) -> dict[str, Way]:
    x, slices, num_slots = problem.x, len(problem.widths), len(problem.ranks)
    meta = of.LoRAKernelMeta.make(num_slots, x.shape[0], x.device)
    meta.prepare_tensors(problem.int32(problem.slots))
    of.forget()

    def way(active: bool, configs: tuple[dict[str, int] | None, dict[str, int] | None] = (None, None)) -> Way:
        args = meta.meta_args(x.shape[0], active)

        def alone(y: Tensor, i: int) -> None:
            of.configure(*configs)
            h = torch.empty(slices, x.shape[0], problem.max_rank, dtype=torch.float32, device=x.device)
            of.lora_shrink(x, problem.copies[i].a, h, *args, problem.scaling)
            of.lora_expand(h, problem.copies[i].b, y, *args, offset_start=0, add_inputs=True)

        return Way(alone)

    made = {"vllm": way(False), "vllm active": way(True)}
    for name, configs in _vllm_configs(x.shape[0], problem.max_rank).items():
        made[f"vllm {name}"] = way(True, configs)
    return made


def _batch_info(of: SimpleNamespace, problem: Problem, chunk: int | None) -> Any:
    """SGLang has no -1: rows without an adapter name one more slot, of rank 0. ``chunk``: csgmv's segments."""
    num_slots = len(problem.ranks)
    slots = [num_slots if s < 0 else s for s in problem.slots]
    ids: list[int] = []
    lengths: list[int] = []
    for slot in sorted(set(slots)):
        left = slots.count(slot)
        while left > 0:
            lengths.append(left if chunk is None else min(left, chunk))
            ids.append(slot)
            left -= lengths[-1]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return of.LoRABatchInfo(
        use_cuda_graph=False,
        bs=len(ids),
        num_segments=len(ids),
        seg_indptr=problem.int32(starts),
        weight_indices=problem.int32(ids),
        lora_ranks=problem.int32([*problem.ranks, 0]),
        scalings=torch.full((num_slots + 1,), problem.scaling, device=problem.x.device),
        max_len=chunk or max(lengths),
        seg_lens=problem.int32(lengths),
        permutation=problem.int32(sorted(range(len(slots)), key=lambda row: slots[row])),
    )


def _sglang(of: SimpleNamespace, problem: Problem) -> dict[str, Way]:
    x, widths, rows = problem.x, problem.widths, problem.x.shape[0]
    by_adapter = _batch_info(of, problem, None)
    chunked = _batch_info(of, problem, 128 if rows >= 256 else 32 if rows >= 64 else 16)
    offsets, host_offsets = problem.int32(problem.offsets), torch.tensor(problem.offsets, dtype=torch.int32)

    def triton(y: Tensor, i: int) -> None:
        at = problem.copies[i]
        h = of.sgemm_lora_a_fwd(x, at.all_a, by_adapter, len(widths))
        if len(widths) == 1:
            of.sgemm_lora_b_fwd(h, at.all_b, by_adapter, y)
        elif len(widths) == 2:
            of.gate_up_lora_b_fwd(h, at.all_b, by_adapter, widths[0], y)
        else:
            of.qkv_lora_b_fwd(h, at.all_b, by_adapter, offsets, max(widths), y)

    def csgmv(y: Tensor, i: int) -> None:
        at = problem.copies[i]
        h = of.csgmv_shrink(x, at.all_a, chunked, len(widths))
        of.csgmv_expand(h, at.all_b, chunked, offsets, max(widths), y, host_offsets)

    made = {"sglang triton": Way(triton), "sglang csgmv": Way(csgmv)}
    for phase in (of.Phase.DECODE,) if rows <= 64 else (of.Phase.PREFILL,) if rows > 512 else of.Phase:
        made[f"sglang v2 {phase.value}"] = _v2(of, problem, phase)
    return made


def _aligned(of: SimpleNamespace, problem: Problem, block: int, token_slots: Tensor) -> Any:
    """triton_v2's route for grouped kernels: each slot's rows padded to blocks, and room as its own builder leaves."""
    rows, num_slots = len(problem.slots), len(problem.ranks)
    ids: list[int] = []
    blocks: list[int] = []
    for slot in range(num_slots):
        mine = [row for row, s in enumerate(problem.slots) if s == slot]
        for at in range(0, len(mine), block):
            part = mine[at : at + block]
            ids += part + [rows] * (block - len(part))
            blocks.append(slot)
    room = rows * block if rows < num_slots + 1 else rows + (num_slots + 1) * (block - 1)
    room = -(-room // block) * block
    return of.RouteView(
        view=of.RouteViewKind.ALIGNED,
        block_size=block,
        token_slots=token_slots,
        group_ids=None,
        groups_per_slot=1,
        max_loras=num_slots,
        maybe_sorted_pair_ids=problem.int32(ids + [rows] * (room - len(ids))),
        maybe_block_bucket_ids=problem.int32(blocks + [-1] * (room // block - len(blocks))),
        maybe_num_pairs_post_padded=problem.int32([len(ids)]),
    )


def _v2(of: SimpleNamespace, problem: Problem, phase: Any) -> Way:
    """triton_v2 by its own runner: its plan of the shape, its overlap with the base."""
    x, device = problem.x, problem.x.device
    sizes = x.shape[0], problem.max_rank, x.shape[1], sum(problem.widths)
    plan = rivals.v2_plan(of, phase, *sizes)
    runner = of.DenseLoraRunner(of.LoraWorkspace(), max_loras=len(problem.ranks), device=device, architecture="given")
    token_slots = problem.int32(problem.slots)
    runner.begin_batch(
        token_slots=token_slots,
        lora_ranks=problem.int32(problem.ranks),
        scalings=torch.full((len(problem.ranks),), problem.scaling, device=device),
        num_tokens=x.shape[0],
        phase=phase,
        graph_mode=True,
        is_prefill_graph=phase is of.Phase.PREFILL,
    )
    routes: dict[int, Any] = {}  # made once a step, like ours

    def route(key: tuple[Any, ...]) -> Any:
        if key[1] not in routes:
            routes[key[1]] = _aligned(of, problem, key[1], token_slots)
        return routes[key[1]]

    runner._build_route = route

    def alone(y: Tensor, i: int) -> None:
        at = problem.copies[i]
        bridge = runner.run_a(x, at.all_a, stack=len(problem.widths), plan=plan)
        runner.run_b(bridge, at.all_b, y, offsets=problem.offsets, plan=plan)

    def whole(i: int) -> Tensor:
        at = problem.copies[i]
        base = lambda: linear(x, at.weight)  # noqa: E731
        return runner.apply(x, base, plan, a=at.all_a, b=at.all_b, offsets=problem.offsets)

    return Way(alone, whole)


def _slices(problem: Problem, y: Tensor) -> list[Tensor]:
    return list(y.split(problem.widths, -1))


def _mm_loop(problem: Problem) -> Way:
    """Two matmuls for each adapter present, rows gathered by index, as PEFT's mixed batch does."""
    x = problem.x
    groups = {s: problem.int32([r for r, at in enumerate(problem.slots) if at == s]).long()
              for s in sorted(set(problem.slots) - {-1})}  # fmt: skip

    def alone(y: Tensor, i: int) -> None:
        at = problem.copies[i]
        for slot, index in groups.items():
            mine, rank = x[index], problem.ranks[slot]
            for a, b, part in zip(at.a, at.b, _slices(problem, y), strict=True):
                h = mine @ a[slot, :rank].t()
                part.index_add_(0, index, h @ b[slot, :, :rank].t(), alpha=problem.scaling)

    return Way(alone)


def _gathered_bmm(problem: Problem) -> Way:
    """A copy of its factors for every row."""
    slots = problem.int32(problem.slots).long()

    def alone(y: Tensor, i: int) -> None:
        at = problem.copies[i]
        for a, b, part in zip(at.a, at.b, _slices(problem, y), strict=True):
            h = torch.bmm(a[slots], problem.x.unsqueeze(2))  # [rows, max_rank, 1]
            part.add_(torch.bmm(b[slots], h).squeeze(2), alpha=problem.scaling)

    return Way(alone)


def ways(problem: Problem) -> dict[str, Way]:
    """Every rival that is at hand and can run this problem."""
    made: dict[str, Way] = {}
    if (of := rivals.vllm()) is not None:
        made |= _vllm(of, problem)
    if (of := rivals.sglang()) is not None:
        made |= _sglang(of, problem)
    made["mm loop"] = _mm_loop(problem)
    if len(problem.slots) <= 64 and -1 not in problem.slots:
        made["gathered bmm"] = _gathered_bmm(problem)
    return made


def settle(us: dict[str, float], rival: str, kept: str) -> str:
    """Replace all of a rival's ways but ``rival`` itself by its fastest, called ``kept``; returns which that is.

    With a base, the fastest is the one that is so with the base.
    """
    base = " + base"
    mine = [name for name in us if name.startswith(rival) and not name.endswith(base)]
    best = min(mine, key=lambda name: us.get(name + base, us[name]))
    found = {kept + end: us[best + end] for end in ("", base) if best + end in us}
    for name in mine:
        for end in ("", base):
            if name != rival:
                us.pop(name + end, None)
    us |= found
    return best
