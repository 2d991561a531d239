"""One step of the cached model: the same function for prefill, decode and any mixture of the two."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from dsv4_jax import Cache, LayerCache, LayerKind, ModelSpec, StepPlan, begin, token_rotary
from dsv4_jax.example.attention import Source, index_scores, rms_norm, sink_attention, top_entries
from dsv4_jax.example.layer import IndexQuery, Projections, compressor_inputs, merge_heads, project
from dsv4_jax.example.weights import LayerWeights, StackWeights
from dsv4_jax.spec.model import LayerSpec

Implementation = Literal["native", "reference"]


def step(
    weights: StackWeights,
    cache: Cache,
    plan: StepPlan,
    tokens: jax.Array,
    *,
    spec: ModelSpec,
    implementation: Implementation = "native",
) -> tuple[Cache, jax.Array, jax.Array]:
    """Run the tokens of one plan through the stack. Jit it with the cache donated.

    Every source of rows is scored for all requests of the step at once and masked by request: few, large matrix
    products, and no shape that depends on who brings how many tokens. The price is a factor of the number of requests
    in scores; a serving kernel would walk each request's own rows.

    Args:
      weights: of the stack.
      cache: as the step before left it.
      plan: of this step, from ``CacheManager.prepare_forward``.
      tokens: int32 [T] bytes in the plan's order; padding may hold anything in 0..255.
      spec: of the model (static).
      implementation: which implementation of the cache operations runs (static).

    Returns:
      The cache; fp32 logits [R, 256] after each request's last token; int32 [CSA layers, T, K], the entries that the
      indexer chose (-1 = none).
    """
    with jax.default_matmul_precision("highest"):  # fp32 products stay fp32 on GPUs too
        cache_step = begin(cache, plan, implementation=implementation)
        plan = cache_step.plan
        angles = {rope: token_rotary(plan, rope) for rope in {layer.rope for layer in spec.layers}}
        hidden = weights.embedding[tokens].astype(jnp.float32)
        selections = []
        for index, (layer, layer_weights) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            made = project(layer_weights, spec, hidden, angles[layer.rope])
            handle = cache_step.layer(index)
            handle, sources, selection = _remember(handle, plan, spec, layer, layer_weights, made)
            cache_step = handle.step
            if selection is not None:
                selections.append(selection)
            attended = sink_attention(made.queries, sources, layer_weights.sinks)
            hidden = hidden + merge_heads(layer_weights, attended, angles[layer.rope])
        logits = rms_norm(hidden[plan.last_token], spec.norm_eps, weights.norm) @ weights.unembedding
        return cache_step.end(), logits, _stack(selections, tokens.shape[0], spec)


def _remember(
    handle: LayerCache,
    plan: StepPlan,
    spec: ModelSpec,
    layer: LayerSpec,
    weights: LayerWeights,
    made: Projections,
) -> tuple[LayerCache, list[Source], jax.Array | None]:
    """Put the step's tokens into the layer's cache; what its queries attend to, and the CSA selection."""
    # Only now is a row that this step pushes out of the ring still there.
    handle, before = handle.window_before(dtype=jnp.float32)
    handle = handle.update(made.rows, *compressor_inputs(weights, made, plan, layer))
    own = handle.stored(made.rows, dtype=jnp.float32)
    sources = [_window_source(plan, spec.window, before, own)]
    selection = None
    if made.index_query is not None:
        handle, selection = _select(handle, plan, spec, made.index_query)
        handle, chosen = handle.entries(selection, dtype=jnp.float32)
        sources.append(Source(chosen.values, chosen.valid))
    elif handle.kind is LayerKind.HCA:
        count = handle.schema.max_context // handle.kind.ratio
        handle, entries = handle.all_entries(count, dtype=jnp.float32)
        seen = jnp.arange(count) < handle.visible[:, None, None]  # [T, 1, K]
        mine = plan.token_request[:, None] == jnp.arange(entries.values.shape[0])  # [T, R]
        mask = mine[:, :, None] & seen & entries.valid
        sources.append(Source(_flat(entries.values), mask.reshape(mask.shape[0], -1)))
    return handle, sources, selection


def _window_source(plan: StepPlan, window: int, before, own: jax.Array) -> Source:
    """Rows of earlier steps and the step's own, each token seeing the last ``window`` of its request up to itself."""
    requests, rows = before.positions.shape
    row_position = jnp.concatenate([before.positions.reshape(-1), plan.token_position])
    row_request = jnp.concatenate([jnp.repeat(jnp.arange(requests), rows), plan.token_request])
    row_valid = jnp.concatenate([before.valid.reshape(-1), plan.token_position >= 0])
    age = plan.token_position[:, None] - row_position
    mine = plan.token_request[:, None] == row_request
    return Source(jnp.concatenate([_flat(before.values), own]), mine & row_valid & (age >= 0) & (age < window))


def _select(handle: LayerCache, plan: StepPlan, spec: ModelSpec, query: IndexQuery) -> tuple[LayerCache, jax.Array]:
    """The indexer's choice for each token, int32 [T, K]."""
    count = handle.schema.max_context // handle.kind.ratio
    handle, keys = handle.all_keys(count, dtype=jnp.float32)
    queries = handle.transform_query(query.queries)
    scores = index_scores(queries, query.head_weights, _flat(keys.values))
    own = scores.reshape(scores.shape[0], -1, count)[jnp.arange(scores.shape[0]), plan.token_request]
    return handle, top_entries(own, handle.visible, spec.index_topk)


def _flat(values: jax.Array) -> jax.Array:
    """[R, K, d] -> [R * K, d]."""
    return values.reshape(-1, values.shape[-1])


def _stack(selections: list[jax.Array], tokens: int, spec: ModelSpec) -> jax.Array:
    return jnp.stack(selections) if selections else jnp.zeros((0, tokens, spec.index_topk), jnp.int32)
