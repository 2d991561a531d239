"""attend_window, attend_entries, attend_all_entries: softmax attention over rows where they are stored.

Keys and values are the same rows: a token's sliding window, and compressed entries behind it. Where the window's or the
entries' format is ``fp32``, and on the CPU, everything is in float32. Hopper's tensor cores take every other pair of
formats: they multiply queries and softmax weights that are rounded to bfloat16, and add in float32. On other GPUs that
is so for ``bf16`` and ``fp8_ds_mla``, and the rest is in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import Signature, signature
from dsv4_jax.ops.attend import reference
from dsv4_jax.ops.attend.operands import Attended, Displaced, EntryRows, WindowRows
from dsv4_jax.ops.checks import (
    FLOATING,
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
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.operands import Window
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, ROPE_DIM
from dsv4_jax.spec.rotary import Rotary

_WINDOW = "window positions displaced displaced_positions"
_QUERIES = "queries sinks cos sin plan layer"
_RESULTS = "output lse part_rows part_shares"
_ATTEND_WINDOW = signature(
    "attend_window",
    f"{_WINDOW} {_QUERIES}",
    f"window positions {_RESULTS}",
    "tokens requests size scale window_codec",
)
_ATTEND_ENTRIES = signature(
    "attend_entries",
    f"{_WINDOW} entries block_table indices {_QUERIES} kind_layer",
    f"window positions entries {_RESULTS}",
    "tokens requests size ratio scale window_codec entry_codec entry_global_scale",
)
_ATTEND_ALL_ENTRIES = signature(
    "attend_all_entries",
    f"{_WINDOW} entries block_table {_QUERIES} kind_layer",
    f"window positions entries {_RESULTS}",
    "tokens requests size ratio count scale window_codec entry_codec entry_global_scale",
)

# How kernels for Hopper share a token: tiles of rows for 64 heads, blocks of a cluster, clusters that run at once.
_TILE_ROWS, _TILE_HEADS, _CLUSTER, _CLUSTERS = 64, 64, 16, 7


def attend_window(
    window: Window,
    queries: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    size: int = 128,
    displaced: Displaced | None = None,
    sinks: jax.Array | None = None,
    rotary: Rotary | None = None,
    scale: float = HEAD_DIM**-0.5,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[Window, Attended]:
    """Attention of each token over its sliding window, itself included; its row is stored before.

    Args:
      window: [layers, slots, *page(ring)] of `format` and positions int32 [layers, slots, ring]. A token at position t
        sees the rows that hold positions ``t - size + 1`` to ``t``; what the ring does not hold, it does not see.
      queries: float32 or bfloat16 [tokens, heads, 512], rotated.
      plan: the step; padding sees nothing.
      layer: index of the layer; out of range: no row is seen.
      format: how rows are stored.
      size: of the window, at most the ring's.
      displaced: rows that the ring has lost in this step and that its tokens still see; None: there are none.
      sinks: [heads] float32 or bfloat16; each adds exp(sink) to its head's denominator once. None: nothing is added.
      rotary: of the tokens; the trailing 64 channels of the output are rotated back by it. None: they are not.
      scale: of the logits.
      dtype: of the output, bfloat16 or float32.
      implementation: who runs it.

    Returns:
      window, unchanged (reads thread the pool), and Attended [tokens, heads, ...].

    Raises:
      OperandError: an operand does not fit, or it is differentiated or mapped.
    """
    op = "attend_window"
    size, dtype, scale = _check(op, window, queries, plan, format, size, displaced, sinks, rotary, scale, dtype,
                                implementation)  # fmt: skip
    given = untransformed(op, (window, displaced, queries, plan, sinks, rotary, take_layer(layer)))
    window, displaced, queries, plan, sinks, rotary, layer = jax.tree.map(jnp.asarray, given)
    if implementation == "reference":
        rows = WindowRows(*window, layer, format, size, displaced)
        return window, reference.attend(rows, None, queries, plan, sinks=sinks, rotary=rotary, scale=scale, dtype=dtype)
    operands = _operands(window, displaced, queries, plan, sinks, rotary, layer)
    made = _results(queries, size, 0, dtype)
    attributes = plan_attributes(plan) | {"size": size, "scale": scale, "window_codec": format.codec}
    stored, positions, output, lse, *_ = call(_ATTEND_WINDOW, operands, results=made, **attributes)
    return Window(stored, positions), Attended(output, lse)


def attend_entries(
    window: Window,
    pool: jax.Array,
    block_table: jax.Array,
    queries: jax.Array,
    indices: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    ratio: int,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    size: int = 128,
    displaced: Displaced | None = None,
    sinks: jax.Array | None = None,
    rotary: Rotary | None = None,
    scale: float = HEAD_DIM**-0.5,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[Window, jax.Array, Attended]:
    """Attention of each token over its sliding window and chosen entries.

    Args:
      window: as ``attend_window`` takes it.
      pool: [layers, blocks, *page(128 / ratio)] of `entry_format`.
      block_table: int32 [slots, max_blocks].
      queries: float32 or bfloat16 [tokens, heads, 512], rotated.
      indices: int32 [tokens, count], each token's entries in any order. Below 0, or not below ``(t + 1) // ratio`` for
        a token at position t: none. Twice: it counts twice.
      plan: the step; padding sees nothing.
      layer: index of the layer; out of range: no window row is seen.
      kind_layer: index of the layer among those of its kind; out of range: no entry is seen.
      ratio: 4 (CSA) or 128 (HCA).
      window_format: how window rows are stored.
      entry_format: how entries are stored.
      size: of the window, at most the ring's.
      displaced: as ``attend_window`` takes it, and so are the rest.
      sinks: [heads], or None.
      rotary: of the tokens, or None.
      scale: of the logits.
      dtype: of the output, bfloat16 or float32.
      implementation: who runs it.

    Returns:
      window and pool, unchanged, and Attended [tokens, heads, ...].

    Raises:
      OperandError: an operand does not fit, or it is differentiated or mapped.
    """
    op = "attend_entries"
    check(op, "indices", indices, (plan.layout.tokens, None), jnp.int32)
    return _attend_entries(
        op, window, pool, block_table, queries, indices, jnp.shape(indices)[1], plan, layer, kind_layer, ratio,
        window_format, entry_format, size, displaced, sinks, rotary, scale, dtype, implementation,
    )  # fmt: skip


def attend_all_entries(
    window: Window,
    pool: jax.Array,
    block_table: jax.Array,
    queries: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    ratio: int,
    entries: int,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    size: int = 128,
    displaced: Displaced | None = None,
    sinks: jax.Array | None = None,
    rotary: Rotary | None = None,
    scale: float = HEAD_DIM**-0.5,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[Window, jax.Array, Attended]:
    """Attention of each token over its sliding window and every entry that it sees, of the first `entries`.

    What is not said is ``attend_entries``'s.
    """
    op = "attend_all_entries"
    entries = check_count(op, "entries", entries)
    return _attend_entries(
        op, window, pool, block_table, queries, None, entries, plan, layer, kind_layer, ratio,
        window_format, entry_format, size, displaced, sinks, rotary, scale, dtype, implementation,
    )  # fmt: skip


def _attend_entries(
    op: str,
    window: Window,
    pool: jax.Array,
    block_table: jax.Array,
    queries: jax.Array,
    indices: jax.Array | None,
    count: int,
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    ratio: int,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    size: int,
    displaced: Displaced | None,
    sinks: jax.Array | None,
    rotary: Rotary | None,
    scale: float,
    dtype: Any,
    implementation: Implementation,
) -> tuple[Window, jax.Array, Attended]:
    size, dtype, scale = _check(op, window, queries, plan, window_format, size, displaced, sinks, rotary, scale, dtype,
                                implementation)  # fmt: skip
    ratio = check_ratio(op, ratio)
    check_pool(op, "pool", pool, BLOCK_TOKENS // ratio, entry_format)
    check(op, "block_table", block_table, (None, None), jnp.int32)
    layers = take_layer(layer), take_layer(kind_layer)
    given = untransformed(op, (window, displaced, pool, block_table, indices, queries, plan, sinks, rotary, layers))
    given = jax.tree.map(jnp.asarray, given)
    window, displaced, pool, block_table, indices, queries, plan, sinks, rotary, (layer, kind_layer) = given
    if implementation == "reference":
        rows = WindowRows(*window, layer, window_format, size, displaced)
        entries = EntryRows(pool, block_table, kind_layer, ratio, entry_format, count, indices)
        attended = reference.attend(rows, entries, queries, plan, sinks=sinks, rotary=rotary, scale=scale, dtype=dtype)
        return window, pool, attended
    operands = _operands(window, displaced, queries, plan, sinks, rotary, layer)
    operands |= {"entries": pool, "block_table": block_table, "kind_layer": kind_layer}
    attributes = plan_attributes(plan) | {
        "size": size,
        "ratio": ratio,
        "scale": scale,
        "window_codec": window_format.codec,
        "entry_codec": entry_format.codec,
        "entry_global_scale": entry_format.global_scale,
    }
    which: Signature = _ATTEND_ENTRIES
    if indices is None:
        which, attributes = _ATTEND_ALL_ENTRIES, attributes | {"count": count}
    else:
        operands |= {"indices": indices}
    made = _results(queries, size, count, dtype)
    stored, positions, pool, output, lse, *_ = call(which, operands, results=made, **attributes)
    return Window(stored, positions), pool, Attended(output, lse)


def parts_of_token(tokens: int, heads: int, size: int, count: int) -> int:
    """In how many parts the rows of a token are attended to, merged afterwards: 1 unless tokens are few and rows many.

    One cluster takes a token's rows of 64 heads. Where that leaves most of an H200 idle and a cluster has more than two
    tiles for each of its blocks, several take parts of them.
    """
    tiles = -(-size // _TILE_ROWS) - (-count // _TILE_ROWS)
    clusters = tokens * -(-heads // _TILE_HEADS)
    return max(1, min(_CLUSTERS // clusters, tiles // _CLUSTER)) if tiles > 2 * _CLUSTER else 1


def _check(
    op: str,
    window: Window,
    queries: jax.Array,
    plan: StepPlan,
    format: VectorFormat,
    size: int,
    displaced: Displaced | None,
    sinks: jax.Array | None,
    rotary: Rotary | None,
    scale: float,
    dtype: Any,
    implementation: Implementation,
) -> tuple[int, Any, float]:
    """Checks all but entries; the window's size, the dtype and the scale as they are used."""
    check_implementation(implementation)
    check_window(op, window.window, window.positions, format)
    check_plan(op, plan)
    size, dtype = check_count(op, "size", size, smallest=1), check_dtype(op, dtype)
    ring, tokens = jnp.shape(window.positions)[2], plan.layout.tokens
    if size > ring:
        raise OperandError(f"{op}: a window of {size} asked of a ring of {ring}.")
    check(op, "queries", queries, (tokens, None, HEAD_DIM), *FLOATING)
    heads = jnp.shape(queries)[1]
    if heads == 0:
        raise OperandError(f"{op}: queries have no heads.")
    if displaced is not None:
        rows = (size - 1) * plan.layout.requests + tokens
        check(op, "displaced.positions", displaced.positions, (rows,), jnp.int32)
        check(op, "displaced.rows", displaced.rows, (1, 1, *format.page_shape(rows)), format.dtype)
    if sinks is not None:
        check(op, "sinks", sinks, (heads,), *FLOATING)
    if rotary is not None:
        check(op, "cos", rotary.cos, (tokens, ROPE_DIM // 2), jnp.float32)
        check(op, "sin", rotary.sin, (tokens, ROPE_DIM // 2), jnp.float32)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise OperandError(f"{op}: scale is {scale!r}, expected a number.")
    return size, dtype, float(scale)


def _operands(
    window: Window,
    displaced: Displaced | None,
    queries: jax.Array,
    plan: StepPlan,
    sinks: jax.Array | None,
    rotary: Rotary | None,
    layer: Any,
) -> dict[str, Any]:
    """Operands by name; what is not there has no elements."""

    def nothing(dtype: Any) -> jax.Array:
        return jnp.zeros(0, dtype)

    return {
        "window": window.window,
        "positions": window.positions,
        "displaced": nothing(window.window.dtype) if displaced is None else displaced.rows,
        "displaced_positions": nothing(jnp.int32) if displaced is None else displaced.positions,
        "queries": queries,
        "sinks": nothing(jnp.float32) if sinks is None else jnp.asarray(sinks, jnp.float32),
        "cos": nothing(jnp.float32) if rotary is None else rotary.cos,
        "sin": nothing(jnp.float32) if rotary is None else rotary.sin,
        "plan": plan.packed,
        "layer": layer,
    }


def _results(queries: jax.Array, size: int, count: int, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What is made: the output, its lse, and the workspace of parts, without elements where there is one."""
    tokens, heads, _ = jnp.shape(queries)
    parts = parts_of_token(tokens, heads, size, count)
    parts = 0 if parts == 1 else parts
    return {
        "output": ((tokens, heads, HEAD_DIM), dtype),
        "lse": ((tokens, heads), jnp.float32),
        "part_rows": ((parts, tokens, heads, HEAD_DIM), jnp.float32),
        "part_shares": ((parts, tokens, heads, 2), jnp.float32),
    }
