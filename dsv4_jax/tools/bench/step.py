"""The whole decode step, host and device: all writes of DeepSeek-V4-Pro's 61 layers, and the planning before them."""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.cache.rotary import closing_rotary, token_rotary
from dsv4_jax.cache.step import begin
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops.operands import RawRows
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, LayerKind
from dsv4_jax.spec.model import ModelSpec
from dsv4_jax.spec.presets import deepseek_v4_pro, tiny_spec
from dsv4_jax.tools.bench.decode import layer_update
from dsv4_jax.tools.bench.measure import MOST_REPLAYS, Outcome, Timing, native_calls, spread
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import (
    Scale,
    Workload,
    admit,
    compressor_inputs,
    model_of,
    noise,
    noisy_cache,
    plan_of,
    schema_of,
)

STEPS_PER_DISPATCH = 8
REFERENCE_LAYERS = 8
PLANS_ON_DEVICE = 4


def model(scale: Scale, implementation: str = "native") -> ModelSpec:
    """DeepSeek-V4-Pro, or the tiny model of the tiny scale; only the first 8 layers for the jnp definition.

    All 61 take minutes to compile, and then XLA copies whole pools. The time of 8 layers is scaled up.
    """
    spec = deepseek_v4_pro() if scale.name == "full" else tiny_spec()
    return spec if implementation == "native" else dataclasses.replace(spec, layers=spec.layers[:REFERENCE_LAYERS])


def step_inputs(spec: ModelSpec, plan: StepPlan) -> dict[str, Any]:
    """What a step's tokens bring to a layer of each kind, and weights; layers of a kind share them."""
    made: dict[str, Any] = {
        "rows": noise((plan.layout.tokens, HEAD_DIM), jnp.bfloat16),
        "norm": noise((HEAD_DIM,), "f4"),
    }
    for kind, widths in ((LayerKind.CSA, (HEAD_DIM, KEY_DIM)), (LayerKind.HCA, (HEAD_DIM,))):
        if spec.count(kind):
            layer = spec.layers[spec.layer_kinds.index(kind)]
            made[kind.value] = [compressor_inputs(plan, layer, width, jnp.float32, width) for width in widths]
    return made


