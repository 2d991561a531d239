"""Books: what a manager knows of its cache, and what it tells of that. The operations are ``CacheManager``'s."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.accounts import PoolUsage
from dsv4_jax.host.arguments import count
from dsv4_jax.host.batch import BlockNeed
from dsv4_jax.host.blocks import NO_BLOCKS, BlockLedger
from dsv4_jax.host.drafts import DraftTable
from dsv4_jax.host.errors import LengthUnknown, TransfersWait
from dsv4_jax.host.hashing import Match, chain
from dsv4_jax.host.journal import Journal
from dsv4_jax.host.pending import Pending
from dsv4_jax.host.prefix import Hit, PrefixCache
from dsv4_jax.host.receipts import Receipts
from dsv4_jax.host.requests import RequestTable
from dsv4_jax.host.transfers import Wipes, Wish
from dsv4_jax.layout.contents import Contents
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS


class Books:
    """The rooms of a manager, each with one thing to know, and the journal through which all of them are written."""

    def __init__(
        self,
        schema: CacheSchema,
        *,
        every: int | None = None,
        rebuild: bool = False,
        events: bool = False,
        wipe: bool = False,
    ) -> None:
        self._schema = schema
        self._need = BlockNeed(schema.spec)
        self._journal = Journal()
        self._transfers: Pending[Wish] = Pending()
        self._wipes = Wipes(self._transfers, schema.slots, wanted=wipe)
        self._request_table = RequestTable(schema.slots, self._wipes.slot)
        self._prefix = PrefixCache(schema, self._wipes, every=every, rebuild=rebuild, events=events)
        self._ledger = BlockLedger(
            schema.slots, schema.max_blocks, schema.blocks, self._prefix.evict, self._wipes.blocks
        )
        self._drafts = DraftTable(schema)
        self._receipts = Receipts()
        self._preemptions = {"count": 0}

    def _state(self) -> tuple[RequestTable, BlockLedger]:
        """What the manager knows; an interrupted operation is finished first, so nothing else may read it."""
        self._journal.finish()
        return self._request_table, self._ledger

    def _require_no_transfers(self) -> None:
        """Raises TransfersWait if what the operation is about may not be on the device yet."""
        if self._transfers:
            raise TransfersWait(len(self._transfers))

    def _require_wiped(self, count: int, revived: NDArray[np.int32] = NO_BLOCKS) -> None:
        """Raises TransfersWait unless so many blocks that an operation is about to take are wiped, if that is wanted.

        Idle ones are not. Those that would have to go are free from now on, and their wipes wait; those that the
        operation would revive do not go. For operations that queue nothing: in the queue wipes come first anyway.
        """
        missing = count - (self._ledger.free - self._ledger.idle)
        if self._wipes.wanted and missing > 0:
            self._journal.write(self._ledger.evict(missing, revived))
            self._require_no_transfers()

    def __getstate__(self) -> dict[str, Any]:
        self._journal.finish()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._receipts.rename(self._request_table.clock, self._request_table.oldest_plan())

    def __copy__(self) -> Self:
        return copy.deepcopy(self)

    @property
    def schema(self) -> CacheSchema:
        """The cache the plans are for."""
        return self._schema

    @property
    def free_slots(self) -> int:
        """How many more requests can be admitted."""
        return self._state()[0].free

    @property
    def free_blocks(self) -> int:
        """How many blocks no request holds, promised ones among them."""
        return self._state()[1].free

    @property
    def requests(self) -> NDArray[np.int64]:
        """int64 [admitted requests]: their handles, in order of admission."""
        handles = self._state()[0].handles
        return np.sort(handles[handles >= 0])

    @property
    def transfers_wait(self) -> bool:
        """Whether ``take_transfers`` has something to give; ``prepare_forward`` then refuses."""
        self._journal.finish()
        return bool(self._transfers)

    def length(self, request: int) -> int:
        """Tokens of the request in the cache once every plan made so far has run. Raises UnknownRequest.

        With drafts whose plan has not been committed, the most that it can be.
        """
        table, _ = self._state()
        return int(table.lengths[table.slot(request)])

    def slot(self, request: int) -> int:
        """The request's slot. Raises UnknownRequest."""
        return self._state()[0].slot(request)

    def blocks(self, request: int) -> NDArray[np.int32]:
        """int32 [blocks held]: the request's block ids; the i-th holds the entries of tokens 128 i … 128 i + 127.

        Raises UnknownRequest.
        """
        table, ledger = self._state()
        slot = table.slot(request)
        return ledger.table[slot, : self._held(slot)].copy()

    def blocks_needed(self, length: ArrayLike) -> NDArray[np.int64]:
        """Blocks a request of ``length`` tokens holds: as many as its finished entries fill, perhaps in part.

        ceil((length // 4) / 32) in a model with CSA layers, length // 128 with HCA layers only, 0 with neither.

        Args:
          length: integers of any shape, tokens.

        Returns:
          int64 of that shape.
        """
        return self._need.blocks(length)

    def _held(self, slots: Any, lengths: ArrayLike | None = None) -> NDArray[np.int64]:
        """Blocks that requests in these slots hold, or would hold at other lengths.

        As many as these need, or, while one is being rebuilt, all that it found.
        """
        lengths = self._request_table.lengths[slots] if lengths is None else lengths
        return self.blocks_needed(np.maximum(lengths, self._prefix.floors[slots]))

    def contents(self) -> Contents:
        """What the cache holds once every plan made so far has run: what ``CacheChecker`` compares a cache with.

        Raises:
          TransfersWait: ``take_transfers`` first, and apply them.
          LengthUnknown: a request has drafts of which nothing is known; commit their plans first.
        """
        table, ledger = self._state()
        self._require_no_transfers()
        slots = (table.handles >= 0).nonzero()[0]
        for slot in slots.tolist():
            if self._drafts.is_open(slot):
                raise LengthUnknown(int(table.handles[slot]), "checked")
        readable = np.where(ledger.kept & (ledger.references == 0), BLOCK_TOKENS, 0)
        held, places = (ledger.table[slots] >= 0).nonzero()
        stored, rebuilt = np.maximum(table.lengths, self._prefix.floors), table.lengths < self._prefix.floors
        tokens = (stored[slots[held]] - BLOCK_TOKENS * places).clip(0, BLOCK_TOKENS)
        np.maximum.at(readable, ledger.table[slots[held], places], tokens)
        lengths = np.concatenate([np.where(rebuilt, 0, table.lengths), np.zeros(self._schema.snapshots, np.int64)])
        snapshots, blocks = self._prefix.blocks_before_snapshots()
        lengths[np.array(snapshots, np.intp) + self._schema.slots] = BLOCK_TOKENS * (ledger.place[blocks] + 1)
        return Contents(
            requests=table.handles.copy(),
            lengths=lengths,
            table=ledger.table.copy(),
            shared=self._prefix.floors // BLOCK_TOKENS,
            references=ledger.references.copy(),
            places=ledger.place.copy(),
            readable=readable,
            opened=ledger.opened,
            taken=self._prefix.snapshots.taken.copy(),
        )

    def match_prefix(self, tokens: ArrayLike, *, salt: bytes = b"") -> Match:
        """Looks up what of a prompt is in the cache.

        Reserves nothing: ``can_admit`` and ``admit`` look again, without hashing the tokens again.

        Args:
          tokens: int32 [n], the prompt.
          salt: requests share only what was computed with the same salt: one for each tenant, adapter, image, …

        Returns:
          The prompt, hashed; ``length`` of its tokens need not be computed. At least one always must. If ``stored`` is
          more, those between are computed again for a request's state alone, see ``rebuild``.

        Raises:
          TypeError: tokens are no integers [n], or the salt is not bytes.
          ValueError: a token is no int32.
        """
        self._journal.finish()
        ids, root, links = chain(tokens, salt)
        hit = self._prefix.find(links, ids.size)
        return Match(hit.length, hit.stored, ids, salt, root, links)

    def look_up(self, match: Match) -> Match:
        """The same prompt, and what of it is in the cache by now."""
        self._journal.finish()
        hit = self._hit(match)
        return dataclasses.replace(match, length=hit.length, stored=hit.stored)

    def chunk_limit(self, request: int) -> int:
        """How many tokens a request should bring at most so that a step ends where a snapshot is worth its place.

        That is up to the next such length, or else what its context has room for. Raises UnknownRequest.
        """
        table, _ = self._state()
        slot = table.slot(request)
        length = int(table.lengths[slot])
        worth = self._prefix.next_worth(slot, length)
        return (self._schema.max_context if worth is None else min(worth, self._schema.max_context)) - length

    def can_admit(self, prompt: int | Match = 0, max_new_tokens: int | None = None) -> bool:
        """Whether ``admit`` of the same arguments would succeed, and the prompt's blocks are there.

        With ``max_new_tokens`` it is exact: what is admitted so can be prepared up to that length, whatever others do
        meanwhile, and if a request that fits is refused, then because of what others hold or were promised.

        Args:
          prompt: tokens of the request's prompt, or what ``match_prefix`` found.
          max_new_tokens: how many the request will bring at most beyond these, if that is known.

        Raises:
          TypeError, ValueError: a number is no integer, or below 0.
        """
        blocks = self._hit(prompt).blocks if isinstance(prompt, Match) else NO_BLOCKS
        return self._has_room(*self._lengths(prompt, max_new_tokens), blocks)

    def _has_room(self, length: int, limit: int | None, shared: NDArray[np.int32]) -> bool:
        """Whether there is room for a request of so many tokens, and at most so many, that shares these blocks."""
        table, ledger = self._state()
        if not table.free or (length if limit is None else limit) > self._schema.max_context:
            return False
        needed = self._promise(length if limit is None else limit, drafts=limit is not None)
        return max(needed - shared.size, 0) <= ledger.available - ledger.revived(shared).size

    def _hit(self, match: Match) -> Hit:
        return self._prefix.find(match.links, match.tokens.size)

    @staticmethod
    def _lengths(prompt: int | Match, max_new_tokens: int | None) -> tuple[int, int | None]:
        """The tokens of a prompt, and those of its request at most, None if that is not known."""
        length = prompt.tokens.size if isinstance(prompt, Match) else count("prompt", prompt)
        return length, None if max_new_tokens is None else length + count("max_new_tokens", max_new_tokens)

    def _promise(self, limit: int, *, drafts: bool = True) -> int:
        """Blocks of a request that is to reach ``limit`` tokens, and may bring drafts beyond."""
        reach = limit + self._schema.lookahead * drafts
        return int(self.blocks_needed(min(reach, self._schema.max_context)))

    def usage(self) -> dict[str, PoolUsage]:
        """What the cache's slots and blocks are used for, by ``"slots"``, ``"blocks"`` and ``"snapshots"``.

        A snapshot that is in use is a cached one.
        """
        table, ledger = self._state()
        schema, used = self._schema, self._schema.slots - table.free
        return {
            "slots": PoolUsage(schema.slots, used, 0, 0, table.free, 0, schema.bytes_per_slot),
            "blocks": PoolUsage(
                total=ledger.total,
                used=ledger.total - ledger.free,
                shared=ledger.shared,
                cached=ledger.idle,
                free=ledger.free - ledger.idle,
                reserved=ledger.reserved,
                unit_bytes=schema.bytes_per_block,
            ),
            "snapshots": PoolUsage(
                total=schema.snapshots,
                used=0,
                shared=0,
                cached=len(self._prefix.snapshots),
                free=schema.snapshots - len(self._prefix.snapshots),
                reserved=0,
                unit_bytes=schema.bytes_per_snapshot,
            ),
        }

    def metrics(self) -> Mapping[str, float]:
        """What a server reports, by vLLM's names; counters grow from the manager's start on.

        - ``kv_cache_usage_perc``: the part of all blocks that requests hold, from 0 to 1.
        - ``num_requests_running``: requests that are admitted.
        - ``num_preemptions``: requests that were preempted.
        - ``prefix_cache_queries``, ``prefix_cache_hits``: tokens of prompts that were admitted with a match, and of
          these, tokens that need not be computed.
        - ``prefix_snapshots_missed``: lengths that were worth a snapshot and got none, since no step ended there, or it
          was committed when a later one was planned, or there are too few snapshots.
        """
        table, ledger = self._state()
        counts = self._prefix.counts
        return {
            "kv_cache_usage_perc": (ledger.total - ledger.free) / max(ledger.total, 1),
            "num_requests_running": self._schema.slots - table.free,
            "num_preemptions": self._preemptions["count"],
            "prefix_cache_queries": counts["queries"],
            "prefix_cache_hits": counts["hits"],
            "prefix_snapshots_missed": counts["missed"],
        }
