"""The model without a cache: one whole request at once, dense masks by position. What ``verify.py`` compares with.

Written from the model's definition, sharing with the cached model only what has nothing to do with caching
(projections, experts, hyper-connections, sink attention over plain arrays): compressed entries come from the whole
sequence in one reshape, so that nothing here knows of tails, rings, blocks or steps. Rows are rounded through the
cache's formats, since a query attends to rows as they are stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import CacheFormats, CompressorInputs, LayerKind, apply_rotary, ops, rotary
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.gathered import Source, index_scores, sink_attention, top_entries
from dsv4_jax.deepseek_v4.hyper_connections import collapse, connect, mixing, spread
from dsv4_jax.deepseek_v4.layers import rms_norm
from dsv4_jax.deepseek_v4.mixture import expert_scores, mixture, routing_to
from dsv4_jax.deepseek_v4.model import Choices, logits
from dsv4_jax.deepseek_v4.projections import IndexQuery, Projections, merge_heads, project
from dsv4_jax.deepseek_v4.weights import AttentionWeights, MixtureWeights, ModelWeights


class ChoiceCheck(NamedTuple):
    """How recorded choices of one layer compare with the scores computed here, summed over tokens.

    Scores computed in another order differ in their last bits, and more where a stored code fell to the other side of
    a rounding boundary: two entries, or two experts, with almost the same score may then trade places. ``gap`` tells
    such a flip from an error.
    """

    chosen: jax.Array  # int32 [], recorded choices
    flips: jax.Array  # int32 [], how many of them score lower than the last one chosen here
    gap: jax.Array  # fp32 [], the most by which one does, relative to the largest score magnitude that its token sees
    malformed: jax.Array  # int32 [], tokens whose choices repeat one, lack some, or are not theirs to choose


class Checks(NamedTuple):
    """Arrays [CSA layers] and [layers]."""

    entries: ChoiceCheck
    experts: ChoiceCheck


def full_context(
    weights: ModelWeights,
    tokens: jax.Array,
    length: jax.Array,
    wanted: jax.Array,
    recorded: Choices,
    *,
    config: DeepseekV4Config,
    formats: CacheFormats,
    dtype: Any,
) -> tuple[jax.Array, Checks]:
    """Logits of one request.

    Args:
      weights: of the model.
      tokens: int32 [n], n a multiple of 128: padded at the end.
      length: int32 [], how many of them are the request's.
      wanted: int32 [m], after which positions logits are wanted.
      recorded: the cached run's choices: entries [CSA layers, n, K] and experts [layers, n, experts per token].
      config: of the model (static).
      formats: what rows, entries and keys are rounded through (static).
      dtype: of activations (static).

    Returns:
      fp32 [m, vocabulary]; the checks of ``recorded``.
    """
    spec, positions = config.spec, jnp.arange(tokens.shape[0])
    counted = positions < length
    entry_checks, expert_checks = [], []
    with jax.default_matmul_precision("highest"):
        streams = spread(weights.embed[tokens].astype(dtype), config)
        for index, (layer, layer_weights) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            ratio = layer.kind.ratio
            angles = rotary(positions, layer.rope)
            closing = rotary(positions[::ratio], layer.rope) if layer.kind.compression else None
            mixed = mixing(layer_weights.hc_attn, config, streams)
            x = rms_norm(collapse(streams, mixed.into), spec.norm_eps, layer_weights.attn_norm)
            made = project(layer_weights.attention, config, x, angles, closing)
            choice = None
            if made.indexer is not None and made.index_query is not None:
                choice = recorded.entries[spec.kind_index(index)]
                scores = _index_scores(made.indexer, made.index_query, config, formats)
                visible = (positions + 1) // ratio
                entry_checks.append(check_choices(scores, visible, choice, spec.index_topk, counted))
            output = _attention(layer_weights.attention, made, choice, layer.kind, config, formats)
            streams = connect(streams, output, mixed)

            mixed = mixing(layer_weights.hc_ffn, config, streams)
            x = rms_norm(collapse(streams, mixed.into), spec.norm_eps, layer_weights.ffn_norm)
            experts = recorded.experts[index]
            scores = expert_scores(layer_weights.ffn, config, x)
            expert_checks.append(_check_experts(layer_weights.ffn, scores, tokens, experts, counted))
            routing = routing_to(jnp.where(counted[:, None], experts, 0), scores, config)
            streams = connect(streams, mixture(layer_weights.ffn, config, x, routing), mixed)
    return logits(weights, config, streams[wanted]), Checks(_stacked(entry_checks), _stacked(expert_checks))


def _attention(
    weights: AttentionWeights,
    made: Projections,
    choice: jax.Array | None,
    kind: LayerKind,
    config: DeepseekV4Config,
    formats: CacheFormats,
) -> jax.Array:
    """The sublayer's output, [n, hidden]: over the window and over all or, in CSA layers, the chosen entries."""
    tokens, n = made.rows.rotary, made.queries.shape[0]
    positions = jnp.arange(n)
    age = positions[:, None] - positions
    normed = rms_norm(made.rows.rows.astype(jnp.float32), config.spec.norm_eps, made.rows.norm_weight)
    rows = _as_stored(apply_rotary(normed, tokens), formats.window_format)
    sources = [Source(rows, (age >= 0) & (age < config.spec.window))]
    if made.compressor is not None:
        entries = compressed_entries(made.compressor, kind, config.spec.norm_eps)
        mask = jnp.arange(entries.shape[0]) < ((positions + 1) // kind.ratio)[:, None]
        if choice is not None:
            index = jnp.where(choice >= 0, choice, entries.shape[0])  # beyond the end, where nothing is set
            mask = mask & jnp.zeros(mask.shape, bool).at[positions[:, None], index].set(True, mode="drop")
        sources.append(Source(_as_stored(entries, formats.entry_format), mask))
    attended = sink_attention(made.queries.astype(jnp.float32), sources, weights.sinks)
    # Rows are keys and values at once, so what is attended still carries the rotation of where it came from.
    output = apply_rotary(attended, tokens, inverse=True).astype(made.queries.dtype)
    return merge_heads(weights, output)


def compressed_entries(inputs: CompressorInputs, kind: LayerKind, eps: float) -> jax.Array:
    """fp32 [n / ratio, d]: every entry of a sequence, before rounding.

    Args:
      inputs: of the whole sequence, n a multiple of the ratio; their rotary is that of each entry's first token.
      kind: of the layer; its indexer's keys are made likewise.
      eps: of the norm.
    """
    kv = inputs.kv.astype(jnp.float32).reshape(-1, kind.ratio, inputs.kv.shape[-1])
    score = inputs.gate.astype(jnp.float32).reshape(kv.shape) + inputs.position_bias.astype(jnp.float32)
    if kind is LayerKind.CSA:
        # An entry pools the overlap half of the window before its own; entry 0 has none before it.
        width = kv.shape[-1] // 2
        overlap_kv = jnp.pad(kv[:-1, :, :width], ((1, 0), (0, 0), (0, 0)))
        overlap_score = jnp.pad(score[:-1, :, :width], ((1, 0), (0, 0), (0, 0)), constant_values=-jnp.inf)
        kv = jnp.concatenate([overlap_kv, kv[:, :, width:]], axis=1)
        score = jnp.concatenate([overlap_score, score[:, :, width:]], axis=1)
    pooled = jnp.sum(jax.nn.softmax(score, axis=1) * kv, axis=1)
    return apply_rotary(rms_norm(pooled, eps, inputs.norm_weight), inputs.rotary)


def _index_scores(
    inputs: CompressorInputs, query: IndexQuery, config: DeepseekV4Config, formats: CacheFormats
) -> jax.Array:
    """fp32 [n, n / 4]: the indexer's scores."""
    keys = compressed_entries(inputs, LayerKind.CSA, config.spec.norm_eps)
    queries = query.queries.astype(jnp.float32)
    if formats.keys_hadamard:
        transform = _hadamard(keys.shape[-1])
        keys, queries = keys @ transform, queries @ transform
    return index_scores(queries, query.head_weights, _as_stored(keys, formats.key_format))


def check_choices(
    scores: jax.Array, visible: jax.Array, choice: jax.Array, count: int, counted: jax.Array
) -> ChoiceCheck:
    """Compare choices with the best of the scores.

    Args:
      scores: fp32 [n, E].
      visible: int32 [n]: the first so many can be chosen.
      choice: int32 [n, K], -1 = none.
      count: how many should be.
      counted: bool [n], the tokens to look at.
    """
    own = top_entries(scores, visible, count)

    def score_of(indices: jax.Array) -> jax.Array:
        return jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=1)

    last = jnp.where(own >= 0, score_of(own), jnp.inf).min(axis=1, keepdims=True)
    given = (choice >= 0) & counted[:, None]
    below = jnp.where(given, jnp.maximum(last - score_of(choice), 0.0), 0.0)

    seen = jnp.arange(scores.shape[1]) < visible[:, None]
    largest = jnp.where(seen, jnp.abs(scores), 0.0).max(axis=1, keepdims=True)
    ordered = jnp.sort(choice, axis=1)
    repeats = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    unseen = (choice >= visible[:, None]).any(axis=1)
    lacking = (choice >= 0).sum(axis=1) != jnp.minimum(visible, count)
    return ChoiceCheck(
        chosen=given.sum(),
        flips=(below > 0).sum(),
        gap=(below / jnp.maximum(largest, np.finfo(np.float32).tiny)).max(),
        malformed=((repeats | unseen | lacking) & counted).sum(),
    )


