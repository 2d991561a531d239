"""One number in and out of its stored form: bfloat16, E4M3, E2M1, power-of-two scales, and the division before them.

All of it works on the bits of fp32 numbers, because compilers may change floating-point arithmetic and must not change
stored bytes. XLA rewrites a division by a constant or by a broadcast scale into a multiplication by the reciprocal,
which gives other codes; its GPU division is off by up to 2 units in the last place; its CPU arithmetic takes subnormal
numbers for zero; and casts to FP8 turn what is above the largest finite value into NaN. None of that happens to
integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

E4M3_MAX = 448.0
E2M1_MAX = 6.0

_SIGN = np.uint32(0x8000_0000)
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)
_FLOAT_MAX = np.uint32(0x7F7F_FFFF)
_QUIET_NAN = np.uint32(0x7FC0_0000)
_HIDDEN_BIT = 1 << 23
_E4M3_NAN = 0x7F
_E4M3_REBIAS = (127 - 7) << 3


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of numbers, as unsigned integers of their size: moving a float may change a NaN's."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def float_of(bits: jax.Array) -> jax.Array:
    """The fp32 numbers with these bits (any unsigned integers)."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


def bytes_of(x: jax.Array) -> jax.Array:
    """The bytes of numbers, little end first: [..., n] of k bytes each -> uint8 [..., n k]."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def numbers_in(data: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `bytes_of`: uint8 [..., n k] -> [..., n] of dtype."""
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, size), dtype)


def to_float32(x: jax.Array) -> jax.Array:
    """fp32 or bf16 numbers as fp32, exactly."""
    if x.dtype == jnp.float32:
        return jnp.asarray(x)
    return float_of(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16)


