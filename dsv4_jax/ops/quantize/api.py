"""quantize and dequantize: rows to a page of stored bytes and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.native.call import FLOATING, call, check, format_attributes, struct


def quantize(rows: jax.Array, *, format: VectorFormat) -> jax.Array:
    """Stores rows as one page of `format`.

    NaN is ignored by every amax and stored as the format's NaN where it has one, as +6 in E2M1; an infinity counts as
    the largest float32 and saturates.

    Args:
      rows: [count, width] float32 or bfloat16.
      format: how rows are stored.

    Returns:
      The page, ``format.page_shape(count)`` of ``format.dtype``.
    """
    op = "quantize"
    check(op, "rows", rows, (None, format.width), *FLOATING)
    page = struct(format.page_shape(rows.shape[0]), format.dtype)
    (page,) = call(op, (rows,), in_place=0, results=[page], **format_attributes(format))
    return page


def dequantize(page: jax.Array, *, format: VectorFormat, rows: int, dtype: Any = jnp.float32) -> jax.Array:
    """Reads a page of `rows` rows; the inverse of ``quantize``.

    Args:
      page: ``format.page_shape(rows)`` of ``format.dtype``.
      format: how rows are stored.
      rows: how many the page holds.
      dtype: of the result, float32 or bfloat16.

    Returns:
      [rows, width] of `dtype`.
    """
    op = "dequantize"
    check(op, "page", page, format.page_shape(rows), format.dtype)
    (values,) = call(
        op, (page,), in_place=0, results=[struct((rows, format.width), dtype)], **format_attributes(format)
    )
    return values
