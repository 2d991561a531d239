"""quantize and dequantize: rows to a page of stored bytes and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    check,
    check_count,
    check_dtype,
    check_implementation,
    format_attributes,
    untransformed,
)
from dsv4_jax.ops.quantize import reference

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_QUANTIZE = signature("quantize", "rows", "page", "codec global_scale")
_DEQUANTIZE = signature("dequantize", "page", "rows", "codec global_scale")


def quantize(
    rows: Float[Array, "count width"], *, format: VectorFormat, implementation: Implementation = "native"
) -> jax.Array:
    """Stores rows as one page of `format`.

    NaN is ignored by every amax and stored as the format's NaN where it has one, as +6 in E2M1; an infinity counts as
    the largest float32 and saturates.

    Args:
      rows: [count, width] float32 or bfloat16.
      format: how rows are stored.
      implementation: who runs it.

    Returns:
      The page, ``format.page_shape(count)`` of ``format.dtype``; padding is zero.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "quantize"
    check_implementation(implementation)
    check(op, "rows", rows, (None, format.width), *FLOATING)
    rows = untransformed(op, rows)
    if implementation == "reference":
        return reference.quantize(rows, format=format)
    made = {"page": (format.page_shape(jnp.shape(rows)[0]), format.dtype)}
    (page,) = call(_QUANTIZE, {"rows": rows}, results=made, **format_attributes(format))
    return page


def dequantize(
    page: jax.Array,
    *,
    format: VectorFormat,
    rows: int,
    dtype: Any = jnp.float32,
    implementation: Implementation = "native",
) -> Float[Array, "rows width"]:
    """Reads a page of `rows` rows; the inverse of ``quantize``.

    Args:
      page: ``format.page_shape(rows)`` of ``format.dtype``.
      format: how rows are stored.
      rows: how many the page holds.
      dtype: of the result, float32 or bfloat16.
      implementation: who runs it.

    Returns:
      [rows, width] of `dtype`.

    Raises:
      OperandError: an operand does not fit, or `dtype` is another.
    """
    op = "dequantize"
    check_implementation(implementation)
    rows, dtype = check_count(op, "rows", rows), check_dtype(op, dtype)
    check(op, "page", page, format.page_shape(rows), format.dtype)
    page = untransformed(op, page)
    if implementation == "reference":
        return reference.dequantize(page, format=format, rows=rows, dtype=dtype)
    made = {"rows": ((rows, format.width), dtype)}
    (values,) = call(_DEQUANTIZE, {"page": page}, results=made, **format_attributes(format))
    return values
