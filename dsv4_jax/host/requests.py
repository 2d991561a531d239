"""RequestTable: which request has which slot, how long it is, and what of it can still be taken back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.host.arguments import integer
from dsv4_jax.host.errors import CacheFull, ContextExceeded, InvalidStep, UnknownRequest
from dsv4_jax.host.journal import Write


class RequestTable:
    """The state of each slot. A request's handle carries its slot in the low bits, below a serial number.

    Methods that change something return the writes, for a ``Journal``; where a slot's request is gone, those that
    ``wipe`` gives are among them.

    Attributes:
      lengths: int64 [slots], tokens in the cache once every plan made so far has run; 0 for a free slot.
      peaks: int64 [slots]. The longest a request has been since its last reset is ``max(peak, length)``: so only
        ``truncate`` writes peaks, and a step need not.
      reset_due: bool [slots], whether the slot's next plan must clear it of what it held before.
      changed: int64 [slots], when the slot's request was last released, truncated or committed, on the clock of plans:
        no plan up to then can be taken back.
    """

    def __init__(self, slots: int, wipe: Callable[[int], tuple[Write, ...]]) -> None:
        self._wipe = wipe
        self._bits = max(1, (slots - 1).bit_length())
        self._mask = (1 << self._bits) - 1
        # A slot without a request holds ~slot, which is no handle of that slot: its own low bits name another. Places
        # beyond the slots, which a wrong handle may name, are free for ever.
        self._handles = ~np.arange(1 << self._bits, dtype=np.int64)
        self._free = np.arange(slots, dtype=np.int64)[::-1].copy()
        self._counts = {"free": slots, "serial": 0, "clock": 0}
        self.lengths = np.zeros(slots, np.int64)
        self.peaks = np.zeros(slots, np.int64)
        self.reset_due = np.ones(slots, np.bool_)
        self.changed = np.zeros(slots, np.int64)

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self._counts["free"]

    @property
    def clock(self) -> int:
        """How many plans were made, and changes that make plans stale, so far."""
        return self._counts["clock"]

    @property
    def handles(self) -> NDArray[np.int64]:
        """int64 [slots]: the handle of each slot's request, below 0 without one."""
        return self._handles[: self.lengths.size]

    def slot(self, request: int) -> int:
        """The slot of a handle. Raises UnknownRequest."""
        request = integer("a request", request)
        slot = request & self._mask
        if self._handles[slot] != request:
            raise UnknownRequest([request])
        return slot

    def slot_of(self, handle: int) -> int:
        """The slot that a handle names, be it an admitted request's or not."""
        return handle & self._mask

    def slots(self, handles: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of handles, [n]. Raises UnknownRequest."""
        slots = handles & self._mask
        known = self._handles.take(slots) == handles
        if np.count_nonzero(known) < known.size:
            raise UnknownRequest(handles[~known])
        return slots

    def check_growth(
        self,
        handles: NDArray[np.int64],
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        steps: int,
        max_context: int,
    ) -> tuple[int, int, int]:
        """Whether requests of ``starts`` tokens can bring ``counts`` in each of so many steps, blocks aside.

        Returns:
          The tokens of one step, the most that a request brings to it, and those of the longest request.

        Raises:
          InvalidStep: a request twice, or a count below 1.
          ContextExceeded: a request would grow beyond ``max_context``.
        """
        if not handles.size:
            return 0, 0, 0
        # np.maximum.reduce is what counts.max() comes to, without its overhead; so with the others.
        if np.maximum.reduce(np.bincount(slots)) > 1:
            values, times = np.unique(handles, return_counts=True)
            raise InvalidStep(f"request {values[times > 1][0]} appears more than once; give each its tokens at once")
        if np.minimum.reduce(counts) < 1:
            first = int(counts.argmin())
            raise InvalidStep(
                f"request {handles[first]} is given {counts[first]} tokens; give at least 1 or leave it out"
            )
        most, longest = int(np.maximum.reduce(counts)), int(np.maximum.reduce(starts))
        if longest + most * steps > max_context:
            # One by one, compared by division: products could overflow.
            over = counts > (max_context - starts) // min(steps, max_context + 1)
            if over.any():
                first = int(over.argmax())
                raise ContextExceeded(handles[first], starts[first], int(counts[first]) * steps, max_context)
        return int(np.add.reduce(counts)), most, longest

    def oldest_plan(self) -> int:
        """Plans made before this time are stale: each of their slots has changed since."""
        return int(self.changed.min(where=self.handles >= 0, initial=self.clock))

    def tick(self) -> Write:
        """The write that moves the clock on by one."""
        return self._counts, "clock", self.clock + 1

    def admit(self) -> tuple[int, tuple[Write, ...]]:
        """A free slot for a new request: (its handle, writes). Raises CacheFull."""
        free, serial = self._counts["free"], self._counts["serial"] + 1
        if not free:
            raise CacheFull("slots", 1, 0, self.lengths.size)
        slot = int(self._free[free - 1])
        handle = serial << self._bits | slot
        return handle, (
            (self._handles, slot, handle),
            (self._counts, "serial", serial),
            (self._counts, "free", free - 1),
            (self.reset_due, slot, True),
        )

    def forget(self, slot: int) -> tuple[Write, ...]:
        """What a slot's request held is gone: as if it had just been admitted."""
        return (
            (self.lengths, slot, 0),
            (self.peaks, slot, 0),
            (self.reset_due, slot, True),
            *self.make_stale(slot),
            *self._wipe(slot),
        )

    def release(self, slot: int) -> tuple[Write, ...]:
        """The slot is free; the next request to be admitted gets it."""
        free = self._counts["free"]
        return (
            *self.forget(slot),
            (self._handles, slot, ~slot),
            (self._free, free, slot),
            (self._counts, "free", free + 1),
        )

    def release_all(self) -> tuple[Write, ...]:
        """All slots are free, in the order of a new table; handles go on from where they are."""
        slots = self.lengths.size
        everywhere = slice(None)
        return (
            (self.lengths, everywhere, 0),
            (self.peaks, everywhere, 0),
            (self.reset_due, everywhere, True),
            *self.make_stale(everywhere),
            (self._handles, everywhere, ~np.arange(self._handles.size, dtype=np.int64)),
            (self._free, everywhere, np.arange(slots, dtype=np.int64)[::-1]),
            (self._counts, "free", slots),
        )

    def make_stale(self, slots: int | slice | NDArray[np.integer]) -> tuple[Write, ...]:
        """Plans made so far for these slots cannot be taken back any more."""
        return self.tick(), (self.changed, slots, self.clock + 1)
