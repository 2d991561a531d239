"""The running tail: an open HCA window kept as the softmax of its rows so far, instead of as the rows.

With a lookahead it keeps what that was after each of the latest tokens, in a ring by position: then the request goes
on from the state after any of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.arithmetic.places import Requests, all_requests
from dsv4_jax.layout.layer_schema import STATE_ROWS, empty_tail
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.kinds import LayerKind

RATIO = LayerKind.HCA.ratio


def fold_rows(state: jax.Array, kv: jax.Array, score: jax.Array, present: jax.Array) -> jax.Array:
    """States with rows added to their softmax.

    Args:
      state: fp32 [N, 3 (max, denominator, sum), d]; the sum is of kv, each weighted by ``exp(score - max)``.
      kv: fp32 [N, rows, d].
      score: fp32 [N, rows, d].
      present: bool [N, rows], which rows there are.

    Returns:
      fp32 [N, 3, d].
    """
    present = present[..., None]
    score = jnp.where(present, score, -jnp.inf)
    largest = jnp.maximum(state[:, 0], score.max(axis=1))
    weight = softmax_weight(score, largest[:, None])
    keep = softmax_weight(state[:, 0], largest)
    denominator = state[:, 1] * keep + weight.sum(axis=1)
    return jnp.stack([largest, denominator, state[:, 2] * keep + (weight * jnp.where(present, kv, 0)).sum(axis=1)], 1)


def softmax_weight(score: jax.Array, largest: jax.Array) -> jax.Array:
    """``exp(score - largest)``: 0 for a score of -inf, also where the largest is -inf too."""
    return jnp.exp(score - jnp.where(largest == -jnp.inf, 0, largest))


def append_running(
    tail: jax.Array, kv: jax.Array, score: jax.Array, plan: StepPlan, layer: jax.Array | int
) -> jax.Array:
    """``append_tail`` for a running tail: the tokens of the window that is open after the step, folded in.

    Args:
      tail: fp32 [layers, slots, 3 states, d].
      kv: fp32 [T, d].
      score: fp32 [T, d], the position bias added.
      plan: the step.
      layer: int32 scalar; out of range writes nothing.
    """
    layers, slots = tail.shape[:2]
    states = tail.shape[2] // STATE_ROWS
    first, request = jnp.asarray(plan.query_start)[:-1], all_requests(plan, slots)
    # The state after each of a request's last tokens, as many as the tail keeps: [R * states].
    last = (request.next[:, None] - 1 - jnp.arange(states, dtype=jnp.int32)[None]).reshape(-1)
    first, valid, slot, start = (jnp.repeat(x, states) for x in (first, request.valid, request.slot, request.start))
    window = last // RATIO * RATIO
    position = window[:, None] + jnp.arange(RATIO, dtype=jnp.int32)[None]
    present = (position >= start[:, None]) & (position <= last[:, None])
    index = jnp.clip(first[:, None] + position - start[:, None], 0, kv.shape[0] - 1)
    state = window_state(tail, layer, slot, start, start > window)
    state = fold_rows(state, kv[index], score[index], present)
    keep = valid & (last >= start) & (last % RATIO != RATIO - 1) & in_range(layer, layers)
    return _set_states(tail, layer, jnp.where(keep, slot, slots), last, state)


def _set_states(tail: jax.Array, layer: jax.Array | int, slot: jax.Array, position: jax.Array, state: Any) -> jax.Array:
    """Puts states, fp32 [N, 3, d] or for all, where those after the tokens at these positions [N] lie."""
    row = position % (tail.shape[2] // STATE_ROWS) * STATE_ROWS
    rows = row[:, None] + jnp.arange(STATE_ROWS, dtype=jnp.int32)[None]
    return tail.at[layer, slot[:, None], rows].set(state, mode="drop")


def rotate_running(tail: jax.Array, request: Requests, layer: jax.Array | int) -> jax.Array:
    """``rotate`` for a running tail: states after tokens that closed a window are empty.

    Args:
      tail: fp32 [layers, slots, 3 states, d].
      request: the requests of a step.
      layer: int32 scalar; out of range changes nothing.
    """
    layers, slots = tail.shape[:2]
    states = tail.shape[2] // STATE_ROWS
    last = (request.next[:, None] - 1 - jnp.arange(states, dtype=jnp.int32)[None]).reshape(-1)
    valid, slot = (jnp.repeat(x, states) for x in (request.valid, request.slot))
    clear = valid & ((last < 0) | (last % RATIO == RATIO - 1)) & in_range(layer, layers)
    return _set_states(tail, layer, jnp.where(clear, slot, slots), last, empty_tail(tail.shape)[:STATE_ROWS])


def window_state(
    tail: jax.Array, layer: jax.Array | int, slot: jax.Array, start: jax.Array, resumes: jax.Array
) -> jax.Array:
    """The state that windows go on from: that of the slot where earlier steps began the window, else an empty one.

    Args:
      tail: fp32 [layers, slots, 3 states, d].
      layer: int32 scalar.
      slot: int32 [N].
      start: int32 [N], the position that goes on.
      resumes: bool [N].

    Returns:
      fp32 [N, 3, d]; anything where layer or slot are out of range.
    """
    layers, slots = tail.shape[:2]
    layer = jnp.where(in_range(layer, layers), layer, 0)
    empty = jnp.array([-jnp.inf, 0, 0], jnp.float32)[None, :, None]
    states = tail.reshape(layers, slots, -1, STATE_ROWS, tail.shape[3])
    before = states[layer, jnp.clip(slot, 0, slots - 1), jnp.maximum(start - 1, 0) % states.shape[2]]
    return jnp.where(resumes[:, None, None], before, empty)
