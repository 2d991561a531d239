"""save_displaced: the window rows that a step takes the place of while its tokens still see them, as stored.

A chunk of many tokens writes over ring rows that its early tokens need, and over rows of its own. They are copied out
before the write, together with the step's own rows, for the attention that comes after it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import page_of, read_stored
from dsv4_jax.arithmetic.places import all_requests
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops.attend.operands import Displaced
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    check,
    check_count,
    check_implementation,
    check_plan,
    check_window,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.operands import Window
from dsv4_jax.ops.quantize.api import quantize
from dsv4_jax.spec.kinds import HEAD_DIM


def save_displaced(
    window: Window,
    rows: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    size: int = 128,
    implementation: Implementation = "native",
) -> tuple[Window, Displaced]:
    """The rows that each request's tokens see and that may leave the ring in this step; call before they are stored.

    Args:
      window: [layers, slots, *page(ring)] of `format` and positions int32 [layers, slots, ring], before the step.
      rows: [tokens, 512] float32 or bfloat16, the step's, normalized and rotated.
      plan: the step.
      layer: index of the layer; out of range: nothing is saved but the step's own rows.
      format: how rows are stored.
      size: of the window, at most the ring's.
      implementation: who rounds the step's own rows.

    Returns:
      window, unchanged, to be written next: what is saved was read before. And Displaced.

    Raises:
      OperandError: an operand does not fit, or it is differentiated or mapped.
    """
    op = "save_displaced"
    check_implementation(implementation)
    check_window(op, window.window, window.positions, format)
    check_plan(op, plan)
    size = check_count(op, "size", size, smallest=1)
    check(op, "rows", rows, (plan.layout.tokens, HEAD_DIM), *FLOATING)
    given = untransformed(op, (window, rows, plan, take_layer(layer)))
    window, rows, plan, layer = jax.tree.map(jnp.asarray, given)
    layers, slots, ring = window.positions.shape
    layer = jnp.where((layer >= 0) & (layer < layers), layer, layers)

    request, place, position = _places(plan, size, slots)
    token = jnp.arange(position.size, dtype=jnp.int32) - (size - 1) * (request + 1)
    own = place >= size - 1
    slot = jnp.clip(jnp.asarray(plan.request_slot)[request], 0, slots - 1)
    known = jnp.minimum(layer, layers - 1)
    recorded = jnp.where(layer < layers, window.positions[known, slot, position % ring], -1)
    before = read_stored(window.window, known, slot, position % ring, rows_per_page=ring, vector_format=format)
    made = quantize(rows, format=format, implementation=implementation)[None, None]
    zero = jnp.zeros_like(token)
    token = jnp.clip(token, 0, plan.layout.tokens - 1)
    new = read_stored(made, 0, zero, token, rows_per_page=plan.layout.tokens, vector_format=format)
    stored = tuple(jnp.where(own[:, None], *parts) for parts in zip(new, before, strict=True))
    saved = Displaced(page_of(stored, format)[None, None], jnp.where(own | (recorded == position), position, -1))
    # Nothing else would order the read before the write, and XLA would copy the whole window to be safe.
    return jax.lax.optimization_barrier((window, saved))


def _places(plan: StepPlan, size: int, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row of ``Displaced``: its request, its place among the request's rows, its position (-1: none)."""
    requests = all_requests(plan, slots)
    query_start = jnp.asarray(plan.query_start)
    begins = (size - 1) * jnp.arange(plan.layout.requests, dtype=jnp.int32) + query_start[:-1]
    row = jnp.arange((size - 1) * plan.layout.requests + plan.layout.tokens, dtype=jnp.int32)
    request = jnp.searchsorted(begins, row, side="right").astype(jnp.int32) - 1
    place = row - begins[request]
    position = requests.start[request] - (size - 1) + place
    exists = requests.valid[request] & (position >= 0) & (position < requests.next[request])
    return request, place, jnp.where(exists, position, -1)
