"""gather_entries, gather_all_entries and gather_window in jnp; ``gather/api.py`` says what they do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range, read_rows
from dsv4_jax.arithmetic.places import all_requests
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops.flush.reference import block_of
from dsv4_jax.ops.operands import Rows
from dsv4_jax.spec.kinds import entries_per_block


def gather_entries(
    pool: jax.Array,
    block_table: jax.Array,
    plan: StepPlan,
    indices: jax.Array,
    layer: jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Rows]:
    """Chosen entries of each token's request."""
    visible = (jnp.asarray(plan.token_position) + 1) // ratio
    return _entries(pool, block_table, plan.token_slot, visible, indices, layer, ratio, format, dtype)


def gather_all_entries(
    pool: jax.Array,
    block_table: jax.Array,
    plan: StepPlan,
    layer: jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    entries: int,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Rows]:
    """The first `entries` entries of each request."""
    request = all_requests(plan, block_table.shape[0])
    slot = jnp.where(request.valid, request.slot, -1)
    indices = jnp.broadcast_to(jnp.arange(entries, dtype=jnp.int32), (plan.layout.requests, entries))
    return _entries(pool, block_table, slot, request.next // ratio, indices, layer, ratio, format, dtype)


def gather_window(
    window: jax.Array,
    positions: jax.Array,
    plan: StepPlan,
    layer: jax.Array,
    *,
    format: VectorFormat,
    rows: int,
    before: bool,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, Rows]:
    """The window rows of each request up to its last token, or up to the token before its first."""
    layers, slots, ring = positions.shape
    request = all_requests(plan, slots)
    last = (request.start if before else request.next) - 1
    position = last[:, None] - (rows - 1) + jnp.arange(rows, dtype=jnp.int32)[None]
    slot = jnp.broadcast_to(request.slot[:, None], position.shape)
    known = request.valid[:, None] & in_range(layer, layers)
    recorded = positions[jnp.where(in_range(layer, layers), layer, 0), jnp.where(known, slot, 0), position % ring]
    exists = known & (position >= 0) & (recorded == position)
    return window, positions, _read(window, exists, layer, slot, position % ring, position, ring, format, dtype)


def _entries(
    pool: jax.Array,
    block_table: jax.Array,
    slot: jax.Array,
    visible: jax.Array,
    indices: jax.Array,
    layer: jax.Array,
    ratio: int,
    format: VectorFormat,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Rows]:
    """Entries by query: its slot and how many it sees, [queries], and which ones, [queries, count]."""
    exists = (indices >= 0) & (indices < visible[:, None])
    block = block_of(block_table, jnp.broadcast_to(jnp.asarray(slot)[:, None], indices.shape), indices, ratio)
    rows = entries_per_block(ratio)
    return pool, _read(pool, exists, layer, block, indices % rows, ratio * indices, rows, format, dtype)


def _read(
    pool: jax.Array,
    exists: jax.Array,
    layer: jax.Array,
    page: jax.Array,
    row: jax.Array,
    position: jax.Array,
    rows_per_page: int,
    vector_format: VectorFormat,
    dtype: jnp.dtype,
) -> Rows:
    """Rows at pool[layer, page], place `row`, where they exist: [queries, count] each."""
    values, valid = read_rows(
        pool,
        exists.ravel(),
        layer,
        page.ravel(),
        row.ravel(),
        rows_per_page=rows_per_page,
        vector_format=vector_format,
        dtype=dtype,
    )
    valid = valid.reshape(exists.shape)
    return Rows(values.reshape(*exists.shape, -1), jnp.where(valid, position, -1), valid)
