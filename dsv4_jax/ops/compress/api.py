"""compress: the entries of the windows that a step closes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    Implementation,
    OperandError,
    check_implementation,
    check_plan,
    check_ratio,
    check_tail,
    plan_attributes,
    take_finish,
    take_layer,
    take_projections,
    untransformed,
)
from dsv4_jax.ops.compress import reference
from dsv4_jax.spec.kinds import KEY_DIM

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

_COMPRESS = signature(
    "compress",
    "tail kv gate position_bias norm_weight cos sin plan layer",
    "tail entries",
    "tokens requests ratio eps hadamard",
)


def compress(
    tail: jax.Array,
    kv: Float[Array, "tokens columns"],
    gate: Float[Array, "tokens columns"],
    position_bias: Float[Array, "ratio columns"],
    norm_weight: Float[Array, " width"],
    cos: Float32[Array, "closing 32"],
    sin: Float32[Array, "closing 32"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    eps: float,
    hadamard: bool = False,
    implementation: Implementation = "native",
) -> tuple[jax.Array, Float32[Array, "closing width"]]:
    """Pools, normalizes and rotates every window that closes in this step; writes nothing to the cache.

    Rows from before the step come from the tail, rows of the step from kv and gate, so the result does not depend on
    how a sequence was cut into steps. Softmax pooling per channel, RMSNorm, RoPE at the window's first position and the
    optional Hadamard transform are fp32 (arXiv 2606.19348, sections on CSA and HCA).

    Entry i pools, per channel by a softmax over their scores, the current halves of tokens ratio * i to
    ratio * (i + 1) - 1 and, for CSA, the overlap halves of the `ratio` tokens before those; entry 0 has none.

    Args:
      tail: float32 [layers, slots, 2, rows, width] or running [layers, slots, 3 states, 512], as it was before the
        step's tokens were appended, or, when every request brings one token, before or after.
      kv: [tokens, columns], see ``append_tail``; so are gate and position_bias.
      gate: [tokens, columns].
      position_bias: [ratio, columns].
      norm_weight: [width] float32 or bfloat16.
      cos: float32 [closing, 32], for the position ``ratio * entry`` of each closing entry.
      sin: float32 [closing, 32].
      plan: the step; ``plan.closing(ratio)`` lists the tokens that close a window.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).
      eps: of the RMSNorm.
      hadamard: transform the finished row by Hadamard(128) / sqrt(128); indexer keys only.
      implementation: who runs it.

    Returns:
      tail, unchanged (reads thread the pool), and the entries, float32 [closing, width], zeros where nothing closes.
      A score of -inf gives its row the weight 0; a channel whose scores are all -inf is NaN, as a softmax of them is.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "compress"
    check_implementation(implementation)
    ratio = check_ratio(op, ratio)
    check_tail(op, "tail", tail, ratio)
    kv, gate, position_bias = take_projections(op, tail, kv, gate, position_bias, plan, ratio)
    width, closing = jnp.shape(tail)[-1], plan.layout.closing_size(ratio)
    norm_weight = take_finish(op, norm_weight, cos, sin, width, closing)
    check_plan(op, plan)
    if hadamard and width != KEY_DIM:
        raise OperandError(f"{op}: the Hadamard transform is for indexer keys of width {KEY_DIM}, not {width}.")
    given: Any = untransformed(op, (tail, kv, gate, position_bias, norm_weight, cos, sin, plan, take_layer(layer)))
    attributes: dict[str, Any] = {"ratio": ratio, "eps": float(eps), "hadamard": bool(hadamard)}
    if implementation == "reference":
        return reference.compress(*given, **attributes)
    tail, kv, gate, position_bias, norm_weight, cos, sin, plan, layer = given
    operands: dict[str, Any] = {
        "tail": tail,
        "kv": kv,
        "gate": gate,
        "position_bias": position_bias,
        "norm_weight": norm_weight,
    }
    operands |= {"cos": cos, "sin": sin, "plan": plan.packed, "layer": layer}
    made = {"entries": ((closing, width), jnp.float32)}
    tail, entries = call(_COMPRESS, operands, results=made, **attributes, **plan_attributes(plan))
    return tail, entries
