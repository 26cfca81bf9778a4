"""What every routed op refuses before it touches memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fuse.adapters.routing import Routing


class RefusesRouting:
    """What no routed op may read: rows, pairs and segments outside of what is there.

    A subclass sets up a call for five rows, pairs ``PAIRS`` and three slots; ``refuse`` makes it with other tensors.
    """

    routing: Routing

    def refuse(self, match: str, **changes: Any) -> None:
        raise NotImplementedError

    @pytest.mark.parametrize("value", [-1, 5, 2**31 - 1, -(2**31)])
    def test_rows_out_of_range(self, value):
        rows = self.routing.rows.clone()
        rows[1] = value
        self.refuse("rows: value", rows=rows)

    @pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
    def test_row_pairs_out_of_range(self, value):
        pairs = self.routing.row_pairs.clone()
        pairs[0] = value
        self.refuse("row_pairs: value", row_pairs=pairs)

    @pytest.mark.parametrize("starts", [[0, 2, 1, 4], [0, 1, 3, 5], [1, 2, 3, 4], [0, -1, 3, 4], [0, 1, 4]], ids=str)
    def test_segment_starts(self, starts):
        self.refuse("segment_starts", segment_starts=torch.tensor(starts, dtype=torch.int32))
