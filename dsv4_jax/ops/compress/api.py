"""compress: the entries of the windows that a step closes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import (
    OperandError,
    call,
    check_finish,
    check_plan,
    check_projections,
    check_tail,
    layer_operand,
    plan_attributes,
    struct,
)
from dsv4_jax.spec.kinds import KEY_DIM


def compress(
    tail: jax.Array,
    kv: jax.Array,
    gate: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    eps: float,
    hadamard: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Pools, normalizes and rotates every window that closes in this step; writes nothing to the cache.

    Rows from before the step come from the tail, rows of the step from kv and gate, so the result does not depend on
    how a sequence was cut into steps. Softmax pooling per channel, RMSNorm, RoPE at the window's first position and the
    optional Hadamard transform are fp32 (DeepSeek-V4 report, compressed sparse and heavily compressed attention).

    Args:
      tail: float32 [layers, slots, 2, rows, width] or running [layers, slots, 3, 512], as it was before the step's
        tokens were appended, or, when every request brings one token, before or after.
      kv: [tokens, columns], see ``append_tail``; so are gate and ape.
      gate: [tokens, columns].
      ape: float32 [ratio, columns].
      norm_weight: float32 [width].
      cos: float32 [closing, 32], for the position ``ratio * entry`` of each closing entry.
      sin: float32 [closing, 32].
      plan: the step; ``plan.closing(ratio)`` lists the tokens that close a window.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).
      eps: of the RMSNorm.
      hadamard: transform the finished row by Hadamard(128) / sqrt(128); indexer keys only.

    Returns:
      tail, unchanged (reads thread the pool), and the entries, float32 [closing, width], zeros where nothing closes.
    """
    op = "compress"
    check_tail(op, "tail", tail, ratio)
    check_projections(op, tail, kv, gate, ape, plan, ratio)
    width, closing = tail.shape[-1], plan.layout.closing_size(ratio)
    check_finish(op, norm_weight, cos, sin, width, closing)
    check_plan(op, plan)
    if hadamard and width != KEY_DIM:
        raise OperandError(f"{op}: the Hadamard transform is for indexer keys of width {KEY_DIM}, not {width}.")
    operands = (tail, kv, gate, ape, norm_weight, cos, sin, plan.packed, layer_operand(layer))
    tail, entries = call(
        op,
        operands,
        in_place=1,
        results=[struct((closing, width), jnp.float32)],
        ratio=ratio,
        eps=float(eps),
        hadamard=bool(hadamard),
        **plan_attributes(plan),
    )
    return tail, entries
