"""gather_entries, gather_all_entries, gather_window: stored rows, dequantized and dense."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.native.call import (
    FLOATING,
    OperandError,
    call,
    check,
    check_pool,
    format_attributes,
    layer_operand,
    struct,
)
from dsv4_jax.ops.operands import Rows
from dsv4_jax.spec.kinds import BLOCK_TOKENS


def gather_entries(
    pool: jax.Array,
    block_table: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    indices: jax.Array,
    layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, Rows]:
    """Reads chosen entries of each query's slot.

    Args:
      pool: [layers, blocks, *page(128 / ratio)] of `format`.
      block_table: int32 [slots, max_blocks].
      slots: int32 [queries]; below 0 or out of range: every row of that query is invalid.
      counts: int32 [queries], how many entries of its slot a query may see.
      indices: int32 [queries, count]; an index below 0 or not below ``counts`` gives zeros and is invalid.
      layer: index of the layer among those of its kind.
      ratio: 4 (CSA) or 128 (HCA).
      format: how rows are stored.
      dtype: of the values, bfloat16 or float32.

    Returns:
      pool, unchanged (reads thread the pool), and Rows [queries, count]; positions are ``ratio * entry``.
    """
    op = "gather_entries"
    check(op, "indices", indices, (jnp.shape(slots)[0], None), jnp.int32)
    operands = (pool, block_table, slots, counts, indices, layer_operand(layer))
    return _gather(op, operands, indices.shape[1], ratio, format, dtype)


def gather_all_entries(
    pool: jax.Array,
    block_table: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    entries: int,
    dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, Rows]:
    """Reads entries 0 .. entries - 1 of each query's slot; see ``gather_entries``."""
    op = "gather_all_entries"
    return _gather(op, (pool, block_table, slots, counts, layer_operand(layer)), entries, ratio, format, dtype)


def _gather(
    op: str, operands: tuple[jax.Array, ...], count: int, ratio: int, format: VectorFormat, dtype: Any
) -> tuple[jax.Array, Rows]:
    pool, block_table, slots, counts = operands[:4]
    check_pool(op, "pool", pool, BLOCK_TOKENS // ratio, format)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check(op, "slots", slots, (None,), jnp.int32)
    check(op, "counts", counts, slots.shape, jnp.int32)
    results = _row_structs(op, slots.shape[0], count, format.width, dtype)
    pool, *rows = call(op, operands, in_place=1, results=results, ratio=ratio, **format_attributes(format))
    return pool, Rows(*rows)


def gather_window(
    window: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    last: jax.Array,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    dtype: Any = jnp.bfloat16,
    rows: int = 128,
) -> tuple[jax.Array, jax.Array, Rows]:
    """Reads the `rows` window rows that end at a position, oldest first.

    Args:
      window: [layers, slots, *page(ring)] of `format`.
      positions: int32 [layers, slots, ring], the position each ring row holds.
      slots: int32 [queries]; below 0 or out of range: every row of that query is invalid.
      last: int32 [queries]; row j of a query holds position ``last - rows + 1 + j``, invalid where that is below 0 or
        not what the ring holds.
      layer: index of the layer.
      format: how rows are stored.
      dtype: of the values, bfloat16 or float32.
      rows: how many, at most the ring's.

    Returns:
      window and positions, unchanged (reads thread the pool), and Rows [queries, rows].
    """
    op = "gather_window"
    check(op, "positions", positions, (*window.shape[:2], None), jnp.int32)
    check_pool(op, "window", window, positions.shape[2], format)
    check(op, "slots", slots, (None,), jnp.int32)
    check(op, "last", last, slots.shape, jnp.int32)
    if rows > positions.shape[2]:
        raise OperandError(f"{op}: {rows} rows asked of a ring of {positions.shape[2]}.")
    operands = (window, positions, slots, last, layer_operand(layer))
    results = _row_structs(op, slots.shape[0], rows, format.width, dtype)
    window, positions, *out = call(op, operands, in_place=2, results=results, **format_attributes(format))
    return window, positions, Rows(*out)


def _row_structs(op: str, queries: int, count: int, width: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    if jnp.dtype(dtype) not in [jnp.dtype(allowed) for allowed in FLOATING]:
        raise OperandError(f"{op}: dtype is {jnp.dtype(dtype).name}, expected float32 or bfloat16.")
    shape = (queries, count)
    return [struct((*shape, width), dtype), struct(shape, jnp.int32), struct(shape, jnp.bool_)]
