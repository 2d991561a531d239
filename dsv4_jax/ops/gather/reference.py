"""gather_entries, gather_all_entries and gather_window: stored rows, dequantized, with their positions and validity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range, read_rows
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.ops.flush.reference import block_of
from dsv4_jax.ops.operands import Rows
from dsv4_jax.spec.kinds import entries_per_block


def gather_entries(
    pool: jax.Array,
    block_table: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    indices: jax.Array,
    layer: jax.Array | int,
    *,
    ratio: int,
    format: VectorFormat,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[jax.Array, Rows]:
    """Chosen entries (or indexer keys) of each query's slot.

    Args:
      pool: [layers, blocks, *page(128 / ratio)].
      block_table: int32 [slots, max_blocks].
      slots: int32 [Q]; negative or unknown: no row is valid.
      counts: int32 [Q], how many entries exist for the query.
      indices: int32 [Q, K]; an index below 0, not below the query's count, or without a block is not valid.
      layer: int32 scalar, index along the pool's first axis; out of range: no row is valid.
      ratio: tokens per entry, 4 (CSA) or 128 (HCA).
      format: how entries are stored.
      dtype: float32 or bfloat16.

    Returns:
      pool, as it came (an in-place read passes it through); Rows.
    """
    exists = in_range(indices, counts[:, None])
    block = block_of(block_table, jnp.broadcast_to(slots[:, None], indices.shape), indices, ratio)
    row = indices % entries_per_block(ratio)
    rows_per_page = entries_per_block(ratio)
    return pool, _read(pool, exists, layer, block, row, ratio * indices, rows_per_page, format, dtype)


def gather_all_entries(
    pool: jax.Array,
    block_table: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int,
    *,
    ratio: int,
    format: VectorFormat,
    entries: int,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[jax.Array, Rows]:
    """The first `entries` entries of each query's slot, K of `gather_entries`, which has the other arguments."""
    indices = jnp.broadcast_to(jnp.arange(entries), (slots.shape[0], entries))
    return gather_entries(pool, block_table, slots, counts, indices, layer, ratio=ratio, format=format, dtype=dtype)


def gather_window(
    window: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    last: jax.Array,
    layer: jax.Array | int,
    *,
    format: VectorFormat,
    rows: int = 128,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[jax.Array, jax.Array, Rows]:
    """The window rows of each query's slot up to a position: output row j has position last - rows + 1 + j.

    Args:
      window: [layers, slots, *page(ring)].
      positions: int32 [layers, slots, ring].
      slots: int32 [Q]; negative or unknown: no row is valid.
      last: int32 [Q]; negative: no row is valid.
      layer: int32 scalar, index along the window's first axis; out of range: no row is valid.
      format: how window rows are stored.
      dtype: float32 or bfloat16.
      rows: K.

    Returns:
      window and positions, as they came; Rows, valid where the position is not negative and the ring still holds it.
    """
    layers, slot_count, ring = positions.shape
    position = last[:, None] - (rows - 1) + jnp.arange(rows)
    slot = jnp.broadcast_to(slots[:, None], position.shape)
    known = in_range(slot, slot_count) & in_range(layer, layers)
    recorded = positions[jnp.where(known, layer, 0), jnp.where(known, slot, 0), position % ring]
    exists = known & (position >= 0) & (recorded == position)
    return window, positions, _read(window, exists, layer, slot, position % ring, position, ring, format, dtype)


def _read(
    pool: jax.Array,
    exists: jax.Array,
    layer: jax.Array | int,
    page: jax.Array,
    row: jax.Array,
    position: jax.Array,
    rows_per_page: int,
    vector_format: VectorFormat,
    dtype: jnp.dtype,
) -> Rows:
    """Rows at pool[layer, page], place `row`, where they exist: [Q, K] each."""
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
