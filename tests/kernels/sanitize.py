"""Every Triton kernel once or a few times, at odd sizes: what compute-sanitizer runs (``test_gpu_sanitizer.py``).

Every kernel of ``lora_fuse.kernels`` has to be launched by one of ``LAUNCHES`` (``test_sanitize.py`` sees to it). Data
is made on the CPU and moved, so that hardly anything else runs on the device. ``--planted`` also reads out of bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import sparse_launches
import topk_cases
import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fuse.adapters.pool import AdapterPool
from lora_fuse.adapters.sparse_pool import SparsePool
from lora_fuse.kernels import fused_linear, sketch
from lora_fuse.kernels.fused_linear_plan import Plan
from lora_fuse.kernels.multi_lora import starts_ahead
from lora_fuse.kernels.normals import normals
from lora_fuse.kernels.routing import build_tiles, sort_slots
from lora_fuse.kernels.topk_plan import FIELDS
from lora_fuse.kernels.topk_tables import fills
from lora_fuse.nn.sparse_site import placed
from lora_fuse.ops import exchange
from lora_fuse.ops.expand import _cuda_ as expand
from lora_fuse.ops.multi_lora import _cuda_ as multi_lora
from lora_fuse.ops.multi_lora import _cuda_slices_ as slices
from lora_fuse.ops.plans import override_plans
from lora_fuse.ops.sparse_delta import _cuda_ as sparse_delta
from lora_fuse.ops.topk_call import Call
from lora_fuse.sparse import SparseMatrix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter is wrong in bf16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32,)


def moved(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def pool_of(num_slots: int, max_rank: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> AdapterPool:
    """Slots of different ranks, one of them empty."""
    pool = AdapterPool(num_slots, max_rank, fan_in, fan_out, dtype)
    for slot in range(num_slots - 1):
        rank = max(1, max_rank - 3 * slot)
        pool.write(slot, torch.randn(rank, fan_in), torch.randn(fan_out, rank), 0.5)
    return pool.to(DEVICE)


def routing_of(rows: int, num_slots: int, mixed: bool) -> list[Tensor | None]:
    """``rows, weights, segment_starts, row_starts, row_pairs``: a slot a row at most, or up to two weighted."""
    slots = torch.arange(rows) % (num_slots + 1) - 1
    pairs = [(int(slot), row) for row, slot in enumerate(slots) if slot >= 0]
    if mixed:
        pairs += [((int(slot) + 1) % num_slots, row) for row, slot in enumerate(slots) if slot >= 0 and row % 2]
    pairs.sort()
    starts = [sum(slot < s for slot, _ in pairs) for s in range(num_slots + 1)]
    at_rows = torch.tensor([row for _, row in pairs], dtype=torch.int32)
    weights = row_starts = row_pairs = None
    if mixed:
        weights, row_pairs = torch.rand(len(pairs)), torch.argsort(at_rows, stable=True).int()
        counts = torch.bincount(at_rows, minlength=rows)
        row_starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return moved(at_rows, weights, torch.tensor(starts, dtype=torch.int32), row_starts, row_pairs)


def columns(rows: int, width: int, dtype: torch.dtype, gap: int) -> Tensor:
    """``[rows, width]``, the rows ``gap`` elements apart; what lies behind the last one is not its own."""
    return (
        torch.randn((rows - 1) * (width + gap) + width, dtype=dtype)
        .to(DEVICE)
        .as_strided((rows, width), (width + gap, 1))
    )


def run_multi_lora() -> None:
    """Shrink, expand and mix; ranks beyond a block, in and out features that no block divides."""
    shapes = [
        (1, 100, 37, 5, 3, False),
        (23, 1300 if DEVICE.type == "cuda" else 300, 333, 20, 4, True),
        (40, 515, 130, 70, 3, False),
    ]
    for dtype in DTYPES:
        for rows, fan_in, fan_out, rank, num_slots, mixed in shapes[: None if DEVICE.type == "cuda" else 2]:
            pool, routing = pool_of(num_slots, rank, fan_in, fan_out, dtype), routing_of(rows, num_slots, mixed)
            tiles = build_tiles(routing[0], routing[2])
            for gap in (0, 3) if DEVICE.type == "cuda" else (3,):
                x, y = columns(rows, fan_in, dtype, gap), columns(rows, fan_out, dtype, gap)
                multi_lora(y, x, *pool.tensors, *routing, tiles)


def run_slices() -> None:
    """Layers in one launch, of widths that no block divides, with columns between them that nobody may touch."""
    for dtype in DTYPES:
        for mixed in (False, True):
            routing, rows = routing_of(9, 3, mixed), 9
            tiles = build_tiles(routing[0], routing[2])
            pools = [pool_of(3, 20, 64, width, dtype) for width in (77, 5, 130)]
            x, y = columns(rows, 64, dtype, 3), columns(rows, 77 + 9 + 5 + 130, dtype, 2)
            slices(y, x, [t for pool in pools for t in pool.tensors], [0, 86, 91], *routing, tiles)


def run_ahead() -> None:
    """The expand that starts while the shrink runs, where there is a device that can."""
    if starts_ahead("cuda", DEVICE):
        override_plans([{"expand": {"ahead": True}}])
        run_multi_lora()
        run_slices()
        override_plans(None)


def run_expand() -> None:
    """With every slot's shrink beside one another."""
    for dtype in DTYPES:
        for mixed in (False, True):
            routing, pools = routing_of(9, 3, mixed), [pool_of(3, 20, 64, width, dtype) for width in (77, 21)]
            tiles = build_tiles(routing[0], routing[2])
            h, y = columns(9, 2 * 60, dtype, 5), columns(9, 77 + 4 + 21, dtype, 2)
            expand(y, h, [t for pool in pools for t in pool.tensors[1:]], [0, 81], *routing, tiles)


