"""rotate in jnp; ``rotate/api.py`` says what it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.arithmetic.places import all_requests
from dsv4_jax.arithmetic.running import rotate_running
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.layer_schema import EMPTY_SCORE, is_running
from dsv4_jax.layout.plan import StepPlan


def rotate(tail: jax.Array, plan: StepPlan, layer: jax.Array | int, *, ratio: int) -> jax.Array:
    """Kv 0 and score -1e9 in rows that are no longer needed, for requests whose step closed a window.

    With a depth: whose earliest position, that they can go back to, left a window.
    """
    layers, slots = tail.shape[:2]
    request = all_requests(plan, slots)
    here = request.valid & in_range(layer, layers)
    if is_running(tail.shape):
        return rotate_running(tail, request._replace(valid=here), layer)
    geometry = TailGeometry.of_rows(ratio, tail.shape[3])
    closed = here & (geometry.earliest_window(request.start) != geometry.earliest_window(request.next))
    clear = closed[:, None] & ~geometry.rows_in_use(request.next)
    slot = jnp.where(clear, request.slot[:, None], slots)
    row = jnp.arange(geometry.rows, dtype=jnp.int32)[None]
    tail = tail.at[layer, slot, 0, row].set(0.0, mode="drop")
    return tail.at[layer, slot, 1, row].set(EMPTY_SCORE, mode="drop")
