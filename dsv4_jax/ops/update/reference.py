"""update_swa, update_csa, update_hca and normalize in jnp: the separate ops, one after the other."""

from __future__ import annotations

from typing import Any

import jax

from dsv4_jax.arithmetic.scalars import to_float32
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops.append.reference import append_tail, append_window
from dsv4_jax.ops.compress.reference import compress, rms_norm
from dsv4_jax.ops.flush.reference import flush
from dsv4_jax.ops.operands import Compressed, CompressorInputs, RawRows, Window
from dsv4_jax.spec.rotary import apply_rotary


def normalize(raw: RawRows, *, eps: float) -> jax.Array:
    """RMSNorm and RoPE of raw window rows: float32 [tokens, 512]."""
    return apply_rotary(rms_norm(to_float32(raw.rows), to_float32(raw.norm_weight), eps), raw.rotary)


def update_swa(
    window: Window,
    rows: jax.Array | RawRows,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    eps: float,
) -> Window:
    """Stores a step's window rows, finishing them first if they come raw."""
    if isinstance(rows, RawRows):
        rows = normalize(rows, eps=eps)
    return Window(*append_window(*window, rows, plan, layer, format=format))


def _compress(
    compressed: Compressed,
    inputs: CompressorInputs,
    block_table: jax.Array,
    plan: StepPlan,
    kind_layer: int | jax.Array,
    *,
    ratio: int,
    format: VectorFormat,
    eps: float,
    hadamard: bool,
) -> Compressed:
    projections = (inputs.kv, inputs.gate, inputs.position_bias)
    tail, entries = compress(
        compressed.tail,
        *projections,
        inputs.norm_weight,
        inputs.rotary.cos,
        inputs.rotary.sin,
        plan,
        kind_layer,
        ratio=ratio,
        eps=eps,
        hadamard=hadamard,
    )
    pool = flush(compressed.pool, entries, block_table, plan, kind_layer, ratio=ratio, format=format)
    return Compressed(pool, append_tail(tail, *projections, plan, kind_layer, ratio=ratio))


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
    """All writes of an HCA layer and step."""
    common: dict[str, Any] = {"ratio": 128, "format": entry_format, "eps": eps, "hadamard": False}
    entries = _compress(entries, compressor, block_table, plan, kind_layer, **common)
    return update_swa(window, rows, plan, layer, format=window_format, eps=eps), entries


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
    hadamard: bool,
) -> tuple[Window, Compressed, Compressed]:
    """All writes of a CSA layer and step."""
    common: dict[str, Any] = {"ratio": 4, "eps": eps}
    entries = _compress(
        entries, compressor, block_table, plan, kind_layer, format=entry_format, hadamard=False, **common
    )
    keys = _compress(keys, indexer, block_table, plan, kind_layer, format=key_format, hadamard=hadamard, **common)
    return update_swa(window, rows, plan, layer, format=window_format, eps=eps), entries, keys
