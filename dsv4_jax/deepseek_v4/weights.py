"""The weights of a model as a pytree, the shapes that a config gives them, and how the step takes one up.

Matrices keep the layout of the checkpoints, ``[out, in]``, and the format: each is a plain array or a quantized one,
which ``expand`` turns into numbers where the step needs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from dsv4_jax import LayerKind
from dsv4_jax.deepseek_v4.config import DeepseekV4Config


class QuantizedWeight(Protocol):
    """A weight that is kept as codes and scales: a pytree of arrays, which a step expands where it needs the numbers.

    Of stacked weights every array has the stack's axis first, so that one index picks from all of them.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        ...

    def expand(self, dtype: Any) -> jax.Array:
        """The numbers, [*shape], rounded to ``dtype``."""
        ...


Matrix: TypeAlias = jax.Array | QuantizedWeight


class CompressorWeights(NamedTuple):
    """Makes entries of d channels; c is 2d for CSA (overlap half, then current half) and d for HCA."""

    kv: Matrix  # [c, hidden]
    gate: Matrix  # [c, hidden]
    position_bias: jax.Array  # [ratio, c], added to the gate by position within the window
    norm: jax.Array  # [d]


class IndexerWeights(NamedTuple):
    """Scores a CSA layer's entries for each query."""

    query: Matrix  # [index heads * 128, query rank]
    head_weights: Matrix  # [index heads, hidden]
    compressor: CompressorWeights  # d = 128


class AttentionWeights(NamedTuple):
    """One layer's attention; the compressor is None in SWA layers, the indexer in all but CSA layers."""

    wq_a: Matrix  # [query rank, hidden]
    q_norm: jax.Array  # [query rank]
    wq_b: Matrix  # [heads * 512, query rank]
    wkv: Matrix  # [512, hidden], the one row that serves as key and value
    kv_norm: jax.Array  # [512]
    sinks: jax.Array  # [heads]
    wo_a: Matrix  # [groups * output rank, heads * 512 / groups], a block of rows for each group of heads
    wo_b: Matrix  # [hidden, groups * output rank]
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


class ExpertWeights(NamedTuple):
    """One SwiGLU network; of the routed experts with an axis [experts] in front."""

    gate: Matrix  # [width, hidden]
    up: Matrix  # [width, hidden]
    down: Matrix  # [hidden, width]


class MixtureWeights(NamedTuple):
    """The mixture of experts of a layer, which has either a bias or a table."""

    gate: Matrix  # [experts, hidden]
    bias: jax.Array | None  # [experts], added to the scores for the choice alone
    token_experts: jax.Array | None  # int32 [vocabulary, experts per token]: a hash layer's choice
    experts: ExpertWeights
    shared: ExpertWeights


class HyperConnectionWeights(NamedTuple):
    """Makes a sublayer's mixing weights of the n residual streams: m is (2 + n) n, and n where streams only meet."""

    fn: jax.Array  # [m, n * hidden]
    base: jax.Array  # [m]
    scale: jax.Array  # [3], for the weights into, out of and beside the sublayer; [1] where streams only meet


class LayerWeights(NamedTuple):
    """One layer: attention, then the mixture of experts, each within its hyper-connection."""

    hc_attn: HyperConnectionWeights
    attn_norm: jax.Array  # [hidden]
    attention: AttentionWeights
    hc_ffn: HyperConnectionWeights
    ffn_norm: jax.Array  # [hidden]
    ffn: MixtureWeights


class ModelWeights(NamedTuple):
    """The whole model."""

    embed: jax.Array  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    hc_head: HyperConnectionWeights
    norm: jax.Array  # [hidden]
    head: Matrix  # [vocabulary, hidden]


def expand(weight: Matrix, dtype: Any) -> jax.Array:
    """The numbers of a weight, plain or quantized, as ``dtype``."""
    return weight.astype(dtype) if isinstance(weight, jax.Array) else weight.expand(dtype)


def weight_shapes(config: DeepseekV4Config) -> ModelWeights:
    """What the weights of a model look like: ``ModelWeights`` with a ``jax.ShapeDtypeStruct`` in place of every weight.

    dtypes are int32 for the table of experts and float32 for all others; what a checkpoint stores may be narrower, or
    quantized.
    """
    spec = config.spec
    hidden, streams = spec.hidden_size, config.hc_mult

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def compressor(kind: LayerKind, width: int) -> CompressorWeights:
        columns = kind.compression.columns(width) if kind.compression else 0
        return CompressorWeights(
            kv=array(columns, hidden),
            gate=array(columns, hidden),
            position_bias=array(kind.ratio, columns),
            norm=array(width),
        )

    def indexer() -> IndexerWeights:
        return IndexerWeights(
            query=array(spec.index_num_heads * spec.index_head_dim, config.q_lora_rank),
            head_weights=array(spec.index_num_heads, hidden),
            compressor=compressor(LayerKind.CSA, spec.index_head_dim),
        )

    def attention(kind: LayerKind) -> AttentionWeights:
        channels = spec.num_heads * spec.head_dim
        return AttentionWeights(
            wq_a=array(config.q_lora_rank, hidden),
            q_norm=array(config.q_lora_rank),
            wq_b=array(channels, config.q_lora_rank),
            wkv=array(spec.head_dim, hidden),
            kv_norm=array(spec.head_dim),
            sinks=array(spec.num_heads),
            wo_a=array(config.o_groups * config.o_lora_rank, channels // config.o_groups),
            wo_b=array(hidden, config.o_groups * config.o_lora_rank),
            compressor=compressor(kind, spec.head_dim) if kind.compression else None,
            indexer=indexer() if kind is LayerKind.CSA else None,
        )

    def expert(*stack: int) -> ExpertWeights:
        width = config.expert_width
        return ExpertWeights(
            gate=array(*stack, width, hidden), up=array(*stack, width, hidden), down=array(*stack, hidden, width)
        )

    def mixture(hashed: bool) -> MixtureWeights:
        table = array(config.vocabulary, config.experts_per_token, dtype=jnp.int32)
        return MixtureWeights(
            gate=array(config.num_experts, hidden),
            bias=None if hashed else array(config.num_experts),
            token_experts=table if hashed else None,
            experts=expert(config.num_experts),
            shared=expert(),
        )

    def hyper_connection(mixed: int, scales: int) -> HyperConnectionWeights:
        return HyperConnectionWeights(fn=array(mixed, streams * hidden), base=array(mixed), scale=array(scales))

    def layer(kind: LayerKind, hashed: bool) -> LayerWeights:
        return LayerWeights(
            hc_attn=hyper_connection((2 + streams) * streams, 3),
            attn_norm=array(hidden),
            attention=attention(kind),
            hc_ffn=hyper_connection((2 + streams) * streams, 3),
            ffn_norm=array(hidden),
            ffn=mixture(hashed),
        )

    return ModelWeights(
        embed=array(config.vocabulary, hidden),
        layers=tuple(layer(kind, hashed) for kind, hashed in zip(spec.layer_kinds, config.hashed, strict=True)),
        hc_head=hyper_connection(streams, 1),
        norm=array(hidden),
        head=array(config.vocabulary, hidden),
    )
