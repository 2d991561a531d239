"""flush in jnp; ``flush/api.py`` says what it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range, write_rows
from dsv4_jax.arithmetic.places import tokens_at
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.kinds import entries_per_block


def block_of(block_table: jax.Array, slot: jax.Array, entry: jax.Array, ratio: int) -> jax.Array:
    """The block that holds an entry of a slot; -1 where slot or entry is out of range.

    Args:
      block_table: int32 [slots, max_blocks].
      slot: int32, any shape.
      entry: int32, slot's shape.
      ratio: tokens per entry.
    """
    slots, max_blocks = block_table.shape
    index = entry // entries_per_block(ratio)
    known = in_range(slot, slots) & in_range(index, max_blocks)
    return jnp.where(known, block_table[jnp.where(known, slot, 0), jnp.where(known, index, 0)], -1)


def flush(
    pool: jax.Array,
    entries: jax.Array,
    block_table: jax.Array,
    plan: StepPlan,
    layer: jax.Array | int,
    *,
    ratio: int,
    format: VectorFormat,
) -> jax.Array:
    """Entry e in block block_table[slot, e // n], row e % n, n entries a block."""
    rows_per_page = entries_per_block(ratio)
    closing = tokens_at(plan, jnp.asarray(plan.closing(ratio)), block_table.shape[0])
    entry = closing.position // ratio
    block = block_of(block_table, closing.slot, entry, ratio)
    return write_rows(
        pool,
        entries,
        closing.valid,
        layer,
        block,
        entry % rows_per_page,
        rows_per_page=rows_per_page,
        vector_format=format,
    )
