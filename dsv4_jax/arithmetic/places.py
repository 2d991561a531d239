"""Which token of a step is where: the tokens and requests of a plan, checked against the slots of a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.layout.plan import StepPlan


class Tokens(NamedTuple):
    """The tokens of a step. What does not fit the plan or the slots is padding: not valid, all else meaningless.

    Attributes:
      valid: bool [N].
      slot: int32 [N], its request's slot.
      position: int32 [N], its position in its request.
      start: int32 [N], the position of its request's first token of the step.
      next: int32 [N], its request's position after the step.
    """

    valid: jax.Array
    slot: jax.Array
    position: jax.Array
    start: jax.Array
    next: jax.Array


class Requests(NamedTuple):
    """The requests of a step, [R] each; attributes as in `Tokens`."""

    valid: jax.Array
    slot: jax.Array
    start: jax.Array
    next: jax.Array


def tokens_at(plan: StepPlan, index: jax.Array, slots: int) -> Tokens:
    """The tokens at flat indices of a step; a negative or too large index is padding.

    Args:
      plan: the step.
      index: int32 [N].
      slots: how many slots the cache has.
    """
    count, requests = plan.layout.tokens, plan.layout.requests
    exists = (index >= 0) & (index < count)
    at = jnp.clip(index, 0, count - 1)
    slot, position, request = (jnp.asarray(x)[at] for x in (plan.token_slot, plan.token_position, plan.token_request))
    query_start = jnp.asarray(plan.query_start)
    first, end = (query_start[jnp.clip(request, 0, requests - 1) + i] for i in (0, 1))
    start, following = position - (index - first), position + (end - index)
    valid = exists & (slot >= 0) & (slot < slots) & (position >= 0) & (request >= 0) & (request < requests)
    valid &= (first >= 0) & (first <= index) & (index < end) & (end <= count) & (start >= 0)
    return Tokens(valid, slot, position, start, following)


def all_tokens(plan: StepPlan, slots: int) -> Tokens:
    """The tokens of a step in flat order, [T] each."""
    return tokens_at(plan, jnp.arange(plan.layout.tokens, dtype=jnp.int32), slots)


def all_requests(plan: StepPlan, slots: int) -> Requests:
    """The requests of a step in the plan's order, [R] each."""
    slot = jnp.asarray(plan.request_slot)
    first = tokens_at(plan, jnp.asarray(plan.query_start)[:-1], slots)
    valid = (slot >= 0) & (slot < slots) & first.valid & (first.slot == slot)
    return Requests(valid, slot, first.start, first.next)
