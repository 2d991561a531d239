"""update_swa, update_csa, update_hca and normalize: all writes of one layer and step in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    check,
    check_implementation,
    check_plan,
    check_pool,
    check_tail,
    check_window,
    plan_attributes,
    take_finish,
    take_layer,
    take_projections,
    untransformed,
)
from dsv4_jax.ops.operands import Compressed, CompressorInputs, RawRows, Window
from dsv4_jax.ops.update import reference
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, LayerKind

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32

_ROWS = "rows row_norm_weight row_cos row_sin plan layer"
_COMPRESSOR = "kv gate position_bias norm_weight cos sin"
_KEYS = "key_kv key_gate key_position_bias key_norm_weight key_cos key_sin"
_NORMALIZE = signature("normalize", "rows norm_weight cos sin", "finished", "eps")
_UPDATE_SWA = signature(
    "update_swa", f"window positions {_ROWS}", "window positions", "tokens requests eps window_codec"
)
_UPDATE_HCA = signature(
    "update_hca",
    f"window positions entries tail {_ROWS} kind_layer block_table {_COMPRESSOR}",
    "window positions entries tail",
    "tokens requests eps window_codec entry_codec entry_global_scale",
)
_UPDATE_CSA = signature(
    "update_csa",
    f"window positions entries tail keys key_tail {_ROWS} kind_layer block_table {_COMPRESSOR} {_KEYS}",
    "window positions entries tail keys key_tail",
    "tokens requests eps window_codec entry_codec key_codec entry_global_scale key_global_scale hadamard",
)


def normalize(raw: RawRows, *, eps: float, implementation: Implementation = "native") -> Float32[Array, "tokens 512"]:
    """RMSNorm and RoPE of raw window rows: float32 [tokens, 512], what ``append_window`` and attention take.

    Args:
      raw: the rows and what finishes them.
      eps: of the RMSNorm.
      implementation: who runs it.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "normalize"
    check_implementation(implementation)
    rows, weight, (cos, sin) = raw
    check(op, "rows", rows, (None, HEAD_DIM), *FLOATING)
    weight = take_finish(op, weight, cos, sin, HEAD_DIM, jnp.shape(rows)[0])
    if implementation == "reference":
        return reference.normalize(untransformed(op, raw), eps=eps)
    operands = untransformed(op, {"rows": rows, "norm_weight": weight, "cos": cos, "sin": sin})
    made = {"finished": (jnp.shape(rows), jnp.float32)}
    (finished,) = call(_NORMALIZE, operands, results=made, eps=float(eps))
    return finished


def update_swa(
    window: Window,
    rows: Float[Array, "tokens 512"] | RawRows,
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    eps: float,
    implementation: Implementation = "native",
) -> Window:
    """Stores a step's window rows; as ``append_window``, normalizing and rotating them first if they come raw.

    See ``update_csa`` for the arguments.
    """
    op = "update_swa"
    check_implementation(implementation)
    given = untransformed(op, (window, rows, plan, take_layer(layer)))
    operands = _window_operands(op, *given, format)
    if implementation == "reference":
        return reference.update_swa(*given, format=format, eps=eps)
    attributes = plan_attributes(plan) | {"eps": float(eps), "window_codec": format.codec}
    return Window(*call(_UPDATE_SWA, operands, **attributes))


def update_hca(
    window: Window,
    entries: Compressed,
    rows: Float[Array, "tokens 512"] | RawRows,
    compressor: CompressorInputs,
    block_table: Int32[Array, "slots max_blocks"],
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    eps: float,
    implementation: Implementation = "native",
) -> tuple[Window, Compressed]:
    """All writes of an HCA layer and step; see ``update_csa``."""
    op = "update_hca"
    check_implementation(implementation)
    given: Any = (window, entries, rows, compressor, block_table, plan, take_layer(layer), take_layer(kind_layer))
    given = untransformed(op, given)
    window, entries, rows, compressor, block_table, plan, layer, kind_layer = given
    operands = _window_operands(op, window, rows, plan, layer, window_format)
    operands |= _shared_operands(op, block_table, kind_layer)
    operands |= _compressor_operands(op, "entries", entries, compressor, plan, LayerKind.HCA.ratio, entry_format)
    if implementation == "reference":
        formats: dict[str, Any] = {"window_format": window_format, "entry_format": entry_format}
        return reference.update_hca(*given, **formats, eps=eps)
    attributes = plan_attributes(plan) | {"eps": float(eps), "window_codec": window_format.codec}
    attributes |= {"entry_codec": entry_format.codec, "entry_global_scale": entry_format.global_scale}
    results = call(_UPDATE_HCA, operands, **attributes)
    return Window(*results[:2]), Compressed(*results[2:])


