"""Manifold-constrained hyper-connections (mHC): several residual streams, mixed around every sublayer.

A sublayer reads one weighted sum of the streams, and its output is added to all of them by weights, beside the streams
mixed among themselves by a matrix that Sinkhorn's iterations make (nearly) doubly stochastic. All weights come from the
streams of the token itself, and are computed in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.layers import rms_norm
from dsv4_jax.deepseek_v4.sinkhorn import sinkhorn
from dsv4_jax.deepseek_v4.weights import HyperConnectionWeights


class Mixing(NamedTuple):
    """The weights of one sublayer for every token; n streams."""

    into: jax.Array  # fp32 [T, n], of each stream in the sublayer's input
    out: jax.Array  # fp32 [T, n], of the sublayer's output in each stream
    beside: jax.Array  # fp32 [T, n (from), n (to)], of the streams among themselves


@jax.named_scope("model.streams")
def mixing(weights: HyperConnectionWeights, config: DeepseekV4Config, streams: jax.Array) -> Mixing:
    """The weights with which a sublayer is connected to the streams [T, n, hidden]."""
    n = config.hc_mult
    products = _products(weights, config, streams)
    into, out, beside = jnp.split(products, [n, 2 * n], axis=-1)
    into_base, out_base, beside_base = jnp.split(weights.base.astype(jnp.float32), [n, 2 * n])
    scale = weights.scale.astype(jnp.float32)
    logits = (beside * scale[2] + beside_base).reshape(-1, n, n)
    return Mixing(
        into=jax.nn.sigmoid(into * scale[0] + into_base) + config.hc_eps,
        out=2 * jax.nn.sigmoid(out * scale[1] + out_base),
        beside=sinkhorn(jax.nn.softmax(logits, axis=-1) + config.hc_eps, config.hc_sinkhorn_iters, config.hc_eps),
    )


def spread(hidden: jax.Array, config: DeepseekV4Config) -> jax.Array:
    """The streams before the first layer, [T, n, hidden]: all of them the embedded tokens [T, hidden]."""
    return jnp.broadcast_to(hidden[:, None], (hidden.shape[0], config.hc_mult, hidden.shape[1]))


@jax.named_scope("model.streams")
def collapse(streams: jax.Array, into: jax.Array) -> jax.Array:
    """The sublayer's input [T, hidden]: the streams [T, n, hidden], weighted by ``into`` [T, n]."""
    return (into[:, :, None] * streams).sum(axis=1).astype(streams.dtype)


@jax.named_scope("model.streams")
def connect(streams: jax.Array, output: jax.Array, mixing: Mixing) -> jax.Array:
    """The streams after a sublayer, [T, n, hidden], from those before it and its output [T, hidden]."""
    mixed = (mixing.beside[:, :, :, None] * streams[:, :, None, :]).sum(axis=1)
    return (mixed + mixing.out[:, :, None] * output[:, None, :]).astype(streams.dtype)


def collapse_last(weights: HyperConnectionWeights, config: DeepseekV4Config, streams: jax.Array) -> jax.Array:
    """The streams [T, n, hidden] become one, [T, hidden], behind the last layer."""
    products = _products(weights, config, streams)
    return collapse(streams, jax.nn.sigmoid(products * weights.scale + weights.base) + config.hc_eps)


def _products(weights: HyperConnectionWeights, config: DeepseekV4Config, streams: jax.Array) -> jax.Array:
    """fp32 [T, m]: what the mixing weights are made of."""
    flat = streams.astype(jnp.float32).reshape(streams.shape[0], -1)
    return rms_norm(flat, config.spec.norm_eps) @ weights.fn.astype(jnp.float32).T
