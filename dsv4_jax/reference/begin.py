"""begin_step: what a step changes before any layer runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.plan import StepPlan
from dsv4_jax.reference.pages import in_range
from dsv4_jax.schema import empty_tail


def begin_step(
    block_table: jax.Array,
    window_positions: jax.Array,
    csa_tail: jax.Array,
    key_tail: jax.Array,
    hca_tail: jax.Array,
    plan: StepPlan,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Make the slots of new requests as new, then apply the step's block-table changes.

    As new: no blocks, no window position recorded, every tail row with kv 0 and score -1e9 (a running tail: max -1e9,
    denominator and sum 0). Entries, keys and window rows are left as they are, since nothing leads to them any more.

    Args:
      block_table: int32 [slots, max_blocks].
      window_positions: int32 [layers, slots, ring].
      csa_tail: fp32 [csa_layers, slots, 2 (kv, score), 12, 512].
      key_tail: fp32 [csa_layers, slots, 2, 12, 128].
      hca_tail: fp32 [hca_layers, slots, 2, 128, 512], or running [hca_layers, slots, 3, 512].
      plan: the step; slots and table places out of range change nothing.

    Returns:
      The same five arrays.
    """
    slots, max_blocks = block_table.shape
    slot = jnp.asarray(plan.request_slot)
    reset = jnp.where((jnp.asarray(plan.request_reset) != 0) & in_range(slot, slots), slot, slots)
    block_table = block_table.at[reset].set(-1, mode="drop")
    window_positions = window_positions.at[:, reset].set(-1, mode="drop")
    tails = [tail.at[:, reset].set(empty_tail(tail.shape), mode="drop") for tail in (csa_tail, key_tail, hca_tail)]

    slot, index = jnp.asarray(plan.table_slot), jnp.asarray(plan.table_index)
    valid = in_range(slot, slots) & in_range(index, max_blocks)
    changed = jnp.where(valid, slot, slots)
    block_table = block_table.at[changed, index].set(plan.table_block, mode="drop")
    return block_table, window_positions, *tails
