"""The life of requests in a cache of several shards: each holds the bytes that its requests have in a cache of one.

Run by test_sharded_life.py with a mesh and a seed, in a process of its own: JAX settles the number of devices when it
starts.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place
from attended import assert_both_of_tensor_cores
from harness import SPEC, Driver, assert_same_bytes, inputs_of, random_tokens, random_weights
from jax.sharding import AxisType, PartitionSpec

from dsv4_jax import (
    CacheFormats,
    CacheSchema,
    LayerKind,
    RequestState,
    ShardedManager,
    apply_transfers,
    begin,
    init_cache,
    over_shards,
    preempt,
    resume,
    shard_of,
    take_state,
)
from dsv4_jax.cache.pools import ShardingError

CONTEXT, HEADS = 700, 8
SIZES = {"slots": 5, "blocks": 24, "max_context": 1024, "lookahead": 3, "snapshots": 2}
BUCKETS = (1, 3, 16, 64, 256, 1024)
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def step_of_a_shard(cache, plan, weights, brought, queries):
    """An update and attention of every layer: of this rank's query heads, where they are split."""
    step, outputs = begin(cache, plan), []
    for layer, arrays in enumerate(brought):
        inputs = [inputs_of(step.plan, SPEC, layer, weights[layer], arrays, prefix) for prefix in ("", "index_")]
        handle = step.layer(layer).update(arrays["rows"], *inputs)
        chosen = {}
        if handle.kind is LayerKind.CSA:  # index heads are whole on every rank: their scores are summed
            heads = SPEC.index_num_heads
            index_queries = jnp.broadcast_to(arrays["rows"][:, None, :128], (len(arrays["rows"]), heads, 128))
            handle, indices = handle.index_topk(index_queries, index_queries[..., 0], k=16)
            chosen = {"indices": indices}
        handle, attended = handle.attend(queries, **chosen)
        step = handle.step
        outputs.append(attended.output)
    return step.end(), jnp.stack(outputs)


class Shards:
    """A cache of several shards, and for each request one of its own on which it is computed alone."""

    def __init__(self, rng, mesh, check_vma, **sizes):
        self.rng, self.weights = rng, random_weights(rng)
        self.schema = CacheSchema(SPEC, CacheFormats(), **SIZES | sizes)
        self.shards = mesh.shape["data"]
        self.manager = ShardedManager(self.schema, self.shards, token_buckets=BUCKETS)
        self.cache = init_cache(self.schema, mesh=mesh, axis="data")
        split = "tensor" if mesh.shape["tensor"] > 1 else None
        self.step = over_shards(
            step_of_a_shard,
            mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data", split)),
            out_specs=(PartitionSpec(None, "data", split),),
            check_vma=check_vma,
        )
        self.transfer = over_shards(apply_transfers, mesh, check_vma=check_vma)
        self.alone = Driver(self.weights, CacheFormats(), slots=1, blocks=8, max_context=1024, lookahead=3)
        self.alone._step = jax.jit(step_of_a_shard, donate_argnums=0)
        self.sequences, self.queries, self.seen = {}, {}, {}

    def admit(self, **options):
        request = self.manager.admit(**options)
        self.sequences[request] = random_tokens(self.rng, CONTEXT)
        self.queries[request] = self.rng.normal(size=(CONTEXT, HEADS, 512)).astype(np.float32)
        return request

    def rename(self, old, new):
        for book in (self.sequences, self.queries):
            book[new] = book.pop(old)

    def feed(self, counts):
        if self.manager.transfers_wait:
            self.cache = self.transfer(self.cache, self.manager.take_transfers())
        starts = {request: self.manager.length(request) for request in counts}
        plan = self.manager.prepare_forward(counts)
        tokens = plan.layout.tokens
        brought = [{name: [] for name in layer} for layer in next(iter(self.sequences.values()))]
        queries = []
        for shard in range(self.shards):
            members = [list(counts)[index] for index in plan.members(shard).tolist()]
            used = sum(counts[request] for request in members)
            for layer, arrays in enumerate(brought):
                for name, parts in arrays.items():
                    parts += [self.sequences[r][layer][name][starts[r] : starts[r] + counts[r]] for r in members]
                    parts.append(np.full((tokens - used, self.some(layer, name).shape[1]), np.nan, np.float32))
            queries += [self.queries[r][starts[r] : starts[r] + counts[r]] for r in members]
            queries.append(np.zeros((tokens - used, HEADS, 512), np.float32))
        joined = [{name: np.concatenate(parts) for name, parts in arrays.items()} for arrays in brought]
        given = plan.step_plan, self.weights, joined, np.concatenate(queries)
        self.given = given
        self.plan, (self.cache, outputs) = plan, self.step(self.cache, *given)
        last = np.concatenate([np.asarray(part.last_token) + tokens * s for s, part in enumerate(plan.parts)])
        self.seen = dict(zip(counts, np.asarray(outputs)[:, last[plan.rows]].swapaxes(0, 1), strict=True))

    def some(self, layer, name):
        return next(iter(self.sequences.values()))[layer][name]

    def check(self, requests):
        """Bytes and the latest output of each request are those of its tokens fed in one go to a cache of one shard."""
        for request in requests:
            shard, local = self.manager.place(request)
            view = Driver.__new__(Driver)
            view.schema, view.manager = self.schema, self.manager.managers[shard]
            view.cache = shard_of(self.cache, shard)
            alone, length = self.alone, self.manager.length(request)
            again = alone.manager.admit()
            alone.sequences = {again: self.sequences[request]}
            plan, brought = alone.prepare({again: length})
            queries = np.zeros((plan.layout.tokens, HEADS, 512), np.float32)
            queries[:length] = self.queries[request][:length]
            alone.cache, outputs = alone._step(alone.cache, plan, self.weights, brought, queries)
            assert_same_bytes(view.visible(local), alone.visible(again), f"request {request} of {length}")
            if request in self.seen:
                expected = np.asarray(outputs)[:, length - 1]
                if jax.default_backend() == "cpu":
                    np.testing.assert_array_equal(self.seen[request], expected)
                else:  # how a token's rows are split over blocks follows from how many tokens a step has
                    assert_both_of_tensor_cores(self.seen[request], expected, f"request {request} of {length}")
            alone.manager.release(again)


