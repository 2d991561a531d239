"""What attention reads where it lies: rows by `attend`, keys by `index_topk`, from pools much larger than the L2 cache.

Every call has queries and choices of its own, and other slots or another layer than the call before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dsv4_jax import ops
from dsv4_jax.cache.rotary import token_rotary
from dsv4_jax.layout.formats import PROFILES, CacheFormats
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.ops import Implementation
from dsv4_jax.ops.attend.operands import Displaced, displaced_rows
from dsv4_jax.ops.operands import Window
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, KEY_DIM, LayerKind
from dsv4_jax.spec.presets import deepseek_v4_flash
from dsv4_jax.tools.bench import traffic
from dsv4_jax.tools.bench.stored import filled_pool, filled_window, stored_pages
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import FORMATS, Scale, Workload, block_table, noise, plan_of, slot_sets

ATTENDED = {
    "fp8": FORMATS,
    "fp8_ds_mla": PROFILES["flashmla"],
    "default": PROFILES["default"],
    "nvfp4": CacheFormats(entries="nvfp4", window="fp8"),
}
"""Formats of entries and window rows, by the name of their cases."""

KEYS = {"fp8": PROFILES["flashmla"], "mxfp4": PROFILES["deepseek"], "nvfp4": PROFILES["default"]}
"""Formats of indexer keys, by theirs."""

MODEL = deepseek_v4_flash()
LAYERS = 2


def decode_shape(requests: int, context: int, tokens: int = 1) -> StepShape:
    """The last tokens of contexts of that length."""
    return StepShape(np.full(requests, context - tokens), np.full(requests, tokens))


def chunk_shape(tokens: int, context: int) -> StepShape:
    """Tokens of one request behind a context of that length."""
    return StepShape(np.array([context]), np.array([tokens]))


def choices(rng: np.random.Generator, shape: StepShape, ratio: int, count: int) -> NDArray[np.int32]:
    """Entries that each token sees, random and ascending without a repetition as `index_topk` gives them.

    Returns:
      int32 [tokens, count]; -1 behind the entries of a token that sees fewer.
    """
    visible = np.concatenate(shape.visible(ratio))[:, None]
    # Sorted numbers that may repeat become ascending ones that do not.
    spread = np.sort(rng.random((len(visible), count)), axis=1) * np.maximum(visible - count + 1, 1)
    chosen = spread.astype(np.int64) + np.arange(count)
    few = np.broadcast_to(np.arange(count), chosen.shape)
    chosen = np.where(visible >= count, chosen, np.where(few < visible, few, -1))
    return chosen.astype(np.int32)


def attend(
    kind: LayerKind,
    formats: CacheFormats,
    heads: int,
    shape: StepShape,
    scale: Scale,
    implementation: Implementation,
    *,
    slots: int,
    chosen: int | None = None,
    lookahead: int = 0,
    share: int = 4,
) -> Workload:
    """Attention with sinks, rotated back.

    Args:
      kind: CSA or HCA.
      formats: of entries and window rows.
      heads: of the queries, which are bfloat16.
      shape: who brings what; all requests end at the same position.
      scale: whose calls are made.
      implementation: of the op.
      slots: in the pools.
      chosen: entries of each token (CSA); None: all (HCA).
      lookahead: rows that the ring has to spare.
      share: one in so many of the scale's calls is made.
    """
    window_format, entry_format, ratio = formats.window_format, formats.entry_format, kind.ratio
    size, ring, requests = MODEL.window, MODEL.window + lookahead, len(shape.starts)
    end, sets = int(shape.ends[0]), max(scale.calls // share, 1)
    blocks = -(-end // BLOCK_TOKENS)
    table_of_host, count = block_table(slots, blocks), end // ratio
    table = jnp.asarray(table_of_host)
    rope = MODEL.layers[MODEL.layer_kinds.index(kind)].rope
    places = slot_sets(slots, requests, slots // requests)
    plans = [plan_of(shape, places[i % len(places)]) for i in range(sets)]

    def make() -> tuple[Window, jax.Array]:
        # A layer of the window for each call: it is small, and would stay in the L2 cache.
        layers = LAYERS * sets
        recorded = end - 1 - (end - 1 - jnp.arange(ring, dtype=jnp.int32)) % ring
        rows = filled_window(window_format, ring, layers, slots)
        pool = filled_pool(entry_format, BLOCK_TOKENS // ratio, LAYERS, table_of_host)
        return Window(rows, jnp.broadcast_to(recorded, (layers, slots, ring)) + 0), pool

    def call(state: Any, plan: StepPlan, operands: Any, layer: Any) -> tuple[Any, jax.Array | None]:
        window, pool = state
        table, queries, sinks, rotary, indices, displaced, first_layer = operands
        where = (plan, first_layer + layer, layer)
        options: dict[str, Any] = {
            "ratio": ratio,
            "window_format": window_format,
            "entry_format": entry_format,
            "size": size,
            "displaced": displaced,
            "sinks": sinks,
            "rotary": rotary,
            "implementation": implementation,
        }
        if indices is None:
            window, pool, made = ops.attend_all_entries(window, pool, table, queries, *where, entries=count, **options)
        else:
            window, pool, made = ops.attend_entries(window, pool, table, queries, indices, *where, **options)
        return (window, pool), None if implementation == "native" else made.output

    rng = np.random.default_rng(requests)
    indices = [None if chosen is None else choices(rng, shape, ratio, chosen) for _ in range(sets)]
    displaces = int(shape.counts.max()) > lookahead + 1
    sinks, angles = noise((heads,), jnp.float32), jax.jit(token_rotary, static_argnums=1)
    window_rows = traffic.window_seen(shape, size)
    entry_rows = [
        traffic.all_seen(shape, ratio, count) if given is None else traffic.chosen_seen(shape, ratio, given)
        for given in indices
    ]
    stored = window_rows.rows * (window_format.row_bytes + traffic.POSITION)
    stored += _mean([seen.rows for seen in entry_rows]) * entry_format.row_bytes
    return Workload(
        key=("attend", kind, formats, slots, sets, ring, end),
        state=make,
        call=call,
        gates=plans,
        operands=[
            (
                table,
                noise((shape.tokens, heads, HEAD_DIM), jnp.bfloat16, i),
                sinks,
                angles(plan, rope),
                None if indices[i] is None else jnp.asarray(indices[i]),
                _displaced(shape, formats, size) if displaces else None,
                np.int32(LAYERS * i),
            )
            for i, plan in enumerate(plans)
        ],
        layers=LAYERS,
        calls=sets,
        bytes_moved=traffic.attend(shape.tokens, heads, stored, traffic.BFLOAT16, indices=chosen or 0),
        operations=traffic.attend_operations(heads, window_rows.looks + _mean([seen.looks for seen in entry_rows])),
        reads=True,
    )


def _displaced(shape: StepShape, formats: CacheFormats, size: int) -> Displaced:
    """What `update` saves of a chunk of one request."""
    (start,), (end,) = shape.starts, shape.ends
    format, rows = formats.window_format, displaced_rows(PlanLayout(shape.tokens, 1), size)
    return Displaced(jnp.asarray(stored_pages(format, rows, 1)[None]), jnp.arange(start - size + 1, end, dtype="i4"))


def index_topk(
    formats: CacheFormats,
    heads: int,
    k: int,
    shape: StepShape,
    slots: int,
    scale: Scale,
    implementation: Implementation,
    *,
    share: int = 4,
) -> Workload:
    """The indexer's choice of k entries for each token.

    Args:
      formats: of keys.
      heads: of the queries, which are bfloat16.
      k: how many to choose.
      shape: who brings what.
      slots: in the pool.
      scale: whose calls are made.
      implementation: of the op.
      share: one in so many of the scale's calls is made.
    """
    format, ratio, requests = formats.key_format, LayerKind.CSA.ratio, len(shape.starts)
    sets = max(scale.calls // share, 1)
    blocks = -(-int(shape.ends.max()) // BLOCK_TOKENS)
    table_of_host, places = block_table(slots, blocks), slot_sets(slots, requests, slots // requests)
    table = jnp.asarray(table_of_host)

    def call(pool: Any, plan: StepPlan, operands: Any, layer: Any) -> tuple[Any, jax.Array | None]:
        table, queries, head_weights = operands
        options: dict[str, Any] = {
            "format": format,
            "k": k,
            "hadamard": formats.keys_hadamard,
            "implementation": implementation,
        }
        pool, indices = ops.index_topk(pool, table, plan, queries, head_weights, layer, **options)
        return pool, None if implementation == "native" else indices

    return Workload(
        key=("csa_keys", format, slots, blocks),
        state=lambda: filled_pool(format, BLOCK_TOKENS // ratio, LAYERS, table_of_host),
        call=call,
        gates=[plan_of(shape, places[i % len(places)]) for i in range(sets)],
        operands=[
            (
                table,
                noise((shape.tokens, heads, KEY_DIM), jnp.bfloat16, i),
                noise((shape.tokens, heads), jnp.float32, i),
            )
            for i in range(sets)
        ],
        layers=LAYERS,
        calls=sets,
        bytes_moved=traffic.index_topk(shape, ratio, format, heads, k, traffic.BFLOAT16),
        operations=traffic.index_operations(shape, ratio, format, heads, k),
        reads=True,
    )


def _mean(values: list[int]) -> int:
    return round(float(np.mean(values)))
