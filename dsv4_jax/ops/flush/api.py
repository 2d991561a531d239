"""flush: finished entries, quantized into their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    Implementation,
    check,
    check_implementation,
    check_plan,
    check_pool,
    check_ratio,
    format_attributes,
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.flush import reference
from dsv4_jax.spec.kinds import BLOCK_TOKENS

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32

_FLUSH = signature("flush", "pool entries block_table plan layer", "pool", "tokens requests ratio codec global_scale")


def flush(
    pool: jax.Array,
    entries: Float32[Array, "closing width"],
    block_table: Int32[Array, "slots max_blocks"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    implementation: Implementation = "native",
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
      implementation: who runs it.

    Returns:
      pool, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "flush"
    check_implementation(implementation)
    ratio = check_ratio(op, ratio)
    check_pool(op, "pool", pool, BLOCK_TOKENS // ratio, format)
    check(op, "entries", entries, (plan.layout.closing_size(ratio), format.width), jnp.float32)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check_plan(op, plan)
    given = untransformed(op, (pool, entries, block_table, plan, take_layer(layer)))
    if implementation == "reference":
        return reference.flush(*given, ratio=ratio, format=format)
    pool, entries, block_table, plan, layer = given
    operands = {"pool": pool, "entries": entries, "block_table": block_table, "plan": plan.packed, "layer": layer}
    (pool,) = call(_FLUSH, operands, ratio=ratio, **plan_attributes(plan), **format_attributes(format))
    return pool
