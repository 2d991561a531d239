"""save_displaced: the window rows that a step takes the place of while its tokens still see them, as stored.

A chunk of many tokens writes over ring rows that its early tokens need, and over rows of its own. They are copied out
before the write, together with the step's own rows, for the attention that comes after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.attend.operands import Displaced, displaced_rows
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    check,
    check_implementation,
    check_plan,
    check_window,
    check_window_size,
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.displaced import reference
from dsv4_jax.ops.operands import Window
from dsv4_jax.ops.quantize.api import quantize
from dsv4_jax.spec.kinds import HEAD_DIM

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_SAVE_DISPLACED = signature(
    "save_displaced",
    "window positions stored plan layer",
    "window positions displaced displaced_positions",
    "tokens requests size codec",
)


def save_displaced(
    window: Window,
    rows: Float[Array, "tokens 512"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    size: int = 128,
    implementation: Implementation = "native",
) -> tuple[Window, Displaced]:
    """The rows that each request's tokens see and that may leave the ring in this step; call before they are stored.

    Args:
      window: [layers, slots, *page(ring)] of `format` and positions int32 [layers, slots, ring], before the step.
      rows: [tokens, 512] float32 or bfloat16, the step's, normalized and rotated.
      plan: the step.
      layer: index of the layer; out of range: nothing is saved but the step's own rows.
      format: how rows are stored.
      size: of the window, at most the ring's.
      implementation: who runs it.

    Returns:
      window, unchanged (reads thread the pool), and Displaced, of which rows without a position hold anything.

    Raises:
      OperandError: an operand does not fit, or it is differentiated or mapped.
    """
    op = "save_displaced"
    check_implementation(implementation)
    check_window(op, window.window, window.positions, format)
    check_plan(op, plan)
    size = check_window_size(op, size, window.positions)
    check(op, "rows", rows, (plan.layout.tokens, HEAD_DIM), *FLOATING)
    given = untransformed(op, (window, rows, plan, take_layer(layer)))
    window, rows, plan, layer = jax.tree.map(jnp.asarray, given)
    page = quantize(rows, format=format, implementation=implementation)
    if implementation == "reference":
        return window, reference.save_displaced(window, page, plan, jnp.asarray(layer), format=format, size=size)
    count = displaced_rows(plan.layout, size)
    stored, positions, saved, saved_positions = call(
        _SAVE_DISPLACED,
        {
            "window": window.window,
            "positions": window.positions,
            "stored": page,
            "plan": plan.packed,
            "layer": layer,
        },
        results={
            "displaced": ((1, 1, *format.page_shape(count)), format.dtype),
            "displaced_positions": ((count,), jnp.int32),
        },
        **plan_attributes(plan),
        size=size,
        codec=format.codec,
    )
    return Window(stored, positions), Displaced(saved, saved_positions)
