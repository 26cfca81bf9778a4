"""The launch plans: pure functions, so their promises are checked over the whole grid of shapes."""

from __future__ import annotations

import itertools

import pytest

from lora_fuse.kernels.configs import mix_steps, plan, tile_capacity, tile_rows

FEATURES = (1, 100, 384, 4096, 6144, 14336, 28672)
RANKS = (1, 8, 16, 17, 64, 100, 512)
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_decides_a_rows_bits_does_not_depend_on_the_batch(dtype, backend):
    for in_features, out_features, rank in itertools.product(FEATURES, FEATURES, RANKS):
        made = [
            plan(in_features, out_features * n, rank, t, s, dtype, backend, n, None, processors)
            for t in (1, 16, 64, 4096)
            for s in (1, 64)
            for n in (1, 3)
            for processors in (108, 132, 304)
        ]
        assert len({(p.shrink.split_len, p.shrink.block_r, p.expand.block_r, p.expand.precision) for p in made}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plan_holds_together(dtype):
    for in_features, out_features, rank, pairs, slots in itertools.product(
        FEATURES, FEATURES, RANKS, (1, 5, 64, 4096), (1, 8, 64)
    ):
        made = plan(in_features, out_features, rank, pairs, slots, dtype, "cuda")
        shrink, expand = made.shrink, made.expand
        splits = -(-in_features // shrink.split_len)
        assert shrink.split_len % shrink.block_k == 0
        assert shrink.planes in (1, splits)
        assert shrink.block_m == expand.block_m == tile_rows(pairs) <= 32  # no wgmma: its sums may differ
        assert shrink.block_r % expand.block_r == 0  # the shrink writes whole blocks, as far as there are ranks
        assert expand.block_r >= rank or rank > 64
        assert min(shrink.block_r, shrink.block_k, expand.block_r, expand.block_n) >= 16  # what tl.dot takes


def test_few_rows_are_spread_and_many_are_not_cut_small():
    def programs(pairs, slots, out_features):
        made = plan(4096, out_features, 16, pairs, slots, "bfloat16", "cuda").expand
        return -(-pairs // made.block_m) * -(-out_features // (made.block_n * made.steps)), made.block_n * made.steps

    assert programs(1, 8, 4096) == (64, 64)
    padded = plan(4096, 4096, 16, 64, 9, "bfloat16", "cuda", num_rows=16).expand  # a captured batch has room for mixes
    assert padded.block_n * padded.steps == 64
    assert programs(64, 64, 4096)[1] == 256  # wide loads of B for rows that all want others
    many, columns = programs(4096, 8, 4096)
    assert many >= 264
    assert columns >= 512  # h is read once for all of them


def test_larger_cards_get_more_programs():
    def programs(rows, processors):
        made = plan(4096, 28672, 16, rows, 8, "bfloat16", "cuda", 1, None, processors).expand
        return -(-rows // made.block_m) * -(-28672 // (made.block_n * made.steps))

    for rows in (1, 16, 64, 4096):
        found = [programs(rows, processors) for processors in (20, 132, 304)]
        assert found == sorted(found)
        assert all(n >= min(448, p // 2) for n, p in zip(found, (20, 132, 304), strict=True))
    assert programs(16, 20) < programs(16, 304)


def test_rows_with_several_pairs_take_few_programs():
    for rows, blocks in itertools.product((1, 7, 64, 4096), (1, 3, 64, 448)):
        steps = mix_steps(rows, blocks)
        programs = rows * -(-blocks // steps)
        assert programs <= max(264, rows)
        assert steps == 1 or 2 * programs > 264 or programs == rows


def test_tiles_are_enough():
    """For any way that pairs fall to slots."""
    for pairs, slots in itertools.product((0, 1, 15, 16, 17, 100, 1024, 1025, 5000), (1, 3, 64)):
        rows = tile_rows(pairs)
        for used in range(1, slots + 1):
            spread = [pairs // used + (i < pairs % used) for i in range(used)]
            lopsided = [max(pairs - used + 1, 0)] + [1] * min(used - 1, pairs)
            for counts in (spread, lopsided):
                assert sum(-(-c // rows) for c in counts if sum(counts) == pairs) <= tile_capacity(pairs, slots)