def run_routing() -> None:
    """Slots out of range among the others; more rows than a block, and tile lists with room to spare."""
    for rows in (1, 100, 1501):
        slots = (torch.arange(rows, dtype=torch.int32) % 9 - 2).to(DEVICE)
        flag = torch.zeros(1, dtype=torch.int32).to(DEVICE)
        order, starts = sort_slots(slots, 5, flag)
        build_tiles(order, starts)
        build_tiles(order, starts, torch.empty(rows + 5, 4, dtype=torch.int32, device=DEVICE))


def run_sparse_delta() -> None:
    """Rows that are gathered, a slot with more, mixes; features that no block divides."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            sparse_launches.as_on_a_gpu(patch)
        for dtype in DTYPES:
            filled = SparsePool(2, 301, 37, dtype)
            for slot in range(2):
                delta = torch.randn(37, 301).to(dtype)
                filled.write(slot, SparseMatrix.from_mask(delta, torch.rand(37, 301) < 0.1))
            pool = filled.to(DEVICE)
            for rows, mixed in ((3, False), (19, True), (50, False))[: None if DEVICE.type == "cuda" else 2]:
                routing = routing_of(rows, 2, mixed)
                tiles = build_tiles(routing[0], routing[2])
                x, y = columns(rows, 301, dtype, 3), columns(rows, 37, dtype, 5)
                sparse_delta(y, x, pool.handle, pool.out_features, False, True, *routing, tiles)


def bitmap_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, ceil(columns / 32)]`` int32: bits of each row, and entries before each word."""
    rows, cols = mask.shape
    bits = torch.nn.functional.pad(mask, (0, -cols % 32)).view(rows, -1, 32).long()
    words = (bits << torch.arange(32)).sum(-1)
    counts = bits.sum(-1).flatten()
    return words.where(words < 2**31, words - 2**32).int(), (counts.cumsum(0) - counts).view(rows, -1).int()


def run_sketch() -> None:
    """Draws, products both ways with a drawn Q and a given one, squares; a tensor, a difference, a bitmap."""
    m, n, columns_of_q = (301, 147, 21) if DEVICE.type == "cuda" else (33, 19, 5)
    mask = torch.rand(m, n) < 0.2
    words, starts = moved(*bitmap_of(mask))
    values, first, second = moved(torch.randn(int(mask.sum())), torch.randn(1, m, n), torch.randn(1, n, m).mT)
    sources = [sketch.Source((1, m, n), values, words=words, starts=starts)]
    sources += [sketch.Source((1, m, n), first.to(dtype)) for dtype in DTYPES]
    sources += [sketch.Source((1, m, n), first.to(DTYPES[-1]), second, (1.0, -1.0))]
    for source in sources:
        for transposed, reduced in ((False, n), (True, m)):
            (q,) = moved(torch.randn(1, columns_of_q, reduced))
            for given in (None, q) if DEVICE.type == "cuda" else (q if transposed else None,):
                sketch.product(source, given, columns_of_q, transposed, (7, 1))
        sketch.squares(source)
    normals(3, 1, (2, n, columns_of_q), DEVICE)


