"""Writes: a layer's update in a decode step or a prefill, and the separate ops it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv4_jax import ops
from dsv4_jax.cache.step import Step
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops import Implementation
from dsv4_jax.spec.kinds import HEAD_DIM, LayerKind
from dsv4_jax.tools.bench import traffic
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import (
    FORMATS,
    Scale,
    Workload,
    model_of,
    noise,
    noisy_cache,
    plan_of,
    schema_of,
    slot_sets,
    update_inputs,
)

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
ROW_ITEMSIZE = 2  # raw window rows are bfloat16


def decode_shapes(kind: LayerKind, boundary: str, batch: int, scale: Scale, tokens: int = 1) -> list[StepShape]:
    """One or a few tokens for each request of each plan, all in the last 256 tokens of the context.

    Args:
      kind: whose boundaries.
      boundary: "none" or "all" requests close a window, or "mixed": as many as in the long run of a decode, 1 in 4
        (CSA) or 1 in 128 (HCA), over all plans.
      batch: requests.
      scale: the number of plans, and the context.
      tokens: of each request, at most 128; boundaries are those of the first.
    """
    rng, ratio, first = np.random.default_rng(batch), max(kind.ratio, 1), scale.context - (128 if tokens == 1 else 256)
    shapes = []
    for plan in range(scale.plans):
        request = np.arange(batch)
        if boundary == "all":
            phase = np.full(batch, ratio - 1)
        elif boundary == "none":
            phase = rng.integers(0, max(ratio - 1, 1), batch)
        else:
            phase = (request * scale.plans + plan) * ratio // (batch * scale.plans)
        starts = first + rng.integers(0, 128 // ratio, batch) * ratio + phase
        shapes.append(StepShape(starts, np.full(batch, tokens)))
    return shapes


def layer_update(implementation: Implementation) -> Any:
    """``LayerCache.update`` as a workload's call; the layer is an operand."""

    def call(cache: Any, plan: Any, inputs: Any, layer: Any) -> tuple[Any, None]:
        # Every layer of the workload's model is of one kind, so its index is the row of every pool.
        kind = cache.schema.spec.layers[0].kind
        step = Step(cache, plan, implementation).scanning()
        return step.layer(layer, kind=kind).update(*inputs).step.end(), None

    return call


def update_bytes(kind: LayerKind, shape: StepShape, schema: CacheSchema, itemsize: int) -> int:
    """The fewest bytes of a layer's update."""
    total = traffic.window_rows(shape, schema.ring, FORMATS.window_format, ROW_ITEMSIZE)
    entry, key = FORMATS.entry_format, FORMATS.key_format
    for format in {LayerKind.SWA: (), LayerKind.CSA: (entry, key), LayerKind.HCA: (entry,)}[kind]:
        total += traffic.compressor(shape, kind.ratio, format, itemsize, hca_tail=schema.formats.hca_tail)
    return total


def update(
    kind: LayerKind,
    hca_tail: str,
    boundary: str,
    batch: int,
    scale: Scale,
    implementation: Implementation,
    *,
    tokens: int = 1,
    lookahead: int = 0,
) -> Workload:
    """One layer's update in a decode step, or, with several tokens a request, in one that verifies drafts."""
    slots = scale.plans * max(scale.batches)
    schema = schema_of(model_of(kind, scale.layers), slots, scale.context, hca_tail, lookahead)
    shapes = decode_shapes(kind, boundary, batch, scale, tokens)
    plans = [plan_of(*pair) for pair in zip(shapes, slot_sets(schema.slots, batch, scale.plans), strict=True)]
    return Workload(
        key=schema,
        state=lambda: noisy_cache(schema),
        call=layer_update(implementation),
        gates=plans,
        operands=[update_inputs(plan, schema.spec.layers[0], jnp.float32, 16 * i) for i, plan in enumerate(plans)],
        layers=scale.layers,
        calls=scale.calls,
        bytes_moved=_mean(update_bytes(kind, shape, schema, 4) for shape in shapes),
    )


