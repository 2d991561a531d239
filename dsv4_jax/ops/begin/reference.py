"""begin_step in jnp; ``begin/api.py`` says what it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.layout.plan import StepPlan


def begin_step(
    block_table: jax.Array, write_table: jax.Array, window_positions: jax.Array, plan: StepPlan
) -> tuple[jax.Array, jax.Array, jax.Array, StepPlan]:
    """The slots of new requests as new, then the step's block-table changes; and the plan."""
    slots, max_blocks = block_table.shape
    slot = jnp.asarray(plan.request_slot)
    reset = jnp.where((jnp.asarray(plan.request_reset) != 0) & in_range(slot, slots), slot, slots)
    window_positions = window_positions.at[:, reset].set(-1, mode="drop")

    slot, index = jnp.asarray(plan.table_slot), jnp.asarray(plan.table_index)
    valid = in_range(slot, slots) & in_range(index, max_blocks)
    changed = jnp.where(valid, slot, slots)
    block_table, write_table = (
        table.at[reset].set(-1, mode="drop").at[changed, index].set(plan.table_block, mode="drop")
        for table in (block_table, write_table)
    )
    return block_table, write_table, window_positions, StepPlan(jnp.asarray(plan.packed), plan.layout)
