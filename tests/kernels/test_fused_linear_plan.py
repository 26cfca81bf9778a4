"""The plans of the one launch: pure functions, checked over the whole grid of shapes."""

from __future__ import annotations

import itertools

import pytest

from lora_fuse.kernels.fused_linear_plan import CUT_ALIGN, CUTS, MAX_ROWS, plan, serves

FEATURES = (16, 96, 384, 1024, 4096, 6144, 11008, 14336, 16896, 28672, 128256)
ROWS = (1, 4, 16, 17, 32, 33, 64)


def served(dtype="bfloat16"):
    for rows, fan_in, fan_out, rank in itertools.product(ROWS, FEATURES, FEATURES, (8, 16, 64)):
        if serves(rows, fan_in, fan_out, rank, dtype):
            yield rows, fan_in, fan_out, plan(rows, fan_in, fan_out, rank, 9, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_plan_holds_together(dtype):
    for rows, fan_in, fan_out, rank in itertools.product(ROWS, FEATURES, FEATURES, (1, 16, 100)):
        made = plan(rows, fan_in, fan_out, rank, 9, dtype)
        assert made.block_m * made.blocks_m >= rows
        assert made.cut_len * CUTS >= fan_in
        assert made.cut_len % CUT_ALIGN == 0
        assert CUT_ALIGN % made.block_k == 0
        assert CUTS % made.splits == 0
        assert made.blocks_m == 1 or made.splits > 1  # two sums and their totals would not fit in registers
        assert min(made.block_m, made.block_n, made.block_k) >= 16
        assert 0 < made.shrinkers <= 9 * CUTS * -(-rank // 16)
    assert plan(4, 64, 64, 16, 0, dtype).shrinkers == 0


def test_where_sums_are_cut_does_not_depend_on_the_batch():
    for fan_in, fan_out in itertools.product(FEATURES, FEATURES):
        assert len({plan(rows, fan_in, fan_out, 16, 9, "bfloat16").cut_len for rows in ROWS}) == 1
    assert all(made.block_m <= 32 for *_, made in served())  # taller ones would take wgmma on sm_90


def test_two_programs_share_a_processor_with_enough_on_the_way():
    for rows, _, fan_out, made in served():
        buffers = made.num_stages - 1
        stage = (made.block_n + made.block_m * made.blocks_m) * made.block_k * 2
        assert 2 * (buffers * stage + 2048) <= 227 << 10
        assert buffers >= 4
        assert 2 * buffers * made.block_n * made.block_k * 2 >= 64 << 10, (rows, fan_out)  # of W


def test_the_shapes_of_decoding_are_served():
    for rows, (fan_in, fan_out) in itertools.product((1, 16, 32), ((4096, 4096), (4096, 6144), (4096, 28672))):
        assert serves(rows, fan_in, fan_out, 16, "bfloat16")
    assert serves(64, 4096, 4096, 16, "bfloat16")
    for no in ((MAX_ROWS + 1, 4096, 4096, 16), (0, 4096, 4096, 16), (4, 4100, 64, 16), (4, 4096, 64, 65)):
        assert not serves(*no, "bfloat16")
    assert not serves(4, 4096, 64, 16, "float32")
