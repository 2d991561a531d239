"""One step of the whole model: the same function for prefill, decode and any mixture of the two."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import Cache, ConfigError, Rotary, StepPlan, begin, closing_rotary, token_rotary
from dsv4_jax.deepseek_v4.attention import Attention, attend
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.hyper_connections import collapse, collapse_last, connect, mixing, spread
from dsv4_jax.deepseek_v4.layers import linear, rms_norm
from dsv4_jax.deepseek_v4.mixture import mixture, route
from dsv4_jax.deepseek_v4.projections import project
from dsv4_jax.deepseek_v4.weights import ModelWeights

Implementation = Literal["native", "reference"]


class Choices(NamedTuple):
    """What the model chose for every token of a step."""

    entries: jax.Array  # int32 [CSA layers, T, K], by the indexer; -1 = none
    experts: jax.Array  # int32 [layers, T, experts per token], by the routing


def step(
    weights: ModelWeights,
    cache: Cache,
    plan: StepPlan,
    tokens: jax.Array,
    *,
    config: DeepseekV4Config,
    implementation: Implementation = "native",
    attention: Attention = "attend",
    dtype: Any = jnp.bfloat16,
    last: int = 1,
    tensor_axis: str | None = None,
) -> tuple[Cache, jax.Array, Choices]:
    """Run the tokens of one plan through the model. Jit it with the cache donated.

    Args:
      weights: of the model.
      cache: as the step before left it.
      plan: of this step, from ``CacheManager.prepare_forward``.
      tokens: int32 [T] token ids in the plan's order; padding may hold any id.
      config: of the model (static).
      implementation: which implementation of the cache operations runs (static).
      attention: how rows are attended to (static).
      dtype: of activations, bfloat16 or float32; weights are rounded to it (static).
      last: after how many of each request's last tokens there are to be logits (static).
      tensor_axis: inside ``jax.shard_map``, the mesh axis over which query heads and experts are split, see
        ``placement.py``; None if each device has all (static).

    Returns:
      The cache; fp32 logits [R * last, vocabulary] after ``last_tokens``; what was chosen on the way.

    Raises:
      ConfigError: the cache is of another model.
    """
    options: dict[str, Any] = {"implementation": implementation, "attention": attention, "dtype": dtype}
    options |= {"config": config, "tensor_axis": tensor_axis}
    cache, streams, choices = run_layers(weights, cache, plan, tokens, **options)
    return cache, logits(weights, config, streams[last_tokens(plan, last)]), choices


def last_tokens(plan: StepPlan, count: int) -> jax.Array:
    """int32 [R * count]: flat indices of each request's last tokens, one request's behind the other's, in order.

    A request that brought fewer has its first one repeated. Those of padding are any tokens.
    """
    if count == 1:
        return jnp.asarray(plan.last_token)
    columns = plan.last_token[:, None] + jnp.arange(1 - count, 1)
    return jnp.clip(columns, plan.query_start[:-1, None], plan.layout.tokens - 1).reshape(-1)


def run_layers(
    weights: ModelWeights,
    cache: Cache,
    plan: StepPlan,
    tokens: jax.Array,
    *,
    config: DeepseekV4Config,
    implementation: Implementation = "native",
    attention: Attention = "attend",
    dtype: Any = jnp.bfloat16,
    tensor_axis: str | None = None,
) -> tuple[Cache, jax.Array, Choices]:
    """As ``step``, but up to the residual streams of every token behind the last layer, ``dtype`` [T, n, hidden]."""
    spec = config.spec
    if cache.schema.spec != spec:
        raise ConfigError(
            f"the cache is of {cache.schema.spec.name}, the weights are of {spec.name}, which differs from it; make "
            "the cache's schema with config.spec."
        )
    with jax.default_matmul_precision("highest"):  # fp32 products stay fp32 on GPUs too
        with jax.named_scope("step.begin"):
            cache_step = begin(cache, plan, implementation=implementation)
        plan = cache_step.plan
        with jax.named_scope("step.angles"):
            angles = {layer: _angles(plan, layer) for layer in set(spec.layers)}
        streams = spread(weights.embed[tokens].astype(dtype), config)
        selections, experts = [], []
        for index, (layer, layer_weights) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            mixed = mixing(layer_weights.hc_attn, config, streams)
            x = rms_norm(collapse(streams, mixed.into), spec.norm_eps, layer_weights.attn_norm)
            made = project(layer_weights.attention, config, x, *angles[layer])
            layer_cache, of_attention = cache_step.layer(index), layer_weights.attention
            handle, output, selected = attend(layer_cache, of_attention, made, attention, tensor_axis)
            cache_step = handle.step
            if selected is not None:
                selections.append(selected)
            streams = connect(streams, output, mixed)

            mixed = mixing(layer_weights.hc_ffn, config, streams)
            x = rms_norm(collapse(streams, mixed.into), spec.norm_eps, layer_weights.ffn_norm)
            routing = route(layer_weights.ffn, config, x, tokens)
            experts.append(routing.experts)
            streams = connect(streams, mixture(layer_weights.ffn, config, x, routing, tensor_axis), mixed)
        entries = jnp.stack(selections) if selections else jnp.zeros((0, tokens.shape[0], spec.index_topk), jnp.int32)
        return cache_step.end(), streams, Choices(entries, jnp.stack(experts))


@jax.named_scope("model.head")
def logits(weights: ModelWeights, config: DeepseekV4Config, streams: jax.Array) -> jax.Array:
    """fp32 [N, vocabulary] from the residual streams [N, n, hidden] of N tokens."""
    with jax.default_matmul_precision("highest"):
        hidden = rms_norm(collapse_last(weights.hc_head, config, streams), config.spec.norm_eps, weights.norm)
        return linear(hidden, weights.head, dtype=jnp.float32)


def _angles(plan: StepPlan, layer: Any) -> tuple[Rotary, Rotary | None]:
    """The rotary of the step's tokens, and of its closing entries where the layer makes any."""
    closing = closing_rotary(plan, layer.kind.ratio, layer.rope) if layer.kind.compression else None
    return token_rotary(plan, layer.rope), closing
