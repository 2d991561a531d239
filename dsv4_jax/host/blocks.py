"""BlockLedger: which blocks of the pools are free, and which slots have which block for which part of their context."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.errors import CacheFull
from dsv4_jax.host.journal import Write

NO_BLOCK = -1
NO_PLACE = -1


class BlockLedger:
    """Who has each block. Free blocks are a stack, so that a freed block is the next one handed out.

    Slots may share blocks, each at the same place. Nobody writes a block that is shared.

    Its methods change nothing themselves: they return the writes that do, for a ``Journal``. They trust their caller:
    places taken are empty, and of places given back those from ``first`` to before ``end`` are taken.

    Attributes:
      references: int32 [blocks], how many slots have the block; 0 for a free one.
      place: int32 [blocks], the block holds entries of tokens 128 place … 128 place + 127 of theirs; -1 = free.
      table: int32 [slots, max_blocks], the same from the other side: the block of a slot's place, -1 = none.
    """

    def __init__(self, slots: int, max_blocks: int, blocks: int) -> None:
        self.references = np.zeros(blocks, np.int32)
        self.place = np.full(blocks, NO_PLACE, np.int32)
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
        return self.references.size

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
            (self.references, at, 1),
            (self.place, at, places.astype(np.int32)),
            (self.table, (slots, places), ids),
            (self._taken, at, np.arange(taken, taken + count)),
            (self._counts, "taken", taken + count),
            (self._counts, "free", free - count),
        )

    def give_back(
        self, slots: NDArray[np.integer], first: NDArray[np.integer], end: NDArray[np.integer]
    ) -> tuple[Write, ...]:
        """Takes the blocks of places ``first[i]`` to before ``end[i]`` from ``slots[i]``, distinct slots; [n] each.

        Those that no other slot has are free.
        """
        counts = end - first
        count = int(counts.sum())
        if count == 0:
            return ()
        rows = np.repeat(slots, counts)
        places = np.arange(count) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return *self._release(self.table[rows, places]), (self.table, (rows, places), NO_BLOCK)

    def _release(self, ids: NDArray[np.int32], spare: int = 0) -> tuple[Write, ...]:
        """One reference less to each of these blocks; ``spare`` of those free by now are somebody's already."""
        ids, times = np.unique(ids, return_counts=True)
        left = self.references[ids] - times
        freed, free = ids[left == 0], self._counts["free"] - spare
        latest_first = freed[self._taken[freed].argsort()[::-1]]
        return (
            (self._stack, slice(free, free + freed.size), latest_first),
            (self.references, ids, left),
            (self.place, freed, NO_PLACE),
            (self._counts, "free", free + freed.size),
        )

    def share(self, source: int, target: int, full: int, held: int) -> tuple[NDArray[np.int32], tuple[Write, ...]]:
        """Gives a slot without blocks the first ``full`` blocks of another, and own ones for the places up to ``held``.

        Returns:
          int32 [held], the target's block ids; and the writes.

        Raises:
          CacheFull: too few blocks are free.
        """
        own, writes = self.take(np.full(held - full, target), np.arange(full, held))
        shared = self.table[source, :full].copy()
        references = self.references[shared] + 1
        return np.concatenate([shared, own]), (
            *writes,
            (self.references, shared, references),
            (self.table, (target, slice(full)), shared),
        )

    def exchange(self, slot: int, place: int, end: int) -> tuple[int, int, tuple[Write, ...]]:
        """Gives a slot a block of its own for one that it shares; takes those of later places, to before ``end``.

        Returns:
          The shared block, the new one, and the writes.

        Raises:
          CacheFull: no block is free; those of later places do not count.
        """
        (new,), taken = self.take(np.array([slot]), np.array([place]))
        given_back = self._release(self.table[slot, place:end], spare=1)
        return (
            int(self.table[slot, place]),
            int(new),
            (
                *given_back,
                (self.table, (slot, slice(place + 1, end)), NO_BLOCK),
                *taken[:-1],
            ),
        )

    def give_back_all(self) -> tuple[Write, ...]:
        """Frees every block, and restores the order of a new ledger."""
        return (
            (self._stack, slice(None), np.arange(self.total, dtype=np.int32)[::-1]),
            (self.references, slice(None), 0),
            (self.place, slice(None), NO_PLACE),
            (self.table, slice(None), NO_BLOCK),
            (self._counts, "free", self.total),
        )
