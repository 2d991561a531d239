"""The mixture of experts: who computes a token, and the experts that were chosen, one after the other.

Experts may be quantized, and all of them expanded would take many times the memory that a step has to spare. So tokens
are sorted by expert, and a loop takes a tile of one expert's tokens at a time: it expands that expert alone, and no
expert that nobody chose.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.layers import linear, swiglu
from dsv4_jax.deepseek_v4.weights import ExpertWeights, MixtureWeights


class Routing(NamedTuple):
    """Which experts compute a token, and with what weight."""

    experts: jax.Array  # int32 [T, experts per token]
    shares: jax.Array  # fp32 [T, experts per token]


def mixture(weights: MixtureWeights, config: DeepseekV4Config, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The sublayer: routed experts and the shared one, [T, hidden] to the same.

    Args:
      weights: of the layer's mixture.
      config: of the model.
      x: [T, hidden], normed.
      tokens: int32 [T], the ids, by which hash layers route.
    """
    routing = route(weights, config, x, tokens)
    routed = apply_experts(weights.experts, x, routing, config.swiglu_limit)
    shared = swiglu(weights.shared, x, config.swiglu_limit)
    return (routed + shared.astype(jnp.float32)).astype(x.dtype)


def route(weights: MixtureWeights, config: DeepseekV4Config, x: jax.Array, tokens: jax.Array) -> Routing:
    """The choice of experts, in fp32: by the best scores with bias, or by the token's id. Shares have no bias."""
    scores = _score(linear(x.astype(jnp.float32), weights.gate), config)
    if weights.token_experts is not None:
        experts = weights.token_experts[tokens].astype(jnp.int32)
    else:
        biased = scores if weights.bias is None else scores + weights.bias
        experts = jax.lax.top_k(biased, config.experts_per_token)[1].astype(jnp.int32)
    shares = jnp.take_along_axis(scores, experts, axis=1)
    if config.norm_topk_prob:
        shares = shares / (shares.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(experts, shares * config.routed_scaling)


def _score(products: jax.Array, config: DeepseekV4Config) -> jax.Array:
    if config.scoring == "softmax":
        return jax.nn.softmax(products, axis=-1)
    return jax.nn.sigmoid(products) if config.scoring == "sigmoid" else jnp.sqrt(jax.nn.softplus(products))


def apply_experts(weights: ExpertWeights, x: jax.Array, routing: Routing, limit: float) -> jax.Array:
    """The routed experts' part of every token, fp32 [T, hidden].

    Temporary memory: one expert expanded to x's dtype, and two rows [hidden] for each of a token's experts.

    Args:
      weights: of all experts, stacked.
      x: [T, hidden].
      routing: of the tokens.
      limit: of the SwiGLU.
    """
    tokens, per_token = routing.experts.shape
    assigned, experts = tokens * per_token, weights.gate.shape[0]
    tile, tiles = _tiles(assigned, experts)

    order = jnp.argsort(routing.experts.reshape(-1), stable=True)
    counts = jnp.bincount(routing.experts.reshape(-1), length=experts)
    tile_ends = jnp.cumsum(-(-counts // tile))
    # A tile may reach beyond its expert's rows: what it computes there, the next one writes over.
    rows = jnp.pad(x[order // per_token], ((0, tile), (0, 0)))

    def compute(made: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        expert = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right"), experts - 1)
        later = tile_ends[expert] - index  # tiles of this expert from this one on; none are left at the end
        first = jnp.where(later > 0, jnp.cumsum(counts)[expert] - counts[expert], assigned)
        first = first + tile * jnp.where(later > 0, -(-counts[expert] // tile) - later, 0)
        one = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False), weights)
        output = swiglu(one, jax.lax.dynamic_slice_in_dim(rows, first, tile), limit)
        return jax.lax.dynamic_update_slice_in_dim(made, output, first, axis=0), None

    made, _ = jax.lax.scan(compute, jnp.zeros_like(rows), jnp.arange(tiles))
    place = jnp.argsort(order).reshape(tokens, per_token)
    return jnp.einsum("tk,tkd->td", routing.shares, made[place].astype(jnp.float32))


def _tiles(assigned: int, experts: int) -> tuple[int, int]:
    """Rows of a tile, and how many tiles there can be: one for each expert that is chosen, and those that are full."""
    chosen = min(assigned, experts)
    tile = 8
    while tile < min(128, assigned // chosen):
        tile *= 2
    return tile, chosen + (assigned - chosen) // tile
