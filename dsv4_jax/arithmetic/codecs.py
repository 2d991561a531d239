"""One row in and out of its stored form: the rounding rules of every storage format.

`encode` turns a row into its data bytes and its scale bytes, `decode` turns them back; where the bytes lie in a page
is `pages.py`'s business. Codes are always the row *divided by* its scale. A NaN is ignored by every scale and stored as
the code's NaN, or as +6 where codes have none (E2M1); an infinity counts as the largest finite fp32 number, saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.scalars import (
    E2M1_MAX,
    E4M3_MAX,
    amax,
    bytes_of,
    ceil_exponent,
    divide,
    e2m1_codes,
    e2m1_values,
    e4m3_codes,
    e4m3_values,
    numbers_in,
    pack_nibbles,
    power_of_two,
    times_power_of_two,
    to_bfloat16,
    to_float32,
    unpack_nibbles,
)
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.spec.kinds import ROPE_DIM

FP8_AMAX_FLOOR = 1e-12
FP8_POW2_AMAX_FLOOR = 1e-4
NVFP4_AMAX_FLOOR = 2.0**-100
MXFP4_AMAX_FLOOR = 6 * 2.0**-126  # its scale is the smallest normal number
E4M3_SMALLEST = 2.0**-9

FP8_DS_MLA_BLOCK = 64
NVFP4_BLOCK = 16
MXFP4_BLOCK = 32


def encode(rows: jax.Array, vector_format: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """Rows as stored by a quantized format.

    Args:
      rows: fp32 [N, width].
      vector_format: a format with `quantized` true.

    Returns:
      Data uint8 [N, data_bytes] and scales uint8 [N, scale_bytes].
    """
    return _CODECS[vector_format.codec].encode(rows, vector_format)


def decode(data: jax.Array, scales: jax.Array, vector_format: VectorFormat) -> jax.Array:
    """The inverse of `encode`: fp32 [N, width]."""
    return _CODECS[vector_format.codec].decode(data, scales, vector_format)


def _blocks(rows: jax.Array, size: int) -> jax.Array:
    """[N, channels] -> [N, channels / size, size]."""
    return rows.reshape(rows.shape[0], -1, size)


def _flat(blocks: jax.Array) -> jax.Array:
    """[N, blocks, size] -> [N, channels]."""
    return blocks.reshape(blocks.shape[0], -1)


def _encode_fp8(rows: jax.Array, _: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """448 E4M3 codes with one fp32 scale, amax / 448; the RoPE channels as bf16."""
    values, rope = rows[:, :-ROPE_DIM], rows[:, -ROPE_DIM:]
    scale = divide(jnp.maximum(amax(values), FP8_AMAX_FLOOR), E4M3_MAX)
    data = [e4m3_codes(divide(values, scale)), bytes_of(to_bfloat16(rope))]
    return jnp.concatenate(data, axis=1), bytes_of(scale)


def _decode_fp8(data: jax.Array, scales: jax.Array, _: VectorFormat) -> jax.Array:
    codes, rope = data[:, : -2 * ROPE_DIM], data[:, -2 * ROPE_DIM :]
    values = e4m3_values(codes) * numbers_in(scales, jnp.float32)
    return jnp.concatenate([values, to_float32(numbers_in(rope, jnp.bfloat16))], axis=1)


def _encode_fp8_ds_mla(rows: jax.Array, _: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """448 E4M3 codes with a UE8M0 scale per 64, amax / 448 rounded up to a power of two, and a zero byte."""
    values, rope = _blocks(rows[:, :-ROPE_DIM], FP8_DS_MLA_BLOCK), rows[:, -ROPE_DIM:]
    exponents = ceil_exponent(divide(jnp.maximum(amax(values), FP8_POW2_AMAX_FLOOR), E4M3_MAX))
    codes = e4m3_codes(divide(values, power_of_two(exponents)))
    data = jnp.concatenate([_flat(codes), bytes_of(to_bfloat16(rope))], axis=1)
    return data, jnp.pad(_flat(exponents), ((0, 0), (0, 1)))


def _decode_fp8_ds_mla(data: jax.Array, scales: jax.Array, _: VectorFormat) -> jax.Array:
    codes, rope = data[:, : -2 * ROPE_DIM], data[:, -2 * ROPE_DIM :]
    values = e4m3_values(_blocks(codes, FP8_DS_MLA_BLOCK)) * power_of_two(scales[:, :-1, None])
    return jnp.concatenate([_flat(values), to_float32(numbers_in(rope, jnp.bfloat16))], axis=1)


def _encode_fp8_pow2(rows: jax.Array, _: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes with one fp32 scale, amax / 448 rounded up to a power of two."""
    scale = power_of_two(ceil_exponent(divide(jnp.maximum(amax(rows), FP8_POW2_AMAX_FLOOR), E4M3_MAX)))
    return e4m3_codes(divide(rows, scale)), bytes_of(scale)


