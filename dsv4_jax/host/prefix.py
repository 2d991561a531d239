"""PrefixCache: which blocks hold which tokens, so that requests that begin alike share them.

A block is known by the hash of its tokens and all before them. It gets known once the host has been told that these
are stored (``commit``), stays so while it is held or idle, and is forgotten when it is taken for something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from dsv4_jax.host.hashing import Link, Match, tokens_of
from dsv4_jax.host.journal import EACH, GONE, Write
from dsv4_jax.host.pending import Pending
from dsv4_jax.host.snapshots import SnapshotTable
from dsv4_jax.host.transfers import Wipes
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS


class Chain(NamedTuple):
    """What a request's blocks are known by.

    Attributes:
      root, salt: as in ``Match``.
      links: of its blocks that are full of known tokens.
      worth: lengths at which a snapshot is worth its place.
    """

    root: bytes
    salt: bytes
    links: tuple[Link, ...]
    worth: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Hit:
    """What of a prompt is in the cache.

    Attributes:
      blocks: int32 [n], the blocks that a request shares.
      snapshot: the one at their end; None if there are no such blocks, or the state there is to be rebuilt.
      length: tokens that need not be computed.
      worth: as in ``Chain``, for a request of the prompt.
    """

    blocks: NDArray[np.int32]
    snapshot: int | None
    length: int
    worth: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Tokens whose entries need not be stored."""
        return BLOCK_TOKENS * self.blocks.size


