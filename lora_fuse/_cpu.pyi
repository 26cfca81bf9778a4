from collections.abc import Sequence
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
def isa() -> str: ...
def available_isas() -> list[str]: ...
def choose_isa(name: str) -> None: ...
