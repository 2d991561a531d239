"""The mixture of experts: who computes a token, and the experts that were chosen, a few at a time.

Experts may be quantized, and all of them expanded would take many times the memory that a step has to spare. So rows
are laid out in tiles, each of one expert's rows, and a loop takes a few tiles at a time: it expands their experts
alone. On GPUs nothing is expanded where rows are few: ``packed_experts.py`` has kernels for the release's format, and
in other formats each row is multiplied by itself. (``jax.lax.ragged_dot`` needs all experts expanded at once, and
multiplies every row with every one of them where XLA has no kernel for it.)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.layers import expanded_products, fused_products, linear, swiglu
from dsv4_jax.deepseek_v4.packed_experts import multiplies_packed, packed_experts
from dsv4_jax.deepseek_v4.weights import ExpertWeights, MixtureWeights


class Routing(NamedTuple):
    """Which experts compute a token, and with what weight."""

    experts: jax.Array  # int32 [T, experts per token]
    shares: jax.Array  # fp32 [T, experts per token]


@jax.named_scope("model.shared_expert")
def mixture(
    weights: MixtureWeights,
    config: DeepseekV4Config,
    x: jax.Array,
    routing: Routing,
    tensor_axis: str | None = None,
) -> jax.Array:
    """The sublayer: routed experts and the shared one, [T, hidden] to the same; x is normed.

    Where a device has a part of every expert's width alone, the parts are summed over the mesh axis, in fp32.
    """
    routed = apply_experts(weights.experts, x, routing, config.swiglu_limit)
    if tensor_axis is not None and weights.experts.gate.shape[1] < config.expert_width:
        routed = jax.lax.psum(routed, tensor_axis)
    shared = swiglu(weights.shared, x, config.swiglu_limit)
    return (routed + shared.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("model.routing")
def route(weights: MixtureWeights, config: DeepseekV4Config, x: jax.Array, tokens: jax.Array) -> Routing:
    """Who computes each token: the experts with the best scores, bias added, or those of its id.

    Args:
      weights: of the layer's mixture.
      config: of the model.
      x: [T, hidden], normed; scores are fp32.
      tokens: int32 [T], the ids, by which hash layers route.
    """
    scores = expert_scores(weights, config, x)
    if weights.token_experts is not None:
        experts = weights.token_experts[tokens].astype(jnp.int32)
    else:
        biased = scores if weights.bias is None else scores + weights.bias
        experts = jax.lax.top_k(biased, config.experts_per_token)[1].astype(jnp.int32)
    return routing_to(experts, scores, config)


def routing_to(experts: jax.Array, scores: jax.Array, config: DeepseekV4Config) -> Routing:
    """The routing to experts [T, experts per token] that are chosen already; shares come of scores without bias."""
    shares = jnp.take_along_axis(scores, experts, axis=1)
    if config.norm_topk_prob:
        shares = shares / (shares.sum(axis=1, keepdims=True) + 1e-20)
    return Routing(experts, shares * config.routed_scaling)


def expert_scores(weights: MixtureWeights, config: DeepseekV4Config, x: jax.Array) -> jax.Array:
    """fp32 [T, experts], without bias."""
    products = linear(x.astype(jnp.float32), weights.gate)
    if config.scoring == "softmax":
        return jax.nn.softmax(products, axis=-1)
    return jax.nn.sigmoid(products) if config.scoring == "sigmoid" else jnp.sqrt(jax.nn.softplus(products))


@jax.named_scope("model.experts")
def apply_experts(weights: ExpertWeights, x: jax.Array, routing: Routing, limit: float) -> jax.Array:
    """The routed experts' part of every token, fp32 [T, hidden].

    Temporary memory: 512 MiB of experts expanded to x's dtype, or one expert if that is more; and for each of a token's
    experts, and for each tile, a few rows [hidden]. On GPUs none of the former with quantized experts and few rows:
    on average at most 64 of each expert where ``multiplies_packed``.

    Args:
      weights: of all experts, stacked.
      x: [T, hidden].
      routing: of the tokens.
      limit: of the SwiGLU.
    """
    in_tiles = functools.partial(experts_in_tiles, limit=limit)
    _, tile, tiles = _tiling(weights, x, routing)
    if multiplies_packed(weights, x) and tile <= _PACKED_TILE:
        packed = functools.partial(experts_packed, limit=limit)
        return jax.lax.platform_dependent(weights, x, routing, cuda=packed, default=in_tiles)
    # A row takes a GPU 0.4 times as long as a tile, by the instructions and bytes of both; it was not measured.
    if isinstance(weights.gate, jax.Array) or 2 * routing.experts.size > 5 * tiles:
        return in_tiles(weights, x, routing)
    by_row = functools.partial(experts_by_row, limit=limit)
    return jax.lax.platform_dependent(weights, x, routing, cuda=by_row, default=in_tiles)


def experts_by_row(weights: ExpertWeights, x: jax.Array, routing: Routing, *, limit: float) -> jax.Array:
    """``apply_experts`` with a product for every row by itself, which on GPUs expands nothing in memory."""

    def compute(row: jax.Array, expert: jax.Array) -> jax.Array:
        return swiglu(_expert(weights, expert), row[None], limit, fused_products)[0]

    made = jax.vmap(jax.vmap(compute, (None, 0)))(x, routing.experts)
    return jnp.einsum("tk,tkd->td", routing.shares, made.astype(jnp.float32))


def experts_in_tiles(weights: ExpertWeights, x: jax.Array, routing: Routing, *, limit: float) -> jax.Array:
    """``apply_experts`` with a matrix product for every tile."""
    experts = weights.gate.shape[0]
    at_once, rows, tiles = _tiling(weights, x, routing)
    laid_out = lay_out(routing, experts, tiles, rows)

    def compute(tile_of_one: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, rows = tile_of_one
        return swiglu(_expert(weights, expert), rows, limit, expanded_products)

    expert_of_tile = jnp.minimum(laid_out.expert_of_tile, experts - 1)
    made = jax.lax.map(compute, (expert_of_tile, x[laid_out.token_of_row]), batch_size=min(tiles, at_once))
    return _shared_out(made, laid_out, routing)


def experts_packed(
    weights: ExpertWeights, x: jax.Array, routing: Routing, *, limit: float, interpret: bool = False
) -> jax.Array:
    """``apply_experts`` by ``packed_experts``, which says when it can be."""
    _, rows, tiles = _tiling(weights, x, routing)
    laid_out = lay_out(routing, weights.gate.shape[0], tiles, rows)
    expert_of_tile, token_of_row, _ = laid_out
    made = packed_experts(weights, x, expert_of_tile, token_of_row, limit=limit, interpret=interpret)
    return _shared_out(made, laid_out, routing)


class Tiles(NamedTuple):
    """Rows laid out by expert: each expert's begin a tile, so its last tile may have rows of nobody at its end."""

    expert_of_tile: jax.Array  # int32 [tiles], the number of experts where a tile is nobody's
    token_of_row: jax.Array  # int32 [tiles, rows of a tile], of some token where a row is nobody's
    place: jax.Array  # int32 [T, experts per token], the row of each token's expert, counted over all tiles


