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
from dsv4_jax.ops import Implementation
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


def model(scale: Scale, implementation: Implementation = "native") -> ModelSpec:
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


def decode_step(
    cache: Cache, plan: StepPlan, inputs: dict[str, Any], implementation: Implementation = "native"
) -> Cache:
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


class _Step:
    """The decode step of a scale, compiled, with a cache and a manager that are in the middle of their work.

    Args:
      scale: sizes.
      implementation: "native", or "reference" for a step of the first layers, see ``model``.
      planned: steps that ``plan`` is called for, at most.
      per_dispatch: steps of a dispatch, 1 for a step that takes its plan alone.
      ahead: steps that are planned at a time and dispatched one by one; the device counts which of them comes next.
    """

    def __init__(
        self, scale: Scale, implementation: Implementation, planned: int, per_dispatch: int = 1, ahead: int = 1
    ) -> None:
        self.schema, self.manager, self._batch = _make(scale, model(scale, implementation), planned)
        self._steps = max(per_dispatch, ahead) if max(per_dispatch, ahead) > 1 else None
        layout = self.manager.layouts[0]
        self.inputs = step_inputs(self.schema.spec, StepPlan(jnp.full(layout.size, -1, jnp.int32), layout))

        def run_next(state: tuple[Cache, jax.Array], plans: StepPlan, inputs: Any) -> tuple[Cache, jax.Array]:
            cache, count = state
            return decode_step(cache, plans.step(count % ahead), inputs, implementation), count + 1

        def run(cache: Cache, plan: StepPlan, inputs: Any) -> Cache:
            if self._steps is None:
                return decode_step(cache, plan, inputs, implementation)
            return jax.lax.scan(lambda c, one: (decode_step(c, one, inputs, implementation), None), cache, plan)[0]

        self.state: Any = noisy_cache(self.schema)
        if ahead > 1:
            self.state = (self.state, jnp.zeros((), jnp.int32))
        shape = (layout.size,) if self._steps is None else (self._steps, layout.size)
        example = StepPlan(jax.ShapeDtypeStruct(shape, jnp.int32), layout)
        self.compiled, self.graphs, self.compile_seconds = compile_step(
            run if ahead == 1 else run_next, self.state, example, self.inputs
        )

    def plan(self) -> StepPlan:
        """The next dispatch's, as `prepare_forward` returns it: NumPy."""
        return self.manager.prepare_forward(self._batch, steps=self._steps)

    def dispatch(self, plan: StepPlan) -> None:
        """Sends one step (or several, of a scan), and waits for nothing."""
        self.state = self.compiled(self.state, plan, self.inputs)

    def seconds(self, plans: Callable[[int], StepPlan], count: int) -> tuple[float, float]:
        """Time of so many dispatches, `plans` called for each, and the host's part of it."""
        begin = time.perf_counter()
        for index in range(count):
            self.dispatch(plans(index))
        dispatched = time.perf_counter()
        jax.block_until_ready(self.state)
        return time.perf_counter() - begin, dispatched - begin


def sent(plan: StepPlan) -> StepPlan:
    """A plan of NumPy, on the device."""
    return StepPlan(jax.device_put(plan.packed), plan.layout)


