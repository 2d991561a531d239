"""Where things are: the tokens and requests of a step, blocks of entries, and the rows of a compressor's tail.

A token's projection has an *overlap* half, columns [:d], pooled by the next window's entry, and a *current* half,
columns [d:], pooled by its own window's. Only CSA has both; HCA's d columns are all current. A tail keeps

    overlap halves   at row  position % (2 ratio)           the open window and the one before it, side by side
    current halves   at row  overlap_rows + position % ratio

so that closing a window moves nothing: which rows mean something follows from the request's next position.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.kinds import BLOCK_TOKENS

CSA_RATIO = 4


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


def entries_per_block(ratio: int) -> int:
    """Entries of a block: 32 for CSA, 1 for HCA."""
    return BLOCK_TOKENS // ratio


def overlap_rows(ratio: int) -> int:
    """Tail rows for overlap halves, which come first: two windows for CSA, none for HCA."""
    return 2 * ratio if ratio == CSA_RATIO else 0


def tail_rows(ratio: int) -> int:
    """All rows of a tail: 12 for CSA, 128 for HCA."""
    return overlap_rows(ratio) + ratio


def overlap_row(position: jax.Array, ratio: int) -> jax.Array:
    """The tail row of a token's overlap half."""
    return position % (2 * ratio)


def current_row(position: jax.Array, ratio: int) -> jax.Array:
    """The tail row of a token's current half."""
    return overlap_rows(ratio) + position % ratio


def overlap_survives(position: jax.Array, following: jax.Array, ratio: int) -> jax.Array:
    """Whether a token's overlap half is still needed when its request continues at position `following`."""
    return (overlap_rows(ratio) > 0) & (position // ratio >= following // ratio - 1)


def current_survives(position: jax.Array, following: jax.Array, ratio: int) -> jax.Array:
    """Whether a token's current half is still needed when its request continues at position `following`."""
    return position // ratio == following // ratio


def tail_rows_in_use(following: jax.Array, ratio: int) -> jax.Array:
    """Which tail rows hold something when a request continues at position `following`: [R] -> bool [R, rows]."""
    row, following = jnp.arange(tail_rows(ratio), dtype=jnp.int32)[None], following[:, None]
    open_window, filled = following // ratio, following % ratio
    is_current = row >= overlap_rows(ratio)
    is_open = row // ratio == open_window % 2
    overlap = jnp.where(is_open, row % ratio < filled, open_window > 0)
    return jnp.where(is_current, row - overlap_rows(ratio) < filled, overlap)
