"""Random traffic of a server on a manager alone, without a device; and how long its operations take.

    python tests/host_traffic.py --operations 1000000 --blocks 1000
    python tests/host_traffic.py --operations 20000 --blocks 1000 --blocks 100000 --blocks 1000000 --fill

The books are recounted now and then. With ``--fill`` every block holds a known prefix before the clock starts, so that
new ones are always taken from those that were used longest ago.
"""

import argparse
import collections
import dataclasses
import secrets
import time

import numpy as np

from dsv4_jax import CacheFormats, CacheFull, CacheManager, CacheSchema
from dsv4_jax.host.errors import CannotTruncate
from dsv4_jax.spec.presets import tiny_spec

CONTEXT = 4096
SPEC = dataclasses.replace(tiny_spec(), layers=tiny_spec().layers[1:3])
WHAT = {"decode": 8, "prefill": 4, "admit": 3, "release": 2, "truncate": 1, "fork": 1, "cancel": 1, "match": 1}


class Traffic:
    """Requests that come, grow, part and go. Of each, ``lengths`` has how many tokens it has."""

    def __init__(self, seed, *, blocks, slots=64, lookahead=8, snapshots=64):
        self.rng, self.slots = np.random.default_rng(seed), slots
        schema = CacheSchema(SPEC, CacheFormats(), slots, blocks, CONTEXT, lookahead, snapshots)
        self.manager = CacheManager(schema, token_buckets=(slots, CONTEXT), snapshot_every=4)
        self.lengths, self.prompts, self.seen = {}, {}, collections.Counter()
        self.times = collections.defaultdict(list)
        self.beginnings = self.rng.integers(0, 9999, (16, CONTEXT), np.int32)

    def run(self, operations):
        """So many random operations; those that end in an error count too, they must change nothing."""
        names, weights = list(WHAT), np.array(list(WHAT.values()))
        for name in self.rng.choice(names, operations, p=weights / weights.sum()).tolist():
            if self.manager.transfers_wait:
                self.manager.take_transfers()
            if self.lengths or name == "admit":
                self.seen[name] += getattr(self, name)() is not False

    def timed(self, name, operation, *arguments, **options):
        """What an operation gives; False where there is no room for it."""
        start = time.perf_counter()
        try:
            return operation(*arguments, **options)
        except CacheFull:
            self.seen["full"] += 1
            return False
        finally:
            self.times[name].append(time.perf_counter() - start)

    def some(self):
        return int(self.rng.choice(list(self.lengths)))

    def new_prompt(self):
        beginning = self.beginnings[int(self.rng.integers(16)), : int(self.rng.integers(0, 2000))]
        return np.concatenate([beginning, self.rng.integers(0, 9999, int(self.rng.integers(1, 500)), np.int32)])

    def admit(self):
        prompt, promised = self.new_prompt(), int(self.rng.integers(0, 500)) if self.rng.random() < 0.5 else None
        match = self.timed("match_prefix", self.manager.match_prefix, prompt)
        request = self.timed("admit", self.manager.admit, match, promised)
        if request is False:
            return self.release() if self.lengths else False
        self.lengths[request], self.prompts[request] = match.length, prompt
        self.seen["hit"] += match.length > 0
        return request

    def match(self):
        self.timed("match_prefix", self.manager.match_prefix, self.new_prompt())

    def step(self, name, counts, drafts=None):
        """A step that is committed."""
        plan = self.timed(f"prepare_forward ({name})", self.manager.prepare_forward, counts, drafts=drafts)
        if plan is False:
            return self.release()
        requests, brought = (part.tolist() for part in counts)
        kept = [tokens - int(self.rng.integers(0, 1 + (drafts or 0))) for tokens in brought]
        ends = [self.lengths[request] + tokens for request, tokens in zip(requests, kept, strict=True)]
        told = [self.ids(request, tokens) for request, tokens in zip(requests, kept, strict=True)]
        self.timed(f"commit ({name})", self.manager.commit, plan, lengths=ends, tokens=told)
        self.lengths.update(zip(requests, ends, strict=True))
        return plan

    def ids(self, request, tokens):
        """The next tokens of a request: of its prompt, and then any."""
        mine = self.prompts[request][self.lengths[request] :][:tokens]
        return np.concatenate([mine, self.rng.integers(0, 9999, tokens - mine.size, np.int32)])

    def decode(self):
        drafts = int(self.rng.integers(0, 4))
        room = [request for request, length in self.lengths.items() if length + 1 + drafts <= CONTEXT]
        room = np.array(room[: self.slots // (1 + drafts)])
        return self.step("decode", (room, np.full(room.size, 1 + drafts)), drafts or None)

    def prefill(self):
        request = self.some()
        left = max(self.prompts[request].size - self.lengths[request], int(self.rng.integers(1, 200)))
        count = min(left, self.manager.chunk_limit(request))
        return self.step("prefill", (np.array([request]), np.array([count]))) if count else False

    def cancel(self):
        request = self.some()
        count = min(int(self.rng.integers(1, 600)), CONTEXT - self.lengths[request])
        plan = self.manager.length(request) < CONTEXT and self.timed(
            "prepare_forward (prefill)", self.manager.prepare_forward, {request: count}
        )
        if plan:
            self.timed("cancel", self.manager.cancel, plan)

    def truncate(self):
        request = self.some()
        length = max(self.lengths[request] - int(self.rng.integers(0, 9)), 0) * (self.rng.random() < 0.9)
        try:
            if self.timed("truncate", self.manager.truncate, request, length) is False:
                return False
        except CannotTruncate:
            return False
        if length < self.lengths[request]:
            self.prompts[request] = self.prompts[request][:length]
        self.lengths[request] = length
        return True

    def fork(self):
        request = self.some()
        twin = self.timed("fork", self.manager.fork, request)
        if twin is False:
            return self.release()
        self.lengths[twin], self.prompts[twin] = self.lengths[request], self.prompts[request]
        return twin

    def release(self):
        request = self.some()
        self.timed("release", self.manager.release, request)
        del self.lengths[request], self.prompts[request]

    def fill(self):
        """Until every block has been of a prompt that is known."""
        while self.manager.usage()["blocks"].free >= CONTEXT // 128:
            prompt = self.rng.integers(0, 9999, CONTEXT, np.int32)
            request = self.manager.admit(self.manager.match_prefix(prompt))
            self.manager.commit(self.manager.prepare_forward({request: CONTEXT}), 1)
            self.manager.release(request)
            self.manager.take_transfers()

    def recount(self):
        """Everything that the manager says of blocks and slots, counted anew from what its requests hold."""
        manager, places, holders = self.manager, {}, collections.Counter()
        assert manager.requests.tolist() == sorted(self.lengths)
        assert len({manager.slot(request) for request in self.lengths}) == len(self.lengths)
        for request, length in self.lengths.items():
            assert manager.length(request) == length
            blocks = manager.blocks(request).tolist()
            assert len(blocks) == len({entry // 32 for entry in range(length // 4)})
            for place, block in enumerate(blocks):
                assert places.setdefault(block, place) == place, f"block {block} at two places"
                holders[block] += 1
        open_blocks = [manager.blocks(one)[length // 128 :].tolist() for one, length in self.lengths.items()]
        assert all(holders[block] == 1 for blocks in open_blocks for block in blocks), "an open block is shared"
        known, usage = set(manager._prefix._hash_of), manager.usage()
        blocks, slots = usage["blocks"], usage["slots"]
        assert blocks.used == len(holders)
        assert blocks.shared == sum(times > 1 for times in holders.values())
        assert blocks.cached == len(known - holders.keys())
        assert blocks.free == blocks.total - len(known | holders.keys())
        assert (slots.used, slots.free) == (len(self.lengths), slots.total - len(self.lengths))
        assert {block: name for name, block in manager._prefix._block_of.items()} == manager._prefix._hash_of

    def close(self):
        """Nothing is left once everybody is gone and nothing is remembered."""
        while self.lengths:
            self.release()
        assert self.manager.usage()["blocks"].reserved == 0
        self.manager.reset_prefix_cache()
        for pool in self.manager.usage().values():
            assert pool.free == pool.total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, action="append")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--every", type=int, default=10_000, help="operations between two recounts")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    given = parser.parse_args()
    print(f"--seed {given.seed}")
    columns = {}
    for blocks in given.blocks or [1000]:
        traffic, start = Traffic(given.seed, blocks=blocks, slots=given.slots), time.perf_counter()
        if given.fill:
            traffic.fill()
        traffic.times.clear()
        traffic.seen.clear()
        for first in range(0, given.operations, given.every):
            traffic.run(min(given.every, given.operations - first))
            traffic.recount()
        columns[blocks] = traffic.times
        usage = traffic.manager.usage()["blocks"]
        traffic.close()
        print(f"{blocks} blocks: {given.operations} operations in {time.perf_counter() - start:.0f} s")
        print(f"  {dict(traffic.seen)}\n  {traffic.manager.metrics()}\n  {usage}")
    print("µs, median (99 %) | " + " | ".join(f"{blocks:,} blocks" for blocks in columns))
    for name in sorted(next(iter(columns.values()))):
        values = [np.array(times[name]) * 1e6 for times in columns.values()]
        print(f"{name:26}| " + " | ".join(f"{np.median(v):7.1f} ({np.percentile(v, 99):7.1f})" for v in values))


if __name__ == "__main__":
    main()
