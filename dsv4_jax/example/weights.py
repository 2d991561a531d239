"""The parameters of the example stack: what they are, and random ones in which every weight matters."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import LayerKind, ModelSpec

VOCABULARY = 256  # a token is a byte


class CompressorWeights(NamedTuple):
    """Makes entries of d channels; c is 2d for CSA (overlap half, then current half) and d for HCA. All is fp32."""

    kv: jax.Array  # [hidden, c]
    gate: jax.Array  # [hidden, c]
    position_bias: jax.Array  # [ratio, c] added to the gate by position within the window
    norm: jax.Array  # [d]


class IndexerWeights(NamedTuple):
    """Scores a CSA layer's entries for each query."""

    query: jax.Array  # [hidden, index heads, 128]
    head: jax.Array  # [hidden, index heads]
    keys: CompressorWeights  # d = 128


class LayerWeights(NamedTuple):
    """One attention layer; the compressor is None in SWA layers, the indexer in all but CSA layers."""

    norm: jax.Array  # [hidden]
    query: jax.Array  # [hidden, heads, 512]
    row: jax.Array  # [hidden, 512], the one row that serves as key and value
    row_norm: jax.Array  # [512]
    sinks: jax.Array  # [heads]
    output: jax.Array  # [heads, 512, hidden]
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


class StackWeights(NamedTuple):
    """The whole stack."""

    embedding: jax.Array  # [256, hidden]
    layers: tuple[LayerWeights, ...]
    norm: jax.Array  # [hidden]
    unembedding: jax.Array  # [hidden, 256]


def init_weights(spec: ModelSpec, seed: int) -> StackWeights:
    """Random fp32 weights for ``spec``, the same on every platform.

    Scales are chosen so that everything has an effect of order one on the logits: an attention that ignored its
    sinks, its compressor's position embeddings or its entries would be seen.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, fan_in: int = 1, gain: float = 1.0) -> jax.Array:
        return jnp.asarray(gain * fan_in**-0.5 * rng.standard_normal(shape), jnp.float32)

    def near_one(width: int) -> jax.Array:
        return 1.0 + 0.25 * normal(width)

    hidden, heads = spec.hidden_size, spec.num_heads

    def compressor(ratio: int, width: int, columns: int) -> CompressorWeights:
        return CompressorWeights(
            kv=normal(hidden, columns, fan_in=hidden),
            gate=normal(hidden, columns, fan_in=hidden),
            position_bias=normal(ratio, columns),
            norm=near_one(width),
        )

    def layer(kind: LayerKind) -> LayerWeights:
        main = indexer = None
        if kind is LayerKind.CSA:
            main = compressor(kind.ratio, spec.head_dim, 2 * spec.head_dim)
            indexer = IndexerWeights(
                query=normal(hidden, spec.index_num_heads, spec.index_head_dim, fan_in=hidden),
                head=normal(hidden, spec.index_num_heads, fan_in=hidden),
                keys=compressor(kind.ratio, spec.index_head_dim, 2 * spec.index_head_dim),
            )
        elif kind is LayerKind.HCA:
            main = compressor(kind.ratio, spec.head_dim, spec.head_dim)
        return LayerWeights(
            norm=near_one(hidden),
            query=normal(hidden, heads, spec.head_dim, fan_in=hidden),
            row=normal(hidden, spec.head_dim, fan_in=hidden),
            row_norm=near_one(spec.head_dim),
            sinks=normal(heads),
            # An average over a hundred rows is small: the gain brings it back to the size of the residual stream.
            output=normal(heads, spec.head_dim, hidden, fan_in=heads * spec.head_dim, gain=4.0),
            compressor=main,
            indexer=indexer,
        )

    return StackWeights(
        embedding=normal(VOCABULARY, hidden),
        layers=tuple(layer(layer_spec.kind) for layer_spec in spec.layers),
        norm=near_one(hidden),
        unembedding=normal(hidden, VOCABULARY, fan_in=hidden),
    )
