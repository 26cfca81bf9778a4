"""Slots that a tensor on a device asks for and that hold no adapter: found there, reported once the device is known to
have got that far, without ever waiting for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Posted:
    flag: Tensor  # [1] on the host; holds what the device found once `event` has happened
    event: torch.cuda.Event | None
    asked: Tensor  # the slots as they were given
    wrong: Tensor  # [num_tokens] bool, on the device
    held: dict[str, int]


class SlotErrors:
    """What devices were asked to find out and has not been looked at."""

    def __init__(self) -> None:
        self.pending: deque[_Posted] = deque()

    def post(self, flag: Tensor, asked: Tensor, wrong: Tensor, held: dict[str, int]) -> None:
        """Have a flag sent to the host.

        Args:
            flag: ``[1]`` int32, not zero if something is wrong.
            asked, wrong: ``[num_tokens]``, the slots asked for and which of them are refused.
            held: name -> slot that would have been accepted.
        """
        event = None
        host = torch.zeros(1, dtype=torch.int32, pin_memory=flag.device.type == "cuda")
        host.copy_(flag, non_blocking=True)
        if flag.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(flag.device))
        self.pending.append(_Posted(host, event, asked, wrong, held))

    def check(self, wait: bool = False) -> None:
        """Raise what has been found by now, or, with ``wait``, what will be found.

        Raises:
            ValueError: naming the first row and its slot. It is raised once.
        """
        while self.pending:
            try:
                posted = self.pending.popleft()
            except IndexError:  # another thread looks too
                return
            if posted.event is not None:
                if wait:
                    posted.event.synchronize()
                elif not posted.event.query():
                    self.pending.appendleft(posted)
                    return
            if int(posted.flag):
                row = int(posted.wrong.nonzero()[0])
                raise ValueError(
                    f"selection: row {row} of a tensor of slots on {posted.asked.device} asked for slot "
                    f"{int(posted.asked[row])}; accepted were -1 (base) and {posted.held}. Such rows were computed as "
                    "base rows"
                )
