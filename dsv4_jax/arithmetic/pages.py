"""Rows in pages, pages in pools: where `codecs.py`'s bytes lie, and reading and writing single rows.

A pool is [layers, pages, *page]. A page of a quantized format is bytes: the data of every row, then the scales of every
row, then padding that stays zero. A page of an unquantized format is [rows, width].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.arithmetic.codecs import decode, encode
from dsv4_jax.arithmetic.scalars import bits_of, to_bfloat16, to_float32
from dsv4_jax.layout.formats import VectorFormat


def in_range(index: jax.Array | int, size: int) -> jax.Array:
    """Whether an index lies in [0, size)."""
    return (jnp.asarray(index) >= 0) & (jnp.asarray(index) < size)


def cast(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """fp32 or bf16 numbers as fp32 or bf16, by this package's rounding.

    Raises:
      TypeError: dtype is neither.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"rows are float32 or bfloat16, not {jnp.dtype(dtype)}.")
    values = to_float32(rows)
    return to_bfloat16(values) if dtype == jnp.bfloat16 else values


def write_rows(
    pool: jax.Array,
    rows: jax.Array,
    valid: jax.Array,
    layer: jax.Array | int,
    page: jax.Array,
    row: jax.Array,
    *,
    rows_per_page: int,
    vector_format: VectorFormat,
) -> jax.Array:
    """The pool with rows stored at pool[layer, page], place `row` of the page.

    Args:
      pool: [layers, pages, *page shape].
      rows: fp32 or bf16 [N, width].
      valid: bool [N]; nothing is written for the others, nor where layer or page is out of range.
      layer: int32 scalar.
      page: int32 [N].
      row: int32 [N], in [0, rows_per_page).
      rows_per_page: how many rows a page holds.
      vector_format: how rows are stored.

    Returns:
      The pool.
    """
    layers, pages = pool.shape[:2]
    valid = valid & in_range(layer, layers) & in_range(page, pages)
    page = jnp.where(valid, page, pages)  # past the end and dropped; a negative index would wrap
    if not vector_format.quantized:
        bits = bf16_as_bits(pool).at[layer, page, row].set(bf16_as_bits(cast(rows, vector_format.dtype)), mode="drop")
        return lax.bitcast_convert_type(bits, pool.dtype)
    stored = encode(to_float32(rows), vector_format)
    for part, at in zip(stored, _offsets(row, rows_per_page, vector_format), strict=True):
        pool = pool.at[layer, page[:, None], at[:, None] + jnp.arange(part.shape[1], dtype=jnp.int32)[None]].set(
            part, mode="drop"
        )
    return pool


def read_rows(
    pool: jax.Array,
    valid: jax.Array,
    layer: jax.Array | int,
    page: jax.Array,
    row: jax.Array,
    *,
    rows_per_page: int,
    vector_format: VectorFormat,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Rows stored at pool[layer, page], place `row` of the page; arguments as in `write_rows`.

    Returns:
      Rows [N, width] of dtype, zero where there is none, and bool [N], whether there is one.
    """
    layers, pages = pool.shape[:2]
    valid = valid & in_range(layer, layers) & in_range(page, pages)
    layer, page, row = (jnp.where(valid, jnp.asarray(index, jnp.int32), 0) for index in (layer, page, row))
    if not vector_format.quantized:
        rows = cast(pool[layer, page, row], dtype)
    else:
        stored = read_stored(pool, layer, page, row, rows_per_page=rows_per_page, vector_format=vector_format)
        rows = cast(decode(stored[0], stored[1], vector_format), dtype)
    return jnp.where(valid[:, None], rows, 0), valid


def read_stored(
    pool: jax.Array,
    layer: jax.Array | int,
    page: jax.Array,
    row: jax.Array,
    *,
    rows_per_page: int,
    vector_format: VectorFormat,
) -> tuple[jax.Array, ...]:
    """Rows as they are stored at pool[layer, page], place `row` of the page; the caller keeps all indices in range.

    Returns:
      For a quantized format the rows' data, uint8 [N, data_bytes], and scales, uint8 [N, scale_bytes]; for another the
      rows, [N, width].
    """
    if not vector_format.quantized:
        return (bf16_as_bits(pool)[layer, page, row],)
    data_at, scales_at = _offsets(row, rows_per_page, vector_format)
    layer = jnp.broadcast_to(jnp.asarray(layer, jnp.int32), row.shape)
    data = _read_bytes(pool, layer, page, data_at, vector_format.data_bytes)
    return data, _read_bytes(pool, layer, page, scales_at, vector_format.scale_bytes)


def page_of(stored: tuple[jax.Array, ...], vector_format: VectorFormat) -> jax.Array:
    """One page of rows as `read_stored` gives them; padding is zero."""
    if not vector_format.quantized:
        (rows,) = stored
        return lax.bitcast_convert_type(rows, vector_format.dtype)
    (count,) = {len(part) for part in stored}
    page = jnp.concatenate([part.ravel() for part in stored])
    return jnp.pad(page, (0, vector_format.page_bytes(count) - len(page)))


def bf16_as_bits(x: jax.Array) -> jax.Array:
    """bf16 as uint16, all else as it is: XLA's CPU scatters and slices bf16 by way of fp32, the whole pool there and
    back, and changes NaNs.
    """
    return bits_of(x) if x.dtype == jnp.bfloat16 else x


def _offsets(row: jax.Array, rows_per_page: int, vector_format: VectorFormat) -> tuple[jax.Array, jax.Array]:
    """Where in its page a row's data and its scales begin."""
    return vector_format.data_bytes * row, vector_format.data_bytes * rows_per_page + vector_format.scale_bytes * row


def _read_bytes(pool: jax.Array, layer: jax.Array, page: jax.Array, start: jax.Array, count: int) -> jax.Array:
    def read(layer: jax.Array, page: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_slice(pool, (layer, page, start), (1, 1, count))[0, 0]

    # One width of index, whatever jax_enable_x64 made of each.
    return jax.vmap(read)(*(jnp.asarray(index, jnp.int32) for index in (layer, page, start)))
