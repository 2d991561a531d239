"""BlockAllocator: which blocks of the pools are free. A stack, so that a freed block is the next one handed out."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.errors import AllocatorError, CacheFull


class BlockAllocator:
    """Hands out block ids 0 … blocks - 1, all or nothing. Freeing what was just allocated restores the order."""

    def __init__(self, blocks: int) -> None:
        if blocks < 0:
            raise ValueError(f"blocks must be at least 0, got {blocks}")
        self._stack = np.arange(blocks, dtype=np.int32)[::-1].copy()
        self._free = blocks
        self._allocated = np.zeros(blocks, np.bool_)

    @property
    def free_blocks(self) -> int:
        """How many blocks are free."""
        return self._free

    @property
    def total(self) -> int:
        """How many blocks there are."""
        return self._stack.size

    def allocate(self, count: int) -> NDArray[np.int32]:
        """Takes ``count`` blocks.

        Returns:
          int32 [count], distinct block ids.

        Raises:
          ValueError: count is negative.
          CacheFull: fewer than ``count`` blocks are free; none is taken.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count > self._free:
            raise CacheFull("blocks", count, self._free, self.total)
        ids = self._stack[self._free - count : self._free][::-1].copy()
        self._allocated[ids] = True
        self._free -= count
        return ids

    def free(self, ids: ArrayLike) -> None:
        """Gives blocks back; they may be handed out again at once.

        Args:
          ids: integers [count], each allocated and named once.

        Raises:
          AllocatorError: an id is not a block, is not allocated, or is named twice; none is freed.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers [count], got {ids.dtype} {list(ids.shape)}")
        foreign = (ids < 0) | (ids >= self.total)
        if foreign.any():
            raise AllocatorError(f"not a block of this allocator, which has {self.total}", ids[foreign])
        allocated = self._allocated[ids]
        if not allocated.all():
            raise AllocatorError("freed although not allocated", ids[~allocated])
        ordered = np.sort(ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise AllocatorError("freed twice in one call", repeated)
        self._stack[self._free : self._free + ids.size] = ids[::-1]
        self._allocated[ids] = False
        self._free += ids.size
