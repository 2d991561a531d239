"""The running tail: an open HCA window kept as the softmax of its rows so far, instead of as the rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.arithmetic.places import Requests, all_requests
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import empty_tail
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
      tail: fp32 [layers, slots, 3, d].
      kv: fp32 [T, d].
      score: fp32 [T, d], the position bias added.
      plan: the step.
      layer: int32 scalar; out of range writes nothing.
    """
    layers, slots = tail.shape[:2]
    request = all_requests(plan, slots)
    window = request.next // RATIO * RATIO
    position = window[:, None] + jnp.arange(RATIO, dtype=jnp.int32)[None]
    present = (position >= request.start[:, None]) & (position < request.next[:, None])
    index = jnp.asarray(plan.query_start)[:-1, None] + position - request.start[:, None]
    index = jnp.clip(index, 0, kv.shape[0] - 1)
    state = window_state(tail, layer, request.slot, request.start > window)
    state = fold_rows(state, kv[index], score[index], present)
    keep = request.valid & (request.next > window) & in_range(layer, layers)
    return tail.at[layer, jnp.where(keep, request.slot, slots)].set(state, mode="drop")


def rotate_running(tail: jax.Array, closed: Requests, layer: jax.Array | int) -> jax.Array:
    """``rotate`` for a running tail: requests whose window closed with the step's last token start with an empty one.

    Args:
      tail: fp32 [layers, slots, 3, d].
      closed: the requests of a step; valid are those that closed a window.
      layer: int32 scalar; out of range changes nothing.
    """
    layers, slots = tail.shape[:2]
    clear = closed.valid & (closed.next % RATIO == 0) & in_range(layer, layers)
    return tail.at[layer, jnp.where(clear, closed.slot, slots)].set(empty_tail(tail.shape), mode="drop")


def window_state(tail: jax.Array, layer: jax.Array | int, slot: jax.Array, resumes: jax.Array) -> jax.Array:
    """The state that windows go on from: that of the slot where earlier steps began the window, else an empty one.

    Args:
      tail: fp32 [layers, slots, 3, d].
      layer: int32 scalar.
      slot: int32 [N].
      resumes: bool [N].

    Returns:
      fp32 [N, 3, d]; anything where layer or slot are out of range.
    """
    layers, slots = tail.shape[:2]
    layer = jnp.where(in_range(layer, layers), layer, 0)
    empty = jnp.array([-jnp.inf, 0, 0], jnp.float32)[None, :, None]
    return jnp.where(resumes[:, None, None], tail[layer, jnp.clip(slot, 0, slots - 1)], empty)
