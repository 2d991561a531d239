"""Which stored rows hold a NaN, told from their bytes: no format is decoded and no float made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv4_jax.arithmetic.scalars import numbers_in
from dsv4_jax.layout.formats import Numbers, VectorFormat

_INFINITY: dict[Any, Any] = {
    jnp.dtype(jnp.float32): np.uint32(0xFF00_0000),
    jnp.dtype(jnp.bfloat16): np.uint16(0xFF00),
}
"""The bits of a float's infinity, the sign shifted out: what is larger is a NaN."""


def is_nan(x: jax.Array) -> jax.Array:
    """Which fp32 or bf16 numbers are NaN, whatever arithmetic makes of those; bool of x's shape."""
    infinity = _INFINITY[x.dtype]
    return lax.bitcast_convert_type(x, infinity.dtype) << 1 > infinity


def rows_with_nan(pages: jax.Array, rows: int, vector_format: VectorFormat) -> jax.Array:
    """Which rows hold a NaN: a channel, a code or a scale.

    Args:
      pages: [n, *page], of a pool in that format.
      rows: of a page.
      vector_format: how rows are stored.

    Returns:
      bool [n, rows].
    """
    if not vector_format.quantized:
        return is_nan(pages).any(axis=-1)
    found = jnp.zeros((pages.shape[0], rows), bool)
    for numbers, stored in _parts(pages, rows, vector_format):
        found |= _codes_with_nan(stored, numbers.dtype).any(axis=-1)
    return found


def _parts(pages: jax.Array, rows: int, vector_format: VectorFormat) -> Iterator[tuple[Numbers, jax.Array]]:
    """The numbers that every row has, and the bytes of each, uint8 [n, rows, bytes]."""
    start = 0
    for size, runs in (
        (vector_format.data_bytes, vector_format.data),
        (vector_format.scale_bytes, vector_format.scales),
    ):
        stored, at = pages[:, start : start + rows * size].reshape(-1, rows, size), 0
        for numbers in runs:
            yield numbers, stored[:, :, at : at + numbers.bytes]
            at += numbers.bytes
        start += rows * size


def _codes_with_nan(stored: jax.Array, dtype: str) -> jax.Array:
    match dtype:
        case "float8_e4m3fn":
            return stored & 0x7F == 0x7F
        case "float8_e8m0fnu":
            return stored == 0xFF
        case "float4_e2m1fn":  # has none
            return jnp.zeros_like(stored, bool)
        case _:
            return is_nan(numbers_in(stored, jnp.dtype(dtype)))
