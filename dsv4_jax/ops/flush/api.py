"""flush: finished entries, quantized into their blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call, check, check_plan, check_pool, format_attributes, layer_operand, plan_attributes
from dsv4_jax.spec.kinds import BLOCK_TOKENS


def flush(
    pool: jax.Array,
    entries: jax.Array,
    block_table: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
) -> jax.Array:
    """Stores the entries (or indexer keys) that a step closes.

    Entry e of a slot goes to row ``e % rows`` of block ``block_table[slot, e // rows]``, rows = 128 / ratio.

    Args:
      pool: [layers, blocks, *page(128 / ratio)] of `format`.
      entries: float32 [closing, width], from ``compress``.
      block_table: int32 [slots, max_blocks]; a block below 0 or out of range writes nothing.
      plan: the step; ``plan.closing(ratio)`` gates the writes, -1 writes nothing.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).
      format: how rows are stored.

    Returns:
      pool, updated in place.
    """
    op = "flush"
    check_pool(op, "pool", pool, BLOCK_TOKENS // ratio, format)
    check(op, "entries", entries, (plan.layout.closing_size(ratio), format.width), jnp.float32)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check_plan(op, plan)
    operands = (pool, entries, block_table, plan.packed, layer_operand(layer))
    (pool,) = call(op, operands, in_place=1, ratio=ratio, **plan_attributes(plan), **format_attributes(format))
    return pool
