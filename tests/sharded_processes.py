"""One of two processes with two devices each, over which a cache of four shards lies; each manages its own two.

Run by test_sharded_life.py with a seed, the number of the process and a port.
"""

import sys

import jax
import numpy as np
from harness import Driver, assert_same_bytes, random_tokens, random_weights, update
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sharded_life import BUCKETS, CONTEXT, SIZES, SPEC

from dsv4_jax import (
    CacheFormats,
    CacheSchema,
    ShardedManager,
    StepPlan,
    init_cache,
    over_shards,
    preempt,
    resume,
    shard_of,
)
from dsv4_jax.host.sharded_plan import largest


def main(seed, number, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    weights, rng = random_weights(np.random.default_rng(seed)), np.random.default_rng([seed, number])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    schema = CacheSchema(SPEC, CacheFormats(), **SIZES)
    cache = init_cache(schema, mesh=mesh, axis="data")
    manager = ShardedManager(schema, 2, token_buckets=BUCKETS, first=2 * number)
    step = over_shards(update, mesh, in_specs=(PartitionSpec(), PartitionSpec("data")))
    sequences, here = {}, NamedSharding(mesh, PartitionSpec("data"))

    def feed(counts):
        nonlocal cache
        # Every process needs a plan of the same layout: the largest that one of them needs.
        mine = manager.layouts.index(manager.layout_of(counts))
        all_of_them = multihost_utils.process_allgather(np.array(mine))
        layout = largest([manager.layouts[index] for index in all_of_them.ravel().tolist()])
        starts = {request: manager.length(request) for request in counts}
        plan = manager.prepare_forward(counts, layout=layout)
        brought = [{name: [] for name in layer} for layer in next(iter(sequences.values()))]
        for shard in range(2):
            members = [list(counts)[index] for index in plan.members(shard).tolist()]
            used = sum(counts[request] for request in members)
            for layer, arrays in enumerate(brought):
                for name, parts in arrays.items():
                    parts += [sequences[r][layer][name][starts[r] : starts[r] + counts[r]] for r in members]
                    width = next(iter(sequences.values()))[layer][name].shape[1]
                    parts.append(np.full((layout.tokens - used, width), np.nan, np.float32))

        def of_all(local):
            return jax.make_array_from_process_local_data(here, local)

        brought = [{name: of_all(np.concatenate(parts)) for name, parts in arrays.items()} for arrays in brought]
        cache = step(cache, StepPlan(of_all(plan.step_plan.packed), layout), weights, brought)

    requests = [manager.admit(shard=index % 2) for index in range(3)]
    for request in requests:
        sequences[request] = random_tokens(rng, CONTEXT)
    feed(dict(zip(requests, (200 + 30 * number, 3, 40), strict=True)))
    feed(dict.fromkeys(requests[: 1 + number], 1))
    state = preempt(cache, manager, requests[0])
    moved, cache = resume(cache, manager, state, shard=1)
    sequences[moved] = sequences.pop(requests[0])
    requests[0] = moved
    feed(dict.fromkeys(requests, 2))

    alone = Driver(weights, CacheFormats(), slots=1, blocks=8, max_context=1024, lookahead=3)
    for request in requests:
        shard, local = manager.place(request)
        view = Driver.__new__(Driver)
        view.schema, view.manager, view.cache = schema, manager.managers[shard], shard_of(cache, 2 * number + shard)
        again = alone.admit(sequences[request])
        alone.feed({again: manager.length(request)})
        assert_same_bytes(view.visible(local), alone.visible(again), f"request {request} of process {number}")
        alone.release(again)
    print("equal")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
