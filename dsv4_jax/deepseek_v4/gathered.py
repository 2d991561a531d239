"""Attention over rows that are read out of the cache first, in plain jnp: what ``attend`` and ``index_topk`` are held
against. Every source of rows is scored for all requests of the step at once and masked by request, so its cost grows
with the number of requests times the longest context.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import LayerCache, LayerKind, Rows
from dsv4_jax.deepseek_v4.projections import IndexQuery, Projections

_MASKED = -1e30  # finite: a row without any visible key must not make inf - inf


class Source(NamedTuple):
    """Rows that queries may attend to (keys and values at once) and which query sees which row."""

    rows: jax.Array  # [K, d] shared by all queries, or [T, K, d] one set for each query
    mask: jax.Array  # bool [T, K]


def attend_gathered(
    layer: LayerCache, made: Projections, sinks: jax.Array
) -> tuple[LayerCache, jax.Array, jax.Array | None]:
    """Update a layer and attend: the handle, fp32 [T, heads, 512] still rotated, and a CSA layer's choice [T, K]."""
    # Only now is a row that this step pushes out of the ring still there.
    layer, before = layer.window_before(dtype=jnp.float32)
    rows = layer.normalize(made.rows)
    layer = layer.update(rows, made.compressor, made.indexer)
    sources = [_window_source(layer, before, layer.stored(rows, dtype=jnp.float32))]
    selected = None
    if made.index_query is not None:
        layer, selected = _select(layer, made.index_query)
        layer, chosen = layer.entries(selected, dtype=jnp.float32)
        sources.append(Source(chosen.values, chosen.valid))
    elif layer.kind is LayerKind.HCA:
        count = layer.schema.max_context // layer.kind.ratio
        layer, entries = layer.all_entries(count, dtype=jnp.float32)
        seen = jnp.arange(count) < layer.visible[:, None, None]  # [T, 1, K]
        mine = layer.plan.token_request[:, None] == jnp.arange(entries.values.shape[0])  # [T, R]
        mask = mine[:, :, None] & seen & entries.valid
        sources.append(Source(_flat(entries.values), mask.reshape(mask.shape[0], -1)))
    return layer, sink_attention(made.queries.astype(jnp.float32), sources, sinks), selected


def sink_attention(queries: jax.Array, sources: list[Source], sinks: jax.Array) -> jax.Array:
    """Softmax attention over all sources together; every head's sink adds exp(sink) to the denominator once.

    Args:
      queries: fp32 [T, heads, d].
      sources: the rows, fp32, and their masks; rows that are masked out must be finite.
      sinks: fp32 [heads].

    Returns:
      fp32 [T, heads, d]; the scale is d^-1/2. A query that sees no row at all gets zeros.
    """
    scale = queries.shape[-1] ** -0.5
    scores = []
    for rows, mask in sources:
        product = jnp.einsum("thd,kd->thk" if rows.ndim == 2 else "thd,tkd->thk", queries, rows)
        scores.append(jnp.where(mask[:, None, :], product * scale, _MASKED))
    sink = sinks[None, :, None]
    peak = jnp.maximum(jnp.concatenate(scores, axis=-1).max(axis=-1, keepdims=True), sink)

    denominator = jnp.exp(sink - peak)
    output = jnp.zeros_like(queries)
    for (rows, _), score in zip(sources, scores, strict=True):
        weight = jnp.exp(score - peak)
        denominator = denominator + weight.sum(axis=-1, keepdims=True)
        output = output + jnp.einsum("thk,kd->thd" if rows.ndim == 2 else "thk,tkd->thd", weight, rows)
    return output / denominator


def index_scores(queries: jax.Array, head_weights: jax.Array, keys: jax.Array) -> jax.Array:
    """The indexer's scores, ``I[t, s] = sum over heads h of w[t, h] * ReLU(q[t, h] . K[s])``.

    Args:
      queries: fp32 [T, index heads, 128].
      head_weights: fp32 [T, index heads], scale included.
      keys: fp32 [K, 128].

    Returns:
      fp32 [T, K].
    """
    products = jax.nn.relu(jnp.einsum("thd,kd->thk", queries, keys))
    return jnp.einsum("thk,th->tk", products, head_weights)


def top_entries(scores: jax.Array, visible: jax.Array, count: int) -> jax.Array:
    """The best ``count`` visible entries of each query.

    Args:
      scores: fp32 [T, K].
      visible: int32 [T]; query t sees entries 0 .. visible[t] - 1.
      count: how many to choose; at most K are.

    Returns:
      int32 [T, min(count, K)]; -1 where a query sees fewer entries than that.
    """
    seen = jnp.arange(scores.shape[1]) < visible[:, None]
    values, indices = jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), min(count, scores.shape[1]))
    return jnp.where(values > -jnp.inf, indices, -1).astype(jnp.int32)


def _window_source(layer: LayerCache, before: Rows, own: jax.Array) -> Source:
    """Rows of earlier steps and the step's own, each token seeing the last of its request up to itself."""
    plan = layer.plan
    requests, rows = before.positions.shape
    row_position = jnp.concatenate([before.positions.reshape(-1), plan.token_position])
    row_request = jnp.concatenate([jnp.repeat(jnp.arange(requests), rows), plan.token_request])
    row_valid = jnp.concatenate([before.valid.reshape(-1), plan.token_position >= 0])
    age = plan.token_position[:, None] - row_position
    mine = plan.token_request[:, None] == row_request
    seen = mine & row_valid & (age >= 0) & (age < layer.schema.spec.window)
    return Source(jnp.concatenate([_flat(before.values), own]), seen)


def _select(layer: LayerCache, query: IndexQuery) -> tuple[LayerCache, jax.Array]:
    """The indexer's choice for each token, int32 [T, K]."""
    count = layer.schema.max_context // layer.kind.ratio
    layer, keys = layer.all_keys(count, dtype=jnp.float32)
    queries = layer.transform_query(query.queries.astype(jnp.float32))
    scores = index_scores(queries, query.head_weights.astype(jnp.float32), _flat(keys.values))
    own = scores.reshape(scores.shape[0], -1, count)[jnp.arange(scores.shape[0]), layer.plan.token_request]
    return layer, top_entries(own, layer.visible, layer.schema.spec.index_topk)


def _flat(values: jax.Array) -> jax.Array:
    """[R, K, d] -> [R * K, d]."""
    return values.reshape(-1, values.shape[-1])