def to_bfloat16(x: jax.Array) -> jax.Array:
    """fp32 to bf16: to the nearest, ties to even; a NaN keeps its sign and upper payload and becomes quiet."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = jnp.where(_is_nan(bits), (bits >> 16) | 0x40, rounded)
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)


def amax(x: jax.Array) -> jax.Array:
    """The largest magnitude along the last axis; NaN is ignored, infinity counts as the largest finite number.

    Args:
      x: fp32 [..., n].

    Returns:
      fp32 [..., 1]; 0 if all are NaN.
    """
    size = bits_of(x) & _MAGNITUDE  # magnitudes order as their bits do
    size = jnp.where(_is_nan(size), 0, size)
    return float_of(jnp.minimum(jnp.max(size, axis=-1, keepdims=True), _FLOAT_MAX))


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """The quotient x / y in fp32, correctly rounded (ties to even), by long division of the 24-bit significands.

    Args:
      x: fp32, any shape. Infinity stays infinity, NaN becomes the quiet NaN, zeros keep their sign.
      y: fp32 broadcastable to x, positive, normal and finite: a scale.

    Returns:
      fp32 of x's shape; a quotient below 2^-126, which every format here stores as zero, is a zero with x's sign.
    """
    bits = bits_of(x)
    sign, size = bits & _SIGN, bits & _MAGNITUDE
    exponent, dividend = _normalized(size)
    divisor_exponent, divisor = _normalized(bits_of(jnp.broadcast_to(jnp.asarray(y, jnp.float32), x.shape)))

    below_one = dividend < divisor
    exponent = exponent - divisor_exponent - below_one.astype(jnp.int32) + 127
    remainder = jnp.where(below_one, 2 * dividend, dividend) - divisor
    quotient = jnp.ones_like(size)  # 1 and 24 fractional bits, 8 at a time: one more than fp32 keeps
    for _ in range(3):
        remainder = remainder << 8
        quotient = quotient << 8 | remainder // divisor
        remainder = remainder % divisor
    is_tie_or_above, is_odd, is_above = quotient & 1, quotient >> 1 & 1, (remainder != 0).astype(jnp.uint32)
    significand = (quotient >> 1) + (is_tie_or_above & (is_odd | is_above))

    # Adding the significand with its leading 1 carries a round-up into the exponent, which is therefore one less.
    result = (jnp.maximum(exponent - 1, 0).astype(jnp.uint32) << 23) + significand
    result = jnp.where((exponent < 1) | (size == 0), 0, result)
    result = jnp.where((exponent > 254) | (size == _INFINITY), _INFINITY, jnp.minimum(result, _INFINITY))
    return float_of(jnp.where(_is_nan(size), _QUIET_NAN, sign | result))


def times_power_of_two(x: jax.Array, exponent_byte: jax.Array) -> jax.Array:
    """The product x times 2^(exponent_byte - 127), exactly, for E2M1 values x (whose significands have at most 2 bits).

    Multiplying would lose 0.5 x 2^-126, a subnormal number, where arithmetic takes those for zero.
    """
    bits = bits_of(x)
    sign, size = bits & _SIGN, bits & _MAGNITUDE
    exponent = (size >> 23).astype(jnp.int32) + exponent_byte.astype(jnp.int32) - 127
    normal = (jnp.maximum(exponent, 0).astype(jnp.uint32) << 23) | (size & (_HIDDEN_BIT - 1))
    subnormal = (size & (_HIDDEN_BIT - 1) | _HIDDEN_BIT) >> jnp.clip(1 - exponent, 0, 31).astype(jnp.uint32)
    result = jnp.where(exponent < 1, subnormal, jnp.where(exponent > 254, _INFINITY, normal))
    return float_of(sign | jnp.where(size == 0, 0, result))


def e4m3_codes(x: jax.Array) -> jax.Array:
    """fp32 to E4M3FN codes (uint8): to the nearest, ties to even, saturating at +-448; NaN becomes 0x7F."""
    bits = bits_of(x)
    sign, size = bits >> 24 & 0x80, bits & _MAGNITUDE
    clipped = jnp.minimum(size, bits_of(jnp.float32(E4M3_MAX)))
    # Normal: round the significand to 3 bits in place. Below 2^-6 the codes count multiples of 2^-9.
    normal = ((clipped + 0x7FFFF + (clipped >> 20 & 1)) >> 20) - _E4M3_REBIAS
    subnormal = jnp.round(float_of(clipped) * 2.0**9).astype(jnp.uint32)
    code = jnp.where(clipped < bits_of(jnp.float32(2.0**-6)), subnormal, normal)
    return jnp.where(_is_nan(size), _E4M3_NAN, sign | code).astype(jnp.uint8)


def e4m3_values(codes: jax.Array) -> jax.Array:
    """E4M3FN codes (uint8) to fp32."""
    codes = codes.astype(jnp.uint32)
    sign, size = (codes & 0x80) << 24, codes & 0x7F
    value = jnp.where(size < 8, bits_of(size.astype(jnp.float32) * 2.0**-9), (size + _E4M3_REBIAS) << 20)
    return float_of(jnp.where(size == _E4M3_NAN, _QUIET_NAN, sign | value))


def e2m1_codes(x: jax.Array) -> jax.Array:
    """fp32 to E2M1 codes 0..15 (uint8) for 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign bit that zero has too.

    To the nearest, ties to the even code, saturating at +-6; NaN becomes +6.
    """
    bits = bits_of(x)
    size = float_of(bits & _MAGNITUDE)
    steps = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0)
    code = sum(step.astype(jnp.uint32) for step in steps)  # even codes win ties
    return jnp.where(_is_nan(bits), 7, code | bits >> 28 & 8).astype(jnp.uint8)


def e2m1_values(codes: jax.Array) -> jax.Array:
    """E2M1 codes 0..15 to fp32."""
    codes = codes.astype(jnp.uint32)
    sign, size = (codes & 8) << 28, codes & 7
    half_or_zero = jnp.where(size == 1, bits_of(jnp.float32(0.5)), 0)
    return float_of(sign | jnp.where(size < 2, half_or_zero, (size << 22) + (126 << 23)))


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """4-bit codes [..., n] to bytes [..., n / 2]: the even element is the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(data: jax.Array) -> jax.Array:
    """The inverse of `pack_nibbles`."""
    return jnp.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def ceil_exponent(x: jax.Array) -> jax.Array:
    """The UE8M0 byte of 2^ceil(log2 x), the smallest power of two not below x; x fp32, positive and normal."""
    bits = bits_of(x)
    return ((bits >> 23) + (bits & (_HIDDEN_BIT - 1) != 0).astype(jnp.uint32)).astype(jnp.uint8)


def power_of_two(exponent_byte: jax.Array) -> jax.Array:
    """The fp32 value 2^(byte - 127) of a UE8M0 byte from 1 to 254."""
    return float_of(exponent_byte.astype(jnp.uint32) << 23)


def _is_nan(bits: jax.Array) -> jax.Array:
    return bits & _MAGNITUDE > _INFINITY


def _normalized(size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A magnitude's biased exponent (int32, down to -22 for subnormals) and its 24-bit significand (uint32)."""
    exponent, fraction = (size >> 23).astype(jnp.int32), size & (_HIDDEN_BIT - 1)
    shift = lax.clz(jnp.maximum(fraction, 1)) - 8
    subnormal = exponent == 0
    return (
        jnp.where(subnormal, 1 - shift.astype(jnp.int32), exponent),
        jnp.where(subnormal, fraction << shift, fraction | _HIDDEN_BIT),
    )
