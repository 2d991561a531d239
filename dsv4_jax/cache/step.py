"""begin_step: what a step does before any layer runs."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Literal

from dsv4_jax import ops, reference
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.plan import StepPlan

Implementation = Literal["native", "reference"]
"""Who runs an op: the native FFI handlers (the platform picks CPU or CUDA), or the plain jnp definition."""


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
    begin = ops_of(implementation).begin_step
    block_table, window_positions, plan = begin(cache.block_table, cache.window_positions, plan)
    return dataclasses.replace(cache, block_table=block_table, window_positions=window_positions), plan


def ops_of(implementation: Implementation) -> ModuleType:
    """The module that has the ops of an implementation."""
    modules = {"native": ops, "reference": reference}
    if implementation not in modules:
        raise ValueError(f"implementation must be one of {', '.join(modules)}, got {implementation!r}.")
    return modules[implementation]
