"""Decode steps under the JAX profiler, and the time that each op of each kind of layer took in them: cache writes, the
indexer's choice and attention, see ``attended_step``; or all of a model's step, see ``model_step``.

Every op runs in a named scope, which XLA keeps as the name of what it compiles it to; the profiler names the compiled
instruction of each event. So events are matched to scopes through the text of the compiled program. What XLA fused
across scopes counts for that of its result.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.model import ModelSpec
from dsv4_jax.spec.presets import tiny_spec
from dsv4_jax.tools.bench.attended_step import attended_inputs, attended_step, placed_cache
from dsv4_jax.tools.bench.workload import FORMATS, admit

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$", re.MULTILINE)
_SCOPE = re.compile(r"\b(step|swa|csa|hca|model)\.(\w+)")
_AROUND_OTHERS = re.compile(r"^[^\"]*? (while|conditional|call)\(")
_TARGET = re.compile(r'custom_call_target="dsv4_(\w+)"')


@dataclasses.dataclass(frozen=True)
class Op:
    """What a compiled instruction belongs to.

    Attributes:
      kind: "swa", "csa" or "hca"; "step" for what is done once a step, "model" for what a model does besides.
      scope: what the step asked for, such as "update"; "other" for what is in no scope.
      target: the native op, without its prefix, or "XLA" for what XLA made itself.
    """

    kind: str
    scope: str
    target: str


@dataclasses.dataclass
class Spent:
    """Calls of an op in all steps, their time in microseconds, and the names of the kernels that ran."""

    calls: int = 0
    microseconds: float = 0.0
    kernels: set[str] = dataclasses.field(default_factory=set)


def trace_schema(*, steps: int, requests: int, context: int, spec: ModelSpec | None = None) -> CacheSchema:
    """The cache of ``trace_steps``, which takes the same arguments.

    Raises:
      SchemaError: the context and the steps together are longer than any request can be.
    """
    longest = -(-(context + 2 * steps) // 128) * 128
    return CacheSchema(spec or tiny_spec(), FORMATS, requests, requests * longest // 128, longest)


def trace_steps(
    folder: Path, *, steps: int, requests: int, context: int, spec: ModelSpec | None = None
) -> dict[Op, Spent]:
    """Runs decode steps under the profiler.

    Args:
      folder: where the profile goes; TensorBoard and XProf read it.
      steps: how many steps are traced; as many run before, untraced.
      requests: tokens of a step.
      context: tokens of each request before the first step.
      spec: of the model; a layer of each kind, and a second CSA layer, if None.

    Returns:
      What each op took in all steps.

    Raises:
      RuntimeError: the profile has no event of the steps.
    """
    schema = trace_schema(steps=steps, requests=requests, context=context, spec=spec)
    manager = CacheManager(schema, token_buckets=(requests, context))
    handles = admit(manager, [context] * requests)
    ones = np.ones(requests, np.int64)
    plans = [manager.prepare_forward((handles, ones)) for _ in range(2 * steps)]
    cache = placed_cache(schema, plans[0])
    inputs = attended_inputs(schema.spec, StepPlan(jnp.asarray(plans[0].packed), plans[0].layout))
    return profiled(folder, attended_step, cache, plans, inputs)


def profiled(
    folder: Path, step: Callable[[Any, StepPlan, Any], Any], state: Any, plans: Sequence[StepPlan], operands: Any
) -> dict[Op, Spent]:
    """Runs steps, the second half of them under the profiler.

    Args:
      folder: where the profile goes.
      step: (state, plan, operands) -> state, to be compiled.
      state: donated.
      plans: of all steps.
      operands: of every step.

    Raises:
      RuntimeError: the profile has no event of the steps.
    """
    # The profiler tells the kernels of a CUDA graph apart, but not which instruction each belongs to.
    options: dict[str, str | bool] = {} if jax.default_backend() == "cpu" else {"xla_gpu_enable_command_buffer": ""}
    compiled = jax.jit(step, donate_argnums=0).lower(state, plans[0], operands).compile(compiler_options=options)
    untraced = len(plans) // 2
    for plan in plans[:untraced]:
        state = compiled(state, plan, operands)
    jax.block_until_ready(state)
    profiler = jax.profiler.ProfileOptions()
    profiler.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=profiler):
        for plan in plans[untraced:]:
            state = compiled(state, plan, operands)
        jax.block_until_ready(state)
    newest = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime, default=None)
    spent = {} if newest is None else sum_events(newest, instructions(compiled.as_text() or ""))
    if not spent:
        raise RuntimeError(f"the profile in {folder} has no event of the traced steps")
    return spent


def instructions(text: str) -> dict[str, Op]:
    """Instruction name -> op, for the instructions of a compiled program; without those that run others."""
    found = {}
    for name, rest in _INSTRUCTION.findall(text):
        if _AROUND_OTHERS.search(rest):
            continue
        scope = re.search(r'op_name="([^"]*)"', rest)
        # The innermost one.
        kind, where = ([("step", "other")] + (_SCOPE.findall(scope[1]) if scope else []))[-1]
        target = _TARGET.search(rest)
        found[name] = Op(kind, where, target[1] if target else "XLA")
    return found


def sum_events(profile: Path, ops: Mapping[str, Op]) -> dict[Op, Spent]:
    """Adds up a profile's events by op: those of the device if it has any, else those of the host."""
    planes = list(jax.profiler.ProfileData.from_file(str(profile)).planes)
    for of_device in (True, False):
        spent: dict[Op, Spent] = {}
        for plane in planes:
            if plane.name.startswith("/device:GPU") == of_device:
                for op, name, nanoseconds in _events(plane, ops, of_device):
                    one = spent.setdefault(op, Spent())
                    one.calls += 1
                    one.microseconds += nanoseconds / 1e3
                    if of_device:
                        one.kernels.add(name)
        if spent:
            return spent
    return {}


def _events(plane: Any, ops: Mapping[str, Op], of_device: bool) -> Iterator[tuple[Op, str, float]]:
    for line in plane.lines:
        # A device plane may have lines that sum others up.
        if of_device and not line.name.startswith("Stream"):
            continue
        for event in line.events:
            op = ops.get(str(dict(event.stats).get("hlo_op")))
            if op is not None:
                yield op, event.name, event.duration_ns
