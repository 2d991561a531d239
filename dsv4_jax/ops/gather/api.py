"""gather_entries, gather_all_entries, gather_window: stored rows, dequantized and dense.

Each takes the whole plan of the step: slices of it would reach a kernel as copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    Implementation,
    OperandError,
    check,
    check_count,
    check_dtype,
    check_implementation,
    check_plan,
    check_pool,
    check_ratio,
    check_window,
    format_attributes,
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.gather import reference
from dsv4_jax.ops.operands import Rows
from dsv4_jax.spec.kinds import BLOCK_TOKENS

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

_ROWS = "values row_positions valid"
_GATHER_ENTRIES = signature(
    "gather_entries",
    "pool block_table plan indices layer",
    f"pool {_ROWS}",
    "tokens requests ratio codec global_scale",
)
_GATHER_ALL_ENTRIES = signature(
    "gather_all_entries",
    "pool block_table plan layer",
    f"pool {_ROWS}",
    "tokens requests ratio codec global_scale",
)
_GATHER_WINDOW = signature(
    "gather_window",
    "window positions plan layer",
    f"window positions {_ROWS}",
    "tokens requests before codec global_scale",
)


def gather_entries(
    pool: jax.Array,
    block_table: Int32[Array, "slots max_blocks"],
    plan: StepPlan,
    indices: Int32[Array, "tokens count"],
    layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[jax.Array, Rows]:
    """Reads chosen entries (or indexer keys) of each token's request.

    Args:
      pool: [layers, blocks, *page(128 / ratio)] of `format`.
      block_table: int32 [slots, max_blocks].
      plan: the step; a token at position p sees the entries below ``(p + 1) // ratio``, padding sees none.
      indices: int32 [tokens, count]; an index below 0, not yet visible to the token, or without a block gives zeros
        and is invalid.
      layer: index of the layer among those of its kind; out of range: no row is valid.
      ratio: 4 (CSA) or 128 (HCA).
      format: how rows are stored.
      dtype: of the values, bfloat16 or float32.
      implementation: who runs it.

    Returns:
      pool, unchanged (reads thread the pool), and Rows [tokens, count]; positions are ``ratio * entry``.

    Raises:
      OperandError: an operand does not fit, or `dtype` is another.
    """
    op = "gather_entries"
    check(op, "indices", indices, (plan.layout.tokens, None), jnp.int32)
    ratio, dtype = _check_pool(op, pool, block_table, plan, ratio, format, dtype, implementation)
    given = untransformed(op, (pool, block_table, plan, indices, take_layer(layer)))
    if implementation == "reference":
        return reference.gather_entries(*given, ratio=ratio, format=format, dtype=dtype)
    pool, block_table, plan, indices, layer = given
    operands = {"pool": pool, "block_table": block_table, "plan": plan.packed, "indices": indices, "layer": layer}
    made = _rows(jnp.shape(indices), format, dtype)
    attributes = plan_attributes(plan) | format_attributes(format)
    pool, *rows = call(_GATHER_ENTRIES, operands, results=made, ratio=ratio, **attributes)
    return pool, Rows(*rows)


def gather_all_entries(
    pool: jax.Array,
    block_table: Int32[Array, "slots max_blocks"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    entries: int,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[jax.Array, Rows]:
    """Reads entries 0 .. entries - 1 of each request, Rows [requests, entries].

    Valid are those that the request's last token of the step sees; the other arguments are ``gather_entries``'s.
    """
    op = "gather_all_entries"
    ratio, dtype = _check_pool(op, pool, block_table, plan, ratio, format, dtype, implementation)
    entries = check_count(op, "entries", entries)
    given = untransformed(op, (pool, block_table, plan, take_layer(layer)))
    if implementation == "reference":
        return reference.gather_all_entries(*given, ratio=ratio, format=format, dtype=dtype, entries=entries)
    pool, block_table, plan, layer = given
    operands = {"pool": pool, "block_table": block_table, "plan": plan.packed, "layer": layer}
    made = _rows((plan.layout.requests, entries), format, dtype)
    attributes = plan_attributes(plan) | format_attributes(format)
    pool, *rows = call(_GATHER_ALL_ENTRIES, operands, results=made, ratio=ratio, **attributes)
    return pool, Rows(*rows)


def gather_window(
    window: jax.Array,
    positions: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    rows: int = 128,
    before: bool = False,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[jax.Array, jax.Array, Rows]:
    """Reads the `rows` newest window rows of each request, oldest first.

    Args:
      window: [layers, slots, *page(ring)] of `format`.
      positions: int32 [layers, slots, ring], the position each ring row holds.
      plan: the step. Row j of a request holds position ``last - rows + 1 + j``, invalid where that is below 0 or not
        what the ring holds.
      layer: index of the layer; out of range: no row is valid.
      format: how rows are stored.
      rows: how many, at most the ring's.
      before: whether `last` is the position before the request's first token of the step, instead of that of its last
        token.
      dtype: of the values, bfloat16 or float32.
      implementation: who runs it.

    Returns:
      window and positions, unchanged (reads thread the pool), and Rows [requests, rows].

    Raises:
      OperandError: an operand does not fit, or `dtype` is another.
    """
    op = "gather_window"
    check_implementation(implementation)
    check_window(op, window, positions, format)
    check_plan(op, plan)
    rows, dtype = check_count(op, "rows", rows), check_dtype(op, dtype)
    ring = jnp.shape(positions)[2]
    if rows > ring:
        raise OperandError(f"{op}: {rows} rows asked of a ring of {ring}.")
    given = untransformed(op, (window, positions, plan, take_layer(layer)))
    if implementation == "reference":
        return reference.gather_window(*given, format=format, dtype=dtype, rows=rows, before=bool(before))
    window, positions, plan, layer = given
    operands = {"window": window, "positions": positions, "plan": plan.packed, "layer": layer}
    made = _rows((plan.layout.requests, rows), format, dtype)
    attributes = plan_attributes(plan) | format_attributes(format)
    window, positions, *read = call(_GATHER_WINDOW, operands, results=made, before=bool(before), **attributes)
    return window, positions, Rows(*read)


def _check_pool(
    op: str,
    pool: Any,
    block_table: Any,
    plan: StepPlan,
    ratio: Any,
    format: VectorFormat,
    dtype: Any,
    implementation: Any,
) -> tuple[int, Any]:
    """Checks what both gathers of entries take; the ratio and the dtype as they are used."""
    check_implementation(implementation)
    ratio = check_ratio(op, ratio)
    check_pool(op, "pool", pool, BLOCK_TOKENS // ratio, format)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    check_plan(op, plan)
    return ratio, check_dtype(op, dtype)


def _rows(shape: tuple[int, ...], format: VectorFormat, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {
        "values": ((*shape, format.width), dtype),
        "row_positions": (shape, jnp.int32),
        "valid": (shape, jnp.bool_),
    }
