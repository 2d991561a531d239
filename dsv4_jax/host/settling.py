"""What becomes of a plan after it was made: which of its requests can still be taken out of it, and what is left."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.errors import InvalidStep, StalePlan
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
    """

    receipt: Receipt
    steps: int
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    resets: NDArray[np.bool_]

    @classmethod
    def of_plan(cls, plan: StepPlan, receipts: Receipts, table: RequestTable) -> Outstanding:
        """All of a plan.

        Raises:
          StalePlan: it is not this manager's, was settled, or holds a request that changed since.
          TypeError: it is no StepPlan.
        """
        receipt = receipts.check(plan)
        first, steps = (plan, 1) if plan.packed.ndim == 1 else (plan.step(0), len(plan.packed))
        requests = int(np.count_nonzero(first.request_slot >= 0))
        slots = first.request_slot[:requests].astype(np.int64)
        gone = table.changed[slots] >= receipt.serial
        if gone.any():
            raise StalePlan(
                f"{int(gone.sum())} of the plan's {requests} requests (slot {slots[gone][0]} for one) were released or "
                "truncated since it was made, or had a later plan committed; truncate or release the others"
            )
        starts = first.request_start[:requests].astype(np.int64)
        counts = np.diff(first.query_start[: requests + 1]).astype(np.int64)
        return cls(receipt, steps, slots, starts, counts, first.request_reset[:requests] != 0)

    @property
    def ends(self) -> NDArray[np.int64]:
        """int64 [n]: each request's length once all of the steps have run."""
        return self.starts + self.counts * self.steps

    def of(self, chosen: NDArray[np.bool_]) -> Outstanding:
        """The part of some of the requests; bool [n]."""
        parts = {name: getattr(self, name)[chosen] for name in ("slots", "starts", "counts", "resets")}
        return dataclasses.replace(self, **parts)

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

    def check_latest(self, table: RequestTable) -> None:
        """Raises StalePlan if a request has a later plan."""
        later = table.lengths[self.slots] != self.ends
        if later.any():
            raise StalePlan(
                f"{int(later.sum())} of the plan's {self.slots.size} requests ({table.handles[self.slots[later][0]]} "
                "for one) have a later plan; cancel that first"
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
