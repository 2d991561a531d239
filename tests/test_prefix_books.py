"""The prefix cache's books against a device that remembers what every block, slot and snapshot holds."""

import contextlib
import copy

import numpy as np
import pytest
from histories import steps_until
from managers import CSA, HCA, SWA, make_manager, state
from test_blocks import assert_balanced

from dsv4_jax import CacheManager
from dsv4_jax.host.errors import CacheError, CacheFull, CannotTruncate
from dsv4_jax.host.events import AllBlocksCleared, BlockRemoved, BlockStored
from dsv4_jax.layout.transfers import TransferKind

SLOTS = 4
SIZES = {"slots": SLOTS, "blocks": 16, "max_context": 1024, "snapshots": 3}


def make(*kinds, every=None, **sizes) -> CacheManager:
    schema = make_manager(*kinds, **(SIZES | sizes)).schema
    return CacheManager(schema, token_buckets=(8, 64, 512, 1024), snapshot_every=every, events=True)


class Device:
    """What a cache would hold: of each slot and snapshot the tokens that its state is of, of each block those up to its
    end. Plans and transfers run as they are handed over.
    """

    def __init__(self, manager):
        self.manager, self.first = manager, manager._need.first_entry
        self.state, self.blocks, self.table = {}, {}, {}

    def transfer(self):
        transfers = self.manager.take_transfers()
        for kind, target, source, offset, count in transfers.operations.tolist():
            match kind:
                case TransferKind.RESET:
                    self.state[target], self.table[target] = b"", {}
                case TransferKind.INSTALL | TransferKind.SHARE:
                    ids = transfers.blocks[offset : offset + count].tolist()
                    self.table[target].update({source + place: block for place, block in enumerate(ids)})
                case TransferKind.COPY:
                    self.state[target] = self.state[source]
                case TransferKind.COPY_BLOCK:
                    self.blocks[target] = self.blocks[source]

    def run(self, plan, texts):
        """A plan's requests get the tokens of their texts."""
        for slot, reset in zip(plan.request_slot.tolist(), plan.request_reset.tolist(), strict=True):
            if reset:
                self.state[slot], self.table[slot] = b"", {}
        changes = zip(plan.table_slot.tolist(), plan.table_index.tolist(), plan.table_block.tolist(), strict=True)
        for slot, index, block in changes:
            if slot >= 0:
                self.table[slot][index] = block
        for request, text in texts.items():
            slot, end = self.manager.slot(request), self.manager.length(request)
            start = int(plan.request_start[plan.request_slot.tolist().index(slot)])
            assert self.state[slot][: 4 * start] == text[:start].tobytes(), "goes on from something else"
            self.state[slot] = text[:end].tobytes()
            for place in range(start // 128, len(self.manager.blocks(request))):
                self.blocks[self.table[slot][place]] = text[: min(128 * (place + 1), end)].tobytes()

    def check(self, request, text):
        """A request's blocks and state are of its own tokens."""
        manager, length = self.manager, self.manager.length(request)
        slot, data = manager.slot(request), text[:length].tobytes()
        if length:
            assert self.state[slot][: len(data)] == data
        for place, block in enumerate(manager.blocks(request).tolist()):
            assert self.table[slot][place] == block
            mine = data[: 4 * 128 * (place + 1)]
            assert self.blocks[block][: len(mine)] == mine, (request, place)


class Router:
    """Knows from events alone which blocks there are."""

    def __init__(self):
        self.known = {}

    def hear(self, events):
        for event in events:
            match event:
                case BlockStored():
                    parent = event.parent_block_hash
                    assert event.block_size == 128
                    assert len(event.token_ids) == 128 * len(event.block_hashes)
                    for place, block in enumerate(event.block_hashes):
                        assert block not in self.known
                        self.known[block] = parent, event.token_ids[128 * place : 128 * (place + 1)]
                        parent = block
                case BlockRemoved():
                    for block in event.block_hashes:
                        del self.known[block]
                case AllBlocksCleared():
                    self.known.clear()


class History:
    """Random operations on a manager and on all that should follow it."""

    def __init__(self, rng, kinds, **sizes):
        self.rng, self.manager = rng, make(*kinds, **sizes)
        self.device, self.router = Device(self.manager), Router()
        self.texts, self.limits, self.seen = {}, {}, set()
        self.beginnings = [self.tokens(900) for _ in range(4)]
        for text in self.beginnings[1:]:
            same = int(rng.integers(1, 500))
            text[:same] = self.beginnings[0][:same]

    def tokens(self, count):
        return self.rng.integers(0, 1000, count).astype(np.int32)

    def reserved(self):
        need = {one: self.promise(limit) - len(self.manager.blocks(one)) for one, limit in self.limits.items()}
        return sum(max(blocks, 0) for blocks in need.values())

    def promise(self, limit):
        schema = self.manager.schema
        return int(self.manager.blocks_needed(min(limit + schema.lookahead, schema.max_context)))

    def held(self):
        return {block for request in self.texts for block in self.manager.blocks(request).tolist()}

    def admit(self):
        rng, manager = self.rng, self.manager
        text = self.beginnings[int(rng.integers(4))][: int(rng.integers(1, 700))]
        text = np.concatenate([text, self.tokens(int(rng.integers(0, 150)))])
        new = int(rng.integers(0, 100)) if rng.random() < 0.7 else None
        match = manager.match_prefix(text)
        # Exactly: what it shares and others hold costs nothing, what lies idle is no longer there for others.
        hit = match.length // 128
        shared = [manager._prefix._block_of[link.hash] for link in match.links[:hit]]
        free = manager.schema.blocks - len(self.held()) - self.reserved() - len(set(shared) - self.held())
        needed = int(manager.blocks_needed(text.size)) if new is None else self.promise(text.size + new)
        fits = len(self.texts) < SLOTS and max(needed - hit, 0) <= free
        assert manager.can_admit(match, new) == fits
        if not fits:
            if new is not None:
                before = state(manager)
                with pytest.raises(CacheFull):
                    manager.admit(match, new)
                assert state(manager) == before
            return
        request = manager.admit(match, new)
        assert manager.length(request) == match.length
        self.texts[request] = text
        if new is not None:
            self.limits[request] = text.size + new
        self.seen.add("hit" if match.length else "new")

    def step(self):
        rng, manager = self.rng, self.manager
        self.device.transfer()
        counts = {}
        for request in self.texts:
            most = min(900 - manager.length(request), manager.chunk_limit(request) if rng.random() < 0.7 else 999)
            if most > 0 and rng.random() < 0.7:
                counts[request] = int(rng.choice([1, rng.integers(1, most + 1), most]))
        while sum(counts.values()) > 1000:
            counts.popitem()
        for request, count in counts.items():
            more = manager.length(request) + count - self.texts[request].size
            self.texts[request] = np.concatenate([self.texts[request], self.tokens(max(more, 0))])
        starts = {request: manager.length(request) for request in counts}
        plan = manager.prepare_forward(counts)
        if rng.random() < 0.1:
            manager.cancel(plan)
            return
        self.device.run(plan, {request: self.texts[request] for request in counts})
        told = [self.texts[request][start : start + counts[request]] for request, start in starts.items()]
        if counts and rng.random() < 0.9:
            if set(counts.values()) == {1}:
                told = np.array(told, np.int32)[:, 0]
            manager.commit(plan, lengths=plan.request_end, tokens=told if rng.random() < 0.9 else None)

    def truncate(self, request):
        current = self.manager.length(request)
        length = max(current - int(self.rng.integers(0, 150)), 0)
        length = length // 128 * 128 if self.rng.random() < 0.3 else length
        self.manager.truncate(request, length)
        if length < current:  # else the rest of its prompt is still to come
            self.texts[request] = self.texts[request][:length]

    def release(self, request):
        self.manager.release(request)
        self.limits.pop(request, None)
        del self.texts[request]

    def run(self):
        rng, manager = self.rng, self.manager
        what = str(rng.choice(["admit", "admit", "fork", "truncate", "release", "reset", *["step"] * 6]))
        request = int(rng.choice(list(self.texts))) if self.texts else None
        match what:
            case "admit":
                self.admit()
            case "step":
                self.step()
            case "fork" if self.texts:
                self.texts[manager.fork(request)] = self.texts[request].copy()
            case "truncate" if self.texts:
                self.truncate(request)
            case "release" if self.texts:
                self.release(request)
            case "reset" if rng.random() < 0.05:
                manager.reset_prefix_cache()
        self.seen.add(what)

    def check(self):
        manager = self.manager
        assert_balanced(manager._ledger)
        self.router.hear(manager.take_events())
        known = manager._prefix._block_of
        assert self.router.known.keys() == known.keys()
        assert manager._prefix._hash_of == {block: name for name, block in known.items()}
        np.testing.assert_array_equal(manager._ledger.kept.nonzero()[0], sorted(known.values()))
        usage, held = manager.usage(), self.held()
        cached = len(set(known.values()) - held)
        found = usage["blocks"]
        assert (found.used, found.cached, found.reserved) == (len(held), cached, self.reserved())
        assert set(manager._prefix.snapshots._of_hash) <= known.keys()
        assert usage["snapshots"].cached == len(manager._prefix.snapshots)


@pytest.mark.parametrize("lookahead", [0, 150])
@pytest.mark.parametrize("kinds", [(CSA, HCA, SWA), (HCA, SWA), (SWA,)])
def test_a_random_history(rng, kinds, lookahead):
    history = History(rng, kinds, lookahead=lookahead, every=int(rng.choice([1, 2, 3])))
    has_blocks = CSA in kinds or HCA in kinds
    wanted = {"hit", "new", "full", "fork", "truncate", "release"} if has_blocks else set()
    for _ in steps_until(800, history.seen, wanted):
        try:
            history.run()
        except CacheFull:
            history.seen.add("full")
            if history.texts:
                history.release(max(history.texts, key=history.manager.length))
        except CannotTruncate:
            pass
        history.check()
        history.device.transfer()
        for request, text in history.texts.items():
            history.device.check(request, text)
    print(history.manager.metrics())
    assert history.seen >= wanted
    assert has_blocks or "hit" not in history.seen  # without blocks there is nothing to know a prompt by


def fed(manager, text, new=None):
    """A request of a prompt, all of it computed, in steps that end where that is worth it."""
    request = manager.admit(manager.match_prefix(text), new)
    while manager.length(request) < len(text):
        manager.take_transfers()
        count = min(len(text) - manager.length(request), manager.chunk_limit(request), 1024)
        plan = manager.prepare_forward({request: count})
        manager.commit(plan, 1)
    manager.take_transfers()
    return request


def test_what_was_not_used_for_longest_goes_first_and_of_that_the_tail(rng):
    manager = make(blocks=9, snapshots=9, every=1, max_context=2048)
    texts = [rng.integers(0, 99, 385) for _ in range(3)]
    for text in texts[:2]:
        manager.release(fed(manager, text))
    manager.release(fed(manager, np.concatenate([texts[0][:128], texts[2][:1]])))  # one of the first three blocks again

    def found():
        return [manager.match_prefix(text).length for text in texts[:2]]

    assert found() == [384, 384]
    other = manager.admit()
    left = []
    for _ in range(9):  # three are free, six idle
        manager.prepare_forward({other: 128})
        left.append(found())
    assert left[:3] == [[384, 384]] * 3
    assert left[3:] == [[256, 384], [128, 384], [128, 256], [128, 128], [128, 0], [0, 0]]


def test_an_idle_chain_is_revived_and_not_taken_for_the_same_request(rng):
    manager = make(blocks=4, snapshots=2)
    text = rng.integers(0, 99, 257)
    manager.release(fed(manager, text, 0))
    assert manager.usage()["blocks"].cached == 2
    assert manager.can_admit(manager.match_prefix(text), 512 - 257)
    assert not manager.can_admit(manager.match_prefix(text), 516 - 257)
    request = manager.admit(manager.match_prefix(text), 512 - 257)
    manager.take_transfers()
    manager.prepare_forward({request: 512 - 256})
    assert manager.free_blocks == 0


@pytest.mark.parametrize("as_array", [True, False])
def test_tokens_whose_places_are_not_known_are_passed_over(rng, as_array):
    """Those of a plan that is committed before another one whose drafts it hangs on."""
    manager = make(lookahead=4, every=1)
    one, two = (manager.admit(manager.match_prefix(rng.integers(0, 99, 120))) for _ in range(2))
    manager.commit(manager.prepare_forward({one: 120, two: 120}), 1)
    manager.prepare_forward({one: 5}, drafts=4)  # keeps 2 in the end
    later = manager.prepare_forward({one: 1, two: 1})
    tokens = [7, 8]
    manager.commit(
        later, lengths=[123, 121], tokens=np.array(tokens, np.int32) if as_array else [[token] for token in tokens]
    )
    assert (manager.length(one), manager.length(two)) == (123, 121)
    assert manager._prefix.known[[manager.slot(one), manager.slot(two)]].tolist() == [120, 121]
    assert manager._prefix.open[manager.slot(two), 120] == 8


def test_blocks_that_others_computed_meanwhile_are_not_known_twice(rng):
    manager = make(blocks=12, snapshots=2)
    text = rng.integers(0, 99, 300)
    one, two = (manager.admit(manager.match_prefix(text)) for _ in range(2))
    plan = manager.prepare_forward({one: 256, two: 256})
    manager.commit(plan, 1)
    (event,) = manager.take_events()
    assert len(event.block_hashes) == 2
    assert event.parent_block_hash is None
    assert event.token_ids == tuple(text[:256].tolist())
    assert event.extra_keys == (None, None)
    assert manager.take_events() == ()
    assert manager.take_events(again=True) == ()
    assert manager.usage()["snapshots"].cached == 1
    manager.release(one)
    manager.release(two)
    assert manager.usage()["blocks"].cached == 2
    assert manager.free_blocks == 12


def test_events_are_told_only_if_wanted(rng):
    schema = make().schema
    quiet = CacheManager(schema, token_buckets=(512,))
    quiet.release(fed(quiet, rng.integers(0, 99, 300)))
    assert quiet.take_events() == ()
    manager = make()
    manager.match_prefix([1] * 200, salt=b"tenant")
    request = manager.admit(manager.match_prefix([1] * 200, salt=b"tenant"))
    manager.commit(manager.prepare_forward({request: 200}), 1)
    (event,) = manager.take_events()
    assert (event.extra_keys, event.medium) == (((b"tenant",),), "GPU")
    manager.reset_prefix_cache()
    assert manager.take_events() == (AllBlocksCleared(),)
    assert manager.take_events(again=True) == (AllBlocksCleared(),)


def test_a_prompt_is_hashed_by_all_before(rng):
    manager = make(every=1, snapshots=3)
    one, two = rng.integers(0, 99, 128), rng.integers(0, 99, 128)
    fed(manager, np.concatenate([one, two, [0]]))
    assert manager.match_prefix(np.concatenate([two, one, [0]])).length == 0
    assert manager.match_prefix(np.concatenate([one, one, two, [0]])).length == 128
    assert manager.match_prefix(np.concatenate([one, two, [0]]).astype(np.uint16)).length == 256
    assert manager.match_prefix(np.concatenate([one, two, [0]]).tolist()).length == 256


@pytest.mark.parametrize(
    ("tokens", "salt", "error", "message"),
    [
        ([1.5], b"", TypeError, "tokens must be integers"),
        ([[1]], b"", TypeError, "tokens must be integers"),
        ([2**31], b"", ValueError, "tokens must be int32"),
        ([1], "salt", TypeError, "salt must be bytes"),
    ],
)
def test_what_is_no_prompt_is_refused(tokens, salt, error, message):
    with pytest.raises(error, match=message):
        make().match_prefix(tokens, salt=salt)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "those of each of the plan's 2 requests, got 1"),
        ([[1, 2], [1]], "kept 1 tokens of the plan, and 2 are given"),
        ([[1], [0.5]], "tokens must be integers"),
        ({}, None),
    ],
)
def test_told_tokens_are_checked(tokens, message):
    manager = make()
    requests = [manager.admit(manager.match_prefix([1, 2, 3])) for _ in range(2)]
    plan = manager.prepare_forward(dict.fromkeys(requests, 1))
    if message is None:
        manager.commit(plan, 1, tokens=tokens)
        return
    before = state(manager)
    with pytest.raises(CacheError, match=message):
        manager.commit(plan, 1, tokens=tokens)
    assert state(manager) == before


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_snapshot_every_is_checked(every, error):
    with pytest.raises(error, match="snapshot_every"):
        make(every=every)


def test_copies_of_a_manager_go_their_own_ways(rng):
    manager = make(blocks=6)
    text = rng.integers(0, 99, 300)
    request = fed(manager, text)
    twin = copy.deepcopy(manager)
    manager.release(request)
    other = manager.admit()
    with contextlib.suppress(CacheFull):
        while True:
            manager.prepare_forward({other: 100})
    assert twin.match_prefix(text).length == 256
    assert_balanced(twin._ledger)
    twin.release(request)
    assert_balanced(twin._ledger)
    assert twin._ledger._evict.__self__ is twin._prefix
