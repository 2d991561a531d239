"""The whole decode step of DeepSeek-V4-Flash's layers but for its projections: update, index_topk and attend of each.

The shares of the three come from three steps that are measured alike: with the first, with the first two, with all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache.pools import Cache
from dsv4_jax.cache.rotary import token_rotary
from dsv4_jax.cache.step import begin
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops import Implementation
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, LayerKind
from dsv4_jax.spec.model import ModelSpec
from dsv4_jax.spec.presets import deepseek_v4_flash, tiny_spec
from dsv4_jax.tools.bench import traffic
from dsv4_jax.tools.bench.decode import update_bytes
from dsv4_jax.tools.bench.measure import MOST_REPLAYS, Outcome, Timing, native_calls
from dsv4_jax.tools.bench.step import (
    compile_step,
    layer_inputs,
    sent,
    step_inputs,
    time_dispatches,
)
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import Scale, admit, noise, noisy_cache, schema_of

Part = Literal["update", "index_topk", "attend"]
PARTS: tuple[Part, ...] = ("update", "index_topk", "attend")


def attended_inputs(spec: ModelSpec, plan: StepPlan) -> dict[str, Any]:
    """What the tokens bring to the layers, which share it: ``step_inputs``, queries, head weights and sinks."""
    tokens = plan.layout.tokens
    return step_inputs(spec, plan) | {
        "queries": noise((tokens, spec.num_heads, HEAD_DIM), jnp.bfloat16),
        "sinks": noise((spec.num_heads,), jnp.float32),
        "index_queries": noise((tokens, spec.index_num_heads, KEY_DIM), jnp.bfloat16),
        "head_weights": noise((tokens, spec.index_num_heads), jnp.float32),
    }


def attended_step(cache: Cache, plan: StepPlan, inputs: dict[str, Any], parts: tuple[Part, ...] = PARTS) -> Cache:
    """A decode step in which every layer does these parts, each in a named scope such as "csa.attend".

    Args:
      cache: donate it.
      plan: of the step.
      inputs: from ``attended_inputs``.
      parts: the first so many of ``PARTS``.
    """
    spec = cache.schema.spec
    with jax.named_scope("step.begin"):
        step = begin(cache, plan)
    with jax.named_scope("step.angles"):
        given = layer_inputs(spec, step.plan, inputs)
        rotary = {rope: token_rotary(step.plan, rope) for rope in dict.fromkeys(layer.rope for layer in spec.layers)}
    for index, layer in enumerate(spec.layers):
        kind, handle, chosen = layer.kind.value, step.layer(index), None
        with jax.named_scope(f"{kind}.update"):
            handle = handle.update(*given[index])
        if "index_topk" in parts and layer.kind is LayerKind.CSA:
            with jax.named_scope(f"{kind}.index_topk"):
                handle, chosen, *_ = handle.index_topk(inputs["index_queries"], inputs["head_weights"])
        if "attend" in parts:
            with jax.named_scope(f"{kind}.attend"):
                turned = rotary[layer.rope]
                handle, _ = handle.attend(inputs["queries"], inputs["sinks"], indices=chosen, rotary=turned)
        step = handle.step
    return step.end()


def placed_cache(schema: CacheSchema, plan: StepPlan) -> Cache:
    """A noisy cache whose windows hold the rows before the plan's tokens: one token for each request, on the host."""
    cache, ring = noisy_cache(schema), np.arange(schema.ring)
    before = plan.token_position[:, None] - 1
    positions = np.full(cache.window_positions.shape, -1, np.int32)
    positions[:, plan.token_slot] = before - (before - ring) % schema.ring
    return cache.with_arrays({"window_positions": jnp.asarray(positions)})


