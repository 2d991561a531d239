"""index_topk: the entries that a query's indexer scores best, chosen from the keys where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    check,
    check_count,
    check_implementation,
    check_plan,
    check_pool,
    format_attributes,
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.index import reference
from dsv4_jax.spec.kinds import BLOCK_TOKENS, KEY_DIM, LayerKind

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

_INDEX_TOPK = signature(
    "index_topk",
    "pool block_table plan queries head_weights layer",
    "pool indices scores every_score prepared",
    "tokens requests ratio codec global_scale hadamard",
)

_SCORES_BYTES = 48 << 20
_PREPARED_BYTES = 64 * KEY_DIM * 2 + 64 * 4  # kPreparedBytes in ffi/ops/params.h
_SLAB_TOKENS = 960  # whose prepared queries stay below 16 MB
_TILE = 128


def index_topk(
    pool: jax.Array,
    block_table: Int32[Array, "slots max_blocks"],
    plan: StepPlan,
    queries: Float[Array, "tokens heads 128"],
    head_weights: Float[Array, "tokens heads"],
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    k: int,
    hadamard: bool = False,
    scores: bool = False,
    implementation: Implementation = "native",
) -> tuple[jax.Array, ...]:
    """Chooses the k entries of each token that score best: ``sum over h of head_weights[h] * relu(queries[h] . key)``.

    Keys count as they are stored, dequantized. Queries are rounded to what a product with such keys takes without loss,
    per token and head, after the Hadamard transform where keys have it, amax being the row's largest magnitude
    (counted as 1e-4 at least and 2^120 at most):

    * keys ``fp8`` and ``mxfp4``: E4M3 codes of ``query / s``, s the least power of two that makes amax / s at most 1;
    * keys ``nvfp4`` and ``nvfp4_static``: float16 numbers of ``query / s``, s that which makes amax / s at most 1/8;
    * keys ``bf16``: bfloat16; keys ``fp32``: the queries as they are.

    Scores of rounded queries are within 2^-10 of the sum of |head_weights * relu| of what exact arithmetic gives, on
    GPUs too (there relu'd products pass through float16, and MXFP4 blocks more than 2^13 below the largest scale of
    their row count as zero), and do not depend on how tokens are batched or cut into steps.

    Args:
      pool: [layers, blocks, *page(32)] of `format`, indexer keys.
      block_table: int32 [slots, max_blocks].
      plan: the step; a token at position p sees the entries below ``(p + 1) // 4``, padding sees none.
      queries: float32 or bfloat16 [tokens, heads, 128], not transformed.
      head_weights: float32 or bfloat16 [tokens, heads], with the factors 128^-1/2 and heads^-1/2.
      layer: index of the layer among those of its kind; out of range: no entry has a key.
      format: how keys are stored.
      k: how many to choose, from 1 on.
      hadamard: whether keys are stored Hadamard-transformed.
      scores: whether to hand out the chosen scores too.
      implementation: who runs it.

    Returns:
      pool, unchanged (reads thread the pool); int32 [tokens, k], the chosen entries in ascending order, then -1; and
      with `scores` float32 [tokens, k], their scores, -inf beside -1. Of equal scores the lower entry is taken first;
      NaN scores, as those of entries without a block, are taken last. A token that sees at most k entries has them all.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "index_topk"
    check_implementation(implementation)
    ratio = LayerKind.CSA.ratio
    check_pool(op, "pool", pool, BLOCK_TOKENS // ratio, format)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check_plan(op, plan)
    tokens = plan.layout.tokens
    check(op, "queries", queries, (tokens, None, KEY_DIM), *FLOATING)
    check(op, "head_weights", head_weights, (tokens, jnp.shape(queries)[1]), *FLOATING)
    k = check_count(op, "k", k, 1)
    weights = jnp.asarray(head_weights, jnp.float32)
    given = untransformed(op, (pool, block_table, plan, queries, weights, take_layer(layer)))
    if implementation == "reference":
        pool, indices, chosen = reference.index_topk(*given, format=format, k=k, ratio=ratio, hadamard=hadamard)
        return (pool, indices, chosen) if scores else (pool, indices)
    pool, block_table, plan, queries, weights, layer = given
    operands = {
        "pool": pool,
        "block_table": block_table,
        "plan": plan.packed,
        "queries": queries,
        "head_weights": weights,
        "layer": layer,
    }
    slab, capacity = slab_of(tokens, block_table.shape[1] * (BLOCK_TOKENS // ratio))
    prepared = 0 if tokens == plan.layout.requests else slab
    made: dict[str, tuple[tuple[int, ...], Any]] = {
        "indices": ((tokens, k), jnp.int32),
        "scores": ((tokens, k if scores else 0), jnp.float32),
        "every_score": ((slab, capacity), jnp.float32),
        "prepared": ((prepared, _PREPARED_BYTES), jnp.uint8),
    }
    attributes = plan_attributes(plan) | format_attributes(format)
    pool, indices, chosen, *_ = call(
        _INDEX_TOPK, operands, results=made, ratio=ratio, hadamard=bool(hadamard), **attributes
    )
    return (pool, indices, chosen) if scores else (pool, indices)


def slab_of(tokens: int, entries: int) -> tuple[int, int]:
    """How many tokens are scored at a time, and the places for scores of each: a workspace below 64 MB in all."""
    capacity = max(-(-entries // _TILE) * _TILE, _TILE)
    most = max(min(_SCORES_BYTES // (4 * capacity), _SLAB_TOKENS), 1)
    slabs = max(-(-tokens // most), 1)
    slab = -(-tokens // slabs)  # of equal size, in whole groups of 8 where that fits
    return min(tokens, -(-slab // 8) * 8 if -(-slab // 8) * 8 <= most else slab), capacity
