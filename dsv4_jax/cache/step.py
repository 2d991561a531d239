"""begin_step: what a step does before any layer runs."""

from __future__ import annotations

import dataclasses

from dsv4_jax import ops
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops import Implementation


def begin_step(cache: Cache, plan: StepPlan, *, implementation: Implementation = "native") -> tuple[Cache, StepPlan]:
    """Applies what a plan changes before any layer runs: resets slots with a new owner, hands out blocks.

    Args:
      cache: as the last step left it.
      plan: the step's.
      implementation: who runs it.

    Returns:
      The cache, updated in place where it is donated, and the plan for the layers: equal to the one given, but always
      at the same address, so that XLA need not update its CUDA graph from step to step.
    """
    block_table, window_positions, plan = ops.begin_step(
        cache.block_table, cache.window_positions, plan, implementation=implementation
    )
    return dataclasses.replace(cache, block_table=block_table, window_positions=window_positions), plan
