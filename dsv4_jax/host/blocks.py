"""BlockLedger: which blocks of the pools are free, and which slot has which block for which part of its context."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.errors import CacheFull
from dsv4_jax.host.journal import Write

NO_BLOCK = -1
NO_OWNER = -1


class BlockLedger:
    """Who owns each block. Free blocks are a stack, so that a freed block is the next one handed out.

    Its methods change nothing themselves: they return the writes that do, for a ``Journal``. They trust their caller:
    places taken are empty, and of places given back those from ``first`` to before ``end`` are taken.

    Attributes:
      owner: int32 [blocks], the slot that has the block, -1 for a free one.
      place: int32 [blocks], the block holds entries of tokens 128 place … 128 place + 127 of its owner; -1 = free.
      table: int32 [slots, max_blocks], the same from the other side: the block of a slot's place, -1 = none.
    """

    def __init__(self, slots: int, max_blocks: int, blocks: int) -> None:
        self.owner = np.full(blocks, NO_OWNER, np.int32)
        self.place = np.full(blocks, NO_OWNER, np.int32)
        self.table = np.full((slots, max_blocks), NO_BLOCK, np.int32)
        self._stack = np.arange(blocks, dtype=np.int32)[::-1].copy()
        # When each block was taken, counted in blocks: given back in reverse, they are handed out as before.
        self._taken = np.zeros(blocks, np.int64)
        self._counts = {"free": blocks, "taken": 0}

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return self._counts["free"]

    @property
    def total(self) -> int:
        """How many blocks there are."""
        return self.owner.size

    def take(
        self, slots: NDArray[np.integer], places: NDArray[np.integer]
    ) -> tuple[NDArray[np.int32], tuple[Write, ...]]:
        """Free blocks for these places of these slots, [n] each: (int32 [n] block ids, writes).

        Raises:
          CacheFull: fewer than n blocks are free.
        """
        count, free, taken = slots.size, self._counts["free"], self._counts["taken"]
        if count > free:
            raise CacheFull("blocks", count, free, self.total)
        ids = self._stack[free - count : free][::-1].copy()
        at = ids.astype(np.intp)  # converted once, not at each write; so are the values
        return ids, (
            (self.owner, at, slots.astype(np.int32)),
            (self.place, at, places.astype(np.int32)),
            (self.table, (slots, places), ids),
            (self._taken, at, np.arange(taken, taken + count)),
            (self._counts, "taken", taken + count),
            (self._counts, "free", free - count),
        )

    def give_back(
        self, slots: NDArray[np.integer], first: NDArray[np.integer], end: NDArray[np.integer]
    ) -> tuple[Write, ...]:
        """Frees the blocks of places ``first[i]`` to before ``end[i]`` of ``slots[i]``, distinct slots; [n] each."""
        counts = end - first
        count = int(counts.sum())
        if count == 0:
            return ()
        rows = np.repeat(slots, counts)
        places = np.arange(count) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        ids, free = self.table[rows, places], self._counts["free"]
        latest_first = ids[self._taken[ids].argsort()[::-1]]
        return (
            (self._stack, slice(free, free + count), latest_first),
            (self.owner, ids, NO_OWNER),
            (self.place, ids, NO_OWNER),
            (self.table, (rows, places), NO_BLOCK),
            (self._counts, "free", free + count),
        )

    def give_back_all(self) -> tuple[Write, ...]:
        """Frees every block, and restores the order of a new ledger."""
        return (
            (self._stack, slice(None), np.arange(self.total, dtype=np.int32)[::-1]),
            (self.owner, slice(None), NO_OWNER),
            (self.place, slice(None), NO_OWNER),
            (self.table, slice(None), NO_BLOCK),
            (self._counts, "free", self.total),
        )
