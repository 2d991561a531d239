"""BlockLedger: which blocks of the pools are free, and which slots have which block for which part of their context."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.errors import CacheFull
from dsv4_jax.host.idle import IdleQueue
from dsv4_jax.host.journal import Write

NO_BLOCK = -1
NO_PLACE = -1
NO_BLOCKS = np.zeros(0, np.int32)


Lose = Callable[[NDArray[np.int32]], tuple[Write, ...]]


def _nothing(ids: NDArray[np.int32]) -> tuple[Write, ...]:
    return ()


class BlockLedger:
    """Who has each block. Free blocks are a stack, so that a freed block is the next one handed out.

    Slots may share blocks, each at the same place. Nobody writes a block that is shared. A slot may be promised all
    blocks up to a place: those that it does not have yet are reserved, and nobody else can take them. A block may be
    kept: if nobody has it any more it is not free but idle, and taken only when no block is free.

    Its methods change nothing themselves: they return the writes that do, for a ``Journal``. They trust their caller:
    places taken are empty, and of places given back those from ``first`` to before ``end`` are taken.

    Attributes:
      references: int32 [blocks], how many slots have the block; 0 for a free one.
      place: int32 [blocks], the block holds entries of tokens 128 place … 128 place + 127 of theirs; -1 = free.
      table: int32 [slots, max_blocks], the same from the other side: the block of a slot's place, -1 = none.
      kept: bool [blocks], whether what the block contains may be wanted again.
      promised: int64 [slots], how many blocks a slot can have whatever others take.
      reopened: int64 [blocks], when it was last decided that a full block is written again, counted as in ``opened``.
    """

    def __init__(
        self,
        slots: int,
        max_blocks: int,
        blocks: int,
        evict: Lose = _nothing,
        wipe: Lose = _nothing,
    ) -> None:
        self.references = np.zeros(blocks, np.int32)
        self.place = np.full(blocks, NO_PLACE, np.int32)
        self.table = np.full((slots, max_blocks), NO_BLOCK, np.int32)
        self._stack = np.arange(blocks, dtype=np.int32)[::-1].copy()
        # When each block was taken, counted in blocks: given back in reverse, they are handed out as before.
        self._taken = np.zeros(blocks, np.int64)
        self.reopened = np.zeros(blocks, np.int64)
        self.promised = np.zeros(slots, np.int64)
        self.kept = np.zeros(blocks, np.bool_)
        self._idle = IdleQueue(blocks)
        self._evict = evict  # the writes for whoever wanted blocks kept that are to be taken
        self._wipe = wipe  # those that have blocks wiped which become free, or are taken while idle
        self._counts = {"free": blocks, "idle": 0, "taken": 0, "shared": 0, "reserved": 0}

    @property
    def free(self) -> int:
        """How many blocks no slot has: those that are free, and those that are idle."""
        return self._counts["free"] + self._counts["idle"]

    @property
    def idle(self) -> int:
        """How many blocks no slot has that are kept for what they contain."""
        return self._counts["idle"]

    @property
    def shared(self) -> int:
        """How many blocks are those of several slots."""
        return self._counts["shared"]

    @property
    def reserved(self) -> int:
        """How many free blocks slots were promised, and do not have yet."""
        return self._counts["reserved"]

    @property
    def available(self) -> int:
        """How many free blocks nobody was promised."""
        return self.free - self._counts["reserved"]

    @property
    def total(self) -> int:
        """How many blocks there are."""
        return self.references.size

    def take(
        self, slots: NDArray[np.integer], places: NDArray[np.integer]
    ) -> tuple[NDArray[np.int32], tuple[Write, ...]]:
        """Free blocks for these places of these slots, [n] each: (int32 [n] block ids, writes).

        Raises:
          CacheFull: fewer than n blocks are free to these slots.
        """
        if not self._counts["reserved"]:
            return self._take(slots, places, 0)
        promised = int(np.count_nonzero(places < self.promised[slots]))
        ids, writes = self._take(slots, places, promised)
        return ids, (*writes, (self._counts, "reserved", self._counts["reserved"] - promised))

    def _take(
        self,
        slots: NDArray[np.integer],
        places: NDArray[np.integer],
        promised: int,
        revived: NDArray[np.int32] = NO_BLOCKS,
    ) -> tuple[NDArray[np.int32], tuple[Write, ...]]:
        """The same, if so many of these blocks were promised. What is reserved does not change.

        Idle blocks that the same operation revives are not taken; the caller counts them.
        """
        counts = self._counts
        count, free, taken = slots.size, counts["free"], counts["taken"]
        available = free + counts["idle"] - counts["reserved"] + promised
        if count > available:
            raise CacheFull("blocks", count, available, self.total)
        evictions: tuple[Write, ...] = ()
        if count > free:
            evicted, evictions = self._idle.pop(count - free, revived)
            ids = np.concatenate([self._stack[:free][::-1], evicted])
            idle = counts["idle"] - evicted.size
            evictions = *evictions, *self._evict(evicted), *self._wipe(evicted)
            evictions = *evictions, (self.kept, evicted, False), (counts, "idle", idle)
            free = count  # none is left
        else:
            ids = self._stack[free - count : free][::-1].copy()
        at = ids.astype(np.intp)  # converted once, not at each write; so are the values
        return ids, (
            *evictions,
            (self.references, at, 1),
            (self.place, at, places.astype(np.int32)),
            (self.table, (slots, places), ids),
            (self._taken, at, np.arange(taken, taken + count)),
            (counts, "taken", taken + count),
            (counts, "free", free - count),
        )

    def give_back(
        self,
        slots: NDArray[np.integer],
        first: NDArray[np.integer],
        end: NDArray[np.integer],
        *,
        keep_promise: bool = True,
        touched: NDArray[np.int32] = NO_BLOCKS,
        keep: NDArray[np.int32] = NO_BLOCKS,
        clean: bool = False,
    ) -> tuple[Write, ...]:
        """Takes the blocks of places ``first[i]`` to before ``end[i]`` from ``slots[i]``, distinct slots; [n] each.

        Those that no other slot has are free, or idle. If slots keep what they were promised, it is reserved for them
        again. Idle blocks that were ``touched`` count as used like those that become idle. Blocks to ``keep`` are kept
        by the same operation. If all are ``clean``, nothing was written to them since they were taken.

        Raises:
          CacheFull: that cannot be reserved, since other slots keep the blocks.
        """
        counts = end - first
        count = int(counts.sum())
        promised = self.promised[slots]
        if count == 0 and not touched.size and (keep_promise or not promised.any()):
            return ()
        rows = np.repeat(slots, counts)
        places = np.arange(count) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        if keep_promise:
            return (
                *self._drop(self.table[rows, places], (promised.clip(max=end) - first).clip(0).sum(), clean=clean),
                (self.table, (rows, places), NO_BLOCK),
            )
        return (
            *self._drop(self.table[rows, places], -(promised - end).clip(0).sum(), touched, keep),
            (self.table, (rows, places), NO_BLOCK),
            (self.promised, slots, 0),
        )

    def _drop(
        self,
        ids: NDArray[np.int32],
        reserve: int,
        touched: NDArray[np.int32] = NO_BLOCKS,
        keep: NDArray[np.int32] = NO_BLOCKS,
        spare: int = 0,
        clean: bool = False,
    ) -> tuple[Write, ...]:
        """One reference less to each of these blocks, and so many more reserved.

        ``spare`` of the blocks that nobody has by now are taken by the same operation. Raises CacheFull.
        """
        ids, times = np.unique(ids, return_counts=True)
        left = self.references[ids] - times
        kept = self.kept[ids] | np.isin(ids, keep)
        unheld, freed = ids[(left == 0) & kept], ids[(left == 0) & ~kept]
        spare_free = min(spare, self._counts["free"])
        free = self._counts["free"] - spare_free
        idle = self._counts["idle"] - (spare - spare_free) + unheld.size
        reserved = self._counts["reserved"] + int(reserve)
        missing = reserved - free - idle - freed.size
        if missing > 0:
            raise CacheFull("blocks", missing, 0, self.total)
        latest_first = freed[self._taken[freed].argsort()[::-1]]
        used = np.concatenate([unheld, touched])
        queued = self._idle.add(used[self.place[used].argsort()[::-1]]) if used.size else ()
        not_shared = int(np.count_nonzero((left < 2) & (left + times > 1)))
        return (
            (self._stack, slice(free, free + freed.size), latest_first),
            (self.references, ids, left),
            (self.place, freed, NO_PLACE),
            *(() if clean else self._wipe(freed)),
            *queued,
            (self._counts, "free", free + freed.size),
            (self._counts, "idle", idle),
            (self._counts, "reserved", reserved),
            (self._counts, "shared", self._counts["shared"] - not_shared),
        )

    def attach(
        self, slot: int, shared: NDArray[np.int32], held: int, promised: int = 0
    ) -> tuple[NDArray[np.int32], tuple[Write, ...]]:
        """Gives a slot without blocks those that others have for its first places, and own ones up to ``held``.

        Args:
          slot: whose places.
          shared: int32 [n], blocks of places 0 to n - 1, n <= held.
          held: how many blocks the slot has then.
          promised: how many it can have whatever others take, those included; 0 for no promise.

        Returns:
          int32 [held], the slot's block ids; and the writes.

        Raises:
          CacheFull: too few blocks are free.
        """
        full, more = shared.size, max(promised - held, 0)
        revived = self.revived(shared)
        needed = held - full + more + revived.size
        if needed > self.available:
            raise CacheFull("blocks", needed, self.available, self.total)
        own, writes = self._take(np.full(held - full, slot), np.arange(full, held), 0, revived)
        idle = self._counts["idle"] - revived.size - max(own.size - self._counts["free"], 0)
        references = self.references[shared] + 1
        return np.concatenate([shared, own]), (
            *writes,
            *self._idle.remove(revived),
            (self._counts, "idle", idle),
            (self.references, shared, references),
            (self.table, (slot, slice(full)), shared),
            (self.promised, slot, promised),
            (self._counts, "shared", self._counts["shared"] + int(np.count_nonzero(references == 2))),
            (self._counts, "reserved", self._counts["reserved"] + more),
        )

    def evict(self, count: int, but: NDArray[np.int32] = NO_BLOCKS) -> tuple[Write, ...]:
        """Makes so many idle blocks free, ``but`` some; the next operation takes them as if they were still idle."""
        free, (ids, popped) = self._counts["free"], self._idle.pop(count, but)
        return (
            *popped,
            *self._evict(ids),
            *self._wipe(ids),
            (self.kept, ids, False),
            (self.place, ids, NO_PLACE),
            (self._stack, slice(free + count), np.concatenate([ids[::-1], self._stack[:free]])),
            (self._counts, "free", free + count),
            (self._counts, "idle", self._counts["idle"] - count),
        )

    def revived(self, shared: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of some blocks that nobody has, and that would no longer be available if somebody had them."""
        return shared[self.references[shared] == 0]

    @property
    def opened(self) -> NDArray[np.int64]:
        """int64 [blocks]: when each block was last taken or reopened, a number that no two such times share."""
        return np.maximum(self._taken, self.reopened)

    def reopen(self, ids: NDArray[np.int32]) -> tuple[Write, ...]:
        """The one slot that has these blocks, or that one block, may write them again from now on."""
        taken = self._counts["taken"]
        return (self.reopened, ids, taken), (self._counts, "taken", taken + 1)

    def keep(self, ids: NDArray[np.int32]) -> tuple[Write, ...]:
        """From now on these blocks, which slots have, are kept."""
        return ((self.kept, ids, True),)

    def keep_no_longer(self, ids: NDArray[np.int32] | slice) -> tuple[Write, ...]:
        """From now on these blocks, which slots have, are not kept; ``slice(None)``: none is, and the idle are free."""
        if not isinstance(ids, slice):
            return ((self.kept, ids, False),)
        idle, free = self._idle.blocks, self._counts["free"]
        return (
            (self.kept, ids, False),
            (self.place, idle, NO_PLACE),
            *self._wipe(idle),
            (self._stack, slice(free, free + idle.size), idle),
            *self._idle.clear(),
            (self._counts, "free", free + idle.size),
            (self._counts, "idle", 0),
        )

    def exchange(self, slot: int, place: int, end: int) -> tuple[int, int, tuple[Write, ...]]:
        """Gives a slot a block of its own for one that it shares; takes those of later places, to before ``end``.

        Returns:
          The shared block, the new one, and the writes.

        Raises:
          CacheFull: no block is free; those of later places do not count.
        """
        (new,), taken = self._take(np.array([slot]), np.array([place]), 0)
        again = max(min(int(self.promised[slot]), end) - place - 1, 0)
        # In this order: what is dropped has the last word on how many are free, the block taken on whose it is.
        return (
            int(self.table[slot, place]),
            int(new),
            (
                *taken,
                (self.table, (slot, slice(place + 1, end)), NO_BLOCK),
                *self._drop(self.table[slot, place:end], again, spare=1),
            ),
        )

    def give_back_all(self) -> tuple[Write, ...]:
        """Frees every block, and restores the order of a new ledger."""
        return (
            (self._stack, slice(None), np.arange(self.total, dtype=np.int32)[::-1]),
            (self.references, slice(None), 0),
            (self.place, slice(None), NO_PLACE),
            (self.table, slice(None), NO_BLOCK),
            (self.promised, slice(None), 0),
            (self.kept, slice(None), False),
            *self._idle.clear(),
            (self._counts, "idle", 0),
            (self._counts, "free", self.total),
            (self._counts, "reserved", 0),
            (self._counts, "shared", 0),
        )