class PrefixCache:
    """Blocks by hash, and of each slot's request what is known of its tokens. Methods that change something return the
    writes, for a ``Journal``.

    Without snapshots, and without leave to rebuild, nothing can be restored, and nothing is remembered.

    Attributes:
      known: int64 [slots], of how many of a request's first tokens it is known which they are.
      stored: int64 [slots], how many of these are in the cache for certain: their plans were committed.
      floors: int64 [slots], below which length (but for 0) a request has no state that could be read: it began there
        from a snapshot, or before, with the blocks up to there and no state.
      open: int32 [slots, 128], the known tokens of the block that is not full of them.
      follows: bool [slots], whether the request is one whose tokens are told.
      tells: whether events are wanted.
    """

    def __init__(self, schema: CacheSchema, wipes: Wipes, *, every: int | None, rebuild: bool, events: bool) -> None:
        slots, self._every, self.tells = schema.slots, every, events
        self._layers = len(schema.spec.layers) if rebuild else 0
        self._takes_snapshots = schema.snapshots > 0
        self._enabled = (self._takes_snapshots or rebuild) and bool(schema.block_pools)
        self.known = np.zeros(slots, np.int64)
        self.stored = np.zeros(slots, np.int64)
        self.floors = np.zeros(slots, np.int64)
        self.open = np.zeros((slots, BLOCK_TOKENS), np.int32)
        self.follows = np.zeros(slots, np.bool_)
        self.chains: dict[int, Chain] = {}  # by slot
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.snapshots = SnapshotTable(schema.snapshots, wipes.snapshot)
        self.events: Pending[Event] = Pending()
        self.counts = {"queries": 0, "hits": 0, "missed": 0}

    def find(self, links: Sequence[Link], tokens: int, *, rebuild: bool = True) -> Hit:
        """What a prompt of these full blocks, and so many tokens, finds; at least one token is left to compute.

        Where it may be rebuilt, the state at the end of the known blocks is, if no snapshot leaves as few tokens to
        compute: a window of 128 tokens takes one block a layer.
        """
        last, known = (max(tokens, 1) - 1) // BLOCK_TOKENS, self._known_links(links)
        parts, hit, snapshot = min(known, last), min(known, last), None
        while hit and (snapshot := self.snapshots.find(links[hit - 1].hash)) is None:
            hit -= 1
        length, from_state = BLOCK_TOKENS * hit, max(parts - self._layers, 0)
        if rebuild and self._layers and hit < parts and (from_state > hit or not hit):
            hit, snapshot, length = parts, None, BLOCK_TOKENS * from_state
        ids = np.array([self._block_of[link.hash] for link in links[:hit]], np.int32)
        # Where prompts part, and where the next one like this can go on from.
        worth = {BLOCK_TOKENS * blocks for blocks in (parts, last) if BLOCK_TOKENS * blocks > length}
        return Hit(ids, snapshot, length, tuple(sorted(worth)))

    def known_run(self, links: Sequence[Link]) -> NDArray[np.int32]:
        """int32 [n]: the blocks that are known of a chain, from its first on."""
        return np.array([self._block_of[link.hash] for link in links[: self._known_links(links)]], np.int32)

    def _known_links(self, links: Sequence[Link]) -> int:
        known = 0
        while known < len(links) and links[known].hash in self._block_of:
            known += 1
        return known

    def next_worth(self, slot: int, length: int) -> int | None:
        """The first length after this one at which a snapshot of the slot's request is worth its place."""
        if slot not in self.chains or not self._takes_snapshots:
            return None
        length = max(length, int(self.floors[slot]) - 1)  # no state before
        lengths = [worth for worth in self.chains[slot].worth if worth > length]
        if self._every:
            lengths.append((length // (BLOCK_TOKENS * self._every) + 1) * BLOCK_TOKENS * self._every)
        return min(lengths, default=None)

    def admit(self, slot: int, match: Match, hit: Hit) -> tuple[Write, ...]:
        """A request of this prompt has the slot, from the hit on."""
        tokens = match.tokens.size
        counted = (
            (self.counts, "queries", self.counts["queries"] + tokens),
            (self.counts, "hits", self.counts["hits"] + hit.length),
        )
        if not self._enabled:
            return counted
        rest = match.tokens[BLOCK_TOKENS * len(match.links) :]
        return (
            *counted,
            *(self.snapshots.touch(hit.snapshot) if hit.snapshot is not None else ()),
            (self.chains, slot, Chain(match.root, match.salt, match.links, hit.worth)),
            (self.open, (slot, slice(rest.size)), rest),
            (self.known, slot, tokens),
            (self.stored, slot, hit.length),
            (self.floors, slot, hit.stored),
            (self.follows, slot, True),
        )

    def resume(self, slot: int, known: Chain, rest: NDArray[np.int32], tokens: int, stored: int) -> tuple[Write, ...]:
        """The slot's request is of this chain and ``rest``, of so many known tokens; ``stored`` are in the cache."""
        if not self._enabled:
            return ()
        return (
            (self.chains, slot, known),
            (self.open, (slot, slice(rest.size)), rest),
            (self.known, slot, tokens),
            (self.stored, slot, stored),
            (self.follows, slot, True),
        )

    def fork(self, source: int, target: int) -> tuple[Write, ...]:
        """The target's request is one like the source's."""
        floor = self.floors, target, self.floors[source]
        if source not in self.chains:
            return (floor,)
        return (
            floor,
            (self.chains, target, self.chains[source]),
            (self.open, target, self.open[source].copy()),
            (self.known, target, self.known[source]),
            (self.stored, target, self.stored[source]),
            (self.follows, target, True),
        )

    def truncate(self, slot: int, length: int) -> tuple[Write, ...]:
        """The slot's request goes on from a smaller length, with tokens that nobody knows yet."""
        floor: tuple[Write, ...] = ((self.floors, slot, 0),) if length == 0 else ()
        if slot not in self.chains:
            return floor
        chain, full = self.chains[slot], length // BLOCK_TOKENS
        opened = tokens_of(chain.links[full]) if full < len(chain.links) else self.open[slot].copy()
        return (
            (self.chains, slot, chain._replace(links=chain.links[:full])),
            (self.open, slot, opened),
            (self.known, slot, min(int(self.known[slot]), length)),
            (self.stored, slot, min(int(self.stored[slot]), length)),
            *floor,
        )

    def forget(self, slot: int) -> tuple[Write, ...]:
        """The slot has no request any more."""
        zeros = ((array, slot, 0) for array in (self.known, self.stored, self.floors, self.follows))
        return (self.chains, slot, GONE), *zeros

    def forget_all(self) -> tuple[Write, ...]:
        """Nothing is known any more, neither of blocks nor of the requests that there are."""
        everywhere = slice(None)
        return (
            *((self.chains, slot, GONE) for slot in self.chains),
            *((self._block_of, block, GONE) for block in self._block_of),
            *((self._hash_of, block, GONE) for block in self._hash_of),
            *((array, everywhere, 0) for array in (self.known, self.stored, self.follows)),
            *self.snapshots.forget_all(),
            *self._told(AllBlocksCleared()),
        )

    def evict(self, ids: NDArray[np.int32]) -> tuple[Write, ...]:
        """These blocks, which are known, are about to hold something else."""
        hashes = [self._hash_of[block] for block in ids.tolist()]
        return (
            *((self._hash_of, block, GONE) for block in ids.tolist()),
            *((self._block_of, block, GONE) for block in hashes),
            *self.snapshots.forget(hashes),
            *self._told(*[BlockRemoved(tuple(hashes))] * bool(hashes)),
        )

    def used_by(self, slot: int) -> NDArray[np.int32]:
        """int32 [n]: the known blocks of a request's tokens, be they its own or others of the same tokens."""
        if slot not in self.chains:
            return np.zeros(0, np.int32)
        links = self.chains[slot].links[: int(self.stored[slot]) // BLOCK_TOKENS]
        return np.array([self._block_of[link.hash] for link in links if link.hash in self._block_of], np.int32)

    def blocks_before_snapshots(self) -> tuple[list[int], list[int]]:
        """The snapshots in use, and the block that each follows."""
        held = self.snapshots.held()
        return [snapshot for snapshot, _ in held], [self._block_of[block] for _, block in held]

    def is_known(self, block: bytes) -> bool:
        """Whether some block is known by this hash."""
        return block in self._block_of

    def remember(self, blocks: dict[bytes, int], stored: Sequence[BlockStored]) -> tuple[Write, ...]:
        """Blocks are known by these hashes from now on."""
        if not blocks:
            return ()
        hashes = {index: block for block, index in blocks.items()}
        return (self._block_of, EACH, blocks), (self._hash_of, EACH, hashes), *self._told(*stored)

    def _told(self, *events: Event) -> tuple[Write, ...]:
        return self.events.add(*events) if self.tells else ()
