"""Launch plans of one's own for GPU kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any


def override_plans(rules: Sequence[Mapping[str, Any]] | str | PathLike[str] | None) -> None:
    """Launch ``multi_lora`` on GPUs by other plans than the shipped ones, from the next call on, in this process.

    Each rule is ``{"where": {...}, "shrink": {...}, "expand": {...}}``, all three optional. Where several rules fit a
    shape, they are applied in their order. A row's result stays independent of its batch: what decides how sums are cut
    (``split_len``, ``block_k``) may hang on ``in_features``, ``max_rank``, ``dtype`` and ``backend`` only.

    - ``where``: a value or a list of values for ``in_features``, ``out_features`` (of all slices), ``max_rank``,
      ``slices`` (layers in one launch), ``dtype``, ``backend`` ("cuda", "hip"); ``pairs``: ``[least, most]`` pairs of a
      row and an adapter. Captured and compiled forwards have ``max_pairs`` (``attach``) for each row, whatever is
      selected; layers whose A lies behind the weight (``augment``) count as ``in_features`` 1, and their ``shrink`` is
      none.
    - ``shrink``: ``split_len``, ``planes`` (1 or "all"), ``block_k``, ``num_warps``, ``num_stages``.
    - ``expand``: ``block_n``, ``steps``, ``ahead``, ``num_warps``, ``num_stages``.

    Call it while no forward runs, before ``warmup`` and before graphs are captured, which keep what they recorded. A
    plan that a device has no room for is Triton's error at the first launch, so in ``warmup``.

    Args:
        rules: a list of rules, or a JSON file of one; None: the shipped plans again.
    Raises:
        ValueError, TypeError: a rule names what there is not, or a value that is not accepted; nothing is changed.
        OSError: the file cannot be read.
    """
    from lora_fuse.kernels import plan_rules  # not when lora_fuse is imported, as all of that room

    plan_rules.use_rules(rules)