def prefill(
    kind: LayerKind, hca_tail: str, requests: int, dtype: str, scale: Scale, implementation: Implementation
) -> Workload:
    """One layer's update in a prefill step from position 0; other projections in every call."""
    calls = max(scale.calls // 4, 1)
    schema = schema_of(model_of(kind, 2), calls * scale.prefill_requests, scale.prefill, hca_tail)
    shape = StepShape(np.zeros(requests, np.int64), np.full(requests, scale.prefill // requests))
    plans = [plan_of(shape, slots) for slots in slot_sets(schema.slots, requests, calls)]
    made = DTYPES[dtype]
    return Workload(
        key=schema,
        state=lambda: noisy_cache(schema),
        call=layer_update(implementation),
        gates=plans,
        operands=[update_inputs(plan, schema.spec.layers[0], made, 16 * i) for i, plan in enumerate(plans)],
        layers=2,
        calls=calls,
        bytes_moved=update_bytes(kind, shape, schema, jnp.dtype(made).itemsize),
    )


def separate_op(op: str, kind: LayerKind, batch: int, scale: Scale, implementation: Implementation) -> Workload:
    """One of the ops that `update` is made of, for its main compressor.

    Every request closes a window, except where the op is to append: there as many as in the long run.
    """
    schema = schema_of(model_of(kind, scale.layers), scale.plans * max(scale.batches), scale.context)
    shapes = decode_shapes(kind, "mixed" if op.startswith("append") else "all", batch, scale)
    plans = [plan_of(*pair) for pair in zip(shapes, slot_sets(schema.slots, batch, scale.plans), strict=True)]
    ratio, eps = kind.ratio, schema.spec.norm_eps
    by: dict[str, Any] = {"implementation": implementation}
    names = {LayerKind.CSA: ("csa_entries", "csa_tail"), LayerKind.HCA: ("hca_entries", "hca_tail")}
    pool_name, tail_name = names[kind]
    entry, window = FORMATS.entry_format, FORMATS.window_format

    def call(cache: Any, plan: Any, operands: Any, layer: Any) -> tuple[Any, Any]:
        (raw, inputs), entries = operands
        pool, tail, result = cache.arrays[pool_name], cache.arrays[tail_name], None
        if op == "append_window":
            made = ops.append_window(cache.window, cache.window_positions, raw.rows, plan, layer, format=window, **by)
            return dataclasses.replace(cache, window=made[0], window_positions=made[1]), None
        if op == "append_tail":
            tail = ops.append_tail(tail, inputs.kv, inputs.gate, inputs.position_bias, plan, layer, ratio=ratio, **by)
        elif op == "compress":
            brought = (inputs.kv, inputs.gate, inputs.position_bias, inputs.norm_weight)
            angles = (inputs.rotary.cos, inputs.rotary.sin)
            tail, closed = ops.compress(tail, *brought, *angles, plan, layer, ratio=ratio, eps=eps, **by)
            result = None if implementation == "native" else closed
        elif op == "rotate":
            tail = ops.rotate(tail, plan, layer, ratio=ratio, **by)
        elif op == "flush":
            pool = ops.flush(pool, entries, cache.write_table, plan, layer, ratio=ratio, format=entry, **by)
        return cache.with_arrays({pool_name: pool, tail_name: tail}), result

    counted = {
        "append_window": lambda shape: traffic.window_rows(shape, schema.ring, window, ROW_ITEMSIZE),
        "append_tail": lambda shape: traffic.append_tail(shape, ratio, HEAD_DIM, 4),
        "compress": lambda shape: traffic.compress(shape, ratio, HEAD_DIM, 4),
        "rotate": lambda shape: traffic.rotate(shape, ratio, HEAD_DIM),
        "flush": lambda shape: traffic.flush(shape, ratio, entry),
    }
    operands = []
    for index, plan in enumerate(plans):
        inputs = update_inputs(plan, schema.spec.layers[0], jnp.float32, 16 * index)[:2]
        operands.append((inputs, noise((plan.layout.closing_size(ratio), HEAD_DIM), jnp.float32, index)))
    return Workload(
        key=schema,
        state=lambda: noisy_cache(schema),
        call=call,
        gates=plans,
        operands=operands,
        layers=scale.layers,
        calls=scale.calls,
        bytes_moved=_mean(counted[op](shape) for shape in shapes),
    )


def _mean(values: Any) -> int:
    return round(float(np.mean(list(values))))