def whole_step(way: str, scale: Scale, implementation: Implementation) -> Outcome:
    """Microseconds of one decode step's cache updates, steps dispatched back to back: of host and device together.

    The difference of many dispatches and a third as many: a server's device does not wait for the first one.

    Args:
      way: "turns": a few plans are on the device before, and used in turn. "one": always the same of them, so that no
        address changes. "scan": as "turns", 8 steps in one dispatch. "planned": each step is planned by
        `prepare_forward` and dispatched with the NumPy plan, as in a server. "transferred": planned, and sent by
        `jax.device_put` before it is dispatched. "ahead": 8 steps are planned at a time and sent together, and the
        device picks the next one: an argument's address changes every eighth step only.
      scale: sizes.
      implementation: "native", or "reference" for an estimate from its first layers, see ``model``.
    """
    trials = max(scale.trials // 2, 2)
    full = scale.name == "full" and implementation == "native"
    # A server goes on and on: its host runs ahead until the runtime makes it wait.
    replays = (4 * MOST_REPLAYS if way in ("planned", "transferred", "ahead") else MOST_REPLAYS) if full else 2
    per_dispatch = STEPS_PER_DISPATCH if way == "scan" else 1
    ahead = STEPS_PER_DISPATCH if way == "ahead" else 1
    planned = (replays + replays // 3 + 2 * ahead) * (trials + 1) * per_dispatch
    step = _Step(scale, implementation, planned, per_dispatch, ahead)
    scaled = len(model(scale).layers) / len(step.schema.spec.layers)
    kept = {"turns": PLANS_ON_DEVICE, "scan": PLANS_ON_DEVICE, "one": 1}.get(way, 0)
    on_device = [sent(step.plan()) for _ in range(kept)]
    latest: list[StepPlan] = []

    def planned_ahead(index: int) -> StepPlan:
        if index % ahead == 0:
            latest[:] = [sent(step.plan())]
        return latest[0]

    plans: Callable[[int], StepPlan] = {
        "ahead": planned_ahead,
        "planned": lambda _: step.plan(),
        "transferred": lambda _: sent(step.plan()),
    }.get(way, lambda index: on_device[index % kept])

    timing = time_dispatches(
        lambda count: step.seconds(plans, count),
        replays,
        trials,
        steps=per_dispatch,
        scaled=scaled,
        compile_seconds=step.compile_seconds,
    )
    return Outcome(
        timing,
        {
            "cuda_graphs": step.graphs,
            "native_calls": native_calls(step.compiled),
            "layers": len(step.schema.spec.layers),
        },
    )


def time_dispatches(
    seconds: Callable[[int], tuple[float, float]],
    replays: int,
    trials: int,
    *,
    steps: int = 1,
    scaled: float = 1.0,
    compile_seconds: float = 0.0,
) -> Timing:
    """One step's time: the difference of many dispatches and a third as many, the median of several trials.

    Args:
      seconds: makes so many dispatches: how long they take, and the host's part of it.
      replays: how many.
      trials: how often, besides one to warm up.
      steps: of a dispatch.
      scaled: what times are multiplied by.
      compile_seconds: for the timing.
    """
    fewer, times, shares = replays // 3, [], []
    counted = (replays - fewer) * steps
    for trial in range(trials + 1):
        short, _ = seconds(fewer)
        long, host = seconds(replays)
        if trial:  # the first warms up
            times.append((long - short) / counted * 1e6 * scaled)
            shares.append(host / long)
    return Timing(
        statistics.median(times), spread(times), statistics.median(shares), counted, compile_seconds=compile_seconds
    )


def host_part(part: str, scale: Scale, implementation: Implementation) -> Outcome:
    """What the host alone spends on one part of a planned step, microseconds; the device is idle when it begins.

    Args:
      part: "prepare_forward", "device_put" of its plan, "dispatch" of a step whose plan is on the device, or
        "send_and_dispatch" of one whose plan is NumPy's: with "prepare_forward" that is a planned step.
      scale: sizes.
      implementation: of the ops.
    """
    full = scale.name == "full"
    trials, count = scale.trials, MOST_REPLAYS if full else 2
    step = _Step(scale, implementation, count * (trials + 1) + 1)
    first = step.plan()
    on_device = sent(first)
    work: Callable[[], Any] = {
        "prepare_forward": step.plan,
        "device_put": lambda: sent(first),
        "dispatch": lambda: step.dispatch(on_device),
        "send_and_dispatch": lambda: step.dispatch(first),
    }[part]
    times = []
    for trial in range(trials + 1):
        made = []
        begin = time.perf_counter()
        for _ in range(count):
            made.append(work())
        elapsed = time.perf_counter() - begin
        jax.block_until_ready((step.state, [plan.packed for plan in made if plan is not None]))
        if trial:  # the first warms up
            times.append(elapsed / count * 1e6)
    return Outcome(Timing(statistics.median(times), spread(times), host_share=1.0, calls=count))


def compile_step(run: Callable[..., Any], *args: Any) -> tuple[jax.stages.Compiled, int | None, float]:
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


def prepare_forward(scale: Scale, implementation: Implementation) -> Outcome:
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


def reset_slots(reset: bool, scale: Scale, implementation: Implementation) -> Workload:
    """``begin`` of the whole model, with nothing to do or with every slot to reset."""
    schema = schema_of(model(scale), scale.step_requests, scale.context)
    requests = scale.step_requests
    layout, ones = PlanLayout(requests, requests, displaces=False), np.ones(requests, np.int64)
    host = build_plan(layout, np.arange(requests), ones * 128, ones, np.full(requests, reset))
    calls = max(scale.calls // 8, 1)

    def call(cache: Cache, plan: StepPlan, operands: Any, layer: Any) -> tuple[Cache, jax.Array]:
        step = begin(cache, plan, implementation=implementation)
        return step.end(partial=True), step.plan.packed

    slot = schema.table_bytes + 4 * schema.ring * len(schema.spec.layers)
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


def floor(scale: Scale, implementation: Implementation) -> Workload:
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
