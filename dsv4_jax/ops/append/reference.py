"""append_window and append_tail in jnp; ``append/api.py`` says what they do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range, write_rows
from dsv4_jax.arithmetic.places import all_tokens
from dsv4_jax.arithmetic.running import append_running
from dsv4_jax.arithmetic.scalars import to_float32
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.layer_schema import is_running
from dsv4_jax.layout.plan import StepPlan


def append_window(
    window: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
    plan: StepPlan,
    layer: jax.Array | int,
    *,
    format: VectorFormat,
) -> tuple[jax.Array, jax.Array]:
    """A step's rows in the ring: row = position % ring, and only rows that the same step does not overwrite."""
    layers, slots, ring = positions.shape
    token = all_tokens(plan, slots)
    survives = token.valid & (token.position >= token.next - ring) & in_range(layer, layers)
    row = token.position % ring
    window = write_rows(window, rows, survives, layer, token.slot, row, rows_per_page=ring, vector_format=format)
    slot = jnp.where(survives, token.slot, slots)
    return window, positions.at[layer, slot, row].set(token.position, mode="drop")


def append_tail(
    tail: jax.Array,
    kv: jax.Array,
    gate: jax.Array,
    position_bias: jax.Array,
    plan: StepPlan,
    layer: jax.Array | int,
    *,
    ratio: int,
) -> jax.Array:
    """What later entries pool of a step's projections: kv, and score = gate + position_bias[position % ratio]."""
    layers, slots, *_, width = tail.shape
    token = all_tokens(plan, slots)
    kv, score = to_float32(kv), to_float32(gate) + to_float32(position_bias)[token.position % ratio]
    if is_running(tail.shape):
        return append_running(tail, kv, score, plan, layer)
    geometry = TailGeometry.of_rows(ratio, tail.shape[3])
    places = [(geometry.current_row, geometry.current_survives, slice(-width, None))]
    if geometry.compression.overlap:
        places.append((geometry.overlap_row, geometry.overlap_survives, slice(None, width)))
    for row_of, survives, columns in places:
        keep = token.valid & survives(token.position, token.next) & in_range(layer, layers)
        slot = jnp.where(keep, token.slot, slots)[:, None]
        row = row_of(token.position)[:, None]
        values = jnp.stack([kv[:, columns], score[:, columns]], axis=1)
        tail = tail.at[layer, slot, jnp.arange(2)[None], row].set(values, mode="drop")
    return tail
