"""``Contents``: what a cache holds between two steps as its manager knows it, for ``CacheChecker`` to compare with."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What a cache holds once all that a manager planned has run; ``CacheManager.contents`` makes it.

    Attributes:
      requests: int64 [slots], the handle of each slot's request, below 0 for none.
      lengths: int64 [slots + snapshots], tokens of each slot's request, and of the prefix that each snapshot is of; 0
        where nothing is held, and where a state is being rebuilt.
      table: int32 [slots, max_blocks], the block of every 128 tokens of a slot; -1 = none.
      shared: int64 [slots], how many blocks, from the first on, a slot's request began with. The write table may be
        without these; where a state is being rebuilt, it is.
      references: int32 [blocks], how many slots have each block.
      places: int32 [blocks], which 128 tokens of theirs it is for; -1 = free.
      readable: int64 [blocks], how many of the 128 tokens somebody may read: all of a block that is kept for prompts to
        come, none of a free one.
      opened: int64 [blocks], changes whenever a block is handed out, or opened again, so that it may be written.
      taken: int64 [snapshots], changes whenever a snapshot is taken.
    """

    requests: NDArray[np.int64]
    lengths: NDArray[np.int64]
    table: NDArray[np.int32]
    shared: NDArray[np.int64]
    references: NDArray[np.int32]
    places: NDArray[np.int32]
    readable: NDArray[np.int64]
    opened: NDArray[np.int64]
    taken: NDArray[np.int64]
