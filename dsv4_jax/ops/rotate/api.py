"""rotate: what a closed window leaves in the tail is cleared."""

from __future__ import annotations

import jax

from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    Implementation,
    check_implementation,
    check_plan,
    check_ratio,
    check_tail,
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.rotate import reference

_ROTATE = signature("rotate", "tail plan layer", "tail", "tokens requests ratio")


def rotate(
    tail: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    implementation: Implementation = "native",
) -> jax.Array:
    """Turns the tail over for every request whose step closed a window.

    The overlap rows of the window just closed become the previous window where they lie (the tail keeps two windows of
    them side by side); every row that no later entry will pool is cleared to kv 0 and score -1e9.

    Args:
      tail: float32 [layers, slots, 2, rows, width], or running [layers, slots, 3 states, 512]: empty (max -1e9,
        denominator and sum 0) where a state is that after a token that closed a window.
      plan: the step; padding requests (-1) change nothing.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).
      implementation: who runs it.

    Returns:
      tail, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "rotate"
    check_implementation(implementation)
    ratio = check_ratio(op, ratio)
    check_tail(op, "tail", tail, ratio)
    check_plan(op, plan)
    tail, plan, layer = untransformed(op, (tail, plan, take_layer(layer)))
    if implementation == "reference":
        return reference.rotate(tail, plan, layer, ratio=ratio)
    operands = {"tail": tail, "plan": plan.packed, "layer": layer}
    (tail,) = call(_ROTATE, operands, ratio=ratio, **plan_attributes(plan))
    return tail
