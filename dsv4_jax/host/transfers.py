"""What operations want done to the cache's arrays, until somebody takes it to the device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.journal import Write
from dsv4_jax.host.pending import Pending
from dsv4_jax.layout.transfers import TransferList, Transfers

Wish = tuple[str, tuple[object, ...]]
"""A method of ``TransferList`` and its arguments."""


def pack(wishes: Iterable[Wish]) -> Transfers:
    """The transfers that are wished, in order, as arrays."""
    made = TransferList()
    for name, arguments in wishes:
        getattr(made, name)(*arguments)
    return made.pack()


class Wipes:
    """What is to be wiped since it is nobody's any more: the writes that queue it, none unless it is wanted.

    What is free and not wiped yet has its wipe in the queue, before anything that whoever gets it next may want done.
    """

    def __init__(self, queue: Pending[Wish], slots: int, *, wanted: bool) -> None:
        self._queue, self._slots, self.wanted = queue, slots, wanted

    def slot(self, slot: int) -> tuple[Write, ...]:
        """All that a slot has of its own."""
        return self._queue.add(("wipe", (slot,))) if self.wanted else ()

    def snapshot(self, snapshot: int) -> tuple[Write, ...]:
        """A snapshot."""
        return self.slot(self._slots + snapshot)

    def blocks(self, ids: NDArray[np.int32]) -> tuple[Write, ...]:
        """Blocks, int32 [n]."""
        return self._queue.add(("wipe_blocks", (ids,))) if self.wanted and ids.size else ()
