"""What one layer computes from its tokens alone, before any cache: queries, window rows and the compressors' inputs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import CompressorInputs, ModelSpec, Rotary, StepPlan, apply_rotary, closing_rotary
from dsv4_jax.example.attention import rms_norm
from dsv4_jax.example.weights import CompressorWeights, IndexerWeights, LayerWeights
from dsv4_jax.spec.model import LayerSpec


class Compressed(NamedTuple):
    """A compressor's two projections; [T, 2d] in CSA layers, [T, d] in HCA layers."""

    kv: jax.Array
    gate: jax.Array


class IndexQuery(NamedTuple):
    """What a token asks the indexer."""

    queries: jax.Array  # fp32 [T, index heads, 128]
    head_weights: jax.Array  # fp32 [T, index heads], scale included


class Projections(NamedTuple):
    """Everything that one layer makes of its tokens."""

    queries: jax.Array  # fp32 [T, heads, 512], normed and rotated
    rows: jax.Array  # fp32 [T, 512], normed and rotated: the window rows
    compressor: Compressed | None
    index_keys: Compressed | None
    index_query: IndexQuery | None


def project(weights: LayerWeights, spec: ModelSpec, hidden: jax.Array, rotary: Rotary) -> Projections:
    """The projections of one layer.

    Args:
      weights: of the layer.
      spec: of the model.
      hidden: fp32 [T, hidden], the residual stream.
      rotary: cos and sin [T, 32] of the tokens' positions with the layer's RoPE.
    """
    x = rms_norm(hidden, spec.norm_eps, weights.norm)
    rows = rms_norm(x @ weights.row, spec.norm_eps, weights.row_norm)
    queries = rms_norm(jnp.einsum("ti,ihd->thd", x, weights.query), spec.norm_eps)
    return Projections(
        queries=apply_rotary(queries, rotary),
        rows=apply_rotary(rows, rotary),
        compressor=None if weights.compressor is None else _compressed(weights.compressor, x),
        index_keys=None if weights.indexer is None else _compressed(weights.indexer.keys, x),
        index_query=None if weights.indexer is None else _index_query(weights.indexer, x, rotary),
    )


def compressor_inputs(
    weights: LayerWeights, made: Projections, plan: StepPlan, layer: LayerSpec
) -> tuple[CompressorInputs | None, CompressorInputs | None]:
    """What ``LayerCache.update`` takes besides rows: the compressor's inputs and the indexer's, None without one."""
    if weights.compressor is None or made.compressor is None:
        return None, None
    angles = closing_rotary(plan, layer.kind.ratio, layer.rope)
    main = _inputs(made.compressor, weights.compressor, angles)
    if weights.indexer is None or made.index_keys is None:
        return main, None
    return main, _inputs(made.index_keys, weights.indexer.keys, angles)


def _inputs(made: Compressed, weights: CompressorWeights, angles: Rotary) -> CompressorInputs:
    return CompressorInputs(made.kv, made.gate, weights.position_bias, weights.norm, angles)


def merge_heads(weights: LayerWeights, attended: jax.Array, rotary: Rotary) -> jax.Array:
    """The layer's output [T, hidden] from the attention's [T, heads, 512].

    Rows are keys and values at once, so attended values still carry the rotation of where they came from; the
    inverse rotation by the query's position makes that a relative one.
    """
    return jnp.einsum("thd,hdi->ti", apply_rotary(attended, rotary, inverse=True), weights.output)


def _compressed(weights: CompressorWeights, x: jax.Array) -> Compressed:
    return Compressed(x @ weights.kv, x @ weights.gate)


def _index_query(weights: IndexerWeights, x: jax.Array, rotary: Rotary) -> IndexQuery:
    queries = jnp.einsum("ti,ihd->thd", x, weights.query)
    _, heads, width = queries.shape
    return IndexQuery(apply_rotary(queries, rotary), x @ weights.head * (width * heads) ** -0.5)
