from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lora_fuse.adapters.routing import Routing

_Array = np.ndarray[Any, Any]

STACK_WORKSPACE: int

def multi_lora(
    out: Tensor,
    x: Tensor,
    pool: tuple[Tensor, Tensor, Tensor, Tensor],
    routing: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
    threads: int,
) -> bool: ...
def multi_lora_eager(out: Tensor, x: Tensor, buffers: dict[str, Tensor | None], routing: Routing, /) -> bool: ...
def serve(y: Tensor, x: Tensor, local: Any, buffers: dict[str, Tensor | None], /) -> bool: ...
def serve_packed(
    y: Tensor, x: Tensor, local: Any, parts: tuple[tuple[dict[str, Tensor | None] | None, int], ...], /
) -> bool: ...
def may_bypass(x: Tensor, weights: Tensor | None) -> bool: ...
def fill_routing(
    fields: tuple[_Array, _Array | None, _Array, _Array | None, _Array | None],
    entries: Sequence[Sequence[tuple[int, float]]],
    which: Sequence[int],
    outer: int,
    inner: int,
) -> None: ...
def set_eager_queries(queries: dict[str, object]) -> None: ...
def use_exchange_api(capsule: object) -> bool: ...
def operand_key(operands: tuple[Tensor | int | None, ...]) -> bytes | None: ...
def launch_again(ready: dict[bytes, Any], operands: tuple[Tensor | int | None, ...]) -> bool: ...
def set_ready_launches(ready: dict[bytes, Any]) -> None: ...

class DirectLaunches:
    def __init__(
        self,
        launch: int,
        device: int,
        otherwise: Callable[[tuple[int, ...]], bool],
        hooked: Callable[[], bool],
        current_device: Callable[[], int],
        current_stream: Callable[[int], int],
        scratch: Sequence[Callable[[], Tensor]],
    ) -> None: ...
    def add(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, parameters: list[tuple[int, int]]
    ) -> None: ...
    def __call__(self, addresses: tuple[int, ...]) -> bool: ...

def isa() -> str: ...
def available_isas() -> list[str]: ...
def choose_isa(name: str) -> None: ...

class Selection:
    def __init__(
        self, xs: list[Tensor], minus: list[Tensor] | None, shapes: list[tuple[int, int]], scope: str, ks: list[int], /
    ) -> None: ...
    def select(self, threads: int, histogram: bool, /) -> int: ...
    def kept(self) -> list[int]: ...
    def write_mask(self, out: list[Tensor], threads: int, /) -> None: ...
    def write_dense(self, out: list[Tensor], fresh: bool, threads: int, /) -> None: ...
    def write_sparse(
        self, out: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], own: bool, threads: int, /
    ) -> None: ...

SPARSE_LANES: int
SPARSE_STRIP: int

class SparsePositions:
    def __init__(self, row_starts: Tensor, columns: Tensor | None, bitmap: Tensor | None, num_cols: int) -> None: ...
    def column_index(self, out: Tensor) -> None: ...
    def order(self, starts: Tensor, order: Tensor, wide: bool) -> int: ...
    def pack(
        self, values: Tensor, starts: Tensor, order: Tensor, packed_values: Tensor, packed_gaps: Tensor
    ) -> None: ...

class SparseSlot:
    def __init__(
        self,
        in_features: int,
        out_features: int,
        values: Tensor | None,
        gaps: Tensor | None,
        starts: Tensor | None,
        order: Tensor | None,
        bias: Tensor | None,
    ) -> None: ...

class SparseSlots:
    def __init__(self, in_features: int, out_features: int, slots: Sequence[SparseSlot | None]) -> None: ...

def sparse_write(
    writes: Sequence[tuple[SparsePositions, Tensor, Tensor | None, Tensor | None]], threads: int
) -> None: ...
def sparse_delta_linear(
    out: Tensor,
    x: Tensor,
    slots: SparseSlots,
    routing: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
    threads: int,
) -> bool: ...
def sparse_delta_linear_eager(out: Tensor, x: Tensor, slots: SparseSlots, routing: Routing) -> bool: ...
