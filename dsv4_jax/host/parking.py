"""Requests leave their slot and come back: what the manager writes down of one, and gives a new slot to go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.admission import Admission
from dsv4_jax.host.blocks import NO_BLOCKS
from dsv4_jax.host.errors import LengthUnknown, NothingCached, PromptTooLong
from dsv4_jax.host.hashing import Link, Match, chain, tokens_of
from dsv4_jax.host.prefix import Chain, Hit
from dsv4_jax.host.telling import Telling
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS


@dataclasses.dataclass(frozen=True)
class RequestRecord:
    """What the host knows of a request, or of a prefix, that is to be resumed later, perhaps by another manager.

    Attributes:
      made_for: the model and formats of its cache, ``describe_requests`` of the schema.
      length: its tokens in the cache.
      blocks: how many it holds.
      peak: the longest it has been since nothing older of it is left, see ``CacheManager.truncate``.
      floor: the tokens whose blocks it began with, those of a prefix; it has no state below that length.
      stored: how many of its tokens are known, and known to be in the cache; others may share blocks of these.
      tokens: int32 [known], its first tokens, as many as are known; the rest of its prompt among them.
      salt: of ``match_prefix``; None for a request that was admitted without a match, of which no tokens are known.
      worth: lengths at which a snapshot is worth its place.
    """

    made_for: str
    length: int
    blocks: int
    peak: int
    floor: int
    stored: int
    tokens: NDArray[np.int32]
    salt: bytes | None
    worth: tuple[int, ...]


class Places(NamedTuple):
    """Where in the cache something lies.

    Attributes:
      slot: a slot, or a snapshot behind the slots.
      blocks: int32 [blocks], block ids.
      shared: how many of these, from the first on, held what they are to hold before they were given to it.
    """

    slot: int
    blocks: NDArray[np.int32]
    shared: int = 0


def describe_requests(schema: CacheSchema) -> str:
    """JSON of all that two caches must have in common for a request to move from one to the other.

    That is the model but for its name, the formats and the lookahead; numbers of slots and blocks may differ.
    """
    described = json.loads(schema.to_json(), parse_int=float)
    del described["spec"]["name"]
    return json.dumps({name: described[name] for name in ("spec", "formats", "lookahead")}, sort_keys=True)


class Parking(Admission):
    """The operations of ``CacheManager`` by which requests are preempted, moved and resumed."""

    def record(self, what: int | Match) -> tuple[RequestRecord, Places]:
        """What is to be written down of a request, or of a prompt up to its last snapshot, and where it lies.

        For ``take_state``, which reads the arrays there; nothing changes. Of a request that is being rebuilt there
        is nothing worth it but its tokens.

        Args:
          what: handle, or what ``match_prefix`` found.

        Raises:
          UnknownRequest: not an admitted request.
          LengthUnknown: it has drafts of which nothing is known.
          NothingCached: no snapshot of the prompt is there.
          TransfersWait: ``take_transfers`` first, which may be what brings it there.
        """
        table, ledger = self._state()
        self._require_no_transfers()
        made_for = describe_requests(self._schema)
        if isinstance(what, Match):
            hit = self._to_record(what)
            if hit.snapshot is None:
                raise NothingCached(what.tokens.size)
            length = hit.length
            at_its_end = length, hit.blocks.size, length, length, length
            record = RequestRecord(made_for, *at_its_end, what.tokens[:length], what.salt, ())
            return record, Places(self._schema.slots + hit.snapshot, hit.blocks)
        slot = table.slot(what)
        if self._drafts.is_open(slot):
            raise LengthUnknown(what, "recorded")
        length, prefix = int(table.lengths[slot]), self._prefix
        floor, stored = int(prefix.floors[slot]), int(prefix.stored[slot])
        peak = max(int(table.peaks[slot]), length)
        if length < floor:
            length = peak = floor = stored = 0
        known, tokens = prefix.chains.get(slot), np.zeros(0, np.int32)
        if known is not None:
            rest = prefix.open[slot, : int(prefix.known[slot]) % BLOCK_TOKENS]
            tokens = np.concatenate([*map(tokens_of, known.links), rest])
        record = RequestRecord(
            made_for,
            length,
            int(self.blocks_needed(length)),
            peak,
            floor,
            stored,
            tokens,
            known and known.salt,
            known.worth if known else (),
        )
        return record, Places(slot, ledger.table[slot, : record.blocks].copy())

    def recordable(self, match: Match) -> int:
        """How many tokens of a prompt ``record`` takes: those before its last snapshot."""
        self._journal.finish()
        return self._to_record(match).length

    def _to_record(self, match: Match) -> Hit:
        return self._prefix.find(match.links, match.tokens.size + 1, rebuild=False)

    def preempt(self, request: int) -> RequestRecord:
        """Takes a request's slot and blocks, to be resumed by computing again what is not cached by then.

        ``dsv4_jax.preempt`` keeps its state in host memory as well. Where its tokens are known, its blocks stay in the
        cache until they are needed, as after any ``release``. As there, an exception from outside may come before the
        record is handed over; the request is then gone.

        Raises:
          UnknownRequest, LengthUnknown, TransfersWait: as ``record``.
        """
        record, places = self.record(request)
        preempted = self._preemptions, "count", self._preemptions["count"] + 1
        self._journal.write((*self._release(places.slot), preempted))
        return record

    def resume(self, record: RequestRecord, max_new_tokens: int | None = None) -> tuple[int, Places]:
        """Gives a recorded request a slot and blocks again; ``dsv4_jax.resume`` then writes its state there.

        Blocks of its tokens that are still known are shared, and need not be written.

        Args:
          record: of this or another manager, of a cache of the same ``describe_requests``.
          max_new_tokens: how many it will bring at most beyond the tokens that are known, or its length, as in
            ``admit``.

        Returns:
          The request's handle, a new one, and where its state is to be written before its next plan runs.

        Raises:
          CacheFull, PromptTooLong, TypeError, ValueError: as ``admit``.
          TransfersWait: ``take_transfers`` first: what waits must not come behind what is written now. With ``wipe``,
            also as in ``prepare_forward``.
        """
        table, ledger = self._state()
        self._require_no_transfers()
        handle, writes = table.admit()
        slot, prompt = table.slot_of(handle), max(record.length, record.tokens.size)
        _, limit = self._lengths(prompt, max_new_tokens)
        if (prompt if limit is None else limit) > self._schema.max_context:
            raise PromptTooLong(prompt, max_new_tokens or 0, self._schema.max_context)
        shared = NO_BLOCKS
        if record.salt is not None:
            ids, root, links = chain(record.tokens, record.salt)
            shared = self._shared(record, links)
            known = Chain(root, record.salt, links, record.worth)
            rest = ids[BLOCK_TOKENS * len(links) :]
            writes += self._prefix.resume(slot, known, rest, ids.size, record.stored)
        promised = 0 if limit is None else self._promise(limit)
        blocks, attached = ledger.attach(slot, shared, record.blocks, promised)
        self._require_wiped(record.blocks - shared.size, ledger.revived(shared))
        self._journal.write(
            (
                *writes,
                *attached,
                (self._prefix.floors, slot, record.floor),
                (table.lengths, slot, record.length),
                (table.peaks, slot, record.peak),
                (table.reset_due, slot, record.length == 0),
            )
        )
        return handle, Places(slot, blocks, shared.size)

    def can_resume(self, record: RequestRecord, max_new_tokens: int | None = None) -> bool:
        """Whether ``resume`` of the same arguments would find room, as ``can_admit``."""
        prompt = max(record.length, record.tokens.size)
        return self._has_room(*self._lengths(prompt, max_new_tokens), self._still_known(record))

    def kept_tokens(self, record: RequestRecord) -> int:
        """How many of a recorded request's tokens are in blocks that are still known: ``resume`` shares these."""
        return self._still_known(record).size * BLOCK_TOKENS

    def _still_known(self, record: RequestRecord) -> NDArray[np.int32]:
        self._journal.finish()
        if record.salt is None:
            return NO_BLOCKS
        return self._shared(record, chain(record.tokens, record.salt)[2])

    def _shared(self, record: RequestRecord, links: Sequence[Link]) -> NDArray[np.int32]:
        """The blocks of a record's chain that are known, of those that were in the cache."""
        return self._prefix.known_run(links[: record.stored // BLOCK_TOKENS])

    def resumed(self, request: int) -> None:
        """The state of a resumed request is in the cache: others may share what is known of it.

        Where it ends between two blocks, a transfer takes a snapshot.
        """
        table, _ = self._state()
        slot = table.slot(request)
        telling = Telling(self._prefix, self._ledger)
        telling.restored(slot, int(table.lengths[slot]))
        writes, wishes = telling.finish(self._schema.slots)
        self._journal.write((*writes, *self._transfers.add(*wishes)))

    def lost_tokens(self, request: int) -> int:
        """How many of a request's tokens would have to be computed again if it were preempted without its state.

        Of one that is being rebuilt those that it has computed so far, since it could begin again where it did.
        """
        table, _ = self._state()
        slot = table.slot(request)
        length, known = int(table.lengths[slot]), self._prefix.chains.get(slot)
        if known is None:
            return length
        floor = int(self._prefix.floors[slot])
        links = known.links[: max(int(self._prefix.stored[slot]), floor) // BLOCK_TOKENS]
        return max(length - self._prefix.find(links, max(length, floor) + 1).length, 0)

    def propose_victim(self, among: Iterable[int] | None = None) -> int | None:
        """The request to preempt when room is short: the one with the fewest ``lost_tokens``, of several the latest.

        Args:
          among: handles to choose from; all admitted requests by default.

        Returns:
          Its handle; None if there is nothing to choose from.
        """
        handles = [int(handle) for handle in (self.requests if among is None else among)]
        return fewest_lost(handles, self.lost_tokens)


def fewest_lost(handles: Iterable[int], lost: Callable[[int], int]) -> int | None:
    """The handle of which the fewest tokens are ``lost``, of several the latest; None without any."""
    return min(handles, key=lambda handle: (lost(handle), -handle), default=None)


def differences(ours: str, theirs: str) -> list[str]:
    """What two ``describe_requests`` differ in, a line each."""
    mine, others = _leaves(json.loads(ours)), _leaves(json.loads(theirs))
    return [
        f"{name} is {others.get(name)!r} there and {mine.get(name)!r} here"
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    ]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(index), one) for index, one in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for key, one in items for path, leaf in _leaves(one, f"{name}.{key}".lstrip(".")).items()}
