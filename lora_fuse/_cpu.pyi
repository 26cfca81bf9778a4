from torch import Tensor

STACK_WORKSPACE: int

def multi_lora(
    out: Tensor,
    x: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    slot_rank: Tensor,
    slot_scaling: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    segment_starts: Tensor,
    row_starts: Tensor | None,
    row_pairs: Tensor | None,
    workspace: Tensor | None,
    threads: int,
) -> bool: ...
def use_exchange_api(capsule: object) -> bool: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def choose_isa(name: str) -> None: ...
