"""The rotary of a step: its tokens' and its closing entries', computed once and handed to every layer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.model import RopeSpec
from dsv4_jax.spec.rotary import Rotary, rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


def token_rotary(plan: StepPlan, rope: RopeSpec) -> Rotary:
    """The cos and sin of a step's tokens: fp32 [T, dim / 2] each, angle 0 for padding."""
    return dataclasses.replace(rotary(plan.token_position, rope), purpose="tokens")


def closing_positions(plan: StepPlan, ratio: int) -> Int32[Array, " closing"]:
    """The position of every entry that a step closes, which is that of the entry's first token.

    Args:
      plan: the step.
      ratio: tokens per entry, 4 (CSA) or 128 (HCA).

    Returns:
      int32 [C], in the order of ``plan.closing(ratio)``; -1 for padding.
    """
    closing = plan.closing(ratio)
    last = jnp.asarray(plan.token_position)[jnp.maximum(closing, 0)]
    return jnp.where(closing >= 0, last - (ratio - 1), -1)


def closing_rotary(plan: StepPlan, ratio: int, rope: RopeSpec) -> Rotary:
    """The cos and sin of the entries that a step closes: fp32 [C, dim / 2] each, angle 0 for padding."""
    return dataclasses.replace(rotary(closing_positions(plan, ratio), rope), purpose=("closing", ratio))
