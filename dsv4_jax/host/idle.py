"""IdleQueue: blocks that nobody holds and that are kept for what they contain, least recently used first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.journal import Write


class IdleQueue:
    """A queue from whose middle blocks can leave.

    A block that leaves, or comes again, is not looked for in the queue: its place there carries a stamp that is no
    longer the block's, and is passed over when the front gets there. So each operation costs what it moves, whatever
    the number of blocks is. Methods that change something return the writes, for a ``Journal``; in one operation,
    those of ``pop`` and ``remove`` come before those of ``add``.
    """

    def __init__(self, blocks: int) -> None:
        self._stamp = np.full(blocks, -1, np.int64)
        self._queue = np.zeros(2 * blocks, np.int32)
        self._stamps = np.zeros(2 * blocks, np.int64)
        self._ends = {"head": 0, "tail": 0, "stamp": 0}

    @property
    def blocks(self) -> NDArray[np.int32]:
        """int32 [n]: the blocks, the next to go first."""
        where = slice(self._ends["head"], self._ends["tail"])
        queue = self._queue[where]
        return queue[self._stamp[queue] == self._stamps[where]]

    def add(self, ids: NDArray[np.int32]) -> tuple[Write, ...]:
        """Puts blocks at the end, in this order; those that are in the queue already leave their place there."""
        head, tail, stamp = (self._ends[name] for name in ("head", "tail", "stamp"))
        queue, stamps = ids, np.arange(stamp, stamp + ids.size)
        new = stamps
        moved: tuple[Write, ...] = ()
        if tail + ids.size > self._queue.size:  # what is still in use moves to the front
            where = slice(head, tail)
            there, since = self._queue[where], self._stamps[where]
            stays = (self._stamp[there] == since) & ~np.isin(there, ids)
            queue, stamps = np.concatenate([there[stays], queue]), np.concatenate([since[stays], stamps])
            tail, moved = 0, ((self._ends, "head", 0),)
        where = slice(tail, tail + queue.size)
        return (
            (self._queue, where, queue),
            (self._stamps, where, stamps),
            (self._stamp, ids, new),
            (self._ends, "tail", where.stop),
            (self._ends, "stamp", stamp + ids.size),
            *moved,
        )

    def remove(self, ids: NDArray[np.int32]) -> tuple[Write, ...]:
        """Takes these blocks out."""
        return ((self._stamp, ids, -1),)

    def pop(self, count: int, but: NDArray[np.int32]) -> tuple[NDArray[np.int32], tuple[Write, ...]]:
        """Takes the first ``count`` blocks out; there are so many ``but`` those that the same operation removes."""
        at, tail, found = self._ends["head"], self._ends["tail"], [self._queue[:0]]
        while count and at < tail:
            where = slice(at, min(at + max(2 * count, 64), tail))
            queue = self._queue[where]
            valid = (self._stamp[queue] == self._stamps[where]) & ~np.isin(queue, but)
            first = valid.nonzero()[0][:count]
            found.append(queue[first])
            count -= first.size
            at = where.stop if count else at + int(first[-1]) + 1
        ids = np.concatenate(found)
        return ids, ((self._stamp, ids, -1), (self._ends, "head", at))

    def clear(self) -> tuple[Write, ...]:
        """Takes every block out."""
        return (self._stamp, slice(None), -1), (self._ends, "head", 0), (self._ends, "tail", 0)