def layer_inputs(spec: ModelSpec, plan: StepPlan, inputs: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What ``LayerCache.update`` of each layer takes, the angles of the step computed once for all layers."""
    angles = {rope: token_rotary(plan, rope) for rope in dict.fromkeys(layer.rope for layer in spec.layers)}
    closing = {
        layer: closing_rotary(plan, layer.kind.ratio, layer.rope)
        for layer in dict.fromkeys(spec.layers)
        if layer.kind.ratio
    }
    return [
        (
            RawRows(inputs["rows"], inputs["norm"], angles[layer.rope]),
            *(one._replace(rotary=closing[layer]) for one in inputs.get(layer.kind.value, ())),
        )
        for layer in spec.layers
    ]


def decode_step(cache: Cache, plan: StepPlan, inputs: dict[str, Any], implementation: str = "native") -> Cache:
    """Begin, the angles of the step, every layer's update, and end."""
    step = begin(cache, plan, implementation=implementation)
    for index, given in enumerate(layer_inputs(cache.schema.spec, step.plan, inputs)):
        step = step.layer(index).update(*given).step
    return step.end()


def _make(scale: Scale, spec: ModelSpec, steps: int) -> tuple[CacheSchema, CacheManager, tuple[np.ndarray, np.ndarray]]:
    """A manager whose requests are in the middle of their contexts, evenly spread over the windows' phases."""
    requests = scale.step_requests
    context = scale.context + 128 * (1 + -(-steps // 128))
    schema = schema_of(spec, requests, context)
    chunk = max(128 * requests, scale.context)
    manager = CacheManager(schema, token_buckets=(requests, chunk))
    handles = admit(manager, scale.context - 128 + np.arange(requests) * 128 // requests)
    return schema, manager, (handles, np.ones(requests, np.int64))


def whole_step(way: str, scale: Scale, implementation: str) -> Outcome:
    """Microseconds of one decode step's cache updates, steps dispatched back to back.

    The difference of many dispatches and a third as many: a server's device does not wait for the first one.

    Args:
      way: "device": a few plans are on the device before, and used in turn. "host": each step is planned by
        `prepare_forward` and sent, as in a server. "scan": 8 steps in one dispatch.
      scale: sizes.
      implementation: "native", or "reference" for an estimate from its first layers, see ``model``.
    """
    spec = model(scale, implementation)
    scaled = len(model(scale).layers) / len(spec.layers)
    trials = max(scale.trials // 2, 2)
    replays = MOST_REPLAYS if scale.name == "full" and implementation == "native" else 2
    per_dispatch = STEPS_PER_DISPATCH if way == "scan" else 1
    fewer = replays // 3
    planned = (replays + fewer) * (trials + 1) if way == "host" else replays * per_dispatch
    schema, manager, (handles, counts) = _make(scale, spec, planned)

    if way == "host":
        host_plans, layout = [], manager.layouts[0]
    else:
        stacked = per_dispatch if way == "scan" else None
        host_plans = [manager.prepare_forward((handles, counts), steps=stacked) for _ in range(PLANS_ON_DEVICE)]
        layout = host_plans[0].layout
    inputs = step_inputs(schema.spec, StepPlan(jnp.full(layout.size, -1, jnp.int32), layout))
    plans = [StepPlan(jnp.asarray(plan.packed), plan.layout) for plan in host_plans]

    def run(cache: Cache, plan: StepPlan, inputs: Any) -> Cache:
        if way == "scan":
            return jax.lax.scan(lambda c, one: (decode_step(c, one, inputs, implementation), None), cache, plan)[0]
        return decode_step(cache, plan, inputs, implementation)

    cache = noisy_cache(schema)
    shape = (per_dispatch, layout.size) if way == "scan" else (layout.size,)
    example = StepPlan(jax.ShapeDtypeStruct(shape, jnp.int32), layout)
    compiled, graphs, compile_seconds = _compile(run, cache, example, inputs)

    def next_plan(step: int) -> StepPlan:
        return manager.prepare_forward((handles, counts)) if way == "host" else plans[step % PLANS_ON_DEVICE]

    def dispatch(count: int) -> tuple[float, float]:
        nonlocal cache
        begin = time.perf_counter()
        for step in range(count):
            cache = compiled(cache, next_plan(step), inputs)
        dispatched = time.perf_counter()
        jax.block_until_ready(cache)
        return time.perf_counter() - begin, dispatched - begin

    times, shares = [], []
    steps = (replays - fewer) * per_dispatch
    for trial in range(trials + 1):
        short, _ = dispatch(fewer)
        long, host = dispatch(replays)
        if trial:  # the first warms up
            times.append((long - short) / steps * 1e6 * scaled)
            shares.append(host / long)
    timing = Timing(
        statistics.median(times), spread(times), statistics.median(shares), calls=steps, compile_seconds=compile_seconds
    )
    remarks = {"cuda_graphs": graphs, "native_calls": native_calls(compiled), "layers": len(schema.spec.layers)}
    return Outcome(timing, remarks)


def _compile(run: Callable[..., Cache], *args: Any) -> tuple[jax.stages.Compiled, int | None, float]:
    """The compiled function with its first argument donated, how many CUDA graphs it launches, and the time it took."""
    begin = time.perf_counter()
    lowered = jax.jit(run, donate_argnums=0).lower(*args)
    if jax.default_backend() == "cpu":
        return lowered.compile(), None, time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        return compiled, count_graphs(Path(folder)), time.perf_counter() - begin


def count_graphs(dump: Path) -> int | None:
    """CUDA graphs in the thunk sequence that XLA dumped; None if it dumped none."""
    text = thunk_sequence(dump)
    return None if text is None else len(re.findall(r"^ *\d+: kCommandBuffer", text, re.MULTILINE))


def thunk_sequence(dump: Path) -> str | None:
    """What XLA says it will run, a line for each thunk, indented inside a CUDA graph; None if it dumped nothing."""
    # The first file is written only if a pass changed something, such as capturing calls into a graph.
    files = [*dump.glob("*.thunk_sequence_after_thunk_passes.txt"), *dump.glob("*.thunk_sequence.txt")]
    return files[0].read_text() if files else None


def prepare_forward(scale: Scale, implementation: str) -> Outcome:
    """Host time to plan one decode step of many requests that are all at different lengths."""
    requests, steps = scale.host_requests, 50 * scale.trials
    context = scale.context + steps + 128
    schema = schema_of(deepseek_v4_pro(), requests, context)
    manager = CacheManager(schema, token_buckets=(requests, scale.context))
    handles = admit(manager, np.random.default_rng(0).integers(1, scale.context, requests))
    counts = np.ones(requests, np.int64)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        manager.prepare_forward((handles, counts))
        times.append((time.perf_counter() - begin) * 1e6)
    return Outcome(Timing(statistics.median(times), spread(times), host_share=1.0))


def reset_slots(reset: bool, scale: Scale, implementation: str) -> Workload:
    """``begin`` of the whole model, with nothing to do or with every slot to reset."""
    schema = schema_of(model(scale), scale.step_requests, scale.context)
    requests = scale.step_requests
    layout, ones = PlanLayout(requests, requests), np.ones(requests, np.int64)
    host = build_plan(layout, np.arange(requests), ones * 128, ones, np.full(requests, reset))
    calls = max(scale.calls // 8, 1)

    def call(cache: Cache, plan: StepPlan, operands: Any, layer: Any) -> tuple[Cache, jax.Array]:
        step = begin(cache, plan, implementation=implementation)
        return step.end(partial=True), step.plan.packed

    slot = 4 * schema.max_blocks + 4 * schema.ring * len(schema.spec.layers)
    return Workload(
        key=schema,
        state=lambda: noisy_cache(schema),
        call=call,
        gates=[StepPlan(jnp.asarray(host.packed), layout)],
        operands=[None],
        layers=1,
        calls=calls,
        bytes_moved=requests * slot if reset else 0,
    )


def floor(scale: Scale, implementation: str) -> Workload:
    """The smallest call there is: an SWA layer's update in a step of one token that is padding."""
    schema = schema_of(model_of(LayerKind.SWA, 2), 1, 128)
    shape = StepShape(np.zeros(1, np.int64), np.ones(1, np.int64))
    padding = plan_of(shape, np.zeros(1, np.int64))
    padding = StepPlan(jnp.full_like(padding.packed, -1), padding.layout)
    return Workload(
        key=schema,
        state=lambda: init_cache(schema),
        call=layer_update(implementation),
        gates=[padding],
        operands=[(noise((1, HEAD_DIM), jnp.bfloat16),)],
        layers=2,
        calls=2 * scale.calls,
        bytes_moved=0,
    )
