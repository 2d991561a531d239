"""The decode step of DeepSeek-V4-Flash's layers on several devices at once, beside the same step on one.

Shards lie on different devices, with as many requests on each; they have nothing to tell each other, and the difference
is what one host and one program cost. Devices that share a shard split its query heads, and the difference is the gain.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.cache.shards import change_shard, over_shards
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.host.shards import ShardedManager
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.ops import Implementation
from dsv4_jax.tools.bench.attended_step import (
    PARTS,
    Decoding,
    Part,
    attended_inputs,
    attended_step,
    counted,
    decoding,
    measured,
    measured_in_parts,
    placed_cache,
)
from dsv4_jax.tools.bench.measure import Outcome, Timing
from dsv4_jax.tools.bench.step import sent
from dsv4_jax.tools.bench.targets import Target
from dsv4_jax.tools.bench.workload import Scale, admit

MOST = 1.05
"""Times as long as on one device that a step of shards on several may take."""
_DATA, _TENSOR = "data", "tensor"


def step_of_shards(requests: int, tensor: int, scale: Scale, implementation: Implementation) -> Outcome:
    """Microseconds of a decode step on all devices, steps dispatched back to back.

    The same step is measured on the first device alone, with all query heads, before and after; the shorter of the two
    is what it is compared with. Every step has a plan of its own; all are on the devices before. Bytes and operations
    are those of one device.

    Args:
      requests: in each shard.
      tensor: so many devices share a shard and split its query heads.
      scale: of what is measured.
      implementation: of the ops.

    Remarks: devices, how many share a shard, microseconds on one, the ratio of the two, what each part adds to the step
    on all and on one, and of each device CUDA graphs, native calls, and megabytes of temporaries.
    """
    work = decoding(requests, scale, len(PARTS))
    plans = _plans(CacheManager(work.schema, **_buckets(work, scale)), work)
    before, parts = _on_one(work, plans)
    sizes = (jax.device_count() // tensor, tensor)
    mesh = jax.make_mesh(sizes, (_DATA, _TENSOR), axis_types=(AxisType.Auto,) * 2)
    timing, remarks = _on_all(work, plans[0], mesh, scale)
    last = plans[-work.dispatches :]
    cache, inputs = placed_cache(work.schema, last[0]), attended_inputs(work.schema.spec, last[0])
    after, _, _ = measured(work, attended_step, cache, [sent(plan) for plan in last], inputs)
    alone = min(before.microseconds, after.microseconds)
    remarks |= {
        "devices": mesh.size,
        "devices_a_shard": tensor,
        "one_device_microseconds": round(alone, 4),
        "times_one_device": round(timing.microseconds / alone, 4) if alone > 0 else None,
    } | {f"one_device_{name}": value for name, value in parts.items() if name.startswith(PARTS)}
    target = Target(MOST * alone, alone) if tensor == 1 else None
    heads = work.schema.spec.num_heads // tensor
    return Outcome(timing, remarks, **counted(work.schema, last, heads=heads), target=target)


def _buckets(work: Decoding, scale: Scale) -> dict[str, Any]:
    return {"token_buckets": (work.schema.slots, scale.gather_context)}


def _plans(manager: CacheManager, work: Decoding) -> list[StepPlan]:
    tokens = admit(manager, work.lengths), np.ones(work.schema.slots, np.int64)
    return [manager.prepare_forward(tokens) for _ in range(len(PARTS) * work.dispatches)]


def _on_one(work: Decoding, plans: list[StepPlan]) -> tuple[Timing, dict[str, Any]]:
    """The time on JAX's default device, and remarks."""
    cache, inputs = placed_cache(work.schema, plans[0]), attended_inputs(work.schema.spec, plans[0])
    return measured_in_parts(work, _step, cache, [sent(plan) for plan in plans], inputs)


def _step(parts: tuple[Part, ...]) -> Any:
    return functools.partial(attended_step, parts=parts)


def _on_all(work: Decoding, plan_of_one: StepPlan, mesh: Mesh, scale: Scale) -> tuple[Timing, dict[str, Any]]:
    """The time on all devices of a mesh, and remarks; what tokens bring is the same in each shard."""
    schema, shards = work.schema, mesh.shape[_DATA]
    manager = ShardedManager(schema, shards, **_buckets(work, scale))
    handles: list[int] = []
    for shard, its_manager in enumerate(manager.managers):
        handles += [manager.handle(shard, local) for local in admit(its_manager, work.lengths).tolist()]
    tokens = np.array(handles), np.ones(len(handles), np.int64)
    beside = NamedSharding(mesh, PartitionSpec(_DATA))
    plans = []
    for _ in range(len(PARTS) * work.dispatches):
        plan = manager.prepare_forward(tokens).step_plan
        plans.append(StepPlan(jax.device_put(plan.packed, beside), plan.layout))
    cache = init_cache(schema, mesh=mesh, axis=_DATA)
    for shard in range(shards):
        cache = change_shard(cache, shard, lambda _: placed_cache(schema, plan_of_one))
    given = attended_inputs(schema.spec, plan_of_one)
    of_heads = {"queries": PartitionSpec(None, _TENSOR), "sinks": PartitionSpec(_TENSOR)}
    specs = {name: of_heads.get(name, PartitionSpec()) for name in given}
    inputs = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in given.items()}

    def over_mesh(parts: tuple[Part, ...]) -> Any:
        def step(cache: Cache, plan: StepPlan, inputs: Any) -> Cache:
            return attended_step(cache, plan, inputs, parts)

        return over_shards(step, mesh, axis=_DATA, in_specs=(specs,))

    return measured_in_parts(work, over_mesh, cache, plans, inputs)
