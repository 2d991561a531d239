"""Every storage format at one size: written by `flush`, read by gathers, and by `quantize` and `dequantize` alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv4_jax import ops
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.ops import Implementation
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM
from dsv4_jax.tools.bench import reads, traffic
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import Scale, Workload, block_table, noise, plan_of

RATIO = 4


def flush(component: str, format: VectorFormat, scale: Scale, implementation: Implementation) -> Workload:
    """What a prefill step of one request closes, stored."""
    calls = max(scale.calls // 4, 1)
    sets, blocks = 2 * calls, -(-scale.prefill // BLOCK_TOKENS)
    shape = StepShape(np.zeros(1, np.int64), np.array([scale.prefill]))
    table = jnp.asarray(block_table(sets, blocks))

    def call(pool: Any, plan: Any, operands: Any, layer: Any) -> tuple[Any, None]:
        options: dict[str, Any] = {"ratio": RATIO, "format": format, "implementation": implementation}
        entries, table = operands
        return ops.flush(pool, entries, table, plan, layer, **options), None

    plans = [plan_of(shape, np.array([slot])) for slot in range(sets)]
    closing = plans[0].layout.closing_size(RATIO)
    return Workload(
        key=("flush", component, format),
        state=lambda: noise((1, sets * blocks, *format.page_shape(BLOCK_TOKENS // RATIO)), format.dtype),
        call=call,
        gates=plans,
        operands=[(noise((closing, format.width), jnp.float32, i), table) for i in range(sets)],
        layers=1,
        calls=calls,
        bytes_moved=traffic.flush(shape, RATIO, format),
    )


def gather(component: str, format: VectorFormat, scale: Scale, implementation: Implementation) -> Workload:
    """Chosen entries, or all keys of a context of 16 times as many tokens as entries are chosen."""
    queries = min(scale.queries)
    if component == "keys":
        return reads.first_rows(format, RATIO, queries, 4 * scale.chosen, implementation)
    return reads.chosen_entries(format, queries, queries, 4, scale.gather_context // 2, scale, implementation)


def quantize(component: str, format: VectorFormat, scale: Scale, implementation: Implementation) -> Workload:
    """Float32 rows to a page."""
    rows = _rows(format, scale)

    def call(state: None, gate: None, values: Any, layer: Any) -> tuple[None, Any]:
        return state, ops.quantize(values, format=format, implementation=implementation)

    return _pages(("quantize", component), call, (rows, format.width), jnp.float32, rows, format, 4, scale)


def dequantize(component: str, format: VectorFormat, scale: Scale, implementation: Implementation) -> Workload:
    """A page to bfloat16 rows."""
    rows = _rows(format, scale)

    def call(state: None, gate: None, page: Any, layer: Any) -> tuple[None, Any]:
        options = {"rows": rows, "dtype": jnp.bfloat16, "implementation": implementation}
        return state, ops.dequantize(page, format=format, **options)

    return _pages(("dequantize", component), call, format.page_shape(rows), format.dtype, rows, format, 2, scale)


def _rows(format: VectorFormat, scale: Scale) -> int:
    return scale.rows * HEAD_DIM // format.width


def _pages(
    key: Any, call: Any, shape: Any, dtype: Any, rows: int, format: VectorFormat, itemsize: int, scale: Scale
) -> Workload:
    # Nothing is threaded through these calls, and equal ones would be merged: each gets an array of its own.
    calls = max(scale.calls // 4, 1)
    return Workload(
        key=key,
        state=lambda: None,
        call=call,
        gates=None,
        operands=[noise(shape, dtype, i) for i in range(2 * calls)],
        layers=1,
        calls=calls,
        bytes_moved=traffic.quantize(rows, format, itemsize),
    )
