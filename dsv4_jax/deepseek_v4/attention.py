"""Attention of one layer through the cache: update the layer, choose entries, attend over rows where they lie.

Named scopes, here and in the other parts, are what a profile is summed up by (``dsv4-jax trace --model``).
"""

from __future__ import annotations

from typing import Literal

import jax

from dsv4_jax import LayerCache, apply_rotary
from dsv4_jax.deepseek_v4.gathered import attend_gathered
from dsv4_jax.deepseek_v4.projections import Projections, merge_heads
from dsv4_jax.deepseek_v4.weights import AttentionWeights

Attention = Literal["attend", "gather"]
"""How rows are attended to: where they lie in the cache, or read out of it first, see ``gathered.py``."""


def attend(
    layer: LayerCache,
    weights: AttentionWeights,
    made: Projections,
    attention: Attention,
    tensor_axis: str | None = None,
) -> tuple[LayerCache, jax.Array, jax.Array | None]:
    """Put the step's tokens into the layer's cache and attend.

    Args:
      layer: of the cache.
      weights: of the layer.
      made: of the step's tokens.
      attention: how rows are attended to.
      tensor_axis: the mesh axis over which query heads are split, if they are; the output is the sum over it.

    Returns:
      The handle; the sublayer's output [T, hidden]; a CSA layer's choice of entries, int32 [T, K] (-1 = none).
    """
    dtype, tokens = made.queries.dtype, made.rows.rotary
    if attention == "gather":
        layer, attended, selected = attend_gathered(layer, made, weights.sinks)
        output = apply_rotary(attended, tokens, inverse=True).astype(dtype)
    else:
        kind, selected = layer.kind.value, None
        with jax.named_scope(f"{kind}.update"):
            layer = layer.update(made.rows, made.compressor, made.indexer)
        if made.index_query is not None:
            with jax.named_scope(f"{kind}.index_topk"):
                layer, selected = layer.index_topk(*made.index_query)
        with jax.named_scope(f"{kind}.attend"):
            layer, (output, _) = layer.attend(made.queries, weights.sinks, indices=selected, rotary=tokens, dtype=dtype)
    return layer, merge_heads(weights, output, tensor_axis), selected
