"""begin_step: what a step's plan changes before any layer runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.ops._call import call, check, check_plan, check_tail, plan_attributes
from dsv4_jax.plan import StepPlan

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def begin_step(
    block_table: jax.Array,
    window_positions: jax.Array,
    csa_tail: jax.Array,
    key_tail: jax.Array,
    hca_tail: jax.Array,
    plan: StepPlan,
) -> State:
    """Resets the slots that have a new owner, then applies the step's block-table changes.

    A reset slot is as new: block-table row -1, window positions -1, tails kv 0 and score -1e9 (running: max
    -1e9, denominator and sum 0).

    Args:
      block_table: int32 [slots, max_blocks].
      window_positions: int32 [layers, slots, ring].
      csa_tail: float32 [csa_layers, slots, 2, 12, 512].
      key_tail: float32 [csa_layers, slots, 2, 12, 128].
      hca_tail: float32 [hca_layers, slots, 2, 128, 512], or running [hca_layers, slots, 3, 512].
      plan: the step; slots, indices and requests below 0 or out of range change nothing.

    Returns:
      The five arrays, updated in place.
    """
    op = "begin_step"
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check(op, "window_positions", window_positions, (None, block_table.shape[0], None), jnp.int32)
    for name, tail, ratio in (("csa_tail", csa_tail, 4), ("key_tail", key_tail, 4), ("hca_tail", hca_tail, 128)):
        check_tail(op, name, tail, ratio)
    check_plan(op, plan)
    operands = (block_table, window_positions, csa_tail, key_tail, hca_tail, plan.packed)
    block_table, window_positions, csa_tail, key_tail, hca_tail = call(
        op, operands, in_place=5, **plan_attributes(plan)
    )
    return block_table, window_positions, csa_tail, key_tail, hca_tail
