"""append_window and append_tail: the rows of a step that outlive it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import (
    FLOATING,
    call,
    check,
    check_plan,
    check_pool,
    check_projections,
    check_tail,
    format_attributes,
    layer_operand,
    plan_attributes,
)
from dsv4_jax.spec.kinds import HEAD_DIM


def append_window(
    window: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
) -> tuple[jax.Array, jax.Array]:
    """Stores the step's sliding-window rows, each in ring row ``position % ring``.

    Of more rows than the ring holds only the last ``ring`` of a request are written, so no two writes meet.

    Args:
      window: [layers, slots, *page(ring)] of `format`.
      positions: int32 [layers, slots, ring], the position each ring row holds, -1 for none.
      rows: [tokens, 512] float32 or bfloat16, normalized and rotated; the trailing 64 channels stay exact for bfloat16.
      plan: the step; padding tokens (-1) write nothing.
      layer: index of the layer.
      format: how rows are stored.

    Returns:
      window and positions, updated in place.
    """
    op = "append_window"
    check(op, "positions", positions, (*window.shape[:2], None), jnp.int32)
    check_pool(op, "window", window, positions.shape[2], format)
    check(op, "rows", rows, (plan.layout.tokens, HEAD_DIM), *FLOATING)
    check_plan(op, plan)
    operands = (window, positions, rows, plan.packed, layer_operand(layer))
    window, positions = call(op, operands, in_place=2, **plan_attributes(plan), **format_attributes(format))
    return window, positions


def append_tail(
    tail: jax.Array,
    kv: jax.Array,
    gate: jax.Array,
    ape: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
) -> jax.Array:
    """Keeps the compressor inputs of the step that a later entry will pool.

    Those are the tokens of the window that is open after the step and, for CSA, the overlap half of the one before it.

    Args:
      tail: float32 [layers, slots, 2 (kv, score), rows, width]; 12 rows for CSA, 128 for HCA (see ``Cache``). Or, for
        HCA, a running tail, float32 [layers, slots, 3 (max, denominator, sum), 512].
      kv: [tokens, columns] float32 or bfloat16; columns = 2 * width for CSA (overlap half, current half), width for
        HCA.
      gate: as kv; the stored score is ``gate + ape[position % ratio]``.
      ape: float32 [ratio, columns].
      plan: the step; padding tokens (-1) write nothing.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).

    Returns:
      tail, updated in place.
    """
    op = "append_tail"
    check_tail(op, "tail", tail, ratio)
    check_projections(op, tail, kv, gate, ape, plan, ratio)
    check_plan(op, plan)
    operands = (tail, kv, gate, ape, plan.packed, layer_operand(layer))
    (tail,) = call(op, operands, in_place=1, ratio=ratio, **plan_attributes(plan))
    return tail