def run_fused_linear() -> None:
    """Base and LoRA in one launch; programs that wait for others, and tiles that two programs share."""
    small = Plan(16, 1, 16, 32, 1, 64, 4, 3, 4, 2)
    plans = [small, replace(small, block_m=32, blocks_m=2, block_n=32, splits=2)]
    for dtype in DTYPES:
        for rows, chosen in zip((5, 40), plans, strict=True):
            pool, routing = pool_of(3, 17, 130, 37, dtype), routing_of(rows, 3, rows == 5)
            tiles = build_tiles(routing[0], routing[2])
            weight, bias = moved(torch.randn(37, 130, dtype=dtype), torch.randn(37, dtype=dtype))
            x, y = columns(rows, 130, dtype, 3), columns(rows, 37, dtype, 3)
            (counters,) = moved(torch.zeros(fused_linear.num_counters(37), dtype=torch.int32))
            fused_linear.launch(y, x, weight, bias, pool.tensors, routing, tiles, counters, chosen).run()


def run_exchange() -> None:
    """A whole tensor and kept entries, as a bitmap and as columns, there and back."""
    entries = []
    for density in (None, 0.4, 0.01):
        weight = torch.randn(19, 301)
        mask = torch.rand(19, 301) < (density or 2.0)
        matrix = None if density is None else placed(SparseMatrix.from_mask(weight, mask), DEVICE)
        weight, own = moved(weight, torch.randn(19, 301)[mask])
        entries.append(exchange.Entry(matrix, weight, own))
    made, weights = exchange.Exchange(entries), [entry.weight for entry in entries]
    room = made.make_room()
    made.write(weights, room)
    made.undo(weights, room)


def run_topk() -> None:
    """Lists of every dtype, rows on chip and beyond, thresholds that the sample misses; every form of result."""
    sizes = [(5, 301), (1, 4099)] if DEVICE.type == "cuda" else [(3, 53), (1, 433)]
    for margin in (topk_cases.SMALL.margin, -30.0):
        plan = replace(topk_cases.SMALL, margin=margin)
        for scope in ("tensor", "row", "global"):
            dtypes = DTYPES[0], DTYPES[-1]
            xs = moved(*(torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)))
            minus = moved(*(torch.randn_like(x) for x in xs)) if scope == "tensor" else None
            form = "mask" if scope == "global" else "dense"
            topk_cases.run(xs, 0.3, scope, minus, form, guarded=scope == "row", plan=plan)
            if margin > 0:  # a bitmap, or columns
                Call(xs, minus, 0.01 if scope == "tensor" else 0.3, scope).matrices_on_gpu(scope == "row")
    table = torch.zeros(3, len(FIELDS), dtype=torch.int64, device=DEVICE)
    for launch in fills(table, [[row] * len(FIELDS) for row in range(3)]):  # as they are where a graph is captured
        launch.run()


LAUNCHES: list[Callable[[], None]] = [
    run_multi_lora,
    run_slices,
    run_ahead,
    run_expand,
    run_fused_linear,
    run_routing,
    run_sparse_delta,
    run_exchange,
    run_sketch,
    run_topk,
]


@triton.jit
def _planted_kernel(x, y, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y + offs, tl.load(x + offs + 64))


def run_planted() -> None:
    """Reads beyond the end: whoever looks on has to notice."""
    x, y = moved(torch.zeros(64), torch.zeros(64))
    _planted_kernel[(1,)](x, y, BLOCK=64)


def main(planted: bool) -> None:
    torch.manual_seed(0)
    for launch in LAUNCHES:
        launch()
    if planted:
        run_planted()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("all kernels were launched")


if __name__ == "__main__":
    main("--planted" in sys.argv)
