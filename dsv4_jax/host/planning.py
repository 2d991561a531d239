"""Filling plans: ``build_plan`` from slots, positions and counts, ``build_plans`` for several steps."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.layout.plan import PlanLayout, Receipt, StepPlan
from dsv4_jax.spec.kinds import RATIOS

TableChanges = tuple[ArrayLike, ArrayLike, ArrayLike]
TABLE_FIELDS = ("table_slot", "table_index", "table_block")


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
    slots, starts, counts = np.asarray(slots, np.intp), np.asarray(starts, np.intp), np.asarray(counts, np.intp)
    requests, tokens = slots.size, int(np.add.reduce(counts))
    changes = 0 if table_changes is None else np.size(table_changes[0])
    if requests > layout.requests or tokens > layout.tokens or changes > layout.table_changes:
        raise ValueError(
            f"{requests} requests, {tokens} tokens and {changes} table changes do not fit a plan of "
            f"{layout.requests}, {layout.tokens} and {layout.table_changes}"
        )

    fields = layout.fields
    if tokens == requests:
        packed = _one_token_each(layout, requests).copy()
        packed[fields["token_slot"]][:tokens] = slots
        position = packed[fields["token_position"]][:tokens]
        position[:] = starts
    else:
        packed = _padding(layout).copy()
        query_start = packed[fields["query_start"]]
        np.cumsum(counts, out=query_start[1 : requests + 1])
        query_start[requests + 1 :] = tokens
        packed[fields["longest"]] = counts.max()
        request = np.repeat(np.arange(requests), counts)
        packed[fields["token_slot"]][:tokens] = slots[request]
        packed[fields["token_request"]][:tokens] = request
        position = packed[fields["token_position"]][:tokens]
        position[:] = np.arange(tokens) + (starts - query_start[:requests])[request]
    packed[fields["request_slot"]][:requests] = slots
    packed[fields["request_reset"]][:requests] = resets

    closing = None
    for ratio in RATIOS:
        if closing is None:
            closing = ((position & (ratio - 1)) == ratio - 1).nonzero()[0]
        else:  # each ratio divides the next
            closing = closing[(position[closing] & (ratio - 1)) == ratio - 1]
        packed[fields[f"closing_{ratio}"]][closing if layout.closings_by_token else slice(closing.size)] = closing
    if table_changes is not None:
        for name, values in zip(TABLE_FIELDS, table_changes, strict=True):
            packed[fields[name]][:changes] = values
    packed.flags.writeable = False
    return StepPlan(packed, layout, receipt)


@functools.lru_cache(maxsize=64)
def _padding(layout: PlanLayout) -> NDArray[np.int32]:
    """The vector of a step without requests."""
    packed = np.full(layout.size, -1, np.int32)
    for name in ("request_reset", "query_start", "longest"):
        packed[layout.fields[name]] = 0
    return packed


@functools.lru_cache(maxsize=64)
def _one_token_each(layout: PlanLayout, requests: int) -> NDArray[np.int32]:
    """What the vectors of all steps of one token for each of so many requests share."""
    packed = _padding(layout).copy()
    packed[layout.fields["token_request"]][:requests] = np.arange(requests)
    packed[layout.fields["query_start"]] = np.minimum(np.arange(layout.requests + 1), requests)
    packed[layout.fields["longest"]] = min(requests, 1)
    return packed


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
    first = build_plan(layout, slots, starts, counts, resets)
    packed = np.tile(first.packed, (steps, 1))
    fields = {name: packed[:, where] for name, where in layout.fields.items()}
    fields["request_reset"][1:] = 0
    request = first.token_request[: first.query_start[-1]]
    position = fields["token_position"][:, : request.size]
    position += np.arange(steps, dtype=np.int32)[:, None] * np.asarray(counts, np.int32)[request]
    for ratio in RATIOS:
        step, token = np.nonzero((position & (ratio - 1)) == ratio - 1)
        closing = fields[f"closing_{ratio}"]
        closing[:] = -1
        closing[step, token if layout.closings_by_token else _place_in_run(step)] = token
    if table_changes is not None:
        step, *values = map(np.asarray, table_changes)
        place = _place_in_run(step)
        if place.max(initial=-1) >= layout.table_changes:
            raise ValueError(f"{place.max() + 1} table changes in one step do not fit a plan of {layout.table_changes}")
        for name, value in zip(TABLE_FIELDS, values, strict=True):
            fields[name][step, place] = value
    packed.flags.writeable = False
    return StepPlan(packed, layout, receipt)


def _place_in_run(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal values come before each one; [n] ascending -> [n]."""
    return np.arange(values.size) - np.searchsorted(values, values)
