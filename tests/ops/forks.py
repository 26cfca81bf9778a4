"""What a fork leaves of a kernel's threads."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Python 3.12 warns of what these tests are about
QUIET = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def check_use_fork_use(call: Callable[[Tensor | None], Tensor]) -> None:
    """``call(out)`` gives the same bits before a fork, in the child and afterwards.

    Args:
        call: large enough for a team of threads; adds to ``out``, or to zeros if None.
    """
    want = call(None)
    out = torch.zeros_like(want)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no team survives a fork: this must run serially, not hang
        with torch.no_grad():
            call(out)
        torch.set_num_threads(1)  # torch's own loops would hang
        os.write(write, b"1" if torch.equal(out, want) else b"0")
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 60)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready, "the child hung"
    assert os.read(read, 1) == b"1"
    os.close(read)
    assert torch.equal(call(None), want)
