"""What becomes of a plan after it was made: which of its requests can still be taken out of it, and what is left.

What was reserved and not written, or not kept, cannot be read. Entries, keys and window rows count by position, and
every position from the new length on is written before it counts. Nor does a block that is freed, and then given to
another slot, stay within reach of its former one: the places of the device's block table that a request of length n
reads or writes are the first ``CacheManager.blocks_needed(n)``, which it keeps. A later place may be empty, since the
step that would have filled it was stopped with all its changes, or hold a block that is another's by now: the step that
first needs the place sets it before anything goes through it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.arguments import length_array, run_array
from dsv4_jax.host.drafts import DraftTable
from dsv4_jax.host.errors import InvalidStep, StalePlan
from dsv4_jax.host.journal import Write
from dsv4_jax.host.planning import TABLE_FIELDS, build_plan, build_plans
from dsv4_jax.host.receipts import Receipts
from dsv4_jax.host.requests import RequestTable
from dsv4_jax.layout.plan import PlanLayout, Receipt, StepPlan


@dataclasses.dataclass(frozen=True)
class Outstanding:
    """A plan that was not settled, or its part of some requests: n of them, in the plan's order.

    Attributes:
      receipt: the plan's.
      steps: how many it has.
      slots, starts, counts: int64 [n], each request's slot, its length before the plan, its tokens in each step.
      resets: bool [n], whether the first step resets the slot.
      drafts: int64 [n], drafts among the tokens of each step.
      earlier: int64 [n], drafts of earlier plans that nothing is known of: the length before may be smaller by as many.
      made: int64 [n], drafts of the request up to the plan, see ``Drafted``.
    """

    receipt: Receipt
    steps: int
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    resets: NDArray[np.bool_]
    drafts: NDArray[np.int64]
    earlier: NDArray[np.int64]
    made: NDArray[np.int64]

    @classmethod
    def of_plan(cls, plan: StepPlan, receipts: Receipts, table: RequestTable, drafts: DraftTable) -> Outstanding:
        """All of a plan, as commits have left it since it was made.

        Raises:
          StalePlan: it is not this manager's, or was settled.
          TypeError: it is no StepPlan.
        """
        receipt = receipts.check(plan)
        first, steps = (plan, 1) if plan.packed.ndim == 1 else (plan.step(0), len(plan.packed))
        requests = int(np.count_nonzero(first.request_slot >= 0))
        slots = first.request_slot[:requests].astype(np.int64)
        starts = first.request_start[:requests].astype(np.int64)
        counts = np.diff(first.query_start[: requests + 1]).astype(np.int64)
        resets, drafted = first.request_reset[:requests] != 0, receipt.drafts
        if drafted is None:
            none = np.zeros(requests, np.int64)
            return cls(receipt, steps, slots, starts, counts, resets, none, none, none)
        starts -= drafts.taken_back[slots] - drafted.taken_back
        earlier = drafted.made - drafted.of_step * steps - drafts.known[slots]
        return cls(receipt, steps, slots, starts, counts, resets, drafted.of_step, earlier, drafted.made)

    @property
    def ends(self) -> NDArray[np.int64]:
        """int64 [n]: each request's length once all of the steps have run."""
        return self.starts + self.counts * self.steps

    def of(self, chosen: NDArray[np.bool_]) -> Outstanding:
        """The part of some of the requests; bool [n]."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("receipt", "steps")]
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def unchanged(self, table: RequestTable, *, all_of_them: bool) -> NDArray[np.bool_]:
        """Which of its requests are as this and maybe later plans left them, bool [n].

        Raises:
          StalePlan: some are not, if ``all_of_them`` must be, or else none is.
        """
        gone = table.changed[self.slots] >= self.receipt.serial
        if gone.any() and (all_of_them or gone.all()):
            raise StalePlan(
                f"{int(gone.sum())} of the plan's {gone.size} requests (slot {self.slots[gone][0]} for one) were "
                "released or truncated since it was made, or had a later plan committed; truncate or release the others"
            )
        return ~gone

    def chosen(self, requests: ArrayLike | None, table: RequestTable) -> NDArray[np.bool_]:
        """Which of its requests a caller means: bool [n], all for None.

        Raises:
          InvalidStep: no integers, or a request that the plan does not hold.
          UnknownRequest: a handle that is not admitted.
        """
        if requests is None:
            return np.ones(self.slots.size, np.bool_)
        handles = np.atleast_1d(np.asarray(requests))
        if handles.ndim != 1 or (handles.size and handles.dtype.kind not in "iu"):
            raise InvalidStep(f"requests must be one handle or several, got {handles.dtype} {list(handles.shape)}")
        handles = handles.astype(np.int64)
        missing = ~np.isin(table.slots(handles), self.slots)
        if missing.any():
            raise InvalidStep(f"the plan has no tokens of request {handles[missing][0]}; name requests that it holds")
        return np.isin(table.handles[self.slots], handles)

    def later(self, table: RequestTable) -> NDArray[np.bool_]:
        """Bool [n]: which requests have a later plan."""
        return table.lengths[self.slots] != self.ends

    def check_latest(self, table: RequestTable, *, but: NDArray[np.bool_] | bool = False) -> None:
        """Raises StalePlan if a request has a later plan, ``but`` some [n] that may have one."""
        later = self.later(table) & ~np.asarray(but)
        if later.any():
            raise StalePlan(
                f"{int(later.sum())} of the plan's {self.slots.size} requests ({table.handles[self.slots[later][0]]} "
                "for one) have a later plan; cancel that first"
            )

    def kept(
        self, steps_run: ArrayLike | None, lengths: ArrayLike | None, padded: int, table: RequestTable
    ) -> tuple[Outstanding, NDArray[np.int64]]:
        """``commit``'s arguments: (the part of the requests to settle, int64 [its requests] their length afterwards).

        That is the length once the plan has run, later plans aside. ``padded`` is R.

        Raises:
          InvalidStep: they have another shape, are not of integers, or cannot be.
          StalePlan: a request did not even run the step that resets it, and has a later plan.
        """
        unchanged = self.unchanged(table, all_of_them=False)
        part = self.of(unchanged)
        drafts = part.drafts + part.earlier > 0
        if lengths is not None and steps_run is None:
            kept = length_array(lengths, self.slots.size, padded)[unchanged]
            part._check_lengths(kept, table)
            part.check_latest(table, but=drafts | (kept == part.ends))
            return part, kept
        if steps_run is None or lengths is not None:
            raise InvalidStep("commit takes either steps_run or lengths")
        part.check_latest(table, but=drafts)
        run = run_array(steps_run, table.handles[self.slots], padded, self.steps)[unchanged]
        if drafts.any():
            raise InvalidStep(
                f"request {table.handles[part.slots[drafts][0]]} has drafts of which nothing is known: a number "
                "of steps does not tell how many were kept; give commit lengths=…"
            )
        return part, part.starts + run * part.counts

    def _check_lengths(self, lengths: NDArray[np.int64], table: RequestTable) -> None:
        """Whether there is a number of steps, and of drafts that they keep, that leads to these lengths, [n]."""
        grown = lengths - self.starts
        steps = -(-grown // self.counts)
        possible = (steps >= 0) & (steps <= self.steps) & (grown >= steps * (self.counts - self.drafts))
        possible |= (self.earlier > 0) & (grown >= -self.earlier) & (lengths <= self.ends)
        if not possible.all():
            first = int(possible.argmin())
            raise InvalidStep(
                f"request {table.handles[self.slots[first]]} cannot have {lengths[first]} tokens after {self.steps} "
                f"steps of {self.counts[first]}, {self.drafts[first]} of them drafts, from {self.starts[first]}"
                + f" or up to {self.earlier[first]} fewer"
                * bool(self.earlier[first])
            )
        unborn = self.resets & (lengths == 0) & self.later(table)
        if unborn.any():
            raise StalePlan(
                f"request {table.handles[self.slots[unborn][0]]} ran no step of the plan that resets its slot, and has "
                "a later plan, which would start without; cancel that first"
            )

    def learn(
        self, kept: NDArray[np.int64], table: RequestTable, drafts: DraftTable, lookahead: int
    ) -> tuple[Write, ...]:
        """The writes that note what became of drafts, if requests had ``kept`` tokens [n] once the plan had run."""
        if self.receipt.drafts is None:
            return ()
        # What was written and not kept is at most the drafts of the last step that ran.
        beyond = np.where(self.earlier > 0, lookahead, np.where(kept > self.starts, self.drafts, 0))
        peaks = np.maximum(table.peaks[self.slots], np.minimum(kept + beyond, self.ends))
        return (
            (table.peaks, self.slots, peaks),
            (drafts.taken_back, self.slots, drafts.taken_back[self.slots] + self.ends - kept),
            (drafts.known, self.slots, self.made),
        )


def plan_of(part: Outstanding, plan: StepPlan, layout: PlanLayout, receipt: Receipt) -> StepPlan:
    """A plan of a part of another plan's requests.

    Args:
      part: of ``plan``.
      plan: the plan that the part is of; the blocks it hands out are handed out again.
      layout: of the new plan.
      receipt: of the new plan.
    """
    rows = plan.packed.reshape(part.steps, -1)
    of_table = [rows[:, plan.layout.fields[name]] for name in TABLE_FIELDS]
    step, place = np.isin(of_table[0], part.slots).nonzero()
    slot, index, block = (field[step, place] for field in of_table)
    given = part.slots, part.starts, part.counts, part.resets
    if plan.packed.ndim == 1:
        return build_plan(layout, *given, (slot, index, block), receipt=receipt)
    return build_plans(layout, part.steps, *given, (step, slot, index, block), receipt=receipt)
