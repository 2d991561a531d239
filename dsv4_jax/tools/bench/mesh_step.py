"""The decode step of DeepSeek-V4-Flash's layers on several devices at once, a shard with as many requests on each,
beside the same step on one. Shards have nothing to tell each other; the difference is what one host and program cost.
"""

from __future__ import annotations

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
    Decoding,
    attended_inputs,
    attended_step,
    counted,
    decoding,
    measured,
    placed_cache,
)
from dsv4_jax.tools.bench.measure import Outcome
from dsv4_jax.tools.bench.step import sent
from dsv4_jax.tools.bench.targets import Target
from dsv4_jax.tools.bench.workload import Scale, admit

MOST = 1.05
"""Times as long as on one device that a step of all may take."""
_AXIS = "data"


def step_of_shards(requests: int, scale: Scale, implementation: Implementation) -> Outcome:
    """Microseconds of a decode step on all devices, steps dispatched back to back; so many requests are on each.

    The same step is measured on the first device alone, before and after; the shorter of the two is what it is
    compared with. Every step has a plan of its own; all are on the devices before. Bytes and operations are those of
    one device.

    Remarks: devices, microseconds on one, the ratio of the two, and of each device CUDA graphs, native calls, and
    megabytes of temporaries.
    """
    work = decoding(requests, scale, 1)
    plans = _plans(CacheManager(work.schema, **_buckets(work, scale)), work)
    before = _on_one(work, plans)
    mesh = jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,))
    timing, remarks = _on_all(work, plans[0], mesh, scale)
    alone = min(before, _on_one(work, plans))
    remarks |= {
        "devices": mesh.size,
        "one_device_microseconds": round(alone, 4),
        "times_one_device": round(timing.microseconds / alone, 4) if alone > 0 else None,
    }
    return Outcome(timing, remarks, **counted(work.schema, plans), target=Target(MOST * alone, alone))


def _buckets(work: Decoding, scale: Scale) -> dict[str, Any]:
    return {"token_buckets": (work.schema.slots, scale.gather_context)}


def _plans(manager: CacheManager, work: Decoding) -> list[StepPlan]:
    tokens = admit(manager, work.lengths), np.ones(work.schema.slots, np.int64)
    return [manager.prepare_forward(tokens) for _ in range(work.dispatches)]


def _on_one(work: Decoding, plans: list[StepPlan]) -> float:
    """Microseconds on JAX's default device."""
    cache, inputs = placed_cache(work.schema, plans[0]), attended_inputs(work.schema.spec, plans[0])
    return measured(work, attended_step, cache, [sent(plan) for plan in plans], inputs)[0].microseconds


def _on_all(work: Decoding, plan_of_one: StepPlan, mesh: Mesh, scale: Scale) -> tuple[Any, dict[str, Any]]:
    """The time on all devices of a mesh, and remarks; what tokens bring is the same in each shard."""
    schema, everywhere = work.schema, NamedSharding(mesh, PartitionSpec())
    manager = ShardedManager(schema, mesh.size, **_buckets(work, scale))
    handles: list[int] = []
    for shard, its_manager in enumerate(manager.managers):
        handles += [manager.handle(shard, local) for local in admit(its_manager, work.lengths).tolist()]
    tokens = np.array(handles), np.ones(len(handles), np.int64)
    beside = NamedSharding(mesh, PartitionSpec(_AXIS))
    plans = []
    for _ in range(work.dispatches):
        plan = manager.prepare_forward(tokens).step_plan
        plans.append(StepPlan(jax.device_put(plan.packed, beside), plan.layout))
    cache = init_cache(schema, mesh=mesh, axis=_AXIS)
    for shard in range(mesh.size):
        cache = change_shard(cache, shard, lambda _: placed_cache(schema, plan_of_one))
    inputs = jax.device_put(attended_inputs(schema.spec, plan_of_one), everywhere)

    def step(cache: Cache, plan: StepPlan, inputs: Any) -> Cache:
        return attended_step(cache, plan, inputs)

    run = over_shards(step, mesh, axis=_AXIS, in_specs=(PartitionSpec(),))
    timing, _, remarks = measured(work, run, cache, plans, inputs)
    return timing, remarks
