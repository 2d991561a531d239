"""Reads: chosen entries, all entries, and the window, dense in bfloat16, from pools much larger than the L2 cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import ops
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.ops import Implementation
from dsv4_jax.ops.operands import Rows
from dsv4_jax.spec.kinds import BLOCK_TOKENS
from dsv4_jax.tools.bench import traffic
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import FORMATS, Scale, Workload, block_table, noise, plan_of, slot_sets


def _result(rows: Rows, implementation: Implementation) -> jax.Array | None:
    """What keeps a read alive: the pool that it is threaded through if it is native, else its values."""
    return None if implementation == "native" else rows.values


def _one_token_each(requests: int, context: int) -> StepShape:
    """A decode step of requests of that many tokens."""
    return StepShape(np.full(requests, context - 1), np.ones(requests, np.int64))


def entries(queries: int, scale: Scale, implementation: Implementation) -> Workload:
    """CSA entries chosen by index, one query a slot, as the sparse attention of a decode step reads them."""
    slots, sets = max(scale.queries), max(scale.calls // 4, 1)
    return chosen_entries(FORMATS.entry_format, queries, slots, sets, scale.gather_context, scale, implementation)


def chosen_entries(
    format: VectorFormat,
    queries: int,
    slots: int,
    sets: int,
    context: int,
    scale: Scale,
    implementation: Implementation,
) -> Workload:
    """``gather_entries`` of CSA entries at random places of contexts of that many tokens, from two layers."""
    rng, visible, blocks = np.random.default_rng(queries), context // 4, context // BLOCK_TOKENS
    table = jnp.asarray(block_table(slots, blocks))
    shape = _one_token_each(queries, context)
    choices = slot_sets(slots, queries, slots // queries)

    def call(pool: Any, plan: Any, operands: Any, layer: Any) -> tuple[Any, jax.Array | None]:
        indices, table = operands
        options: dict[str, Any] = {
            "ratio": 4,
            "format": format,
            "dtype": jnp.bfloat16,
            "implementation": implementation,
        }
        pool, rows = ops.gather_entries(pool, table, plan, indices, layer, **options)
        return pool, _result(rows, implementation)

    indices = [rng.integers(0, visible, (queries, scale.chosen)).astype(np.int32) for _ in range(sets)]
    return Workload(
        key=("csa_entries", format, slots, blocks),
        state=lambda: noise((2, slots * blocks, *format.page_shape(BLOCK_TOKENS // 4)), format.dtype),
        call=call,
        gates=[plan_of(shape, choices[i % len(choices)]) for i in range(sets)],
        operands=[(jnp.asarray(chosen), table) for chosen in indices],
        layers=2,
        calls=sets,
        bytes_moved=traffic.gather(queries * scale.chosen, format, traffic.BFLOAT16, index_bytes=4),
    )


def all_entries(queries: int, scale: Scale, implementation: Implementation) -> Workload:
    """All HCA entries of each slot."""
    return first_rows(FORMATS.entry_format, 128, queries, scale.chosen, implementation)


def first_rows(format: VectorFormat, ratio: int, queries: int, count: int, implementation: Implementation) -> Workload:
    """``gather_all_entries``, from two layers and four sets of slots."""
    sets = 4
    slots, blocks = sets * queries, -(-count * ratio // BLOCK_TOKENS)
    table, shape = jnp.asarray(block_table(slots, blocks)), _one_token_each(queries, count * ratio)

    def call(pool: Any, plan: Any, table: Any, layer: Any) -> tuple[Any, jax.Array | None]:
        options: dict[str, Any] = {
            "ratio": ratio,
            "format": format,
            "dtype": jnp.bfloat16,
            "implementation": implementation,
        }
        pool, rows = ops.gather_all_entries(pool, table, plan, layer, entries=count, **options)
        return pool, _result(rows, implementation)

    return Workload(
        key=("entries", ratio, format, slots, blocks),
        state=lambda: noise((2, slots * blocks, *format.page_shape(BLOCK_TOKENS // ratio)), format.dtype),
        call=call,
        gates=[plan_of(shape, chosen) for chosen in slot_sets(slots, queries, sets)],
        operands=[table] * sets,
        layers=2,
        calls=sets,
        bytes_moved=traffic.gather(queries * count, format, traffic.BFLOAT16),
    )


def window(batch: int, scale: Scale, implementation: Implementation) -> Workload:
    """The last 128 rows of each request."""
    rows, format = 128, FORMATS.window_format
    slots, last = scale.plans * max(scale.batches), scale.context - 1
    shape = _one_token_each(batch, scale.context)

    def make() -> tuple[Any, Any]:
        recorded = last - (last - jnp.arange(rows, dtype=jnp.int32)) % rows
        positions = jnp.broadcast_to(recorded, (scale.layers, slots, rows)) + 0
        return noise((scale.layers, slots, *format.page_shape(rows)), format.dtype), positions

    def call(state: Any, plan: Any, operands: None, layer: Any) -> tuple[Any, jax.Array | None]:
        options: dict[str, Any] = {"format": format, "dtype": jnp.bfloat16, "implementation": implementation}
        window, positions = state
        *state, read = ops.gather_window(window, positions, plan, layer, rows=rows, **options)
        return tuple(state), _result(read, implementation)

    return Workload(
        key=("window", format, slots),
        state=make,
        call=call,
        gates=[plan_of(shape, chosen) for chosen in slot_sets(slots, batch, scale.plans)],
        operands=[None] * scale.plans,
        layers=scale.layers,
        calls=scale.calls,
        bytes_moved=traffic.gather(batch * rows, format, traffic.BFLOAT16, index_bytes=traffic.POSITION),
    )
