"""update_swa, update_csa, update_hca and normalize: all writes of one layer and step in one call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import (
    FLOATING,
    call,
    check,
    check_finish,
    check_plan,
    check_pool,
    check_projections,
    check_tail,
    layer_operand,
    plan_attributes,
    struct,
)
from dsv4_jax.ops.operands import Compressed, CompressorInputs, RawRows, Window
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM


def normalize(raw: RawRows, *, eps: float) -> jax.Array:
    """RMSNorm and RoPE of raw window rows: float32 [tokens, 512], what ``append_window`` and attention take."""
    rows, weight, (cos, sin) = raw
    op = "normalize"
    check(op, "rows", rows, (None, HEAD_DIM), *FLOATING)
    check_finish(op, weight, cos, sin, HEAD_DIM, jnp.shape(rows)[0])
    (finished,) = call(
        op, (rows, weight, cos, sin), in_place=0, results=[struct(rows.shape, jnp.float32)], eps=float(eps)
    )
    return finished


def update_swa(
    window: Window,
    rows: jax.Array | RawRows,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    eps: float,
) -> Window:
    """Stores a step's window rows; as ``append_window``, normalizing and rotating them first if they come raw."""
    op = "update_swa"
    operands = (*window, *_row_operands(op, window, rows, plan, format), layer_operand(layer))
    return Window(*call(op, operands, in_place=2, eps=float(eps), window_codec=format.codec, **plan_attributes(plan)))


def update_hca(
    window: Window,
    entries: Compressed,
    rows: jax.Array | RawRows,
    compressor: CompressorInputs,
    block_table: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    eps: float,
) -> tuple[Window, Compressed]:
    """All writes of an HCA layer and step; see ``update_csa``."""
    op = "update_hca"
    operands = (
        *window,
        *entries,
        *_row_operands(op, window, rows, plan, window_format),
        layer_operand(layer),
        layer_operand(kind_layer),
        _table(op, block_table),
        *_compressor_operands(op, entries, compressor, plan, 128, entry_format),
    )
    window_codec, entry_codec = window_format.codec, entry_format.codec
    attributes = {"window_codec": window_codec, "entry_codec": entry_codec, "global_scale": entry_format.global_scale}
    results = call(op, operands, in_place=4, eps=float(eps), **plan_attributes(plan), **attributes)
    return Window(*results[:2]), Compressed(*results[2:])


def update_csa(
    window: Window,
    entries: Compressed,
    keys: Compressed,
    rows: jax.Array | RawRows,
    compressor: CompressorInputs,
    indexer: CompressorInputs,
    block_table: jax.Array,
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    key_format: VectorFormat,
    eps: float,
    hadamard: bool = False,
) -> tuple[Window, Compressed, Compressed]:
    """All writes of a CSA layer and step: one kernel launch where every request may bring one token, else at most two.

    Stores the same bytes as ``compress`` and ``flush`` (main and indexer), ``append_tail`` and ``append_window``, in
    that order. Tail rows that no later entry will pool keep what they hold; ``rotate`` clears them, and nothing reads
    them either way.

    Args:
      window: the window pool and its positions, of `window_format`.
      entries: the CSA entry pool, of `entry_format`, and its tail.
      keys: the indexer key pool, of `key_format`, and its tail.
      rows: [tokens, 512] finished window rows, or ``RawRows`` to be normalized and rotated here.
      compressor: of the entries.
      indexer: of the keys.
      block_table: int32 [slots, max_blocks].
      plan: the step; padding (-1) and anything out of range writes nothing.
      layer: index of the layer in the window pool.
      kind_layer: index of the layer among those of its kind.
      window_format: how window rows are stored; likewise the next two.
      entry_format: of entries.
      key_format: of keys.
      eps: of every RMSNorm.
      hadamard: whether keys are Hadamard-transformed.

    Returns:
      window, entries and keys, updated in place.
    """
    op = "update_csa"
    operands = (
        *window,
        *entries,
        *keys,
        *_row_operands(op, window, rows, plan, window_format),
        layer_operand(layer),
        layer_operand(kind_layer),
        _table(op, block_table),
        *_compressor_operands(op, entries, compressor, plan, 4, entry_format),
        *_compressor_operands(op, keys, indexer, plan, 4, key_format),
    )
    results = call(
        op,
        operands,
        in_place=6,
        eps=float(eps),
        window_codec=window_format.codec,
        entry_codec=entry_format.codec,
        key_codec=key_format.codec,
        global_scale=entry_format.global_scale if entry_format.codec == "nvfp4_static" else key_format.global_scale,
        hadamard=bool(hadamard),
        **plan_attributes(plan),
    )
    return Window(*results[:2]), Compressed(*results[2:4]), Compressed(*results[4:])


def _row_operands(op: str, window: Window, rows: Any, plan: StepPlan, format: VectorFormat) -> tuple[jax.Array, ...]:
    check(op, "positions", window.positions, (*window.window.shape[:2], None), jnp.int32)
    check_pool(op, "window", window.window, window.positions.shape[2], format)
    none = jnp.zeros(0, jnp.float32)
    norm = (none, none, none)
    if isinstance(rows, RawRows):
        norm = (rows.norm_weight, *rows.rotary)
        check_finish(op, *norm, HEAD_DIM, jnp.shape(rows.rows)[0])
        rows = rows.rows
    check(op, "rows", rows, (plan.layout.tokens, HEAD_DIM), *FLOATING)
    check_plan(op, plan)
    return (rows, *norm, plan.packed)


def _table(op: str, block_table: jax.Array) -> jax.Array:
    check(op, "block_table", block_table, (None, None), jnp.int32)
    return block_table


def _compressor_operands(
    op: str, compressed: Compressed, inputs: CompressorInputs, plan: StepPlan, ratio: int, format: VectorFormat
) -> tuple[jax.Array, ...]:
    check_pool(op, "pool", compressed.pool, BLOCK_TOKENS // ratio, format)
    check_tail(op, "tail", compressed.tail, ratio)
    check_projections(op, compressed.tail, inputs.kv, inputs.gate, inputs.ape, plan, ratio)
    check_finish(op, inputs.norm_weight, *inputs.rotary, format.width, plan.layout.closing_size(ratio))
    return (inputs.kv, inputs.gate, inputs.ape, inputs.norm_weight, *inputs.rotary)