def step_traffic(schema: CacheSchema, shape: StepShape) -> tuple[int, int]:
    """The fewest bytes of a step of all layers, and the operations of its matrix products."""
    spec, formats, tokens = schema.spec, schema.formats, shape.tokens
    moved = operations = 0
    for kind in LayerKind:
        window = traffic.window_seen(shape, spec.window)
        stored, looks, chosen = window.rows * (formats.window_format.row_bytes + traffic.POSITION), window.looks, 0
        of_kind = update_bytes(kind, shape, schema, traffic.FLOAT32)
        if kind is LayerKind.CSA:
            chosen, asked = spec.index_topk or 1, (kind.ratio, formats.key_format, spec.index_num_heads)
            of_kind += traffic.index_topk(shape, *asked, chosen, traffic.BFLOAT16)
            operations += spec.count(kind) * traffic.index_operations(shape, *asked, chosen)
        if kind is not LayerKind.SWA:
            entries = traffic.all_seen(shape, kind.ratio, chosen or schema.max_context // kind.ratio)
            stored, looks = stored + entries.rows * formats.entry_format.row_bytes, looks + entries.looks
        of_kind += traffic.attend(tokens, spec.num_heads, stored, traffic.BFLOAT16, indices=chosen)
        moved += spec.count(kind) * of_kind
        operations += spec.count(kind) * traffic.attend_operations(spec.num_heads, looks)
    return moved, operations


def whole_decode(requests: int, scale: Scale, implementation: Implementation) -> Outcome:
    """Microseconds of a decode step of requests in long contexts, steps dispatched back to back.

    Every step has a plan of its own; all are on the device before.

    Remarks: CUDA graphs, native calls, megabytes of temporaries, and what each part adds to the step, in microseconds
    and as a share of it.
    """
    full = scale.name == "full"
    spec = deepseek_v4_flash() if full else tiny_spec()
    trials, replays = (max(scale.trials // 2, 2), MOST_REPLAYS) if full else (1, 3)
    dispatches = (replays + replays // 3) * (trials + 1)
    planned = dispatches * len(PARTS)
    first = scale.gather_context - (planned + 128) // 2
    schema = schema_of(spec, requests, -(-(first + planned + 128) // 128) * 128)
    manager = CacheManager(schema, token_buckets=(requests, scale.gather_context))
    handles = admit(manager, first + np.arange(requests) * 128 // requests)
    plans = [manager.prepare_forward((handles, np.ones(requests, np.int64))) for _ in range(planned)]
    cache, inputs = placed_cache(schema, plans[0]), attended_inputs(spec, plans[0])
    on_device = iter([sent(plan) for plan in plans])
    timings: list[Timing] = []
    remarks: dict[str, Any] = {}
    for count in range(1, len(PARTS) + 1):

        def run(cache: Cache, plan: StepPlan, inputs: Any, parts: Any = PARTS[:count]) -> Cache:
            return attended_step(cache, plan, inputs, parts)

        compiled, graphs, compile_seconds = compile_step(run, cache, plans[0], inputs)

        def seconds(dispatches: int, compiled: Any = compiled) -> tuple[float, float]:
            nonlocal cache
            begun = time.perf_counter()
            for plan in itertools.islice(on_device, dispatches):
                cache = compiled(cache, plan, inputs)
            dispatched = time.perf_counter()
            jax.block_until_ready(cache)
            return time.perf_counter() - begun, dispatched - begun

        timings.append(time_dispatches(seconds, replays, trials, compile_seconds=compile_seconds))
        memory = compiled.memory_analysis()
        remarks = {
            "cuda_graphs": graphs,
            "native_calls": native_calls(compiled),
            "layers": len(spec.layers),
            "temporary_megabytes": None if memory is None else round(memory.temp_size_in_bytes / 1e6, 2),
        }
    shapes = [StepShape(np.array(plan.token_position, np.int64), np.ones(requests, np.int64)) for plan in plans]
    moved, operations = np.mean([step_traffic(schema, shape) for shape in shapes[-dispatches:]], axis=0)
    remarks |= added([timing.microseconds for timing in timings])
    return Outcome(timings[-1], remarks, int(moved), int(operations), reads=True)


def added(microseconds: Sequence[float]) -> dict[str, float]:
    """What each part adds to a step, by the times of the steps with the first part, the first two, and all.

    Returns:
      Microseconds, and percent of the whole step; nothing if a step took less than one that does less.
    """
    parts = dict(zip(PARTS, np.diff([0.0, *microseconds]).tolist(), strict=True))
    if min(parts.values()) < 0:
        return {}
    made = {f"{part}_microseconds": round(one, 4) for part, one in parts.items()}
    return made | {f"{part}_percent": round(100 * one / microseconds[-1], 2) for part, one in parts.items()}
