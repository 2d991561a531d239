"""A request goes on from fewer tokens, where the state there is still in its tails and its window's ring."""

from __future__ import annotations

import numpy as np

from dsv4_jax.host.arguments import integer
from dsv4_jax.host.errors import CannotTruncate
from dsv4_jax.host.journal import Write
from dsv4_jax.host.parking import Parking
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS, LayerKind

CSA, HCA = LayerKind.CSA, LayerKind.HCA


class Truncation(Parking):
    """The operation of ``CacheManager`` that drops a request's latest tokens."""

    def truncate(self, request: int, length: int) -> None:
        """Drops the tokens at positions ``length`` and beyond, on the host only.

        Truncating to 0 is always possible: the request's next plan resets its slot. Above 0 the cache must go on from
        ``length`` as if the dropped tokens had never been, so all that position ``length`` needs must still be there:

        - ``peak`` is the longest the request has been since it was admitted or truncated to 0, and L the schema's
          ``lookahead``: every ring keeps L rows more than the windows need. So every length from ``peak - L`` on is
          possible.
        - Below that, what happens to be left. The open windows of the tails at ``peak - L`` have their rows still: with
          CSA layers ``length >= (peak - L) // 4 * 4``, with HCA layers ``length >= (peak - L) // 128 * 128`` or a
          multiple of 128, where nothing is open. The sliding window: ``length >= peak - L - 1``, or anything while
          ``peak`` is at most the ring.
        - A running HCA tail has the states after the latest L + 1 tokens of ``peak``: below ``peak - L`` only multiples
          of 128 are possible.
        - A request that began with what was in the cache of its prompt has nothing from before that.

        Rows of dropped positions stay on the device. None is read: which rows count follows from the position, and a
        position is written again before it counts. Blocks whose entries are all dropped are given back at once. One
        that others share and that is open from here on is copied, by a transfer, since it will be written.

        Args:
          request: handle.
          length: tokens to keep, 0 <= length <= self.length(request).

        Raises:
          UnknownRequest: not an admitted request.
          CannotTruncate: ``length`` is out of range, or its state is gone; says what is possible.
          CacheFull: no block is free for the copy of a shared one, or for what the request was promised if others keep
            those that it gives back.
        """
        table, _ = self._state()
        slot = table.slot(request)
        length, current = integer("length", length), int(table.lengths[slot])
        floor = int(self._prefix.floors[slot])
        if length == current and (length or not floor):  # at 0 it may have begun with blocks alone
            return
        if length == 0:
            forgotten = *table.forget(slot), *self._drafts.forget(slot), *self._prefix.truncate(slot, 0)
            self._journal.write((*self._free_blocks(np.array([slot]), np.zeros(1, np.int64)), *forgotten))
            return
        peak = max(int(table.peaks[slot]), current)
        check_truncation(self._schema, request, current, peak, length, self._drafts.is_open(slot), floor)
        self._journal.write(
            (
                *self._shorten(slot, length),
                (table.lengths, slot, length),
                (table.peaks, slot, peak),
                *table.make_stale(slot),
                *self._prefix.truncate(slot, length),
            )
        )

    def _shorten(self, slot: int, length: int) -> tuple[Write, ...]:
        """Frees what a request does not need at this length, and copies what it shares and will write."""
        places = np.array([int(self.blocks_needed(length)), int(self._held(slot))])
        last, ledger = length // BLOCK_TOKENS, self._ledger
        given_back = np.array([slot]), places[:1], places[1:]
        if last >= places[0]:
            return ledger.give_back(*given_back)
        opened = ledger.table[slot, last : last + 1]
        if ledger.references[opened[0]] == 1:
            known = opened[ledger.kept[opened]].copy()  # as what it is no longer going to be
            forgotten = *self._prefix.evict(known), *ledger.keep_no_longer(known)
            return *ledger.give_back(*given_back), *forgotten, *ledger.reopen(opened.copy())
        old, new, writes = ledger.exchange(slot, last, int(places[1]))
        return *writes, *self._transfers.add(("install", (slot, [new], last)), ("copy_block", (old, new)))


def check_truncation(
    schema: CacheSchema, request: int, current: int, peak: int, length: int, is_open: bool, floor: int = 0
) -> None:
    """Raises CannotTruncate unless a request of ``current`` tokens can go on from ``length``; see ``truncate``.

    Args:
      schema: the cache.
      request: handle, for the error.
      current: tokens of the request, not 0.
      peak: the most it has had.
      length: the tokens to keep, neither 0 nor ``current``.
      floor: the request has no state below it, or none yet.
      is_open: whether ``current`` is only the most it can be, since it has drafts of which nothing is known.
    """
    if is_open and 0 < length < current:
        reason = "how many of its drafts were kept is not known; commit their plans first"
        raise CannotTruncate(request, current, length, current, reason)
    reach = min(current, peak - schema.lookahead)  # rows of whatever windows are open at or after this are there
    window_lowest = peak - schema.lookahead - 1 if peak > schema.ring else 1
    csa_lowest = max(reach, 0) // CSA.ratio * CSA.ratio if schema.spec.count(CSA) else 1
    running = schema.formats.hca_tail == "running"
    hca_lowest = 1
    if schema.spec.count(HCA):
        opened_a_window = running and (reach - 1) % HCA.ratio == 0  # without that token nothing is open
        hca_lowest = max(reach, 0) - opened_a_window if running else max(reach, 0) // HCA.ratio * HCA.ratio

    if not 0 < length < current:
        reason = "it never had that length" if length > current else "a length is at least 0"
    elif current < floor:
        reason = f"it is being rebuilt, from the blocks of its first {floor} tokens"
    elif length < floor:
        reason = f"it began at {floor}, with what was in the cache of its prompt"
    elif length < window_lowest:
        reason = f"the sliding window there was overwritten when the request grew to {peak}"
    elif length < csa_lowest:
        reason = f"the window of {CSA.ratio} tokens that was open there is closed and its rows are gone"
    elif length >= hca_lowest or length % HCA.ratio == 0:  # between two HCA windows nothing is open
        return
    elif running:
        reason = f"a running tail no longer has the state of the window of {HCA.ratio} tokens that was open there"
    else:
        reason = f"the window of {HCA.ratio} tokens that was open there is closed and its rows are gone"
    lowest = max(window_lowest, csa_lowest, hca_lowest, min(floor, current), 1)
    raise CannotTruncate(request, current, length, lowest, reason)
