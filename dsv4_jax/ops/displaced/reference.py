"""save_displaced in jnp; ``displaced/api.py`` says what it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import page_of, read_stored
from dsv4_jax.arithmetic.places import all_requests
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops.attend.operands import Displaced, displaced_rows
from dsv4_jax.ops.operands import Window


def save_displaced(
    window: Window, page: jax.Array, plan: StepPlan, layer: jax.Array, *, format: VectorFormat, size: int
) -> Displaced:
    """The rows that each request's tokens see: those of its window before the step, then its own, from their page."""
    layers, slots, ring = window.positions.shape
    layer = jnp.where((layer >= 0) & (layer < layers), layer, layers)

    request, place, position = _places(plan, size, slots)
    token = jnp.arange(position.size, dtype=jnp.int32) - (size - 1) * (request + 1)
    own = place >= size - 1
    slot = jnp.clip(jnp.asarray(plan.request_slot)[request], 0, slots - 1)
    known = jnp.minimum(layer, layers - 1)
    recorded = jnp.where(layer < layers, window.positions[known, slot, position % ring], -1)
    before = read_stored(window.window, known, slot, position % ring, rows_per_page=ring, vector_format=format)
    zero = jnp.zeros_like(token)
    token = jnp.clip(token, 0, plan.layout.tokens - 1)
    new = read_stored(page[None, None], 0, zero, token, rows_per_page=plan.layout.tokens, vector_format=format)
    stored = tuple(jnp.where(own[:, None], *parts) for parts in zip(new, before, strict=True))
    return Displaced(page_of(stored, format)[None, None], jnp.where(own | (recorded == position), position, -1))


def _places(plan: StepPlan, size: int, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row of ``Displaced``: its request, its place among the request's rows, its position (-1: none)."""
    requests = all_requests(plan, slots)
    query_start = jnp.asarray(plan.query_start)
    begins = (size - 1) * jnp.arange(plan.layout.requests, dtype=jnp.int32) + query_start[:-1]
    row = jnp.arange(displaced_rows(plan.layout, size), dtype=jnp.int32)
    request = jnp.searchsorted(begins, row, side="right").astype(jnp.int32) - 1
    place = row - begins[request]
    position = requests.start[request] - (size - 1) + place
    exists = requests.valid[request] & (position >= 0) & (position < requests.next[request])
    return request, place, jnp.where(exists, position, -1)
