"""``random_weights``: a model's weights in the release's formats, made on the device in a moment, whatever their size.

For measuring: a step takes as long with them as with those of a checkpoint. ``random_checkpoint.py`` writes a folder.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.quantized import FP4_GROUP, FP8_BLOCK, BlockFp8, PackedFp4
from dsv4_jax.deepseek_v4.random_checkpoint import distribution, stored_as
from dsv4_jax.deepseek_v4.weights import ModelWeights, weight_shapes

_E2M1_DEVIATION = (137 / 16) ** 0.5  # of the 16 codes' values


def random_weights(config: DeepseekV4Config, seed: int = 0) -> ModelWeights:
    """Weights as ``load_checkpoint`` returns those of a release, with ``random_checkpoint``'s means and deviations.

    Codes are random; the scales of a weight are all the same power of two. No temporary memory. It may be traced.

    Args:
      config: of the model.
      seed: below 2^20; the same weights for the same one.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(weight_shapes(config))
    made = []
    for index, (key, leaf) in enumerate(leaves):
        path, this = jax.tree_util.keystr(key, simple=True, separator="."), np.uint32(seed * len(leaves) + index)
        if leaf.dtype == jnp.int32:
            made.append(_table(this, leaf.shape, config.num_experts))
            continue
        mean, deviation = distribution(path, leaf.shape)
        match stored_as(path):
            case "fp8":
                made.append(_block_fp8(this, leaf.shape, deviation))
            case "fp4":
                made.append(_packed_fp4(this, leaf.shape, deviation))
            case plain:
                made.append(_plain(this, leaf.shape, np.float32(mean), np.float32(deviation), plain))
    return jax.tree.unflatten(tree, made)


def _bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of the index alone: fused into what it is for, without the temporaries of ``jax.random``."""
    value = jnp.zeros(shape, jnp.uint32) + (seed + 1) * jnp.uint32(0x9E3779B9)
    for axis in range(len(shape)):
        value = (value + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x85EBCA6B)
        value = value ^ (value >> 15)
    return value * jnp.uint32(0xC2B2AE35)


def _numbers(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 of mean 0 and deviation 1, evenly spread."""
    return (_bits(seed, shape) >> 8).astype(jnp.float32) * np.float32(3**0.5 * 2**-23) - np.float32(3**0.5)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _plain(seed: jax.Array, shape: tuple[int, ...], mean: jax.Array, deviation: jax.Array, dtype: str) -> jax.Array:
    return (mean + _numbers(seed, shape) * deviation).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _block_fp8(seed: jax.Array, shape: tuple[int, ...], deviation: float) -> BlockFp8:
    *stack, out, columns = shape
    codes = _numbers(seed, shape).astype(jnp.float8_e4m3fn)
    return BlockFp8(codes, _scales((*stack, -(-out // FP8_BLOCK), -(-columns // FP8_BLOCK)), deviation))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _packed_fp4(seed: jax.Array, shape: tuple[int, ...], deviation: float) -> PackedFp4:
    *rows, columns = shape
    codes = (_bits(seed, (*rows, columns // 2)) >> 24).astype(jnp.uint8)
    return PackedFp4(codes, _scales((*rows, columns // FP4_GROUP), deviation / _E2M1_DEVIATION))


def _scales(shape: tuple[int, ...], scale: float) -> jax.Array:
    """UE8M0 bytes: the power of two nearest to ``scale``."""
    return jnp.full(shape, 127 + round(math.log2(scale)), jnp.uint8)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _table(seed: jax.Array, shape: tuple[int, int], experts: int) -> jax.Array:
    """int32 [vocabulary, experts per token]: of each token different experts, evenly spaced from a random one on."""
    tokens, per_token = shape
    first = (_bits(seed, (tokens, 1)) >> 8).astype(jnp.int32)
    return (first + jnp.arange(per_token, dtype=jnp.int32) * (experts // per_token)) % experts
