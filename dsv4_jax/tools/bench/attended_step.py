"""The whole decode step of DeepSeek-V4-Flash's layers but for its projections: update, index_topk and attend of each.

The shares of the three come from three steps that are measured alike: with the first, with the first two, with all.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

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
    """A noisy cache whose windows hold the rows before the plan's tokens; the plan is full, and on the host."""
    cache, ring = noisy_cache(schema), np.arange(schema.ring)
    before = plan.request_start[:, None] - 1
    positions = np.full(cache.window_positions.shape, -1, np.int32)
    positions[:, plan.request_slot] = before - (before - ring) % schema.ring
    return cache.with_arrays({"window_positions": jnp.asarray(positions)})


def step_traffic(schema: CacheSchema, shape: StepShape, heads: int | None = None) -> tuple[int, int]:
    """The fewest bytes of a step of all layers, and the operations of its matrix products, with all query heads or so
    many of them.
    """
    spec, formats, tokens = schema.spec, schema.formats, shape.tokens
    heads = heads or spec.num_heads
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
        of_kind += traffic.attend(tokens, heads, stored, traffic.BFLOAT16, indices=chosen)
        moved += spec.count(kind) * of_kind
        operations += spec.count(kind) * traffic.attend_operations(heads, looks)
    return moved, operations


def stack_of(scale: Scale) -> ModelSpec:
    """The layers of a step in a scale."""
    return deepseek_v4_flash() if scale.name == "full" else tiny_spec()


class Decoding(NamedTuple):
    """Requests in long contexts, and how often steps of theirs are dispatched in a measurement."""

    schema: CacheSchema
    lengths: NDArray[np.int64]  # [requests], before the first step
    replays: int
    trials: int

    @property
    def dispatches(self) -> int:
        """Steps of a measurement, each with a plan of its own."""
        return (self.replays + self.replays // 3) * (self.trials + 1)


def decoding(requests: int, scale: Scale, measurements: int, *, tokens: int = 1, lookahead: int = 0) -> Decoding:
    """As many requests as are asked for, for that many measurements one after the other, of so many tokens of each."""
    full, spec = scale.name == "full", stack_of(scale)
    trials, replays = (max(scale.trials // 2, 2), MOST_REPLAYS) if full else (1, 3)
    brought = (replays + replays // 3) * (trials + 1) * measurements * tokens
    first = scale.gather_context - (brought + 128) // 2
    schema = schema_of(spec, requests, -(-(first + brought + 128) // 128) * 128, lookahead=lookahead)
    return Decoding(schema, first + np.arange(requests) * 128 // requests, replays, trials)


def measured(
    work: Decoding, run: Callable[..., Cache], cache: Cache, plans: Sequence[StepPlan], inputs: Any
) -> tuple[Timing, Cache, dict[str, Any]]:
    """Times a step, one dispatched behind the other.

    Args:
      work: what is measured.
      run: (cache, plan, inputs) -> cache.
      cache: given up.
      plans: of ``work.dispatches`` steps, on the device.
      inputs: of every step.

    Returns:
      The time of a step; the cache; CUDA graphs, native calls, layers, and megabytes of temporaries.
    """
    compiled, graphs, compile_seconds = compile_step(run, cache, plans[0], inputs)
    left = iter(plans)

    def seconds(dispatches: int) -> tuple[float, float]:
        nonlocal cache
        begun = time.perf_counter()
        for plan in itertools.islice(left, dispatches):
            cache = compiled(cache, plan, inputs)
        dispatched = time.perf_counter()
        jax.block_until_ready(cache)
        return time.perf_counter() - begun, dispatched - begun

    timing = time_dispatches(seconds, work.replays, work.trials, compile_seconds=compile_seconds)
    memory = compiled.memory_analysis()
    return (
        timing,
        cache,
        {
            "cuda_graphs": graphs,
            "native_calls": native_calls(compiled),
            "layers": len(work.schema.spec.layers),
            "temporary_megabytes": None if memory is None else round(memory.temp_size_in_bytes / 1e6, 2),
        },
    )


def measured_in_parts(
    work: Decoding,
    run_of: Callable[[tuple[Part, ...]], Callable[..., Cache]],
    cache: Cache,
    plans: Sequence[StepPlan],
    inputs: Any,
) -> tuple[Timing, dict[str, Any]]:
    """Times a step, and what each part adds to it: with the first part, with the first two, with all.

    Args:
      work: what is measured.
      run_of: the step that does these parts, as ``measured`` takes it.
      cache: given up.
      plans: of ``work.dispatches`` steps for each measurement, on the device.
      inputs: of every step.

    Returns:
      The time of a step with all parts; the remarks of ``measured`` on it, and those of ``added``.
    """
    timings: list[Timing] = []
    remarks: dict[str, Any] = {}
    for index in range(len(PARTS)):
        mine = plans[index * work.dispatches :][: work.dispatches]
        timing, cache, remarks = measured(work, run_of(PARTS[: index + 1]), cache, mine, inputs)
        timings.append(timing)
    return timings[-1], remarks | added([timing.microseconds for timing in timings])


def counted(
    schema: CacheSchema, plans: Sequence[StepPlan], tokens: int = 1, heads: int | None = None
) -> dict[str, Any]:
    """The bytes and operations of an average step of these, of so many tokens of each request, for an ``Outcome``; see
    ``step_traffic`` for the heads.
    """
    counts = np.full(schema.slots, tokens)
    shapes = [StepShape(np.array(plan.token_position, np.int64)[::tokens], counts) for plan in plans]
    moved, operations = np.mean([step_traffic(schema, shape, heads) for shape in shapes], axis=0)
    return {"bytes_moved": int(moved), "operations": int(operations), "reads": True}


def whole_decode(
    requests: int, scale: Scale, implementation: Implementation, *, tokens: int = 1, lookahead: int = 0
) -> Outcome:
    """Microseconds of a decode step of requests in long contexts, steps dispatched back to back.

    With several tokens of each request it is a step that verifies drafts.

    Every step has a plan of its own; all are on the device before.

    Remarks: CUDA graphs, native calls, megabytes of temporaries, and what each part adds to the step, in microseconds
    and as a share of it.
    """
    work = decoding(requests, scale, len(PARTS), tokens=tokens, lookahead=lookahead)
    manager = CacheManager(work.schema, token_buckets=(requests * tokens, work.schema.max_context))
    brought = admit(manager, work.lengths), np.full(requests, tokens)
    plans = [manager.prepare_forward(brought) for _ in range(len(PARTS) * work.dispatches)]
    cache, inputs = placed_cache(work.schema, plans[0]), attended_inputs(work.schema.spec, plans[0])
    timing, remarks = measured_in_parts(
        work, lambda parts: functools.partial(attended_step, parts=parts), cache, [sent(plan) for plan in plans], inputs
    )
    return Outcome(timing, remarks, **counted(work.schema, plans[-work.dispatches :], tokens))


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