def share_a_prefix(shards, data, done):
    """A prompt goes where it is cached; what is cached of it can be taken to another shard."""
    manager, ids = shards.manager, np.arange(300)
    for request in done:
        manager.release(request)
    first = shards.admit(prompt=manager.match_prefix(ids), shard=data - 1)
    for count in (256, 44):
        shards.feed({first: count})
        manager.commit(shards.plan, lengths=[manager.length(first)])
    hit = manager.admit(manager.match_prefix(ids))
    assert (manager.place(hit)[0], manager.length(hit)) == (data - 1, 256)
    for book in (shards.sequences, shards.queries):
        book[hit] = book[first]
    shards.feed({hit: 44})
    state = take_state(shards.cache, manager, manager.match_prefix(ids))
    manager.release(hit)
    moved, shards.cache = resume(shards.cache, manager, state, shard=0)
    for book in (shards.sequences, shards.queries):
        book[moved] = book[first]
    shards.feed({moved: 44, first: 1})
    shards.check([moved, first])

    manager.release(moved)
    if data > 1:
        manager.managers[0].reset_prefix_cache()
    state = preempt(shards.cache, manager, first)
    back, shards.cache = resume(shards.cache, manager, state)  # where its blocks are, though another has as much room
    assert manager.place(back)[0] == data - 1
    shards.rename(first, back)
    shards.feed({back: 1})
    shards.check([back])


def leave_nothing(shards, mesh):
    """Where caches are wiped, every shard is as it was made once its requests are gone, in place."""
    shards.manager = ShardedManager(shards.schema, shards.shards, token_buckets=BUCKETS, wipe=True)
    shards.cache = init_cache(shards.schema, mesh=mesh, axis="data")
    new = {name: np.asarray(array) for name, array in shards.cache.arrays.items()}
    requests = [shards.admit(shard=shard) for shard in range(shards.shards) for _ in range(2)]
    shards.feed({request: 130 + 10 * index for index, request in enumerate(requests)})
    assert all(np.any(np.asarray(array) != new[name]) for name, array in shards.cache.arrays.items())
    for request in requests:
        shards.manager.release(request)
    shards.cache = shards.transfer(shards.cache, shards.manager.take_transfers())
    assert_same_bytes({name: np.asarray(array) for name, array in shards.cache.arrays.items()}, new, "wiped")


def main(seed, data, tensor, check_vma, axis_type):
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType[axis_type],) * 2)
    shards = Shards(rng, mesh, check_vma)
    one, two, three = (shards.admit(shard=index % data) for index in range(3))
    shards.feed({one: 200, three: 31, two: 130})
    shards.check([one, two, three])
    twin = shards.manager.fork(one)
    shards.sequences[twin], shards.queries[twin] = shards.sequences[one], shards.queries[one]
    shards.feed({one: 1, two: 1, twin: 1})
    shards.check([one, two, three, twin])
    text = shards.step.lower(shards.cache, *shards.given).compile()
    assert not re.search(COLLECTIVES, text.as_text()), "a step of the cache communicates"
    assert_in_place(text, dict(shards.schema.arrays), temporary_bytes=1 << 22)
    traced = shards.step._cache_size()

    shards.manager.truncate(one, 199)
    shards.feed({one: 2, two: 1, three: 1})
    state = RequestState.from_bytes(preempt(shards.cache, shards.manager, two).to_bytes())
    new = shards.admit(shard=1 % data)
    shards.feed({new: 90, one: 1})
    moved, shards.cache = resume(shards.cache, shards.manager, state, shard=data - 1)
    assert shards.manager.place(moved)[0] == data - 1
    shards.rename(two, moved)
    shards.manager.release(three)
    plan = shards.manager.prepare_forward({one: 1, moved: 1})
    shards.manager.cancel(plan)
    shards.feed({moved: 1, one: 1, new: 1})
    shards.check([one, moved, twin, new])
    assert shards.step._cache_size() - traced <= 2, "as many layouts as are new"
    share_a_prefix(shards, data, [twin, new])
    if data > 1:
        with pytest.raises(ShardingError, match="side by side"):
            jax.jit(step_of_a_shard)(shards.cache, *shards.given)
    leave_nothing(shards, mesh)
    print("equal")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4] == "True", sys.argv[5])
