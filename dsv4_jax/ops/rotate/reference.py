"""rotate: after windows have closed, clear the tail rows that no later entry pools."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.arithmetic.places import all_requests
from dsv4_jax.arithmetic.running import rotate_running
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import EMPTY_SCORE, is_running


def rotate(tail: jax.Array, plan: StepPlan, layer: jax.Array | int, *, ratio: int) -> jax.Array:
    """Clear (kv 0, score -1e9) what is no longer needed, for requests whose step closed a window (with a depth: whose
    earliest position, that they can go back to, left a window).

    CSA's open window thereby becomes its previous one: its overlap halves stay, its current halves and the overlap
    halves before them go. HCA's window goes entirely.

    Args:
      tail: fp32 [layers, slots, 2 (kv, score), rows, d], or running [layers, slots, 3, d] (`running.rotate_running`).
      plan: the step.
      layer: int32 scalar, index along the tail's first axis; out of range changes nothing.
      ratio: tokens per entry, 4 (CSA) or 128 (HCA).

    Returns:
      The tail.
    """
    layers, slots = tail.shape[:2]
    request = all_requests(plan, slots)
    here = request.valid & in_range(layer, layers)
    if is_running(tail.shape):
        closed = here & (request.start // ratio != request.next // ratio)
        return rotate_running(tail, request._replace(valid=closed), layer)
    geometry = TailGeometry.of_rows(ratio, tail.shape[3])
    closed = here & (geometry.earliest_window(request.start) != geometry.earliest_window(request.next))
    clear = closed[:, None] & ~geometry.rows_in_use(request.next)
    slot = jnp.where(clear, request.slot[:, None], slots)
    row = jnp.arange(geometry.rows)
    tail = tail.at[layer, slot, 0, row].set(0.0, mode="drop")
    return tail.at[layer, slot, 1, row].set(EMPTY_SCORE, mode="drop")
