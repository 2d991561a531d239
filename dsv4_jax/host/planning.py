"""Filling plans: ``build_plan`` from slots, positions and counts, ``build_plans`` for several steps."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.layout.plan import PlanLayout, Receipt, StepPlan
from dsv4_jax.spec.kinds import RATIOS

TableChanges = tuple[ArrayLike, ArrayLike, ArrayLike]
TABLE_FIELDS = ("table_slot", "table_index", "table_block")
# The field of each ratio, and the position in a window of the token that closes it. Arrays: NumPy converts a number
# anew at every operation.
_LAST_OF_WINDOW = tuple((f"closing_{ratio}", np.array(ratio - 1, np.int32)) for ratio in RATIOS)


def build_plan(
    layout: PlanLayout,
    slots: ArrayLike,
    starts: ArrayLike,
    counts: ArrayLike,
    resets: ArrayLike,
    table_changes: TableChanges | None = None,
    *,
    receipt: Receipt | None = None,
) -> StepPlan:
    """The plan of a step: ``counts[i]`` tokens from position ``starts[i]`` for the request in slot ``slots[i]``.

    Pure: reserves nothing, checks only that the step fits the layout (``CacheManager.prepare_forward`` does the rest).

    Args:
      layout: shapes of the plan.
      slots: integers [n], n <= layout.requests, distinct.
      starts: integers [n], position of each request's first token.
      counts: integers [n], each at least 1, at most layout.tokens together.
      resets: booleans [n], or one for all: whether the slot must first be cleared of its former owner.
      table_changes: (slot, index, block), integers [k] each, k <= layout.table_changes, or None for no change.
      receipt: see ``StepPlan``.

    Returns:
      A StepPlan with a read-only NumPy vector. No request at all gives only padding: a step that changes nothing.

    Raises:
      ValueError: more requests, tokens or table changes than the layout holds.
    """
    _check_fit(layout, slots, counts, 0 if table_changes is None else np.size(table_changes[0]))
    return PlanFrame(layout, slots, counts).plan(starts, resets, table_changes, receipt=receipt)


def build_plans(
    layout: PlanLayout,
    steps: int,
    slots: ArrayLike,
    starts: ArrayLike,
    counts: ArrayLike,
    resets: ArrayLike,
    table_changes: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike] | None = None,
    *,
    receipt: Receipt | None = None,
) -> StepPlan:
    """The plans of successive steps that bring the same number of tokens each, stacked.

    Args:
      layout: shapes of each step's plan.
      steps: how many.
      slots: as for ``build_plan``.
      starts: as for ``build_plan``, of the first step.
      counts: as for ``build_plan``, of every step.
      resets: of the first step, as for ``build_plan``; no later step resets.
      table_changes: (step, slot, index, block), integers [k] each, ascending by step, at most layout.table_changes for
        one step; or None.
      receipt: see ``StepPlan``.

    Returns:
      A StepPlan with a read-only NumPy array [steps, layout.size], whose row i is what ``build_plan`` makes for step i.

    Raises:
      ValueError: as ``build_plan``.
    """
    _check_fit(layout, slots, counts)
    return PlanFrame(layout, slots, counts).plans(steps, starts, resets, table_changes, receipt=receipt)


def _check_fit(layout: PlanLayout, slots: ArrayLike, counts: ArrayLike, changes: int = 0) -> None:
    requests, tokens = np.size(slots), int(np.sum(counts))
    if requests > layout.requests or tokens > layout.tokens or changes > layout.table_changes:
        raise ValueError(
            f"{requests} requests, {tokens} tokens and {changes} table changes do not fit a plan of "
            f"{layout.requests}, {layout.tokens} and {layout.table_changes}"
        )


class PlanFrame:
    """What all plans share whose steps bring so many tokens each of requests in these slots, one after the other.

    A decode step's plan differs from the one before in little else than its positions. Checks nothing; arguments are
    those of ``build_plan``, and ``resets`` None means no slot.
    """

    def __init__(self, layout: PlanLayout, slots: ArrayLike, counts: ArrayLike) -> None:
        self._layout, self._places = layout, _places(layout)
        self._slots, counts = np.asarray(slots).astype(np.int32), np.asarray(counts, np.intp)
        self._requests, self._tokens = self._slots.size, int(np.add.reduce(counts))
        # Of each token: its request (None where each request brings one), which of the request's tokens it is, and by
        # how much its position advances from step to step.
        self._request: NDArray[np.intp] | None = None
        self._offset: NDArray[np.intp] | int = 0
        self._advance: NDArray[np.int32] | int = 1
        if self._tokens == self._requests:
            self._common = _one_token_each(layout, self._requests)
            return
        fields, requests, tokens = self._places.fields, self._requests, self._tokens
        self._common = self._places.padding.copy()
        query_start = self._common[fields["query_start"]]
        np.cumsum(counts, out=query_start[1 : requests + 1])
        query_start[requests + 1 :] = tokens
        self._common[fields["longest"]] = counts.max()
        self._request = np.repeat(np.arange(requests), counts)
        self._offset = np.arange(tokens) - query_start[self._request]
        self._advance = counts[self._request].astype(np.int32)
        self._common[fields["token_request"]][:tokens] = self._request

    def plan(
        self,
        starts: ArrayLike,
        resets: ArrayLike | None = None,
        table_changes: TableChanges | None = None,
        *,
        receipt: Receipt | None = None,
    ) -> StepPlan:
        """The plan of a step; arguments and result as of ``build_plan``."""
        packed, fields = self._common.copy(), self._places.fields
        packed[fields["request_slot"]][: self._requests] = self._slots
        token_slot, position = packed[fields["token_slot"]], packed[fields["token_position"]][: self._tokens]
        if self._request is None:
            token_slot[: self._tokens] = self._slots
            position[:] = starts
        else:
            token_slot[: self._tokens] = self._slots[self._request]
            position[:] = np.asarray(starts)[self._request] + self._offset
        if resets is not None:
            packed[fields["request_reset"]][: self._requests] = resets
        closing = None
        for name, last in _LAST_OF_WINDOW:
            if closing is None:
                closing = ((position & last) == last).nonzero()[0]
            else:  # each ratio divides the next
                closing = closing[(position[closing] & last) == last]
            place = closing if self._places.by_token else slice(closing.size)
            packed[fields[name]][place] = closing.astype(np.int32)  # faster than converting as it is stored
        if table_changes is not None:
            changes = np.size(table_changes[0])
            for name, values in zip(TABLE_FIELDS, table_changes, strict=True):
                packed[fields[name]][:changes] = values
        packed.flags.writeable = False
        return StepPlan(packed, self._layout, receipt)

    def plans(
        self,
        steps: int,
        starts: ArrayLike,
        resets: ArrayLike | None = None,
        table_changes: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike] | None = None,
        *,
        receipt: Receipt | None = None,
    ) -> StepPlan:
        """The plans of so many steps; arguments and result as of ``build_plans``."""
        packed = np.tile(self.plan(starts, resets).packed, (steps, 1))
        fields = {name: packed[:, where] for name, where in self._places.fields.items()}
        fields["request_reset"][1:] = 0
        position = fields["token_position"][:, : self._tokens]
        position += np.arange(steps, dtype=np.int32)[:, None] * self._advance
        for name, last in _LAST_OF_WINDOW:
            step, token = np.nonzero((position & last) == last)
            closing = fields[name]
            closing[:] = -1
            closing[step, token if self._places.by_token else _place_in_run(step)] = token
        if table_changes is not None:
            step, *values = map(np.asarray, table_changes)
            place = _place_in_run(step)
            fits = self._layout.table_changes
            if place.max(initial=-1) >= fits:
                raise ValueError(f"{place.max() + 1} table changes in one step do not fit a plan of {fits}")
            for name, value in zip(TABLE_FIELDS, values, strict=True):
                fields[name][step, place] = value
        packed.flags.writeable = False
        return StepPlan(packed, self._layout, receipt)


@dataclasses.dataclass
class _Places:
    """What a layout says, at hand.

    Attributes:
      fields: its ``fields``.
      by_token: its ``closings_by_token``.
      padding: int32 [layout.size], the vector of a step without requests.
    """

    fields: dict[str, slice]
    by_token: bool
    padding: NDArray[np.int32]


@functools.lru_cache(maxsize=64)
def _places(layout: PlanLayout) -> _Places:
    padding = np.full(layout.size, -1, np.int32)
    for name in ("request_reset", "query_start", "longest"):
        padding[layout.fields[name]] = 0
    return _Places(dict(layout.fields), layout.closings_by_token, padding)


@functools.lru_cache(maxsize=64)
def _one_token_each(layout: PlanLayout, requests: int) -> NDArray[np.int32]:
    """What the vectors of all steps of one token for each of so many requests share."""
    packed = _places(layout).padding.copy()
    packed[layout.fields["token_request"]][:requests] = np.arange(requests)
    packed[layout.fields["query_start"]] = np.minimum(np.arange(layout.requests + 1), requests)
    packed[layout.fields["longest"]] = min(requests, 1)
    return packed


def _place_in_run(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal values come before each one; [n] ascending -> [n]."""
    return np.arange(values.size) - np.searchsorted(values, values)