def _check_experts(
    weights: MixtureWeights, scores: jax.Array, tokens: jax.Array, experts: jax.Array, counted: jax.Array
) -> ChoiceCheck:
    """The experts of a layer: the best ones, or exactly those of a hash layer's table."""
    if weights.token_experts is not None:
        wrong = (experts != weights.token_experts[tokens]).any(axis=1)
        nothing = jnp.zeros((), jnp.int32)
        chosen = counted.sum() * experts.shape[1]
        return ChoiceCheck(chosen, nothing, nothing.astype(jnp.float32), (wrong & counted).sum())
    biased = scores if weights.bias is None else scores + weights.bias
    every = jnp.full(scores.shape[0], scores.shape[1])
    return check_choices(biased, every, experts, experts.shape[1], counted)


def _stacked(checks: list[ChoiceCheck]) -> ChoiceCheck:
    if not checks:
        nothing = jnp.zeros((0,), jnp.int32)
        return ChoiceCheck(nothing, nothing, nothing.astype(jnp.float32), nothing)
    return jax.tree.map(lambda *values: jnp.stack(values), *checks)


def _as_stored(rows: jax.Array, vector_format: Any) -> jax.Array:
    """``rows`` [n, width] through a format of ``CacheFormats`` and back, fp32."""
    page = ops.quantize(rows, format=vector_format, implementation="reference")
    options: dict[str, Any] = {"rows": rows.shape[0], "dtype": jnp.float32, "implementation": "reference"}
    return ops.dequantize(page, format=vector_format, **options)


def _hadamard(width: int) -> jax.Array:
    """The orthonormal Hadamard matrix [width, width], Sylvester's order: H[i, j] = (-1)^(bits that i and j share)."""
    shared = jnp.arange(width)[:, None] & jnp.arange(width)
    return jnp.where(jax.lax.population_count(shared) % 2 == 0, 1.0, -1.0) * width**-0.5
