"""index_topk in jnp; ``index/api.py`` says what it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.arithmetic.scalars import (
    amax,
    bits_of,
    ceil_exponent,
    e4m3_codes,
    e4m3_values,
    float_of,
    power_of_two,
    to_bfloat16,
    to_float32,
)
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops.compress.reference import hadamard_transform
from dsv4_jax.ops.gather.reference import gather_all_entries
from dsv4_jax.spec.kinds import BLOCK_TOKENS


def index_topk(
    pool: jax.Array,
    block_table: jax.Array,
    plan: StepPlan,
    queries: jax.Array,
    head_weights: jax.Array,
    layer: jax.Array,
    *,
    format: VectorFormat,
    k: int,
    ratio: int,
    hadamard: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pool, the chosen entries and their scores, [tokens, k]."""
    slots, max_blocks = block_table.shape
    count = max_blocks * (BLOCK_TOKENS // ratio)
    _, keys = gather_all_entries(
        pool, block_table, plan, layer, ratio=ratio, format=format, entries=count, dtype=jnp.dtype(jnp.float32)
    )
    slot, position = jnp.asarray(plan.token_slot), jnp.asarray(plan.token_position)
    seen = (slot >= 0) & (slot < slots) & (position >= 0)
    visible = jnp.where(seen, (position + 1) // ratio, 0)
    request = jnp.clip(jnp.asarray(plan.token_request), 0, plan.layout.requests - 1)
    rounded = round_queries(queries, format, hadamard=hadamard)

    def one(token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        rows, weights, request, visible = token
        dots = jnp.matmul(rows, keys.values[request].T, precision=lax.Precision.HIGHEST)
        scores = jnp.matmul(weights[None], jnp.maximum(dots, 0), precision=lax.Precision.HIGHEST)[0]
        return best_entries(jnp.where(keys.valid[request], scores, jnp.nan), visible, k)

    indices, scores = lax.map(one, (rounded, head_weights, request, visible))
    return pool, indices, scores


def best_entries(scores: jax.Array, visible: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of the first `visible` scores [count]: entries, ascending, then -1; and their scores, then -inf."""
    count = scores.shape[0]
    exists = jnp.arange(count) < visible
    bits = bits_of(jnp.where(scores == 0, 0.0, scores))  # -0 is 0
    order = bits ^ jnp.where(bits >> 31 != 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(1 << 31))
    order = jnp.where(jnp.isnan(scores), 0, order)
    # Two keys: what does not exist comes behind everything, NaN scores included.
    sorted_by = (~exists).astype(jnp.int32), ~order, jnp.arange(count, dtype=jnp.int32)
    _, _, ranked = lax.sort(sorted_by, num_keys=2, is_stable=True)
    chosen = jnp.sort(jnp.where(jnp.arange(count) < visible, ranked, count)[:k])
    chosen = jnp.concatenate([chosen, jnp.full(max(k - count, 0), count, jnp.int32)])
    taken = chosen < count
    scores = jnp.where(taken, scores[jnp.minimum(chosen, count - 1)], -jnp.inf)
    return jnp.where(taken, chosen, -1), scores


def round_queries(queries: jax.Array, format: VectorFormat, *, hadamard: bool) -> jax.Array:
    """Queries [..., 128] as products with keys of `format` take them, fp32."""
    queries = to_float32(queries)
    if hadamard:
        queries = hadamard_transform(queries)
    if not format.quantized:
        return to_float32(to_bfloat16(queries)) if format.dtype == jnp.bfloat16 else queries
    halves = format.codec.startswith("nvfp4")
    exponent = ceil_exponent(jnp.clip(amax(queries), 1e-4, 2.0**120)) + (3 if halves else 0)
    in_units = queries * power_of_two(254 - exponent)
    codes = _rounded_to_half(in_units) if halves else e4m3_values(e4m3_codes(in_units))
    return codes * power_of_two(exponent)


def _rounded_to_half(x: jax.Array) -> jax.Array:
    """To the precision of float16, for |x| <= 2^15; a cast there and back is none, XLA takes it away."""
    bits = bits_of(x)
    normal = float_of((bits + 0xFFF + (bits >> 13 & 1)) & ~jnp.uint32(0x1FFF))
    below = jnp.round(x * 2.0**24) * 2.0**-24  # below 2^-14 halves are multiples of 2^-24
    return jnp.where(jnp.abs(x) < 2.0**-14, below, jnp.where(jnp.isnan(x), x, normal))
