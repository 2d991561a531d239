"""SnapshotTable: which snapshot holds the state at the end of which block, and which one goes when another comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dsv4_jax.host.journal import GONE, Write


class SnapshotTable:
    """Snapshots by the hash of the block that they follow. Methods that change something return the writes.

    One that is free again is wiped, by the writes that ``wipe`` gives; one that another takes the place of need not be.

    Attributes:
      used: int64 [snapshots], when each was last taken or restored; 0 for a free one.
      taken: int64 [snapshots], when each was last taken.
    """

    def __init__(self, snapshots: int, wipe: Callable[[int], tuple[Write, ...]]) -> None:
        self.used = np.zeros(snapshots, np.int64)
        self.taken = np.zeros(snapshots, np.int64)
        self._of_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._counts = {"uses": 0}
        self._wipe = wipe

    def __len__(self) -> int:
        return len(self._of_hash)

    def find(self, block: bytes) -> int | None:
        """The snapshot at the end of this block."""
        return self._of_hash.get(block)

    def held(self) -> tuple[tuple[int, bytes], ...]:
        """The snapshots in use, and the block that each follows."""
        return tuple(self._hash_of.items())

    def touch(self, snapshot: int) -> tuple[Write, ...]:
        """A snapshot was used."""
        uses = self._counts["uses"] + 1
        return (self.used, snapshot, uses), (self._counts, "uses", uses)

    def take(self, blocks: Sequence[bytes]) -> tuple[list[int], tuple[Write, ...]]:
        """Snapshots for the ends of these blocks, which have none; for fewer if there are fewer snapshots.

        Those free first, then those that were not used for longest.
        """
        chosen = self.used.argsort(kind="stable")[: len(blocks)].tolist()
        uses = self._counts["uses"]
        writes: list[Write] = [(self._of_hash, self._hash_of[one], GONE) for one in chosen if one in self._hash_of]
        for index, (snapshot, block) in enumerate(zip(chosen, blocks, strict=False)):
            uses = self._counts["uses"] + 1 + index
            writes += [
                (self._of_hash, block, snapshot),
                (self._hash_of, snapshot, block),
                (self.used, snapshot, uses),
                (self.taken, snapshot, uses),
            ]
        return chosen, (*writes, (self._counts, "uses", uses))

    def forget(self, blocks: Iterable[bytes]) -> tuple[Write, ...]:
        """The snapshots at the ends of these blocks, where there are any, are free."""
        writes: list[Write] = []
        for block in blocks:
            if (snapshot := self.find(block)) is not None:
                writes += [(self._of_hash, block, GONE), (self._hash_of, snapshot, GONE), (self.used, snapshot, 0)]
                writes += self._wipe(snapshot)
        return tuple(writes)

    def forget_all(self) -> tuple[Write, ...]:
        """All are free."""
        return self.forget(list(self._of_hash))
