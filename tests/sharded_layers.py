"""Whole steps plain and inside ``jax.shard_map`` on two devices: equal bytes, and every pool where it lies.

Run by test_sharded_layers.py with a seed, in a process of its own: JAX settles the number of devices when it starts.
"""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place
from harness import SPEC, inputs_of, random_tokens, random_weights, update
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, LayerKind, StepPlan, begin, init_cache
from dsv4_jax.cache.pools import slots_axis

SHARDS, STEPS = 2, 3
MODEL = dataclasses.replace(SPEC, layers=SPEC.layers * 2)
SCHEMA = CacheSchema(MODEL, CacheFormats(), slots=8, blocks=24, max_context=384)


def unrolled(cache, plan, weights, brought):
    """One step, layer after layer."""
    return update(cache, plan, weights, brought)


def over_steps(cache, plans, weights, brought):
    """A ``lax.scan`` over steps, which begin and end in its body."""
    return jax.lax.scan(lambda cache, plan: (update(cache, plan, weights, brought), None), cache, plans)[0]


def over_layers(cache, plan, weights, brought):
    """A ``lax.scan`` over the layers of each kind."""
    kinds, step = cache.schema.spec.layer_kinds, begin(cache, plan).scanning()
    for kind in LayerKind:
        layers = [layer for layer, other in enumerate(kinds) if other is kind]

        def body(step, xs, kind=kind, first=layers[0]):
            layer, weights, arrays = xs
            inputs = [inputs_of(step.plan, MODEL, first, weights, arrays, prefix) for prefix in ("", "index_")]
            return step.layer(layer, kind=kind).update(arrays["rows"], *inputs).step, None

        stacked = [jax.tree.map(lambda *a: jnp.stack(a), *[of[layer] for layer in layers]) for of in (weights, brought)]
        step, _ = jax.lax.scan(body, step, (jnp.array(layers), *stacked))
    return step.end()


def prefilled(rng, weights):
    """The manager and cache of one shard whose requests are at random lengths, and its requests."""
    manager, cache = CacheManager(SCHEMA, token_buckets=(SCHEMA.slots, 512)), init_cache(SCHEMA)
    requests = [manager.admit() for _ in range(3)]
    counts = {request: int(rng.integers(1, 150)) for request in requests}
    plan = manager.prepare_forward(counts)
    return manager, jax.jit(update)(cache, plan, weights, random_tokens(rng, plan.layout.tokens, spec=MODEL)), requests


def main(seed):
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, MODEL)
    shards = [prefilled(rng, weights) for _ in range(SHARDS)]
    brought = [random_tokens(rng, SCHEMA.slots, spec=MODEL) for _ in shards]
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    empty = init_cache(SCHEMA, mesh=mesh, axis="data")
    specs = empty.partition_specs("data")

    def side_by_side():
        arrays = {name: [np.asarray(cache.arrays[name]) for _, cache, _ in shards] for name in empty.arrays}
        joined = {name: np.concatenate(parts, slots_axis(name)) for name, parts in arrays.items()}
        joined = {name: jax.device_put(array, empty.arrays[name].sharding) for name, array in joined.items()}
        return empty.with_arrays(joined)

    together = jax.tree.map(lambda *parts: np.concatenate(parts), *brought)
    for program, check_vma in itertools.product((unrolled, over_steps, over_layers), (False, True)):
        what = f"{program.__name__}, check_vma {check_vma}"
        steps = STEPS if program is over_steps else None
        plans = []
        for manager, _, requests in shards:
            plans.append(manager.prepare_forward(dict.fromkeys(requests, 1), steps=steps))
            manager.cancel(plans[-1])
        plan = StepPlan(np.concatenate([plan.packed for plan in plans], -1), plans[0].layout)
        plan_spec = PartitionSpec(None, "data") if steps else PartitionSpec("data")
        mapped = jax.shard_map(
            program,
            mesh=mesh,
            in_specs=(specs, plan_spec, PartitionSpec(), PartitionSpec("data")),
            out_specs=specs,
            check_vma=check_vma,
        )
        given = (side_by_side(), plan, weights, together)
        # Outside of shard_map it is refused, and the error says what to do.
        with pytest.raises(ValueError, match=r"jax\.shard_map"):
            jax.eval_shape(program, *given)
        compiled = jax.jit(mapped, donate_argnums=0).lower(*given).compile()
        assert_in_place(compiled, dict(SCHEMA.arrays), temporary_bytes=1 << 21)
        made = compiled(*given)
        plain = [
            jax.jit(program)(cache, plan, weights, mine)
            for (_, cache, _), plan, mine in zip(shards, plans, brought, strict=True)
        ]
        for name, array in made.arrays.items():
            axis = slots_axis(name)
            expected = np.concatenate([np.asarray(cache.arrays[name]) for cache in plain], axis)
            assert expected.tobytes() == np.asarray(array).tobytes(), f"{what}: {name}"
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, specs.arrays[name]), array.ndim), name
        print("equal:", what)


if __name__ == "__main__":
    main(int(sys.argv[1]))
