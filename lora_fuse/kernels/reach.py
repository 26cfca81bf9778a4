"""Every launch that serving can come to make, found without making one: what has to be compiled beforehand.

Which kernel a launch takes hangs on the layer, on how many rows and pairs a batch has and on the form of its routing.
Batch sizes choose among few plans, whose bounds are searched for; tensors that only tell sizes are on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from lora_fuse.adapters.sparse_runs import TABLE_FIELDS
from lora_fuse.kernels import sparse_delta
from lora_fuse.kernels.configs import tile_capacity
from lora_fuse.kernels.launch import Launch
from lora_fuse.kernels.multi_lora import Slice, behind, expand_launches, slice_launches
from lora_fuse.kernels.plan_rules import bounds
from lora_fuse.kernels.routing import sort_launch, tiles_launch

Sized = Callable[[int], list[Launch]]
Lists = tuple[Tensor | None, ...]  # of a routing, see Routing.tensors
_EVERY = 16  # sizes up to here are all tried, and then steps of a 16th


def sizes_of_each(made: Sized, least: int, most: int) -> list[int]:
    """The least size of every run of sizes from ``least`` to ``most`` for which ``made`` takes the same kernels.

    A run that lies between two neighbours that were tried, and takes other kernels than both of them, is not found.
    """

    def what(size: int) -> tuple[object, ...]:
        return tuple([launch.variant for launch in made(size)])

    found, before, size = [least], what(least), least
    while size < most:
        tried = min(size + max(size // _EVERY, 1), most, *[b for b in bounds() if b > size])
        now = what(tried)
        if now != before:
            found += _bounds(what, size, before, tried, now)
        size, before = tried, now
    return found


def _bounds(
    what: Callable[[int], tuple[object, ...]], low: int, at_low: object, high: int, at_high: object
) -> list[int]:
    """Where it changes in ``(low, high]``."""
    if at_low == at_high:
        return []
    if high - low == 1:
        return [high]
    middle = (low + high) // 2
    at_middle = what(middle)
    return [*_bounds(what, low, at_low, middle, at_middle), *_bounds(what, middle, at_middle, high, at_high)]


def _forms(
    made: Callable[[int, Lists, Tensor], list[Launch]],
    num_slots: int,
    most_rows: int,
    most_pairs: int,
) -> Iterator[Launch]:
    """What ``made`` makes of so many rows, a routing and its tiles, for every form of routing."""

    def of(num_rows: int, num_pairs: int, weights: bool, mixes: bool) -> list[Launch]:
        routing = (
            _ints(num_pairs),
            torch.empty(num_pairs, device="meta") if weights else None,
            _ints(num_slots + 1),
            _ints(num_rows + 1) if mixes else None,
            _ints(num_pairs) if mixes else None,
        )
        return made(num_rows, routing, _ints(tile_capacity(num_pairs, num_slots), 4))

    for weights, mixes in product((False, True), repeat=2):
        at_once = most_pairs if mixes else 1
        for pairs in sizes_of_each(lambda n: of(most_rows, n, weights, mixes), 1, most_rows * at_once):  # noqa: B023
            least_rows = -(-pairs // at_once)
            for rows in sizes_of_each(lambda n: of(n, pairs, weights, mixes), least_rows, most_rows):  # noqa: B023
                yield from of(rows, pairs, weights, mixes)


def multi_lora_launches(
    pools: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    starts: Sequence[int],
    columns: int,
    most_rows: int,
    most_pairs: int,
    backend: str,
) -> Iterator[Launch]:
    """What ``multi_lora`` can launch, for every form of routing: with weights or without, padded or not, rows with
    several pairs or none.

    Args:
        pools: ``(pool_a, pool_b, slot_rank, slot_scaling)`` of each slice, the layers' own: where they lie counts.
        starts: the first column of each in the output.
        columns: of the output.
        most_rows: of the flattened input.
        most_pairs: of a row.
        backend: Triton's name of the device kind.
    """
    slices = [Slice(*pool, start) for pool, start in zip(pools, starts, strict=True)]
    pool_a, _, slot_rank, _ = pools[0]
    num_slots, dtype = slot_rank.shape[0], pool_a.dtype

    def made(num_rows: int, routing: Lists, tiles: Tensor) -> list[Launch]:
        x = torch.empty(num_rows, pool_a.shape[1], dtype=dtype, device="meta")
        out = torch.empty(num_rows, columns, dtype=dtype, device="meta")
        plain = slice_launches(out, x, slices, routing, tiles, backend)
        return [*plain, *[behind(launch) for launch in plain if launch.ahead]]

    yield from _forms(made, num_slots, most_rows, most_pairs)


def routing_launches(num_slots: int, most_rows: int, most_pairs: int) -> Iterator[Launch]:
    """What building a routing on the device can launch. Args: as above, ``num_slots`` of the pools."""
    starts = _ints(num_slots + 1)

    def sort(num_rows: int) -> list[Launch]:
        return [sort_launch(_ints(num_rows), _ints(num_rows), starts, _ints(1))]

    def tiles(num_pairs: int) -> list[Launch]:
        return [tiles_launch(_ints(num_pairs), starts, _ints(tile_capacity(num_pairs, num_slots), 4))]

    for made, most in ((sort, most_rows), (tiles, most_rows * most_pairs)):
        for size in sizes_of_each(made, 1, most):
            yield from made(size)


def expand_reach(
    pools: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    starts: Sequence[int],
    columns: int,
    shrunk: tuple[int, int],
    most_rows: int,
    most_pairs: int,
    backend: str,
) -> Iterator[Launch]:
    """What ``expand_`` can launch where y and the shrink of every slot are columns of one tensor.

    Args:
        columns: of that tensor.
        shrunk: the first one of the shrink, and how many these are; for the others see ``multi_lora_launches``.
    """
    slices = [Slice(*pool, start) for pool, start in zip(pools, starts, strict=True)]

    def made(num_rows: int, routing: Lists, tiles: Tensor) -> list[Launch]:
        wide = torch.empty(num_rows, columns, dtype=pools[0][0].dtype, device="meta")
        return expand_launches(wide, wide.narrow(1, *shrunk), slices, routing, tiles, backend)

    yield from _forms(made, pools[0][2].shape[0], most_rows, most_pairs)


def sparse_reach(
    num_slots: int, sizes: tuple[int, int], dtype: torch.dtype, most_rows: int, most_pairs: int, backend: str
) -> Iterator[Launch]:
    """What ``sparse_delta_`` can launch. Args: slots of the pool; in and out features."""
    table = torch.empty(num_slots, TABLE_FIELDS, dtype=torch.int64, device="meta")

    def made(num_rows: int, routing: Lists, tiles: Tensor) -> list[Launch]:
        x, out = (torch.empty(num_rows, size, dtype=dtype, device="meta") for size in sizes)
        return sparse_delta.launches(out, x, table, routing, tiles, backend)

    yield from _forms(made, num_slots, most_rows, most_pairs)


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")
