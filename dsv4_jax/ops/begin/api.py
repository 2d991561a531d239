"""begin_step: what a step's plan changes before any layer runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.begin import reference
from dsv4_jax.ops.checks import (
    Implementation,
    check,
    check_implementation,
    check_plan,
    plan_attributes,
    untransformed,
)

_BEGIN_STEP = signature(
    "begin_step",
    "block_table write_table window_positions plan",
    "block_table write_table window_positions plan_copy",
    "tokens requests",
)


def begin_step(
    block_table: jax.Array,
    write_table: jax.Array,
    window_positions: jax.Array,
    plan: StepPlan,
    *,
    implementation: Implementation = "native",
) -> tuple[jax.Array, jax.Array, jax.Array, StepPlan]:
    """Resets the slots that have a new owner, then applies the step's block-table changes.

    Both tables are changed: a block that comes with a step is the request's own.

    A reset slot has no blocks (table rows -1) and no window rows (positions -1). Tails are left as they are: what a
    former owner left there is of positions that the new one has not reached, and is not read.

    Args:
      block_table: int32 [slots, max_blocks].
      write_table: int32 [slots, max_blocks].
      window_positions: int32 [layers, slots, ring].
      plan: the step; slots, indices and requests below 0 or out of range change nothing.
      implementation: who runs it.

    Returns:
      The three arrays, updated in place, and a copy of the plan, for the layers. The copy has the same address in every
      run of a compiled step; the plan itself is a new array each time, and XLA would update the CUDA graph in every
      place that reads it.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "begin_step"
    check_implementation(implementation)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check(op, "write_table", write_table, jnp.shape(block_table), jnp.int32)
    check(op, "window_positions", window_positions, (None, jnp.shape(block_table)[0], None), jnp.int32)
    check_plan(op, plan)
    given = untransformed(op, (block_table, write_table, window_positions, plan))
    block_table, write_table, window_positions, plan = given
    if implementation == "reference":
        return reference.begin_step(*given)
    operands = {"block_table": block_table, "write_table": write_table, "window_positions": window_positions}
    operands["plan"] = plan.packed
    copy = {"plan_copy": ((plan.layout.size,), jnp.int32)}
    *updated, packed = call(_BEGIN_STEP, operands, results=copy, **plan_attributes(plan))
    block_table, write_table, window_positions = updated
    return block_table, write_table, window_positions, StepPlan(packed, plan.layout)