def update_csa(
    window: Window,
    entries: Compressed,
    keys: Compressed,
    rows: Float[Array, "tokens 512"] | RawRows,
    compressor: CompressorInputs,
    indexer: CompressorInputs,
    block_table: Int32[Array, "slots max_blocks"],
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    key_format: VectorFormat,
    eps: float,
    hadamard: bool = False,
    implementation: Implementation = "native",
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
      implementation: who runs it.

    Returns:
      window, entries and keys, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op = "update_csa"
    check_implementation(implementation)
    ratio = LayerKind.CSA.ratio
    given: Any = (window, entries, keys, rows, compressor, indexer, block_table, plan)
    given = untransformed(op, (*given, take_layer(layer), take_layer(kind_layer)))
    window, entries, keys, rows, compressor, indexer, block_table, plan, layer, kind_layer = given
    operands = _window_operands(op, window, rows, plan, layer, window_format)
    operands |= _shared_operands(op, block_table, kind_layer)
    operands |= _compressor_operands(op, "entries", entries, compressor, plan, ratio, entry_format)
    operands |= _compressor_operands(op, "keys", keys, indexer, plan, ratio, key_format, "key_")
    if implementation == "reference":
        formats: dict[str, Any] = {
            "window_format": window_format,
            "entry_format": entry_format,
            "key_format": key_format,
        }
        return reference.update_csa(*given, **formats, eps=eps, hadamard=bool(hadamard))
    attributes = plan_attributes(plan) | {"eps": float(eps), "hadamard": bool(hadamard)}
    attributes |= {"window_codec": window_format.codec}
    attributes |= {"entry_codec": entry_format.codec, "entry_global_scale": entry_format.global_scale}
    attributes |= {"key_codec": key_format.codec, "key_global_scale": key_format.global_scale}
    results = call(_UPDATE_CSA, operands, **attributes)
    return Window(*results[:2]), Compressed(*results[2:4]), Compressed(*results[4:])


def _window_operands(
    op: str, window: Window, rows: Any, plan: StepPlan, layer: int | jax.Array, format: VectorFormat
) -> dict[str, Any]:
    """The operands that every kind of layer has; an empty norm stands for rows that are finished."""
    check_window(op, *window, format)
    check_plan(op, plan)
    norm: dict[str, Any] = dict.fromkeys(("row_norm_weight", "row_cos", "row_sin"), jnp.zeros(0, jnp.float32))
    if isinstance(rows, RawRows):
        rows, weight, (cos, sin) = rows
        weight = take_finish(op, weight, cos, sin, HEAD_DIM, jnp.shape(rows)[0])
        norm = {"row_norm_weight": weight, "row_cos": cos, "row_sin": sin}
    check(op, "rows", rows, (plan.layout.tokens, HEAD_DIM), *FLOATING)
    operands = {"window": window.window, "positions": window.positions, "rows": rows, **norm}
    return operands | {"plan": plan.packed, "layer": layer}


def _shared_operands(op: str, block_table: jax.Array, kind_layer: int | jax.Array) -> dict[str, Any]:
    check(op, "block_table", block_table, (None, None), jnp.int32)
    return {"block_table": block_table, "kind_layer": kind_layer}


def _compressor_operands(
    op: str,
    pool: str,
    compressed: Compressed,
    inputs: CompressorInputs,
    plan: StepPlan,
    ratio: int,
    format: VectorFormat,
    prefix: str = "",
) -> dict[str, Any]:
    """A pool, its tail and what its compressor made, by name; `prefix` comes before all but the pool's."""
    check_pool(op, pool, compressed.pool, BLOCK_TOKENS // ratio, format)
    check_tail(op, f"{prefix}tail", compressed.tail, ratio)
    projections = (inputs.kv, inputs.gate, inputs.position_bias)
    kv, gate, position_bias = take_projections(op, compressed.tail, *projections, plan, ratio)
    cos, sin = inputs.rotary
    closing = plan.layout.closing_size(ratio)
    weight = take_finish(op, inputs.norm_weight, cos, sin, format.width, closing)
    made = {"tail": compressed.tail, "kv": kv, "gate": gate, "position_bias": position_bias}
    made |= {"norm_weight": weight, "cos": cos, "sin": sin}
    return {pool: compressed.pool} | {prefix + name: operand for name, operand in made.items()}