def lay_out(routing: Routing, experts: int, tiles: int, rows: int) -> Tiles:
    """The tiles of a routing, of so many rows each; those of nobody come last."""
    lay = _lay_out_compared if routing.experts.size <= _COMPARED else _lay_out_sorted
    return lay(routing.experts, experts, tiles, rows)


def _lay_out_compared(chosen: jax.Array, experts: int, tiles: int, rows: int) -> Tiles:
    """``lay_out`` by comparing each with each: on a GPU half as many kernels as a sort and what it needs take."""
    assigned, index = chosen.reshape(-1), jnp.arange(chosen.size)
    rank = ((assigned[:, None] == assigned) & (index[:, None] > index)).sum(axis=1)
    begun = jnp.where(rank % rows == 0, assigned, experts)  # an expert has as many tiles as rows that begin one
    place = rows * (assigned[:, None] > begun).sum(axis=1) + rank
    expert_of_tile = jnp.where(place == rows * jnp.arange(tiles)[:, None], assigned, experts).min(axis=1)
    place, tokens = place.reshape(chosen.shape), jnp.arange(len(chosen))[:, None]
    token_of_row = jnp.where(place == jnp.arange(tiles * rows)[:, None, None], tokens, 0).max(axis=(1, 2))
    return Tiles(expert_of_tile, token_of_row.reshape(tiles, rows), place)


def _lay_out_sorted(chosen: jax.Array, experts: int, tiles: int, rows: int) -> Tiles:
    """``lay_out`` for any number of rows."""
    tokens, per_token = chosen.shape
    assigned = chosen.reshape(-1)
    counts = (assigned[:, None] == jnp.arange(experts)).sum(axis=0)
    tiles_of = -(-counts // rows)
    tile_ends, row_ends = jnp.cumsum(tiles_of), jnp.cumsum(counts)
    expert_of_tile = (tile_ends <= jnp.arange(tiles)[:, None]).sum(axis=1)
    order = jnp.argsort(assigned)
    shift = rows * (tile_ends - tiles_of) - (row_ends - counts)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)) + shift[assigned[order]])
    token_of_row = jnp.zeros(tiles * rows, jnp.int32).at[place].set(jnp.arange(len(place)) // per_token)
    return Tiles(expert_of_tile, token_of_row.reshape(tiles, rows), place.reshape(tokens, per_token))


def _shared_out(made: jax.Array, tiles: Tiles, routing: Routing) -> jax.Array:
    """Every token's sum of its experts' outputs [tiles, rows, hidden], by their shares: fp32 [T, hidden]."""
    outputs = made.reshape(-1, made.shape[-1])[tiles.place].astype(jnp.float32)
    return jnp.einsum("tk,tkd->td", routing.shares, outputs)


def _expert(weights: ExpertWeights, expert: jax.Array) -> ExpertWeights:
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False), weights)


_EXPANDED_BYTES = 2**29
_COMPARED = 1024  # rows whose layout is made without a sort
_PACKED_TILE = 64  # rows; wider tiles would keep more in registers than there are


def _tiling(weights: ExpertWeights, x: jax.Array, routing: Routing) -> tuple[int, int, int]:
    """Tiles of a batch, rows of a tile, and how many tiles there can be, in whole batches.

    There is one for each expert that is chosen, and those that are full.
    """
    experts, width, hidden = weights.gate.shape
    at_once = max(1, _EXPANDED_BYTES // (3 * width * hidden * x.dtype.itemsize))
    assigned = routing.experts.size
    chosen = min(assigned, experts)
    tile = 8
    while tile < 128 and tile * chosen < assigned:
        tile *= 2
    tiles = chosen + (assigned - chosen) // tile
    return at_once, tile, tiles if tiles <= at_once else -(-tiles // at_once) * at_once
