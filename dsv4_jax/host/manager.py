"""CacheManager: which request has which slot, which blocks and how many tokens, between steps and on the host.

The device never sees a request handle, the host never sees a cache: all that crosses is the ``StepPlan`` of each step.
What the manager knows of the cache is what the plans it made will have done once they have run, in the order made.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.arguments import run_array, step_arrays
from dsv4_jax.host.blocks import BlockAllocator
from dsv4_jax.host.errors import CacheFull, ContextExceeded, InvalidStep, StalePlan, StepTooLarge, UnknownRequest
from dsv4_jax.host.planning import build_plan, build_plans
from dsv4_jax.host.truncation import check_truncation
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS, LayerKind

_NO_REQUEST = -1


class _Receipt:
    """Which manager made a plan, when on that manager's clock, and whether it was "cancelled" or "committed" since."""

    __slots__ = ("manager", "settled", "time")

    def __init__(self, manager: CacheManager, time: int) -> None:
        self.manager, self.time, self.settled = manager, time, ""


class CacheManager:
    """Admits requests, reserves their blocks step by step, and takes both back.

    Every operation is all or nothing: one that raises has changed nothing. Not thread-safe.

    A request's *length* is the number of its tokens in the cache once every plan made so far has run, so plans must run
    in the order they were made, each once, on one cache; one that will not run must be cancelled, one that ran in part
    (see ``StepPlan.stop``) committed. ``release`` and ``truncate`` may come while plans are still running: the donated
    cache queues later plans behind them, so a freed block or slot is reused at once.

    Args:
      schema: the cache the plans are for.
      token_buckets: the token counts T that steps are padded to. A step is compiled once for each bucket in use; the
        largest is the most tokens of a step.
    """

    def __init__(self, schema: CacheSchema, *, token_buckets: Sequence[int]) -> None:
        buckets = sorted({int(bucket) for bucket in token_buckets})
        if not buckets or buckets[0] < 1:
            raise ValueError(f"token_buckets must be one or more token counts of at least 1, got {list(token_buckets)}")
        self._schema = schema
        self._buckets = buckets
        self._layouts = [PlanLayout(bucket, min(schema.slots, bucket)) for bucket in buckets]
        self._has_csa = schema.spec.count(LayerKind.CSA) > 0
        self._has_hca = schema.spec.count(LayerKind.HCA) > 0
        # A request needs block i once it has this many tokens more than i blocks hold.
        self._tokens_of_first_entry = LayerKind.CSA.ratio if self._has_csa else LayerKind.HCA.ratio

        self._allocator = BlockAllocator(schema.blocks)
        self._free_slots = list(range(schema.slots))[::-1]
        self._serial = 0
        self._handles = np.full(schema.slots, _NO_REQUEST, np.int64)
        self._lengths = np.zeros(schema.slots, np.int64)
        self._block_table = np.full((schema.slots, schema.max_blocks), -1, np.int32)
        # The longest a slot's request has been: window rows below ``peak - ring`` have been overwritten. Only truncate
        # writes it, so that preparing a step need not; elsewhere the peak is max(peak, length).
        self._peaks = np.zeros(schema.slots, np.int64)
        # When each slot's request was last released, truncated or committed: older plans cannot be taken back.
        self._clock = 0
        self._changed = np.zeros(schema.slots, np.int64)

    @property
    def schema(self) -> CacheSchema:
        """The cache the plans are for."""
        return self._schema

    @property
    def layouts(self) -> tuple[PlanLayout, ...]:
        """The layout of each token bucket, smallest first: all the shapes a plan of this manager can have."""
        return tuple(self._layouts)

    @property
    def free_slots(self) -> int:
        """How many more requests can be admitted."""
        return len(self._free_slots)

    @property
    def free_blocks(self) -> int:
        """How many blocks no request holds."""
        return self._allocator.free_blocks

    @property
    def requests(self) -> NDArray[np.int64]:
        """int64 [admitted requests]: their handles, in order of admission."""
        return np.sort(self._handles[self._handles != _NO_REQUEST])

    def length(self, request: int) -> int:
        """Tokens of the request in the cache once every plan made so far has run. Raises UnknownRequest."""
        return int(self._lengths[self._slot_of(request)])

    def slot(self, request: int) -> int:
        """The request's slot. Raises UnknownRequest."""
        return self._slot_of(request)

    def blocks(self, request: int) -> NDArray[np.int32]:
        """int32 [blocks held]: the request's block ids; the i-th holds the entries of tokens 128 i … 128 i + 127.

        Raises UnknownRequest.
        """
        slot = self._slot_of(request)
        return self._block_table[slot, : self.blocks_needed(self._lengths[slot])].copy()

    def blocks_needed(self, length: ArrayLike) -> NDArray[np.int64]:
        """Blocks a request of ``length`` tokens holds: as many as its finished entries fill, perhaps in part.

        ceil((length // 4) / 32) in a model with CSA layers, length // 128 with HCA layers only, 0 with neither.

        Args:
          length: integers of any shape, tokens.

        Returns:
          int64 of that shape.
        """
        length = np.asarray(length, np.int64)
        if self._has_csa or self._has_hca:
            return (length + (BLOCK_TOKENS - self._tokens_of_first_entry)) // BLOCK_TOKENS
        return np.zeros_like(length)

    def can_admit(self, length: int = 0) -> bool:
        """Whether a slot is free, and blocks for a request of ``length`` tokens are."""
        return (
            bool(self._free_slots)
            and length <= self._schema.max_context
            and self.blocks_needed(length) <= self.free_blocks
        )

    def admit(self) -> int:
        """Gives a new request a slot.

        Returns:
          The request's handle, never given out again by this manager. It is not the slot.

        Raises:
          CacheFull: no slot is free.
        """
        if not self._free_slots:
            raise CacheFull("slots", 1, 0, self._schema.slots)
        slot = self._free_slots.pop()
        self._serial += 1
        self._handles[slot] = self._serial * self._schema.slots + slot
        return int(self._handles[slot])

    def release(self, request: int) -> None:
        """Takes the request's slot and blocks back, on the host only: the slot's next request resets it on the device.

        Raises:
          UnknownRequest: the handle is not an admitted request's, or was released before.
        """
        slot = self._slot_of(request)
        self._forget(slot)
        self._handles[slot] = _NO_REQUEST
        self._free_slots.append(slot)

    def truncate(self, request: int, length: int) -> None:
        """Drops the tokens at positions ``length`` and beyond, on the host only.

        Truncating to 0 is always possible: the request's next plan resets its slot. Above 0 the cache must go on from
        ``length`` as if the dropped tokens had never been, so all that position ``length`` needs must still be there:

        - The open windows. A tail keeps the rows of the open window (for CSA also the overlap rows of the window before
          it); what a closed window leaves behind is cleared. With CSA layers the same window must be open before and
          after: the same ``length // 4``. With HCA layers only, the same ``length // 128``, or ``length`` a multiple of
          128, where the open window has no row yet. A running HCA tail has no rows to drop: only that multiple.
        - The sliding window. Positions ``length - window + 1 … length - 1`` must not have been overwritten by positions
          one ring later: ``length >= peak - lookahead - 1``, where ``peak`` is the longest the request has been since
          it was admitted or truncated to 0. While ``peak`` is at most the ring, nothing has been overwritten.

        Rows of dropped positions stay on the device. None is read: which rows count follows from the position, and a
        position is written again before it counts. Blocks whose entries are all dropped are free at once.

        Args:
          request: handle.
          length: tokens to keep, 0 <= length <= self.length(request).

        Raises:
          UnknownRequest: not an admitted request.
          CannotTruncate: ``length`` is out of range, or its state is gone; says what is possible.
        """
        slot = self._slot_of(request)
        length, current = operator.index(length), int(self._lengths[slot])
        if length == current:
            return
        if length == 0:
            self._forget(slot)
            return
        peak = max(int(self._peaks[slot]), current)
        check_truncation(self._schema, request, current, peak, length)
        self._keep(slot, length)
        self._peaks[slot] = peak

    def prepare_forward(
        self, tokens: Mapping[int, int] | tuple[ArrayLike, ArrayLike], *, steps: int | None = None
    ) -> StepPlan:
        """Reserves what a step needs and plans it: all of the requests given, or none.

        Advances each request's length, takes the blocks its new entries need, picks the smallest bucket that fits.

        With ``steps``, the same for that many steps in a row, each of the same counts: to be run by one dispatch, a
        ``lax.scan`` over the plan or a ``lax.while_loop`` over ``plan.step(i)``. A block or reset appears in the step
        that first needs it. Requests may stop on the way (``StepPlan.stop``); then ``commit`` says how far each came.

        Args:
          tokens: handle -> token count of the step (1 when decoding), or the same as a tuple of two integer arrays,
            (handles [n], counts [n]), the faster form for many requests. The plan keeps the order given. No request at
            all gives a plan of nothing but padding.
          steps: how many steps of these counts; None for the plan of one step.

        Returns:
          The plan, on the host: packed [size], or [steps, size] if ``steps`` is given.

        Raises:
          InvalidStep: a request twice, a count or ``steps`` below 1, or no integers of matching shape.
          UnknownRequest: a handle that is not admitted.
          ContextExceeded: a request would grow beyond ``schema.max_context``.
          StepTooLarge: more tokens than the largest bucket.
          CacheFull: too few free blocks.
        """
        handles, counts = step_arrays(tokens)
        slots = self._slots_of(handles)
        if np.bincount(slots, minlength=1).max() > 1:
            values, times = np.unique(handles, return_counts=True)
            raise InvalidStep(f"request {values[times > 1][0]} appears more than once; give each its tokens at once")
        if counts.min(initial=1) < 1:
            first = int(counts.argmin())
            raise InvalidStep(
                f"request {handles[first]} is given {counts[first]} tokens; give at least 1 or leave it out"
            )
        if steps is not None and (not isinstance(steps, (int, np.integer)) or steps < 1):
            raise InvalidStep(f"steps must be an integer of at least 1, or None for a single step; got {steps!r}")
        starts = self._lengths[slots]
        # Compared by subtraction and division: a sum or product could overflow.
        room = self._schema.max_context - starts
        over = counts > (room if steps is None else room // steps)
        if over.any():
            first = int(over.argmax())
            asked = int(counts[first]) * (steps or 1)
            raise ContextExceeded(handles[first], starts[first], asked, self._schema.max_context)
        total = int(counts.sum())
        if total > self._buckets[-1]:
            raise StepTooLarge(total, self._buckets[-1])
        layout = self._layouts[bisect.bisect_left(self._buckets, total)]
        ends = starts + (counts if steps is None else counts * steps)

        held = self.blocks_needed(starts)
        added = self.blocks_needed(ends) - held
        changes = None
        growing = added.nonzero()[0]
        if growing.size:
            added = added[growing]
            ids = self._allocator.allocate(int(added.sum()))
            first_new = np.cumsum(added) - added
            request = np.repeat(growing, added)
            table_index = np.arange(ids.size) + np.repeat(held[growing] - first_new, added)
            if steps is not None:
                reached = BLOCK_TOKENS * table_index + self._tokens_of_first_entry
                step = (reached - starts[request] - 1) // counts[request]
                # Blocks go out in order of need, as if the steps were prepared one by one.
                by_step = step.argsort(kind="stable")
                step, request, table_index = step[by_step], request[by_step], table_index[by_step]
            table_slot = slots[request]
            self._block_table[table_slot, table_index] = ids
            changes = table_slot, table_index, ids

        self._lengths[slots] = ends
        self._clock += 1
        receipt = _Receipt(self, self._clock)
        if steps is None:
            return build_plan(layout, slots, starts, counts, starts == 0, changes, receipt=receipt)
        changes = None if changes is None else (step, *changes)
        return build_plans(layout, steps, slots, starts, counts, starts == 0, changes, receipt=receipt)

    def cancel(self, plan: StepPlan) -> None:
        """Takes back a plan that has not run and will not: lengths, blocks and resets are as if it had never been made.

        Possible while it is the latest plan of each of its requests; so cancel several in reverse order. A plan of
        several steps is taken back whole; if some of them ran, ``commit`` it.

        Args:
          plan: what ``prepare_forward`` returned (not a copy that came out of jit).

        Raises:
          StalePlan: a request of the plan has a later plan, or was released or truncated since; or the plan was
            cancelled or committed before, or is not this manager's.
        """
        receipt, plans, slots = self._latest(plan)
        self._keep_steps(plans, slots, np.zeros(slots.size, np.int64))
        receipt.settled = "cancelled"

    def commit(self, plan: StepPlan, steps_run: ArrayLike) -> None:
        """Says how many of a plan's steps each request really ran; takes the rest back, lengths and blocks.

        For requests that stopped on the way and go on later. If all ran every step there is nothing to say, and for one
        that is over, ``release`` says enough. Possible while the plan is the latest of each of its requests, so commit
        first and release then.

        What was reserved and not written cannot be read. Entries, keys and window rows count by position, and every
        position from the new length on is written before it counts. Nor does a block that is freed here, and then given
        to another slot, stay within reach of its former one: the places of the device's block table that a request of
        length n reads or writes are the first ``blocks_needed(n)``, which it keeps. Later places are still empty, since
        the step that would have filled them was stopped with all its changes; and should one hold a block (after a
        ``truncate``), the step that first needs the place sets it before anything goes through it.

        Args:
          plan: what ``prepare_forward`` returned (not a copy that came out of jit).
          steps_run: integers, the steps each request ran before it was stopped, or the loop ended: [requests] in the
            plan's order, or [R] as the device has them (padding is ignored), or one number for all. It must be what the
            device did. A request that ran further cannot be taken back this way, only by ``truncate``.

        Raises:
          InvalidStep: ``steps_run`` has another shape, is not of integers, or not within 0 and the plan's steps.
          StalePlan: as for ``cancel``.
        """
        receipt, plans, slots = self._latest(plan)
        run = run_array(steps_run, self._handles[slots], plan.layout.requests, len(plans.packed))
        self._keep_steps(plans, slots, run)
        receipt.settled = "committed"
        # It ran, and so did all plans before it.
        self._clock += 1
        self._changed[slots] = self._clock

    def _latest(self, plan: StepPlan) -> tuple[_Receipt, StepPlan, NDArray[np.int32]]:
        """A plan's receipt, the plan as a stacked one, its requests' slots; StalePlan unless it can be taken back."""
        receipt = plan.receipt
        if not isinstance(receipt, _Receipt) or receipt.manager is not self:
            raise StalePlan("not a plan of this manager; pass the very object that its prepare_forward returned")
        if receipt.settled:
            raise StalePlan(f"this plan was {receipt.settled} before")
        plans = StepPlan(np.atleast_2d(plan.packed), plan.layout)
        last = plans.step(-1)
        slots = last.request_slot
        requests = int(np.count_nonzero(slots >= 0))
        slots = slots[:requests]
        gone = self._changed[slots] > receipt.time
        if gone.any():
            raise StalePlan(
                f"{int(gone.sum())} of the plan's {requests} requests (slot {slots[gone][0]} for one) were released or "
                "truncated since it was made, or had a later plan committed; truncate or release the others"
            )
        later = self._lengths[slots] != last.request_end[:requests]
        if later.any():
            raise StalePlan(
                f"{int(later.sum())} of the plan's {requests} requests ({self._handles[slots[later][0]]} for one) have "
                "a later plan; cancel that first"
            )
        return receipt, plans, slots

    def _keep_steps(self, plans: StepPlan, slots: NDArray[np.int32], run: NDArray[np.int64]) -> None:
        """Takes back all of a stacked plan but the first ``run`` steps [requests] of each request."""
        first = plans.step(0)
        run_by_slot = np.zeros(self._schema.slots, np.int64)
        run_by_slot[slots] = run
        step = np.arange(len(plans.packed))[:, None]
        dropped = (plans.table_slot >= 0) & (step >= run_by_slot[plans.table_slot])
        self._allocator.free(plans.table_block[dropped])
        self._block_table[plans.table_slot[dropped], plans.table_index[dropped]] = -1
        counts = np.diff(first.query_start)[: slots.size]
        self._lengths[slots] = first.request_start[: slots.size] + run * counts

    def _slots_of(self, handles: NDArray[np.int64]) -> NDArray[np.int64]:
        slots = handles % self._schema.slots
        known = (self._handles[slots] == handles) & (handles >= 0)
        if not known.all():
            raise UnknownRequest(handles[~known])
        return slots

    def _slot_of(self, request: int) -> int:
        request = operator.index(request)
        slot = request % self._schema.slots
        if request < 0 or self._handles[slot] != request:
            raise UnknownRequest([request])
        return slot

    def _keep(self, slot: int, length: int) -> None:
        held, kept = self.blocks_needed([self._lengths[slot], length]).tolist()
        self._allocator.free(self._block_table[slot, kept:held])
        self._block_table[slot, kept:held] = -1
        self._lengths[slot] = length
        self._clock += 1
        self._changed[slot] = self._clock

    def _forget(self, slot: int) -> None:
        self._keep(slot, 0)
        self._peaks[slot] = 0
