"""compress in jnp, and what finishes an entry; ``compress/api.py`` says what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.arithmetic.places import Tokens, tokens_at
from dsv4_jax.arithmetic.running import fold_rows, softmax_weight, window_state
from dsv4_jax.arithmetic.scalars import to_float32
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.layer_schema import is_running
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.rotary import Rotary, apply_rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


def compress(
    tail: jax.Array,
    kv: jax.Array,
    gate: jax.Array,
    position_bias: jax.Array,
    norm_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    plan: StepPlan,
    layer: jax.Array | int,
    *,
    ratio: int,
    eps: float,
    hadamard: bool,
) -> tuple[jax.Array, jax.Array]:
    """The entries that a step closes, [closing, width], zeros where nothing closes; the tail as it came."""
    layers, slots = tail.shape[:2]
    index = jnp.asarray(plan.closing(ratio))
    closing = tokens_at(plan, index, slots)
    valid = closing.valid & in_range(layer, layers)
    kv, gate, position_bias = to_float32(kv), to_float32(gate), to_float32(position_bias)
    if is_running(tail.shape):
        entries = _pool_running(tail, kv, gate, position_bias, index, closing, layer)
    else:
        entries = _softmax_pool(*_window_rows(tail, kv, gate, position_bias, index, closing, layer, ratio))
    entries = jnp.where(valid[:, None], entries, 0)
    entries = rms_norm(entries, to_float32(norm_weight), eps)
    entries = apply_rotary(entries, Rotary(cos, sin))
    if hadamard:
        entries = hadamard_transform(entries)
    return tail, jnp.where(valid[:, None], entries, 0)


def hadamard_transform(x: Float[Array, "... n"]) -> Float32[Array, "... n"]:
    """Multiply by the orthonormal Hadamard matrix: x @ H(n) * n^-1/2 in fp32, n a power of two.

    Args:
      x: fp32 [..., n]; n is 128 for indexer keys and queries.

    Returns:
      fp32 [..., n].
    """
    n, stride = x.shape[-1], 1
    y = x.astype(jnp.float32)
    while stride < n:
        low, high = jnp.moveaxis(y.reshape(*x.shape[:-1], -1, 2, stride), -2, 0)
        y = jnp.stack([low + high, low - high], axis=-2).reshape(x.shape)
        stride *= 2
    return y * jnp.float32(n**-0.5)


def _tokens_up_to(closing: Tokens, index: jax.Array, rows: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rows` tokens up to each closing one, oldest first, [C, rows] each: position, whether this step of `tokens`
    tokens brought it, and at which flat index.
    """
    back = jnp.arange(rows, dtype=jnp.int32)[None, ::-1]
    position = closing.position[:, None] - back
    return position, position >= closing.start[:, None], jnp.clip(index[:, None] - back, 0, tokens - 1)


def _window_rows(
    tail: jax.Array,
    kv: jax.Array,
    gate: jax.Array,
    position_bias: jax.Array,
    index: jax.Array,
    closing: Tokens,
    layer: jax.Array | int,
    ratio: int,
) -> tuple[jax.Array, jax.Array]:
    """The rows that every closing window pools, oldest first: kv and score, fp32 [C, rows, d] each.

    Entry 0 of CSA has no window before it: rows of positions below 0 read as kv 0 and score -inf, of weight 0.
    """
    layers, slots, _, _, width = tail.shape
    geometry = TailGeometry.of_rows(ratio, tail.shape[3])
    rows = geometry.compression.pooled_rows
    is_overlap = (jnp.arange(rows) < rows - ratio)[None, :, None]
    position, from_step, in_step = _tokens_up_to(closing, index, rows, kv.shape[0])

    def halves(projection: jax.Array) -> jax.Array:
        return jnp.where(is_overlap, projection[..., :width], projection[..., -width:])

    step_kv = halves(kv[in_step])
    step_score = halves(gate[in_step] + position_bias[position % ratio])

    tail_row = jnp.where(is_overlap[..., 0], geometry.overlap_row(position), geometry.current_row(position))
    layer = jnp.where(in_range(layer, layers), layer, 0)
    slot = jnp.clip(closing.slot, 0, slots - 1)[:, None]
    tail_kv, tail_score = tail[layer, slot, 0, tail_row], tail[layer, slot, 1, tail_row]

    from_step, exists = from_step[..., None], (position >= 0)[..., None]
    row_kv = jnp.where(exists, jnp.where(from_step, step_kv, tail_kv), 0.0)
    row_score = jnp.where(exists, jnp.where(from_step, step_score, tail_score), -jnp.inf)
    return row_kv, row_score


def _softmax_pool(kv: jax.Array, score: jax.Array) -> jax.Array:
    """[C, rows, d] -> [C, d], a softmax over the rows for every channel; NaN where every score is -inf."""
    weight = softmax_weight(score, jnp.max(score, axis=1, keepdims=True))
    return _divide(jnp.sum(weight * kv, axis=1), jnp.sum(weight, axis=1))


def _divide(total: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, NaN for a denominator of 0, which is no arithmetic mistake and must not look like one."""
    empty = denominator == 0
    return jnp.where(empty, jnp.nan, total / jnp.where(empty, 1, denominator))


def _pool_running(
    tail: jax.Array,
    kv: jax.Array,
    gate: jax.Array,
    position_bias: jax.Array,
    index: jax.Array,
    closing: Tokens,
    layer: jax.Array | int,
) -> jax.Array:
    """[C, d]: the window's state from a running tail, and the step's own rows."""
    _, from_step, in_step = _tokens_up_to(closing, index, position_bias.shape[0], kv.shape[0])
    state = window_state(tail, layer, closing.slot, closing.start, ~from_step[:, 0])
    _, denominator, total = jnp.moveaxis(
        fold_rows(state, kv[in_step], gate[in_step] + position_bias[None], from_step), 1, 0
    )
    return _divide(total, denominator)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis."""
    scale = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(eps))
    return x / scale * weight[None]
