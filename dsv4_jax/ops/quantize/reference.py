"""quantize and dequantize in jnp; ``quantize/api.py`` says what they do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import read_rows, write_rows
from dsv4_jax.layout.formats import VectorFormat


def quantize(rows: jax.Array, *, format: VectorFormat) -> jax.Array:
    """One page that holds these rows."""
    count = rows.shape[0]
    page = jnp.zeros((1, 1, *format.page_shape(count)), format.dtype)
    places = _places(count)
    return write_rows(page, rows, *places, rows_per_page=count, vector_format=format)[0, 0]


def dequantize(page: jax.Array, *, format: VectorFormat, rows: int, dtype: jnp.dtype) -> jax.Array:
    """The rows of a page."""
    places = _places(rows)
    return read_rows(page[None, None], *places, rows_per_page=rows, vector_format=format, dtype=dtype)[0]


def _places(count: int) -> tuple[jax.Array, int, jax.Array, jax.Array]:
    """Valid, layer, page and row of every row of a lone page."""
    return jnp.ones(count, bool), 0, jnp.zeros(count, jnp.int32), jnp.arange(count, dtype=jnp.int32)
