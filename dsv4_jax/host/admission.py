"""Admission: requests come and go, and what is shared between them does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host import transfers
from dsv4_jax.host.books import Books
from dsv4_jax.host.errors import LengthUnknown, PromptTooLong
from dsv4_jax.host.events import Event
from dsv4_jax.host.forking import fork
from dsv4_jax.host.hashing import Match
from dsv4_jax.host.journal import Write
from dsv4_jax.host.telling import Telling
from dsv4_jax.layout.transfers import Transfers


class Admission(Books):
    """The operations of ``CacheManager`` that give a request its slot, and take it back."""

    def admit(self, prompt: int | Match = 0, max_new_tokens: int | None = None) -> int:
        """Gives a new request a slot, what is in the cache of its prompt, and promises it blocks.

        With a match the request begins at ``length``, which may be above 0, sharing the blocks up to there or beyond;
        transfers that wait to be taken restore the rest. What it brings then must be the rest of that prompt, and
        ``commit`` makes it known to others. As long as it is not longer than the blocks that it shares, it is being
        rebuilt: it can be truncated to nothing but 0, and ``preempt`` records none of it but its tokens.

        Args:
          prompt: tokens of its prompt, or what ``match_prefix`` found.
          max_new_tokens: how many it will bring at most beyond these. The blocks for all of them are reserved, and
            those for as many drafts more as the schema's ``lookahead`` allows: up to there ``prepare_forward`` finds
            blocks for it. Without, nothing is reserved, and the request may meet CacheFull.

        Returns:
          The request's handle, never given out again by this manager. It is not the slot.

        Raises:
          CacheFull: no slot is free, or too few blocks to be reserved.
          PromptTooLong: it would exceed ``schema.max_context``.
          TypeError, ValueError: a number is no integer, or below 0.
        """
        table, ledger = self._state()
        handle, writes = table.admit()
        length, limit = self._lengths(prompt, max_new_tokens)
        if (length if limit is None else limit) > self._schema.max_context:
            raise PromptTooLong(length, max_new_tokens or 0, self._schema.max_context)
        slot, promised = table.slot_of(handle), 0 if limit is None else self._promise(limit)
        if isinstance(prompt, Match):
            writes += self._restore(slot, prompt, promised)
        elif promised:
            writes += ledger.attach(slot, np.zeros(0, np.int32), 0, promised)[1]
        self._journal.write(writes)
        return handle

    def _restore(self, slot: int, match: Match, promised: int) -> tuple[Write, ...]:
        """A request with a prompt begins where what is known of it ends."""
        table, hit = self._request_table, self._hit(match)
        blocks, attached = self._ledger.attach(slot, hit.blocks, hit.blocks.size, promised)
        writes = *attached, *self._prefix.admit(slot, match, hit)
        if not hit.blocks.size:
            return writes
        state = () if hit.snapshot is None else (("copy", (self._schema.slots + hit.snapshot, slot)),)
        return (
            *writes,
            (table.lengths, slot, hit.length),
            (table.peaks, slot, hit.length),
            (table.reset_due, slot, False),
            *self._transfers.add(("reset", (slot,)), *state, ("share", (slot, blocks))),
        )

    def fork(self, request: int, max_new_tokens: int | None = None) -> int:
        """A twin of a request: a new one, of the same tokens, that goes on by itself.

        The two share all blocks that are full. What else the request holds, its window, its tails and an open block,
        is copied on the device by transfers that wait to be taken. They run after all plans made so far, so the twin
        has the tokens of these too; none of the plans can be cancelled or committed for the request any more.

        Args:
          request: handle.
          max_new_tokens: how many tokens the twin will bring at most, as in ``admit``. What the other was promised is
            not the twin's.

        Returns:
          The twin's handle.

        Raises:
          UnknownRequest: not an admitted request.
          LengthUnknown: the request has drafts of which nothing is known.
          CacheFull: no slot is free, or no block for the copy of an open one, or too few to be reserved.
          PromptTooLong: it would exceed ``schema.max_context``.
          TypeError, ValueError: ``max_new_tokens`` is no integer, or below 0.
        """
        table, ledger = self._state()
        source = table.slot(request)
        if self._drafts.is_open(source):
            raise LengthUnknown(request, "forked")
        handle, writes = table.admit()
        length, limit = self._lengths(int(table.lengths[source]), max_new_tokens)
        if limit is not None and limit > self._schema.max_context:
            raise PromptTooLong(length, limit - length, self._schema.max_context)
        held, promised = int(self._held(source)), 0 if limit is None else self._promise(limit)
        floor = int(self._prefix.floors[source])
        writes += fork(table, ledger, self._transfers, source, table.slot_of(handle), floor, held, promised)
        writes += self._prefix.fork(source, table.slot_of(handle))
        self._journal.write(writes)
        return handle

    def take_transfers(self, *, again: bool = False) -> Transfers:
        """What operations since the last call want done to the arrays, in order, for ``apply_transfers``.

        Nothing, mostly; ``transfers_wait`` tells. Transfers and plans run in the order in which they were made, so run
        the plans that are under way first. To keep that order easy, ``prepare_forward`` refuses while transfers wait.

        Args:
          again: those of the last call once more, if an exception from outside came before they were handed over.
        """
        self._journal.finish()
        if again:
            return transfers.pack(self._transfers.latest)
        wishes, writes = self._transfers.take()
        self._journal.write(writes)
        return transfers.pack(wishes)

    def take_events(self, *, again: bool = False) -> tuple[Event, ...]:
        """What requests can share and no longer can, since the last call, in order; nothing unless ``events`` is set.

        Args:
          again: those of the last call once more, if an exception from outside came before they were handed over.
        """
        self._journal.finish()
        events = self._prefix.events
        if again:
            return events.latest
        taken, writes = events.take()
        self._journal.write(writes)
        return taken

    def release(self, request: int) -> None:
        """Takes the request's slot and blocks back, on the host only: the slot's next request resets it on the device.

        With ``wipe``, transfers then wait after which none of its bytes is left in the cache, but in blocks and
        snapshots that are kept for prompts to come. These are wiped when they are given up: when room is short,
        or by ``reset_prefix_cache``.

        Raises:
          UnknownRequest: the handle is not an admitted request's, or was released before.
        """
        self._journal.write(self._release(self._state()[0].slot(request)))

    def _release(self, slot: int) -> tuple[Write, ...]:
        table, ledger = self._request_table, self._ledger
        # Idle blocks go with their tails first. So that none of them is known without those before it, the request's
        # own take the places of any that were taken for something else meanwhile.
        telling = Telling(self._prefix, self._ledger)
        telling.again(slot)
        touched = ledger.revived(self._prefix.used_by(slot))
        held = self._held([slot])
        given_back = ledger.give_back(
            np.array([slot]), np.zeros_like(held), held, keep_promise=False, touched=touched, keep=telling.blocks
        )
        known, _ = telling.finish(self._schema.slots)
        forgotten = *self._drafts.forget(slot), *self._prefix.forget(slot)
        return *known, *given_back, *table.release(slot), *forgotten

    def reset(self) -> None:
        """Forgets all requests: every slot and block is free, plans made so far are stale, no transfers wait.

        For starting again with a new cache, when a step that the cache was donated to failed on the device. Handles
        given out before stay unknown, they are not given out again.
        """
        table, ledger = self._state()
        no_floors = self._prefix.floors, slice(None), 0
        forgotten = *self._drafts.forget(slice(None)), *self._prefix.forget_all(), no_floors, *self._transfers.forget()
        self._journal.write((*ledger.give_back_all(), *table.release_all(), *forgotten))

    def reset_prefix_cache(self) -> None:
        """Forgets what requests could share: no prompt that was there matches any more.

        For when equal tokens no longer mean equal vectors, as with new weights. Requests go on, sharing what they
        share; nothing of them gets known.
        """
        self._journal.finish()
        self._journal.write((*self._ledger.keep_no_longer(slice(None)), *self._prefix.forget_all()))

    def _free_blocks(
        self, slots: NDArray[np.integer], kept: NDArray[np.int64], *, clean: bool = False
    ) -> tuple[Write, ...]:
        """Frees the blocks of requests in these slots but for so many of their first, [n] each.

        If they are ``clean``, nothing was written to them.
        """
        return self._ledger.give_back(slots, kept, self._held(slots), clean=clean)
