"""append_window and append_tail: the rows of a step that outlive it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.append import reference
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    check,
    check_implementation,
    check_plan,
    check_ratio,
    check_tail,
    check_window,
    format_attributes,
    plan_attributes,
    take_layer,
    take_projections,
    untransformed,
)
from dsv4_jax.spec.kinds import HEAD_DIM

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_APPEND_WINDOW = signature(
    "append_window",
    "window positions rows plan layer",
    "window positions",
    "tokens requests codec global_scale",
)
_APPEND_TAIL = signature("append_tail", "tail kv gate position_bias plan layer", "tail", "tokens requests ratio")


def append_window(
    window: jax.Array,
    positions: jax.Array,
    rows: Float[Array, "tokens 512"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    implementation: Implementation = "native",
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
      implementation: who runs it.

    Returns:
      window and positions, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "append_window"
    check_implementation(implementation)
    check_window(op, window, positions, format)
    check(op, "rows", rows, (plan.layout.tokens, HEAD_DIM), *FLOATING)
    check_plan(op, plan)
    given = untransformed(op, (window, positions, rows, plan, take_layer(layer)))
    if implementation == "reference":
        return reference.append_window(*given, format=format)
    window, positions, rows, plan, layer = given
    operands = {"window": window, "positions": positions, "rows": rows, "plan": plan.packed, "layer": layer}
    window, positions = call(_APPEND_WINDOW, operands, **plan_attributes(plan), **format_attributes(format))
    return window, positions


def append_tail(
    tail: jax.Array,
    kv: Float[Array, "tokens columns"],
    gate: Float[Array, "tokens columns"],
    position_bias: Float[Array, "ratio columns"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    implementation: Implementation = "native",
) -> jax.Array:
    """Keeps the compressor inputs of the step that a later entry will pool.

    Those are the tokens of the window that is open after the step and, for CSA, the overlap half of the one before it.

    Args:
      tail: float32 [layers, slots, 2 (kv, score), rows, width]; 12 rows for CSA, 128 for HCA (see ``Cache``). Or, for
        HCA, a running tail, float32 [layers, slots, 3 states, 512]: max, denominator and sum after each of the latest
        tokens, as many states as rings are deep and one.
      kv: [tokens, columns] float32 or bfloat16; columns = 2 * width for CSA (overlap half, current half), width for
        HCA.
      gate: [tokens, columns] float32 or bfloat16; the stored score is ``gate + position_bias[position % ratio]``.
      position_bias: [ratio, columns] float32 or bfloat16.
      plan: the step; padding tokens (-1) write nothing.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).
      implementation: who runs it.

    Returns:
      tail, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "append_tail"
    check_implementation(implementation)
    ratio = check_ratio(op, ratio)
    check_tail(op, "tail", tail, ratio)
    kv, gate, position_bias = take_projections(op, tail, kv, gate, position_bias, plan, ratio)
    check_plan(op, plan)
    given = untransformed(op, (tail, kv, gate, position_bias, plan, take_layer(layer)))
    if implementation == "reference":
        return reference.append_tail(*given, ratio=ratio)
    tail, kv, gate, position_bias, plan, layer = given
    operands = {"tail": tail, "kv": kv, "gate": gate, "position_bias": position_bias}
    operands |= {"plan": plan.packed, "layer": layer}
    (tail,) = call(_APPEND_TAIL, operands, ratio=ratio, **plan_attributes(plan))
    return tail
