"""What follows once the host is told that requests' tokens are stored: blocks get known, and snapshots are due."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.blocks import BlockLedger
from dsv4_jax.host.errors import InvalidStep
from dsv4_jax.host.events import BlockStored
from dsv4_jax.host.hashing import BLOCK_TOKEN, Link, link_after, token_array
from dsv4_jax.host.journal import EACH, Write
from dsv4_jax.host.prefix import Chain, PrefixCache
from dsv4_jax.host.transfers import Wish
from dsv4_jax.spec.kinds import BLOCK_TOKENS

Tokens = Mapping[int, ArrayLike] | Sequence[ArrayLike] | NDArray[np.integer]
_NOTHING = np.zeros(0, np.int32)


def told_tokens(
    tokens: Tokens, handles: NDArray[np.int64], chosen: NDArray[np.bool_], counts: NDArray[np.int64]
) -> list[NDArray[np.int32]] | NDArray[np.int32]:
    """``commit``'s tokens, of the chosen ones [n] of a plan's requests, which kept ``counts`` tokens each.

    Args:
      tokens: as in ``commit``.
      handles: int64 [requests], the plan's, in its order.
      chosen: bool [requests], n of them.
      counts: int64 [n].

    Returns:
      n arrays, empty where nothing is told; or int32 [n], one token each.

    Raises:
      InvalidStep: not one sequence for each request, or of another length, or of no token ids.
    """
    if isinstance(tokens, Mapping):
        given = [tokens.get(handle) for handle in handles[chosen].tolist()]
    elif len(tokens) != handles.size:
        raise InvalidStep(f"tokens must be those of each of the plan's {handles.size} requests, got {len(tokens)}")
    elif isinstance(tokens, np.ndarray) and tokens.dtype == np.int32 and tokens.ndim == 1 and (counts == 1).all():
        return tokens[chosen].astype(np.int32)
    else:
        given = [tokens[place] for place in chosen.nonzero()[0].tolist()]
    told = []
    for handle, part, count in zip(handles[chosen].tolist(), given, counts.tolist(), strict=True):
        try:
            told.append(_NOTHING if part is None else token_array("tokens", np.atleast_1d(np.asarray(part))))
        except (TypeError, ValueError) as error:
            raise InvalidStep(f"request {handle}: {error}") from error
        if part is not None and told[-1].size != count:
            raise InvalidStep(f"request {handle} kept {count} tokens of the plan, and {told[-1].size} are given for it")
    return told


class Telling:
    """What one operation tells the prefix cache; ``finish`` gives the writes."""

    def __init__(self, prefix: PrefixCache, ledger: BlockLedger) -> None:
        self._prefix, self._ledger = prefix, ledger
        self._writes: list[Write] = []
        self._new: dict[bytes, int] = {}  # blocks that get known
        self._events: list[BlockStored] = []
        self._due: dict[bytes, int] = {}  # the slots whose state is worth a snapshot, by their latest block
        self._reached: dict[int, int] = {}  # how many of a slot's tokens are stored
        self._missed = 0

    def stored(
        self,
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        kept: NDArray[np.int64],
        latest: NDArray[np.bool_],
        told: list[NDArray[np.int32]] | NDArray[np.int32] | None,
    ) -> None:
        """Requests have their tokens from ``starts`` to before ``kept`` in the cache, and so all before.

        Where neither the prompt nor what was told says which tokens these are, nothing more gets known of the request.

        Args:
          slots: int64 [n].
          starts: int64 [n].
          kept: int64 [n].
          latest: bool [n], whether that is all that was planned for the request.
          told: which tokens these are, see ``told_tokens``, or None.
        """
        prefix, known = self._prefix, self._prefix.known[slots]
        left = prefix.follows[slots]
        if isinstance(told, np.ndarray):  # decoding: only a block's last token is more than a number to be noted
            follows = left & (starts == known)
            fills = follows & ((known + 1) % BLOCK_TOKENS == 0)
            noted = follows & ~fills
            where, at = slots[noted], known[noted]
            self._writes += [
                (prefix.open, (where, at % BLOCK_TOKENS), told[noted]),
                (prefix.known, where, at + 1),
            ]
            behind = prefix.stored[where] // BLOCK_TOKENS < at // BLOCK_TOKENS
            self._writes.append((prefix.stored, where[~behind], at[~behind] + 1))
            for slot in where[behind].tolist():
                self._reach(slot, prefix.chains[slot], int(prefix.known[slot]) + 1, False)
            if np.count_nonzero(fills):
                self._fill(slots[fills], known[fills] + 1, latest[fills], told[fills])
            left &= ~follows
        for index in left.nonzero()[0].tolist():
            tokens = _NOTHING if told is None else np.atleast_1d(told[index])
            self._stored(int(slots[index]), int(starts[index]), int(kept[index]), bool(latest[index]), tokens)

    def _fill(
        self, slots: NDArray[np.int64], ends: NDArray[np.int64], latest: NDArray[np.bool_], last: NDArray[np.int32]
    ) -> None:
        """Requests got the ``last`` token of a block, which are their known tokens ``ends`` by then, [n] each."""
        prefix, size = self._prefix, BLOCK_TOKENS * BLOCK_TOKEN.itemsize
        blocks = prefix.open[slots]
        blocks[:, -1] = last
        data = blocks.astype(BLOCK_TOKEN).tobytes()  # all at once: it is many requests that fill a block in one step
        chains: dict[int, Chain] = {}
        for index, (slot, end, only) in enumerate(zip(slots.tolist(), ends.tolist(), latest.tolist(), strict=True)):
            root, salt, links, worth = prefix.chains[slot]
            parent = links[-1].hash if links else root
            links = *links, link_after(parent, data[size * index : size * (index + 1)])
            chains[slot] = Chain(root, salt, links, worth)
            self._reach(slot, chains[slot], end, only)
        self._writes += [(prefix.known, slots, ends), (prefix.chains, EACH, chains)]

    def _stored(self, slot: int, start: int, kept: int, latest: bool, tokens: NDArray[np.int32]) -> None:
        prefix, known = self._prefix, int(self._prefix.known[slot])
        chain = prefix.chains[slot]
        if start > known:
            return
        if kept > known and tokens.size:
            flat = np.concatenate([prefix.open[slot, : known % BLOCK_TOKENS], tokens[known - start :]])
            links = list(chain.links)
            for first in range(0, flat.size // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
                parent = links[-1].hash if links else chain.root
                links.append(link_after(parent, flat[first : first + BLOCK_TOKENS].astype(BLOCK_TOKEN).tobytes()))
            rest, known = flat[flat.size // BLOCK_TOKENS * BLOCK_TOKENS :], kept
            chain = chain._replace(links=tuple(links))
            self._writes += [
                (prefix.open, (slot, slice(rest.size)), rest),
                (prefix.known, slot, known),
                (prefix.chains, slot, chain),
            ]
        self._reach(slot, chain, min(kept, known), latest and kept <= known)

    def _reach(self, slot: int, chain: Chain, stored: int, latest: bool) -> None:
        """A request has so many known tokens in the cache; ``latest``, if nothing else was planned for it."""
        prefix, before = self._prefix, int(self._prefix.stored[slot])
        if stored <= before:
            return
        self._reached[slot] = stored
        first, end = before // BLOCK_TOKENS, stored // BLOCK_TOKENS
        if first == end:
            return
        while first and not self._is_known(chain.links[first - 1].hash):
            first -= 1  # what the next block hangs on was evicted since, and the request has a block of it
        self._register(slot, chain, first, end)
        worth = prefix.next_worth(slot, before)
        while worth is not None and worth <= stored:
            block = chain.links[worth // BLOCK_TOKENS - 1].hash
            if prefix.snapshots.find(block) is None and block not in self._due:
                if latest and worth == stored:
                    self._due[block] = slot
                else:
                    self._missed += 1
            worth = prefix.next_worth(slot, worth)

    def again(self, slot: int) -> None:
        """All of a request's stored blocks get known, also those that were forgotten since."""
        if slot in self._prefix.chains:
            self._register(slot, self._prefix.chains[slot], 0, int(self._prefix.stored[slot]) // BLOCK_TOKENS)

    def restored(self, slot: int, length: int) -> None:
        """All that a request of this length had is in the cache again."""
        prefix = self._prefix
        if slot not in prefix.chains:
            return
        self.again(slot)
        if length and length % BLOCK_TOKENS == 0 and prefix.stored[slot] == length:
            block = prefix.chains[slot].links[length // BLOCK_TOKENS - 1].hash
            if prefix.snapshots.find(block) is None:
                self._due[block] = slot

    @property
    def blocks(self) -> NDArray[np.int32]:
        """int32 [n]: those that get known."""
        return np.fromiter(self._new.values(), np.int32)

    def _is_known(self, block: bytes) -> bool:
        return block in self._new or self._prefix.is_known(block)

    def _register(self, slot: int, chain: Chain, first: int, end: int) -> None:
        run: list[Link] = []
        for place in range(first, end):
            link = chain.links[place]
            if self._is_known(link.hash):
                self._note(chain, place, run)
                continue
            self._new[link.hash] = int(self._ledger.table[slot, place])
            run.append(link)
        self._note(chain, end, run)

    def _note(self, chain: Chain, end: int, run: list[Link]) -> None:
        """The blocks of a run, which ends before place ``end``, are an event."""
        if not run or not self._prefix.tells:
            return
        first, salt = end - len(run), (chain.salt,) if chain.salt else None
        hashes, tokens = zip(*run, strict=True)
        self._events.append(
            BlockStored(
                block_hashes=hashes,
                parent_block_hash=chain.links[first - 1].hash if first else None,
                token_ids=struct.unpack(f"<{BLOCK_TOKENS * len(run)}i", b"".join(tokens)),
                block_size=BLOCK_TOKENS,
                extra_keys=(salt,) * len(run),
            )
        )
        run.clear()

    def finish(self, behind_slots: int) -> tuple[tuple[Write, ...], list[Wish]]:
        """The writes, and the snapshots that are wished; these lie behind so many slots."""
        prefix, due = self._prefix, list(self._due)
        taken, snapshots = prefix.snapshots.take(due) if due else ([], ())
        wishes: list[Wish] = [
            ("copy", (self._due[block], behind_slots + one)) for block, one in zip(due, taken, strict=False)
        ]
        missed = self._missed + len(due) - len(taken)
        slots, lengths = (np.fromiter(numbers, np.int64) for numbers in (self._reached, self._reached.values()))
        return (
            *self._writes,
            (prefix.stored, slots, lengths),
            *prefix.remember(self._new, self._events),
            *self._ledger.keep(self.blocks),
            *snapshots,
            (prefix.counts, "missed", prefix.counts["missed"] + missed),
        ), wishes
