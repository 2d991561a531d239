"""What a layer's attention computes of its tokens alone, before and behind the cache: queries, what the cache is
updated with, and the output projection.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import CompressorInputs, RawRows, Rotary, apply_rotary
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.layers import grouped_linear, linear, linears, rms_norm
from dsv4_jax.deepseek_v4.weights import AttentionWeights, CompressorWeights, IndexerWeights


class IndexQuery(NamedTuple):
    """What a token asks the indexer."""

    queries: jax.Array  # [T, index heads, 128], rotated
    head_weights: jax.Array  # fp32 [T, index heads], scale included


class Projections(NamedTuple):
    """Everything that one layer makes of its tokens."""

    queries: jax.Array  # [T, heads, 512], normed and rotated; where heads are split, this device's
    rows: RawRows
    compressor: CompressorInputs | None
    indexer: CompressorInputs | None
    index_query: IndexQuery | None


@jax.named_scope("model.projections")
def project(
    weights: AttentionWeights, config: DeepseekV4Config, x: jax.Array, tokens: Rotary, closing: Rotary | None
) -> Projections:
    """The projections of one layer.

    Args:
      weights: of the layer's attention.
      config: of the model.
      x: [T, hidden], normed.
      tokens: the rotary of the step's tokens, with the layer's RoPE.
      closing: that of its closing entries; None in SWA layers.
    """
    spec = config.spec
    low_rank, rows = linears(x, (weights.wq_a, weights.wkv))
    low_rank = rms_norm(low_rank, spec.norm_eps, weights.q_norm)
    matrices = (weights.wq_b,) if weights.indexer is None else (weights.wq_b, weights.indexer.query)
    queries, *index_queries = linears(low_rank, matrices)
    queries = queries.reshape(len(x), -1, spec.head_dim)  # of this device's heads, where they are split
    compressor, indexer, index_query = None, None, None
    if weights.compressor is not None and closing is not None:
        compressor = _compressor_inputs(weights.compressor, x, closing)
        if weights.indexer is not None:
            indexer = _compressor_inputs(weights.indexer.compressor, x, closing)
            index_query = _index_query(weights.indexer, config, x, index_queries[0], tokens)
    return Projections(
        queries=apply_rotary(rms_norm(queries, spec.norm_eps), tokens),
        rows=RawRows(rows, weights.kv_norm, tokens),
        compressor=compressor,
        indexer=indexer,
        index_query=index_query,
    )


@jax.named_scope("model.projections")
def merge_heads(weights: AttentionWeights, attended: jax.Array, tensor_axis: str | None = None) -> jax.Array:
    """The sublayer's output [T, hidden] from the attention's [T, heads, 512], which is rotated back.

    Every group of heads has a low-rank projection of its own; one matrix makes the output of them all. Where heads are
    split over a mesh axis, in whole groups, each device's part is summed over it, in fp32.
    """
    tokens = len(attended)
    low_rank = grouped_linear(attended.reshape(tokens, -1, weights.wo_a.shape[-1]), weights.wo_a)
    output = linear(low_rank.reshape(tokens, -1), weights.wo_b, dtype=jnp.float32)
    if tensor_axis is not None:
        output = jax.lax.psum(output, tensor_axis)
    return output.astype(attended.dtype)


def _compressor_inputs(weights: CompressorWeights, x: jax.Array, closing: Rotary) -> CompressorInputs:
    # fp32, as the tails keep them.
    kv, gate = linear(x, weights.kv, dtype=jnp.float32), linear(x, weights.gate, dtype=jnp.float32)
    return CompressorInputs(kv, gate, weights.position_bias, weights.norm, closing)


def _index_query(
    weights: IndexerWeights, config: DeepseekV4Config, x: jax.Array, queries: jax.Array, tokens: Rotary
) -> IndexQuery:
    heads, width = config.spec.index_num_heads, config.spec.index_head_dim
    head_weights = linear(x, weights.head_weights, dtype=jnp.float32) * (width * heads) ** -0.5
    return IndexQuery(apply_rotary(queries.reshape(-1, heads, width), tokens), head_weights)
