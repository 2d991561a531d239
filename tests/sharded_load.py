"""A random load on a cache of several shards: prompts that begin alike come, are computed in chunks, decoded, and go.

Run by test_sharded_life.py with a seed and a number of steps, in a process of its own. By itself, on all GPUs or CPU
devices for so many seconds: ``PYTHONPATH=tests python tests/sharded_load.py SEED 0 SECONDS``.
"""

import sys
import time

import jax
import numpy as np
from harness import random_tokens
from jax.sharding import AxisType
from sharded_life import CONTEXT, HEADS, Shards
from test_blocks import assert_balanced

FAMILIES, SHARED = 3, (100, 133, 261, 389)
"""Prompts begin in so many ways, and for so many tokens."""

MORE = {"blocks": 48, "snapshots": 8}
"""What a shard has, so that prompts are kept."""


class Load:
    """Requests of a few families, whose tokens and vectors are the family's up to where each goes its own way."""

    def __init__(self, shards):
        self.shards, self.rng, self.manager = shards, shards.rng, shards.manager
        self.families = [self.new_text() for _ in range(FAMILIES)]
        self.ids, self.goal = {}, {}  # by request: its tokens, and the length at which it is done
        self.admitted = self.refused = self.hits = self.tokens_hit = self.done = 0

    def new_text(self):
        ids = self.rng.integers(0, 50_000, CONTEXT, dtype=np.int32)
        return ids, random_tokens(self.rng, CONTEXT), self.rng.normal(size=(CONTEXT, HEADS, 512)).astype(np.float32)

    def arrive(self):
        """A prompt is admitted where it fits, with what is cached of it."""
        family, own = self.families[int(self.rng.integers(FAMILIES))], self.new_text()
        shared, prompt = int(self.rng.choice(SHARED)), max(SHARED) + int(self.rng.integers(1, 100))
        joined = [np.concatenate([family[i][:shared], own[i][shared:]]) for i in (0, 2)]
        layers = zip(family[1], own[1], strict=True)
        vectors = [{name: np.concatenate([a[name][:shared], b[name][shared:]]) for name in a} for a, b in layers]
        match = self.manager.match_prefix(joined[0][:prompt])
        new = int(self.rng.integers(1, 20))
        if not self.manager.can_admit(match, new):
            self.refused += 1
            return
        rooms = self.manager.rooms(match, new)
        request = self.manager.admit(match, new)
        found = self.manager.length(request)
        assert found == rooms[self.manager.place(request)[0]].cached < prompt
        self.admitted, self.hits, self.tokens_hit = self.admitted + 1, self.hits + (found > 0), self.tokens_hit + found
        self.ids[request], self.goal[request] = joined[0], (prompt, prompt + new)
        self.shards.sequences[request], self.shards.queries[request] = vectors, joined[1]

    def step(self):
        """Every request gets a chunk of its prompt or the next token; those that are done are checked, and go."""
        counts = {}
        for request in self.goal:
            length, (prompt, _) = self.manager.length(request), self.goal[request]
            chunk = min(self.manager.chunk_limit(request), int(self.rng.integers(1, 300)), prompt - length)
            counts[request] = chunk if length < prompt else 1
        starts = {request: self.manager.length(request) for request in counts}
        self.shards.feed(counts)
        ends = {request: starts[request] + count for request, count in counts.items()}
        told = [self.ids[request][starts[request] : ends[request]] for request in counts]
        self.manager.commit(self.shards.plan, lengths=list(ends.values()), tokens=told)
        finished = [request for request, end in ends.items() if end == self.goal[request][1]]
        self.shards.check(finished)
        for request in finished:
            self.leave(request)
        self.balance()

    def leave(self, request):
        self.manager.release(request)
        for book in (self.ids, self.goal, self.shards.sequences, self.shards.queries):
            del book[request]
        self.done += 1

    def balance(self):
        for manager in self.manager.managers:
            assert_balanced(manager._ledger)
        usage = self.manager.usage()
        assert usage["slots"].used == len(self.goal)


def random_load(shards, steps, seconds=0.0):
    """Runs at least so many steps and so long; in the end all requests are gone and no block is lost."""
    load, began, run = Load(shards), time.monotonic(), 0
    while run < steps or time.monotonic() - began < seconds:
        for _ in range(int(load.rng.integers(0, 2 * shards.shards))):
            load.arrive()
        if load.goal:
            load.step()
        run += 1
    for request in list(load.goal):
        load.leave(request)
    load.balance()
    blocks = load.manager.usage()["blocks"]
    assert (blocks.used, blocks.free + blocks.cached) == (0, blocks.total)
    load.manager.reset_prefix_cache()
    assert load.manager.usage()["blocks"].free == blocks.total
    return load, run


def main(seed, steps, seconds):
    mesh = jax.make_mesh((jax.device_count(), 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    load, run = random_load(Shards(np.random.default_rng(seed), mesh, check_vma=True, **MORE), steps, seconds)
    assert load.hits or not seconds, "nothing was shared"
    print(
        f"balanced: {jax.device_count()} shards, {run} steps, {load.admitted} requests admitted and {load.refused} "
        f"refused, {load.hits} hit {load.tokens_hit} tokens, {load.done} done"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
