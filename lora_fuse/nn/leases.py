"""Slots on loan: a slot goes back to the free list when nothing holds its lease any more."""

from __future__ import annotations

import gc
import itertools
import queue
import weakref
from collections.abc import Iterable

_serials = itertools.count()


class SlotLease:
    """The right to read one slot; whoever may still read the slot keeps the lease alive."""

    __slots__ = ("__weakref__", "index", "serial")

    def __init__(self, index: int) -> None:
        self.index = index
        self.serial = next(_serials)  # tells two tenants of one slot apart

    def __repr__(self) -> str:
        return f"SlotLease({self.index})"


class SlotAllocator:
    """Hands out the slots ``0 .. count - 1``, each to one lease at a time.

    Args:
        count: physical slots.
        taken: slots that start out on loan; their leases are in ``live``.
    """

    def __init__(self, count: int, taken: Iterable[int] = ()) -> None:
        self.count = count
        # SimpleQueue.put may run inside a finalizer, on any thread, at any point: it takes no lock that we could hold.
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.live: weakref.WeakValueDictionary[int, SlotLease] = weakref.WeakValueDictionary()
        self.initial = {index: self._lend(index) for index in taken}
        for index in range(count):
            if index not in self.initial:
                self._free.put(index)

    def _lend(self, index: int) -> SlotLease:
        lease = SlotLease(index)
        self.live[index] = lease
        weakref.finalize(lease, self._free.put, index).atexit = False
        return lease

    def acquire(self, timeout: float) -> SlotLease:
        """A free slot, waiting up to ``timeout`` seconds for a running forward to let go of one.

        Raises:
            RuntimeError: every slot is still held.
        """
        patience = min(timeout, 0.2)  # most forwards are done by then
        try:
            return self._lend(self._free.get(timeout=patience))
        except queue.Empty:
            gc.collect()  # an autograd graph in a reference cycle may be all that holds the slot
        try:
            return self._lend(self._free.get(timeout=timeout - patience))
        except queue.Empty:
            raise RuntimeError(
                f"no slot became free within {timeout:g} s: the spare slot is still held by a running forward, or by "
                "the saved graph of one whose backward has not run; try again when it has finished"
            ) from None