def _decode_fp8_pow2(data: jax.Array, scales: jax.Array, _: VectorFormat) -> jax.Array:
    return e4m3_values(data) * numbers_in(scales, jnp.float32)


def _encode_nvfp4_blocks(rows: jax.Array, global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E2M1 codes with an E4M3 scale per 16, (amax / 6) in units of the fp32 global scale [N, 1]."""
    values, global_scale = _blocks(rows, NVFP4_BLOCK), global_scale[:, :, None]
    block_scale = divide(divide(amax(values), E2M1_MAX), global_scale)
    block_codes = e4m3_codes(jnp.clip(block_scale, E4M3_SMALLEST, E4M3_MAX))
    codes = e2m1_codes(divide(values, e4m3_values(block_codes) * global_scale))
    return pack_nibbles(_flat(codes)), _flat(block_codes)


def _decode_nvfp4_blocks(data: jax.Array, block_codes: jax.Array, global_scale: jax.Array) -> jax.Array:
    scale = e4m3_values(block_codes) * global_scale
    return _flat(e2m1_values(_blocks(unpack_nibbles(data), NVFP4_BLOCK)) * scale[:, :, None])


def _encode_nvfp4(rows: jax.Array, _: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """NVFP4 with a global scale per row, amax / 2688, stored behind the block scales."""
    global_scale = divide(jnp.maximum(amax(rows), NVFP4_AMAX_FLOOR), E2M1_MAX * E4M3_MAX)
    data, block_codes = _encode_nvfp4_blocks(rows, global_scale)
    return data, jnp.concatenate([block_codes, bytes_of(global_scale)], axis=1)


def _decode_nvfp4(data: jax.Array, scales: jax.Array, _: VectorFormat) -> jax.Array:
    return _decode_nvfp4_blocks(data, scales[:, :-4], numbers_in(scales[:, -4:], jnp.float32))


def _constant_scale(rows: jax.Array, vector_format: VectorFormat) -> jax.Array:
    return jnp.full((rows.shape[0], 1), vector_format.global_scale, jnp.float32)


def _encode_nvfp4_static(rows: jax.Array, vector_format: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """NVFP4 with the format's constant global scale."""
    return _encode_nvfp4_blocks(rows, _constant_scale(rows, vector_format))


def _decode_nvfp4_static(data: jax.Array, scales: jax.Array, vector_format: VectorFormat) -> jax.Array:
    return _decode_nvfp4_blocks(data, scales, _constant_scale(data, vector_format))


def _encode_mxfp4(rows: jax.Array, _: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """E2M1 codes with a UE8M0 scale per 32, amax / 6 rounded up to a power of two."""
    values = _blocks(rows, MXFP4_BLOCK)
    exponents = ceil_exponent(divide(jnp.maximum(amax(values), MXFP4_AMAX_FLOOR), E2M1_MAX))
    return pack_nibbles(_flat(e2m1_codes(divide(values, power_of_two(exponents))))), _flat(exponents)


def _decode_mxfp4(data: jax.Array, scales: jax.Array, _: VectorFormat) -> jax.Array:
    return _flat(times_power_of_two(e2m1_values(_blocks(unpack_nibbles(data), MXFP4_BLOCK)), scales[:, :, None]))


class _Codec(NamedTuple):
    encode: Callable[[jax.Array, VectorFormat], tuple[jax.Array, jax.Array]]
    decode: Callable[[jax.Array, jax.Array, VectorFormat], jax.Array]


_CODECS = {
    "fp8": _Codec(_encode_fp8, _decode_fp8),
    "fp8_ds_mla": _Codec(_encode_fp8_ds_mla, _decode_fp8_ds_mla),
    "fp8_pow2": _Codec(_encode_fp8_pow2, _decode_fp8_pow2),
    "nvfp4": _Codec(_encode_nvfp4, _decode_nvfp4),
    "nvfp4_static": _Codec(_encode_nvfp4_static, _decode_nvfp4_static),
    "mxfp4": _Codec(_encode_mxfp4, _decode_mxfp4),
}
