"""Whatever requests do, in whatever order, each reads what it alone would have stored; in random histories.

How many: LIFECYCLE_EXAMPLES=5000 in the environment, for a night or a GPU. Hypothesis prints how a failure is repeated
(its steps, and a line for @reproduce_failure); a run is repeated by its --hypothesis-seed.
"""

import collections
import dataclasses
import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lifecycle import BUCKETS, CONTEXT, SLOTS, Device, Made, Part, Request, setting, text_of
from test_blocks import assert_balanced

from dsv4_jax import CacheFull, CacheManager, RequestState, preempt, resume
from dsv4_jax.host.errors import CannotTruncate, LengthUnknown, StalePlan, TransfersWait

EXAMPLES = int(os.environ.get("LIFECYCLE_EXAMPLES", "40"))


CHUNKS = st.lists(
    st.one_of(st.just(1), st.integers(1, 9), st.just(128), st.just(BUCKETS[-1]), st.integers(1, 250)),
    min_size=SLOTS,
    max_size=SLOTS,
)
TOLD = st.sampled_from((True, True, True, False))


class Lifecycle(RuleBasedStateMachine):
    """Random operations on a manager and its cache. Every step is followed by every read of every request.

    An operation changes the manager, and what it should have meant in ``requests``. Plans and transfers then wait, as
    they may, to be run in the order in which they were made.
    """

    @initialize(
        of=st.sampled_from((("rows", 140), ("rows", 0), ("running", 6))),
        every=st.sampled_from((1, 2, None)),
        rebuild=st.integers(0, 2),
        computed=st.integers(1, 3),
        wipe=st.booleans(),
    )
    def start(self, of, every, rebuild, computed, wipe):
        self.schema, alone = setting(*of)
        self.manager = CacheManager(
            self.schema, token_buckets=BUCKETS, snapshot_every=every, rebuild=rebuild > 0, wipe=wipe
        )
        if rebuild:  # vectors here do not depend on windows: the last block alone brings a state back
            self.manager._prefix._layers = rebuild
        self.device = Device(self.schema, wiped=wipe)
        self.requests: dict[int, Request] = {}
        self.waiting: list[Made] = []  # plans that were not dispatched, in the order in which they were made
        self.dispatched: list[Made] = []  # and those of which the host has not heard
        self.parked: list[tuple[RequestState, Request]] = []  # that were preempted
        self.fixed: dict[tuple, bytes] = {}  # what blocks hold that nobody may write
        first = text_of(bytes(4 * CONTEXT), b"", alone)
        same = text_of(bytes(4 * CONTEXT), b"other", alone)
        self.prompts = [first, first.branch(128, 0), first.branch(300, 0), first.branch(0, 0), same]
        for prompt in range(computed):  # so that there is something to meet from the beginning
            self.come(prompt, 330, 300)

    def one(self, data):
        return data.draw(st.sampled_from(list(self.requests.values())))

    # What happens on the device

    def dispatch(self, plans):
        """The device runs the first of the plans that wait."""
        for made in self.waiting[:plans]:
            rows, lengths = [], []
            for request, part in made.parts.items():
                part.start = request.length
                mine = request.text.rows[:, part.start : part.start + part.tokens].copy()
                mine[:, part.kept :] += 1  # not what the text goes on with
                mine[:, : max(request.found - 128 - part.start, 0)] += (
                    1  # what a layer makes of a window that lacks rows
                )
                rows.append(mine % 512)
                lengths.append(part.start)
                request.length += part.kept
                request.shortened = False
            self.device.run(made.plan, lengths, np.concatenate(rows, axis=1))
        self.dispatched += self.waiting[:plans]
        del self.waiting[:plans]

    def transfer(self):
        """What waits for the device is done there, plans first."""
        self.dispatch(len(self.waiting))
        if self.manager.transfers_wait:
            self.device.apply(self.manager.take_transfers())
        for request in self.requests.values():
            request.restoring = False

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def run_some(self, data):
        self.dispatch(data.draw(st.integers(1, len(self.waiting))))

    @rule()
    def run_all(self):
        self.transfer()

    # Operations

    @precondition(lambda self: len(self.requests) < SLOTS)
    @rule(
        data=st.data(),
        prompt=st.integers(0, 4),
        size=st.one_of(st.integers(200, 500), st.integers(1, 500), st.sampled_from((128, 129, 257, 400))),
        matched=st.sampled_from((True, True, True, False)),
        new=st.one_of(st.none(), st.integers(0, 120)),
    )
    def admit(self, data, prompt, size, matched, new):
        self.admit_one(prompt, size, data.draw(st.integers(0, 1)), matched, new)

    def admit_one(self, prompt, size, seed, matched=True, new=None):
        """A request whose prompt is the beginning of one of the texts."""
        text = self.prompts[prompt].branch(size, seed)
        given = self.manager.match_prefix(text.ids[:size], salt=text.salt) if matched else size
        fits = self.manager.can_admit(given, new)
        try:
            handle = self.manager.admit(given, new)
        except CacheFull:
            assert not fits
            return None
        assert fits or new is None
        request = Request(handle, self.manager.slot(handle), text)
        if matched:
            request.length, request.bound, request.restoring = given.length, size, given.stored > 0
            request.found = given.stored if given.stored > given.length else 0
        request.limit = 0 if new is None else size + new + self.schema.lookahead
        self.requests[handle] = request
        return request

    @rule(prompt=st.integers(0, 4), size=st.integers(257, 400), cut=st.sampled_from((300, 128, 97)))
    def come(self, prompt, size, cut):
        """A request, in the place of the oldest if there is no other, that brings its prompt at once."""
        if len(self.requests) == SLOTS:
            self.leave(next(iter(self.requests.values())))
        if request := self.admit_one(prompt, size, 0):
            self.finish(request, cut)

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), chunks=CHUNKS, whole=st.booleans())
    def prepare(self, data, chunks, whole):
        """Chunks of prompts and decoding in one step, some with drafts; if ``whole``, to where a snapshot is due."""
        self.plan(data, chunks, whole)

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), chunks=CHUNKS, whole=st.booleans(), told=TOLD)
    def serve(self, data, chunks, whole, told):
        """A step and what a server does about it, all at once."""
        made = self.plan(data, chunks, whole)
        if made is not None:
            self.dispatch(len(self.waiting))
            self.hear(made, told)

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), cut=st.sampled_from((300, 300, 128, 97)))
    def prefill(self, data, cut):
        """A prompt, to its end."""
        self.finish(data.draw(st.sampled_from(self.growing)), cut)

    def finish(self, request, cut):
        """Brings what is left of a request's prompt, in steps of so many tokens at most."""
        while request.most < request.bound:
            most = min(cut, request.bound - request.most, self.manager.chunk_limit(request.handle))
            made = self.make({request: Part(most, 0, 0)})
            if made is None:
                return
            self.dispatch(len(self.waiting))
            self.hear(made, True)
            self.holds()

    @precondition(lambda self: self.growing and self.schema.lookahead)
    @rule(data=st.data(), drafts=st.integers(1, 6), told=TOLD)
    def speculate(self, data, drafts, told):
        """Decoding with drafts, always a step ahead of what the host has heard."""
        ahead = []
        for _ in range(4):
            parts = {
                one: Part(1 + drafts, drafts, data.draw(st.integers(0, drafts)))
                for one in self.growing
                if one.most + drafts < CONTEXT
            }
            made = self.make(parts) if parts else None
            if made is None:
                return
            ahead.append(made)
            if len(ahead) > 1:
                self.dispatch(len(self.waiting))
                self.hear(ahead.pop(0), told)
                self.holds()

    @property
    def growing(self):
        """The requests that have room for more tokens."""
        return [request for request in self.requests.values() if request.most < CONTEXT]

    def plan(self, data, chunks, whole):
        """A step of some requests, None if there is no room for it."""
        parts, room = {}, BUCKETS[-1]
        some = data.draw(st.lists(st.sampled_from(self.growing), min_size=1, max_size=SLOTS, unique=True))
        for request, chunk in zip(some, chunks, strict=False):
            most = min(chunk, CONTEXT - request.most, room)
            most = min(most, self.manager.chunk_limit(request.handle)) if whole else most
            if most:
                drafts = min(data.draw(st.sampled_from((0, 0, 3, 100))), most - 1, self.schema.lookahead)
                parts[request] = Part(most, drafts, data.draw(st.integers(0, drafts)))
                room -= most
        return self.make(parts)

    def make(self, parts):
        """A plan of these parts, by request, None if there is no room for it."""
        self.transfer()
        drafts = {request.handle: part.drafts for request, part in parts.items()}
        counts = {request.handle: part.tokens for request, part in parts.items()}
        try:
            plan = self.planned(counts, drafts if any(drafts.values()) else None)
        except CacheFull:
            assert any(request.most + part.tokens > request.limit for request, part in parts.items())
            return None
        made = Made(plan, parts)
        self.waiting.append(made)
        for request in parts:
            request.plans.append(made)
        return made

    def planned(self, counts, drafts):
        """A plan, for which blocks may have to be wiped first."""
        try:
            return self.manager.prepare_forward(counts, drafts=drafts)
        except TransfersWait:
            self.transfer()
        return self.manager.prepare_forward(counts, drafts=drafts)

    @precondition(lambda self: self.dispatched)
    @rule(data=st.data(), told=TOLD)
    def commit(self, data, told):
        """The host hears what became of a plan, and so of those before it."""
        self.hear(data.draw(st.sampled_from(self.dispatched)), told)

    def hear(self, made, told):
        """Commits a plan."""
        self.dispatched.remove(made)
        live = made.live
        ends = [part.start + part.kept for part in made.parts.values()]
        tokens = {
            request.handle: request.text.ids[part.start : part.start + part.kept]
            for request, part in made.parts.items()
            if request in live
        }
        try:
            self.manager.commit(made.plan, lengths=ends, tokens=tokens if told else None)
        except StalePlan:
            assert not live
        else:
            assert live
        for request in live:
            del request.plans[: request.plans.index(made) + 1]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        """A plan that waits, or some requests' part of it."""
        made = data.draw(st.sampled_from(self.waiting))
        latest = [request for request in made.parts if request.plans[-1:] == [made]]
        if made.live != list(made.parts) or not latest:
            return
        out = data.draw(st.lists(st.sampled_from(latest), min_size=1, unique=True))
        made.plan = self.manager.cancel(made.plan, [request.handle for request in out])
        for request in out:
            del made.parts[request]
            request.plans.remove(made)
        if not made.parts:
            self.waiting.remove(made)

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        back=st.one_of(st.integers(1, 9), st.integers(1, 150), st.just(CONTEXT)),
        seed=st.integers(0, 2),
    )
    def truncate(self, data, back, seed):
        request = self.one(data)
        self.dispatch(len(self.waiting))
        length = max(request.most - back, 0)
        try:
            self.manager.truncate(request.handle, length)
        except CannotTruncate:
            assert length < request.most
            return
        except CacheFull:
            return
        if length < request.most or (request.found and not length):
            request.plans.clear()
            request.length, request.shortened = length, True
            if length == 0:
                request.restoring, request.found = False, 0
            request.bound = min(request.bound, length)
            request.text = request.text.branch(length, seed)

    @precondition(lambda self: 0 < len(self.requests) < SLOTS)
    @rule(data=st.data(), seed=st.integers(0, 1), new=st.one_of(st.none(), st.integers(0, 60)))
    def fork(self, data, seed, new):
        source = self.one(data)
        self.dispatch(len(self.waiting))
        if source.most + (new or 0) > CONTEXT:
            return
        try:
            handle = self.manager.fork(source.handle, new)
        except LengthUnknown:
            assert source.is_open
            return
        except CacheFull:
            return
        text = source.text.branch(max(source.length, source.bound), seed)
        limit = 0 if new is None else source.length + new + self.schema.lookahead
        twin = Request(handle, self.manager.slot(handle), text, source.bound, limit, source.length)
        twin.restoring, twin.shortened, twin.found = source.length + source.found > 0, source.shortened, source.found
        source.plans.clear() if source.length else None
        self.requests[handle] = twin

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), sure=st.integers(0, 4))
    def release(self, data, sure):
        if len(self.requests) < SLOTS and sure < 4:
            return  # there would be too little to meet
        self.leave(self.one(data))

    def leave(self, request):
        """Releases a request."""
        self.manager.release(request.handle)
        request.plans.clear()
        del self.requests[request.handle]

    @precondition(lambda self: self.requests and len(self.parked) < SLOTS)
    @rule(data=st.data(), how=st.sampled_from(("state", "bytes", "tokens")))
    def preempt(self, data, how):
        """A request leaves; its state stays on the host, as it is or as bytes, or only what is known of its tokens."""
        request = self.one(data)
        self.transfer()
        try:
            if how == "tokens":
                known = self.manager.preempt(request.handle).tokens
                np.testing.assert_array_equal(known, request.text.ids[: known.size])
            else:
                state = preempt(self.device.cache, self.manager, request.handle)
                self.parked.append((RequestState.from_bytes(state.to_bytes()) if how == "bytes" else state, request))
        except LengthUnknown:
            assert request.is_open
            return
        request.plans.clear()
        if request.length < request.found:  # nothing of it was worth keeping
            request.length = request.found = 0
        del self.requests[request.handle]

    @precondition(lambda self: self.parked and len(self.requests) < SLOTS)
    @rule(data=st.data(), new=st.one_of(st.none(), st.integers(0, 60)))
    def resume(self, data, new):
        self.transfer()
        state, request = self.parked.pop(data.draw(st.integers(0, len(self.parked) - 1)))
        most = max(state.length, state.tokens.size)
        if most + (new or 0) > CONTEXT:
            return
        try:
            try:
                handle, self.device.cache = resume(self.device.cache, self.manager, state, new)
            except TransfersWait:
                self.transfer()
                handle, self.device.cache = resume(self.device.cache, self.manager, state, new)
        except CacheFull:
            return
        limit = 0 if new is None else most + new + self.schema.lookahead
        slot = self.manager.slot(handle)
        self.requests[handle] = dataclasses.replace(request, handle=handle, slot=slot, limit=limit, plans=[])

    @precondition(lambda self: self.manager._prefix._layers)
    @rule(prompt=st.integers(0, 4), size=st.integers(257, 500))
    def come_without_snapshots(self, prompt, size):
        """They went to other prompts meanwhile."""
        self.manager._journal.write(self.manager._prefix.snapshots.forget_all())
        if len(self.requests) < SLOTS:
            self.admit_one(prompt, size, 0)

    @rule(sure=st.integers(0, 4))
    def reset_prefix_cache(self, sure):
        if sure == 4:
            self.manager.reset_prefix_cache()
            for request in self.requests.values():
                request.bound = 0

    def teardown(self):
        """All requests leave, and with them every byte of theirs, if it is to be wiped."""
        if not hasattr(self, "manager"):
            return
        for request in list(self.requests.values()):
            self.leave(request)
        self.manager.reset_prefix_cache()
        self.transfer()
        self.poison_what_is_free()

    # What must hold

    @invariant()
    def holds(self):
        if not hasattr(self, "manager"):
            return
        assert_balanced(self.manager._ledger)
        for handle, request in self.requests.items():
            assert self.manager.length(handle) == request.most
        if not self.manager.transfers_wait:
            self.poison_what_is_free()
        self.check_fixed_blocks()
        self.check_reads([one for one in self.requests.values() if one.length and not one.restoring])

    def held(self):
        """Block -> how many requests have it."""
        return collections.Counter(block for one in self.requests for block in self.manager.blocks(one).tolist())

    def poison_what_is_free(self):
        free = np.ones(self.schema.slots + self.schema.snapshots, bool)
        free[[one.slot for one in [*self.requests.values(), *(one for made in self.waiting for one in made.parts)]]] = (
            False
        )
        free[self.schema.slots :] = self.manager._prefix.snapshots.used == 0
        unused = np.ones(self.schema.blocks, bool)
        unused[[*self.held(), *self.manager._prefix._hash_of]] = False
        self.device.poison(free, unused)

    def check_fixed_blocks(self):
        """Blocks that requests share, or could, hold what they held."""
        fixed = {(block,) for block, times in self.held().items() if times > 1}
        fixed |= set(self.manager._prefix._hash_of.items())
        now = {key: self.device.block_bytes(key[0]) for key in fixed}
        for key in now.keys() & self.fixed.keys():
            assert now[key] == self.fixed[key], f"block {key[0]} was written while others could read it"
        self.fixed = now

    def check_reads(self, requests):
        if not requests:
            return
        layers = self.device.read([one.slot for one in requests], [one.length for one in requests])
        for layer, (found, attended) in enumerate(layers):
            assert np.isfinite(attended.output[: len(requests)]).all()
            for row, request in enumerate(requests):
                first = max(request.length - 128 + request.shortened, 0)
                rebuilt = request.length < request.found  # its window is of no use yet
                expected = {} if rebuilt else {"window": request.text.window[layer][first : request.length]}
                for name, values in request.text.pools[layer].items():
                    expected[name] = values[: request.length * len(values) // CONTEXT]
                for name, values in expected.items():
                    read = found[name]
                    valid = read.valid[row] & (read.positions[row] >= (first if name == "window" else 0))
                    assert valid.sum() == len(values), (name, layer, request.length)
                    same = read.values[row][valid].view(np.int32) == values.view(np.int32)
                    assert same.all(), f"{name} of layer {layer} differ in rows {np.unique((~same).nonzero()[0])}"
                    assert not read.values[row][~read.valid[row]].any()


Lifecycle.TestCase.settings = settings(
    deadline=None,
    max_examples=EXAMPLES,
    stateful_step_count=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLifecycle = Lifecycle.TestCase
