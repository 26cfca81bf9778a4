"""Launches that are made again: never a kernel that Triton would not have chosen, never an argument of another call."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from aot import TARGETS, specialization
from torch import Tensor

from lora_fuse import _cpu
from lora_fuse.kernels.configs import tile_capacity
from lora_fuse.kernels.launch import Launch, arguments_of
from lora_fuse.kernels.multi_lora import Slice, expand_launches, launches
from lora_fuse.kernels.routing import sort_launch, tiles_launch


def placed(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0, spread: int = 0) -> Tensor:
    """Rows ``spread`` elements further apart than need be, ``offset`` elements behind an aligned address."""
    pitch = shape[-1] + spread
    room = torch.empty(offset + shape[0] * pitch + 16, dtype=dtype)
    offset += -room.data_ptr() % 16 // dtype.itemsize
    return room[offset:].as_strided(shape, (pitch, 1) if len(shape) == 2 else (1,))


def operands(
    rows: int = 5,
    in_features: int = 48,
    out_features: int = 32,
    rank: int = 16,
    slots: int = 3,
    dtype: torch.dtype = torch.float16,
    weights: bool = False,
    mixes: bool = False,
    x_offset: int = 0,
    x_spread: int = 0,
    y_offset: int = 0,
    y_spread: int = 0,
    tiles_offset: int = 0,
) -> tuple[Tensor | None, ...]:
    """Of ``multi_lora_``."""
    ints = torch.int32
    return (
        placed((rows, out_features), dtype, y_offset, y_spread),
        placed((rows, in_features), dtype, x_offset, x_spread),
        placed((slots * rank, in_features), dtype),
        placed((slots * rank, out_features), dtype),
        placed((slots,), ints),
        placed((slots,), torch.float32),
        placed((rows,), ints),
        placed((rows,), torch.float32) if weights else None,
        placed((slots + 1,), ints),
        placed((rows + 1,), ints) if mixes else None,
        placed((rows,), ints) if mixes else None,
        placed((tile_capacity(rows, slots), 4), ints, tiles_offset),
    )


def made_of(given: tuple[Tensor | None, ...], backend: str = "cuda") -> list[Launch]:
    out, x, *rest = given
    return launches(out, x, [Slice(*rest[:4])], rest[4:9], rest[9], backend)  # type: ignore[arg-type]


VARIANTS: dict[str, list[Any]] = {
    "rows": [1, 2, 16, 17, 32, 1025],
    "in_features": [1, 48, 50, 4096],
    "out_features": [1, 16, 33],
    "rank": [1, 3, 16, 40],
    "slots": [1, 16],
    "dtype": [torch.bfloat16, torch.float32],
    "weights": [True],
    "mixes": [True],
    "x_offset": [1, 8],
    "x_spread": [1, 16],
    "y_offset": [4],
    "y_spread": [8, 16],
    "tiles_offset": [1],
}


def every_case() -> list[dict[str, Any]]:
    """The plain case, each variant of one thing, and of two."""
    single = [(name, value) for name, values in VARIANTS.items() for value in values]
    pairs = [dict(pair) for pair in itertools.combinations(single, 2) if pair[0][0] != pair[1][0]]
    return [{}, *[dict([one]) for one in single], *pairs]


def test_one_key_means_one_kernel():
    """By what Triton itself specialises on, for all arguments of all launches. Other keys may mean the same kernel."""
    target = TARGETS["sm_90"][0]
    chosen: dict[bytes, Any] = {}
    kernels = set()
    for case in every_case():
        given = operands(**case)
        key = _cpu.operand_key(given)
        assert key is not None
        want = tuple((m.grid, specialization(m, target)) for m in made_of(given, target.backend))
        assert chosen.setdefault(key, want) == want, case
        kernels.update(what for _, what in want)
    assert len(chosen) > 300
    assert len(kernels) > 100  # so there was something to confuse


@pytest.mark.parametrize("value", [0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, -16, None], ids=str)
def test_what_triton_specialises_on(value):
    """1, multiples of 16, the width and None: what a key has to tell apart, and ahead-of-time tests compile for."""
    launch = sort_launch(*[torch.zeros(4, dtype=torch.int32) for _ in range(4)])
    replaced = Launch(launch.kernel, launch.grid, (*launch.args[:5], value), launch.constexprs, 4, 3)
    got = specialization(replaced, TARGETS["sm_90"][0])[1][5]
    if value is None or value == 1:
        assert got == ("constexpr", value)
    else:
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        assert got == (width, "D" if value % 16 == 0 else "")


def test_sizes_of_a_batch_choose_no_kernel_of_their_own():
    target = TARGETS["sm_90"][0]

    def of(rows: int, **case: Any) -> set[Any]:
        return {specialization(m, target) for m in made_of(operands(rows=rows, rank=3, mixes=True, **case))}

    wide = {rows: of(rows, slots=12) for rows in (1, 2, 5, 15, 16)}
    assert len({frozenset(kernels) for kernels in wide.values()}) == 1

    def of_routing(rows: int) -> set[Any]:
        slots, starts, tiles = (
            torch.zeros(shape, dtype=torch.int32) for shape in (rows, 4, (tile_capacity(rows, 3), 4))
        )
        return {
            specialization(m, target)
            for m in (sort_launch(slots, slots, starts, slots), tiles_launch(slots, starts, tiles))
        }

    assert of_routing(1) == of_routing(16) == of_routing(100)


@pytest.mark.parametrize("case", [{}, {"mixes": True, "weights": True}, {"y_offset": 4, "x_spread": 16}], ids=str)
def test_arguments_are_those_of_the_new_operands(case):
    """What launches would be given for other tensors, though they were not asked."""
    first = operands(**case)
    arguments = arguments_of(made_of(first), first)
    assert arguments is not None
    second = operands(**case)
    assert _cpu.operand_key(first) == _cpu.operand_key(second)
    made = made_of(second)
    scratch = [t for launch in made for t in launch.scratch]
    assert [(t.shape, t.dtype) for t in scratch] == arguments.scratch
    got = arguments.values([0 if t is None else t.data_ptr() for t in (*second, *scratch)])
    for launch, pick in zip(made, arguments.picks, strict=True):
        want = [v.data_ptr() if isinstance(v, Tensor) else v for v in launch.bound]
        passed = [0 if v is None else v for v in want]
        assert [0 if v is None else v for v in pick(got)] == passed


def test_operands_in_one_tensor():
    """As the augmented product leaves them: y and h are columns of one tensor, 3-d views of it are what the op gets."""

    def of() -> tuple[Tensor | None, ...]:
        both, (_, _, _, *rest) = torch.zeros(5, 1, 32 + 48, dtype=torch.float16), operands()
        return both[..., :32], both[..., 32:], *rest

    first, second = of(), of()
    made = []
    for out, h, *rest in (first, second):
        assert out is not None
        assert h is not None
        own = Slice(rest[0], *rest[:3])  # type: ignore[arg-type]
        made.append(expand_launches(out.view(5, 32), h.view(5, 48), [own], rest[3:8], rest[8], "cuda"))  # type: ignore[arg-type]
    arguments = arguments_of(made[0], first)
    assert arguments is not None
    got = arguments.values([0 if t is None else t.data_ptr() for t in second])
    for launch, pick in zip(made[1], arguments.picks, strict=True):
        assert [v or 0 for v in pick(got)] == [v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in launch.bound]


class TestPlacing:
    """Tensors that are no operands themselves."""

    def setup_method(self):
        self.wide, self.other = torch.zeros(4, 24), torch.zeros(4)

    def placed(self, tensor, *operands):
        plain = sort_launch(*[self.other.int()] * 4)
        others = [self.other] * 3
        launch = Launch(plain.kernel, (1,), (tensor, *others, *plain.args[4:]), plain.constexprs, 4, 3)
        return arguments_of([launch], (*operands, self.other))

    def test_views_move_with_what_they_are_views_of(self):
        arguments = self.placed(self.wide[:, 8:], self.wide)
        assert arguments is not None
        assert arguments.picks[0](arguments.values([1000, 2000]))[:2] == (1032, 2000)

    def test_a_copy_belongs_to_no_operand(self):
        assert self.placed(self.wide.t().contiguous(), self.wide) is None

    def test_a_view_of_memory_that_two_operands_share(self):
        halves = self.wide[:2], self.wide[2:]
        assert self.placed(self.wide[1:], *halves) is None
        assert self.placed(self.wide[2:, :3], *halves) is not None


class TestKeys:
    def test_all_that_can_differ(self):
        base = torch.zeros(6, 8)
        seen = [
            base,
            base.double(),
            base.int(),
            base[:5],
            base[:, :7],
            base.t(),
            base.view(6, 8, 1),
            base.view(-1),
            base.view(-1)[1:41].view(5, 8),
        ]
        keys = [_cpu.operand_key((t,)) for t in seen] + [
            _cpu.operand_key(other) for other in ((None,), (None, None), (0,), (-1,))
        ]
        assert None not in keys
        assert len(set(keys)) == len(keys)
        assert _cpu.operand_key((torch.ones(6, 8),)) == keys[0]

    def test_no_key_without_memory(self):
        for t in (torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), "text", torch.zeros([1] * 9)):
            assert _cpu.operand_key((t,)) is None

    def test_found_again_by_the_key_and_called_with_addresses(self):
        x, seen = torch.zeros(3, 4), []
        ready = {_cpu.operand_key((x, None)): lambda addresses: not seen.append(addresses)}
        assert _cpu.launch_again(ready, (x, None))
        assert seen == [(x.data_ptr(), 0)]
        assert not _cpu.launch_again(ready, (x[:2], None))
        assert not _cpu.launch_again({key: lambda addresses: False for key in ready}, (x, None))
        with pytest.raises(ZeroDivisionError):
            _cpu.launch_again({key: lambda addresses: 1 / 0 for key in ready}, (x, None))
        assert len(seen) == 1
