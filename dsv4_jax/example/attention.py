"""Attention as DeepSeek-V4 does it, over plain arrays: RMSNorm, attention with a sink, indexer scores, top-k."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite: a row without any visible key must not make inf - inf


class Source(NamedTuple):
    """Rows that queries may attend to (keys and values at once) and which query sees which row."""

    rows: jax.Array  # [K, d] shared by all queries, or [T, K, d] one set for each query
    mask: jax.Array  # bool [T, K]


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | float = 1.0) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


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
