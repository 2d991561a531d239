"""attend: softmax attention of a step's tokens over stored window rows and entries, keys and values at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.arithmetic.pages import cast, in_range, read_rows
from dsv4_jax.arithmetic.places import Tokens, all_tokens
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops.attend.operands import Attended, EntryRows, WindowRows
from dsv4_jax.ops.flush.reference import block_of
from dsv4_jax.spec.kinds import entries_per_block
from dsv4_jax.spec.rotary import Rotary, apply_rotary

_ROWS_AT_ONCE = 1 << 14  # dequantized rows held at a time: 32 MiB


def attend(
    window: WindowRows,
    entries: EntryRows | None,
    queries: jax.Array,
    plan: StepPlan,
    *,
    sinks: jax.Array | None,
    rotary: Rotary | None,
    scale: float,
    dtype: jnp.dtype,
) -> Attended:
    """Attention over rows as stored, in fp32.

    Args:
      window: the sliding window, this step's rows included.
      entries: compressed entries, those that close in this step included; None: the window alone.
      queries: float32 or bfloat16 [tokens, heads, 512], rotated.
      plan: the step.
      sinks: [heads]; each adds exp(sink) to its head's denominator once. None: nothing is added.
      rotary: of the tokens, [tokens, 32] each: the trailing 64 channels of the output are rotated back. None: not.
      scale: of the logits.
      dtype: of the output, float32 or bfloat16.

    Returns:
      Attended, [tokens, heads, ...].
    """
    keys = window.size + (entries.count if entries is not None else 0)
    tokens = all_tokens(plan, window.positions.shape[1])
    displaced_row = _displaced_row(window, plan)

    def one(token: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot, position = tokens.slot[token], tokens.position[token]
        seen = [_window_rows(window, slot, position, displaced_row[token])]
        if entries is not None:
            seen.append(_entry_rows(entries, slot, position, token))
        rows, valid = (jnp.concatenate(parts) for parts in zip(*seen, strict=True))
        return _softmax(queries[token], rows, valid & tokens.valid[token], sinks, scale)

    output, lse = lax.map(one, jnp.arange(plan.layout.tokens), batch_size=max(1, _ROWS_AT_ONCE // keys))
    if rotary is not None:
        output = apply_rotary(output, rotary, inverse=True)
    output = jnp.where(tokens.valid[:, None, None], output, 0)
    lacking = _lacks_rows(window, tokens)
    output = jnp.where(lacking[:, None, None], jnp.nan, output)
    return Attended(cast(output, dtype), jnp.where(lacking[:, None], jnp.nan, lse))


def _lacks_rows(window: WindowRows, tokens: Tokens) -> jax.Array:
    """Bool [tokens]: later tokens of the step took the place of rows that this one sees, and nobody saved them."""
    if window.displaced is not None:
        return jnp.zeros_like(tokens.valid)
    first = jnp.maximum(tokens.position - (window.size - 1), 0)
    return tokens.valid & (tokens.next - window.positions.shape[2] > first)


def _softmax(
    queries: jax.Array, rows: jax.Array, valid: jax.Array, sinks: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """One token's heads [heads, 512] over rows [keys, 512]: output [heads, 512] and lse [heads]."""
    product = jnp.einsum("hd,kd->hk", queries.astype(jnp.float32), rows, precision=lax.Precision.HIGHEST)
    logits = jnp.where(valid, product * scale, -jnp.inf)
    peak = logits.max(axis=1)
    base = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(logits - base[:, None])
    total = weights.sum(axis=1)
    sink = 0.0 if sinks is None else jnp.exp(sinks.astype(jnp.float32) - base)
    denominator = jnp.where(total > 0, total + sink, 1.0)
    output = jnp.einsum("hk,kd->hd", weights, rows, precision=lax.Precision.HIGHEST) / denominator[:, None]
    return output, base + jnp.log(total)


def _window_rows(
    window: WindowRows, slot: jax.Array, position: jax.Array, displaced_row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows of one token's window, oldest first: fp32 [size, 512], zeros where there is none, and bool [size]."""
    layers, slots, ring = window.positions.shape
    read = functools.partial(read_rows, vector_format=window.format, dtype=jnp.float32)
    back = jnp.arange(window.size - 1, -1, -1)
    at = position - back
    known = in_range(window.layer, layers) & in_range(slot, slots)
    recorded = window.positions[jnp.where(known, window.layer, 0), jnp.where(known, slot, 0), at % ring]
    in_ring = known & (at >= 0) & (recorded == at)
    pages = jnp.full_like(at, slot)
    rows, valid = read(window.window, in_ring, window.layer, pages, at % ring, rows_per_page=ring)
    if window.displaced is None:
        return rows, valid
    count = window.displaced.positions.shape[0]
    row = displaced_row - back
    saved = window.displaced.positions[jnp.clip(row, 0, count - 1)]
    in_displaced = ~in_ring & (at >= 0) & in_range(row, count) & (saved == at)
    rest, found = read(window.displaced.rows, in_displaced, 0, jnp.zeros_like(at), row, rows_per_page=count)
    return jnp.where(found[:, None], rest, rows), valid | found


def _displaced_row(window: WindowRows, plan: StepPlan) -> jax.Array:
    """Which displaced row holds each token's own row: int32 [tokens]."""
    request = jnp.asarray(plan.token_request)
    row = (window.size - 1) * (request + 1) + jnp.arange(plan.layout.tokens)
    return jnp.where(in_range(request, plan.layout.requests), row, -window.size)


def _entry_rows(
    entries: EntryRows, slot: jax.Array, position: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The entries one token looks at: fp32 [count, 512], zeros where there is none, and bool [count]."""
    entry = jnp.arange(entries.count) if entries.indices is None else entries.indices[token]
    exists = (entry >= 0) & (entry < (position + 1) // entries.ratio)
    block = block_of(entries.block_table, jnp.full_like(entry, slot), entry, entries.ratio)
    per_block = entries_per_block(entries.ratio)
    read = functools.partial(read_rows, vector_format=entries.format, dtype=jnp.float32)
    return read(entries.pool, exists, entries.layer, block, entry % per_block, rows_per_page=per_block)
