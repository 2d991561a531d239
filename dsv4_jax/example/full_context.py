"""The example stack without a cache: one whole request at once, dense masks by position. What `--verify` compares with.

Written from the model's definition, sharing with the cached model only what has nothing to do with caching (the
projections of ``layer.py`` and the arithmetic of ``attention.py``): compressed entries come from the whole sequence in
one reshape, so that nothing here knows of tails, rings, blocks or steps. Rows are rounded through the cache's formats,
since a query attends to rows as they are stored.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import CacheFormats, LayerKind, ModelSpec, apply_rotary, ops
from dsv4_jax.example.attention import Source, index_scores, rms_norm, sink_attention, top_entries
from dsv4_jax.example.layer import Compressed, IndexQuery, merge_heads, project
from dsv4_jax.example.weights import CompressorWeights, IndexerWeights, StackWeights
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.spec.model import RopeSpec
from dsv4_jax.spec.rotary import rotary


class SelectionCheck(NamedTuple):
    """How a recorded selection compares with the one computed here, summed over the tokens of one CSA layer.

    Scores computed in another order differ in their last bits, and more where a stored code fell to the other side of
    a rounding boundary: two entries with almost the same score may then trade places. ``gap`` tells such a flip from an
    error.
    """

    chosen: jax.Array  # int32 [], entries in the recorded selections
    flips: jax.Array  # int32 [], how many of them score lower than the last entry chosen here
    gap: jax.Array  # fp32 [], the most by which one does, relative to the largest score magnitude that its token sees
    malformed: jax.Array  # int32 [], tokens whose selection repeats an entry, lacks some, or has one it cannot see


def full_context(
    weights: StackWeights,
    tokens: jax.Array,
    length: jax.Array,
    selected: jax.Array,
    *,
    spec: ModelSpec,
    formats: CacheFormats,
) -> tuple[jax.Array, SelectionCheck]:
    """Logits of every position of one request.

    Args:
      weights: of the stack.
      tokens: int32 [n] bytes, n a multiple of 128: padded at the end.
      length: int32 [], how many of them are the request's.
      selected: int32 [CSA layers, n, K], the entries each token attends to (-1 = none): the cached run's.
      spec: of the model (static).
      formats: what rows, entries and keys are rounded through (static).

    Returns:
      fp32 [n, 256], the first ``length`` of which mean anything; the check of ``selected``, arrays [CSA layers].
    """
    with jax.default_matmul_precision("highest"):
        positions = jnp.arange(tokens.shape[0])
        hidden = weights.embedding[tokens].astype(jnp.float32)
        checks = []
        for index, (layer, layer_weights) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            angles = rotary(positions, layer.rope)
            made = project(layer_weights, spec, hidden, angles)
            age = positions[:, None] - positions
            sources = [Source(_as_stored(made.rows, formats.window_format), (age >= 0) & (age < spec.window))]
            if layer_weights.compressor is not None and made.compressor is not None:
                entries = compressed_entries(layer_weights.compressor, made.compressor, layer.kind, layer.rope, spec)
                visible = (positions + 1) // layer.kind.ratio
                mask = jnp.arange(entries.shape[0]) < visible[:, None]
                indexer, keys, query = layer_weights.indexer, made.index_keys, made.index_query
                if indexer is not None and keys is not None and query is not None:
                    choice = selected[spec.kind_index(index)]
                    scores = _scores(indexer, keys, query, layer.rope, spec, formats)
                    checks.append(_check(scores, visible, choice, spec.index_topk, positions < length))
                    mask = mask & (choice[:, :, None] == jnp.arange(entries.shape[0])).any(axis=1)
                sources.append(Source(_as_stored(entries, formats.entry_format), mask))
            attended = sink_attention(made.queries, sources, layer_weights.sinks)
            hidden = hidden + merge_heads(layer_weights, attended, angles)
        logits = rms_norm(hidden, spec.norm_eps, weights.norm) @ weights.unembedding
        return logits, jax.tree.map(lambda *values: jnp.stack(values), *checks) if checks else _nothing_checked()


def compressed_entries(
    weights: CompressorWeights, made: Compressed, kind: LayerKind, rope: RopeSpec, spec: ModelSpec
) -> jax.Array:
    """fp32 [n // ratio, d]: every entry of the sequence, before rounding."""
    ratio = kind.ratio
    kv = made.kv.astype(jnp.float32).reshape(-1, ratio, made.kv.shape[-1])
    score = made.gate.astype(jnp.float32).reshape(kv.shape) + weights.position_bias
    if kind is LayerKind.CSA:
        # An entry pools the overlap half of the window before its own; entry 0 has none before it.
        width = kv.shape[-1] // 2
        overlap_kv = jnp.pad(kv[:-1, :, :width], ((1, 0), (0, 0), (0, 0)))
        overlap_score = jnp.pad(score[:-1, :, :width], ((1, 0), (0, 0), (0, 0)), constant_values=-jnp.inf)
        kv = jnp.concatenate([overlap_kv, kv[:, :, width:]], axis=1)
        score = jnp.concatenate([overlap_score, score[:, :, width:]], axis=1)
    pooled = jnp.sum(jax.nn.softmax(score, axis=1) * kv, axis=1)
    normed = rms_norm(pooled, spec.norm_eps, weights.norm)
    return apply_rotary(normed, rotary(ratio * jnp.arange(kv.shape[0]), rope))


def _scores(
    weights: IndexerWeights,
    made: Compressed,
    query: IndexQuery,
    rope: RopeSpec,
    spec: ModelSpec,
    formats: CacheFormats,
) -> jax.Array:
    """fp32 [n, n // 4]: the indexer's scores."""
    keys = compressed_entries(weights.keys, made, LayerKind.CSA, rope, spec)
    queries = query.queries
    if formats.keys_hadamard:
        transform = _hadamard(keys.shape[-1])
        keys, queries = keys @ transform, queries @ transform
    return index_scores(queries, query.head_weights, _as_stored(keys, formats.key_format))


def _check(scores: jax.Array, visible: jax.Array, choice: jax.Array, count: int, counted: jax.Array) -> SelectionCheck:
    """Compare ``choice`` [n, K] with the best ``count`` of ``scores`` [n, E], where ``counted`` [n] is true."""
    own = top_entries(scores, visible, count)
    score_of = lambda indices: jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=1)  # noqa: E731
    last = jnp.where(own >= 0, score_of(own), jnp.inf).min(axis=1, keepdims=True)
    given = (choice >= 0) & counted[:, None]
    below = jnp.where(given, jnp.maximum(last - score_of(choice), 0.0), 0.0)

    seen = jnp.arange(scores.shape[1]) < visible[:, None]
    largest = jnp.where(seen, jnp.abs(scores), 0.0).max(axis=1, keepdims=True)
    ordered = jnp.sort(choice, axis=1)
    repeats = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    unseen = (choice >= visible[:, None]).any(axis=1)
    lacking = (choice >= 0).sum(axis=1) != jnp.minimum(visible, count)
    return SelectionCheck(
        chosen=given.sum(),
        flips=(below > 0).sum(),
        gap=(below / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)).max(),
        malformed=((repeats | unseen | lacking) & counted).sum(),
    )


def _nothing_checked() -> SelectionCheck:
    nothing = jnp.zeros((0,), jnp.int32)
    return SelectionCheck(nothing, nothing, nothing.astype(jnp.float32), nothing)


def _as_stored(rows: jax.Array, vector_format: VectorFormat) -> jax.Array:
    """``rows`` [n, width] through the format and back, fp32."""
    page = ops.quantize(rows, format=vector_format, implementation="reference")
    options = {"rows": rows.shape[0], "dtype": jnp.float32, "implementation": "reference"}
    return ops.dequantize(page, format=vector_format, **options)


def _hadamard(width: int) -> jax.Array:
    """The orthonormal Hadamard matrix [width, width], Sylvester's order: H[i, j] = (-1)^(bits that i and j share)."""
    shared = jnp.arange(width)[:, None] & jnp.arange(width)
    return jnp.where(jax.lax.population_count(shared) % 2 == 0, 1.0, -1.0) * width**-0.5
