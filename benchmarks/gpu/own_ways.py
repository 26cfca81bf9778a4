"""Our ways to run a linear layer with its LoRA part: the op after the product, and ``attach``'s options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import report
from benchmarks.gpu.rival_ways import Problem, Way
from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.routing import Routing
from lora_fuse.functional import multi_lora
from lora_fuse.nn import augmented, overlap

OVERLAP, AUGMENTED, AHEAD = (f"{report.OURS} {way}" for way in ("overlap", "augmented", "ahead"))
OPTIONS = {report.OURS: {}, OVERLAP: {"overlap": True}, AUGMENTED: {"augment": True}}  # of attach


def routing_of(slots: list[int], num_slots: int, device: torch.device) -> Routing:
    made = Routing.from_slots(torch.tensor(slots), num_slots)
    return Routing(*(None if t is None else t.to(device) for t in made.tensors), made.num_rows)


def pool_of(a: Tensor, b: Tensor, ranks: list[int], scaling: float) -> AdapterPool:
    """Slots with these factors, ``[num_slots, max_rank, in]`` and ``[num_slots, out, max_rank]``; A is shared."""
    num_slots, max_rank, fan_in = a.shape
    pool = AdapterPool(num_slots, max_rank, fan_in, b.shape[1], a.dtype, torch.device("meta"))
    pool.pool_a, pool.pool_b = a.view(-1, fan_in), b.mT.contiguous().view(num_slots * max_rank, -1)
    pool.slot_rank = torch.tensor(ranks, dtype=torch.int32, device=a.device)
    pool.slot_scaling = torch.full((num_slots,), scaling, device=a.device)
    return pool


def in_interpreter(y: Tensor, x: Tensor, pool: AdapterPool, routing: Routing) -> None:
    """What the op runs for CUDA tensors, on CPU tensors."""
    from lora_fuse.kernels.routing import build_tiles
    from lora_fuse.ops.multi_lora import _cuda_

    tiles = build_tiles(routing.rows, routing.segment_starts)
    _cuda_(y, x, *pool.tensors, *routing.tensors, tiles)


def own_ways(problem: Problem, pools: list[AdapterPool], routing: Routing) -> dict[str, Way]:
    """Those that ``attach`` would take for this shape, and the expand that starts while the shrink runs."""
    x, (width,) = problem.x, problem.widths

    def alone(y: Tensor, i: int) -> None:
        if y.is_cuda:
            multi_lora(x, pools[i], routing, out=y)
        else:
            in_interpreter(y, x, pools[i], routing)

    made = {report.OURS: Way(alone)}
    if x.is_cuda and overlap.overlaps(x.shape[0], x.shape[1], width):
        made[OVERLAP] = Way(None, _overlap(problem, pools, routing))
    room = augmented.has_room(x.shape[1], width, pools[0].pool_a.shape[0], x.itemsize)
    if room and x.shape[0] <= augmented.MOST_ROWS:
        made[AUGMENTED] = Way(None, _augmented(problem, pools, routing))
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0):
        made[AHEAD] = Way(_ahead(x, pools, routing))
    return made


def _ahead(x: Tensor, pools: list[AdapterPool], routing: Routing) -> Callable[[Tensor, int], None]:
    from lora_fuse.kernels.multi_lora import Slice, launches, plan_of

    made = plan_of(x, [Slice(*pools[0].tensors)], routing.num_pairs, "cuda")
    chosen, tiles = replace(made, expand=replace(made.expand, ahead=True)), routing.tiles
    assert tiles is not None

    def alone(y: Tensor, i: int) -> None:
        for launch in launches(y, x, [Slice(*pools[i].tensors)], routing.tensors, tiles, "cuda", chosen):
            launch.run()

    return alone


def _overlap(problem: Problem, pools: list[AdapterPool], routing: Routing) -> Callable[[int], Tensor]:
    def whole(i: int) -> Tensor:
        side = overlap.side_of(problem.x.device)
        assert side is not None
        shrink = overlap.SideShrink(problem.x, [pools[i]], problem.widths, routing, side)
        with shrink:
            y = linear(problem.x, problem.copies[i].weight)
        done = shrink.expand_(y, True)
        assert done is not None
        return done

    return whole


def _augmented(problem: Problem, pools: list[AdapterPool], routing: Routing) -> Callable[[int], Tensor]:
    width, rows = problem.widths[0], pools[0].pool_a.shape[0]
    beside = [
        augmented.Beside(torch.cat([f.weight, pool.pool_a]), None, (0,), [0], (width, rows))
        for f, pool in zip(problem.copies, pools, strict=True)
    ]
    return lambda i: augmented.linear_with_lora(problem.x, beside[i], problem.widths, [pools[i]], routing)[0]
