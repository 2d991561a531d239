"""What is promised is kept: usage and admission against a count of what requests hold, over random histories."""

import contextlib
import copy

import pytest
from histories import steps_until
from managers import CSA, HCA, SWA, grow, make_manager, state
from test_blocks import assert_balanced

from dsv4_jax.host.errors import CacheError, CacheFull, ContextExceeded, PromptTooLong, StepTooLarge

SLOTS, BLOCKS, CONTEXT = 5, 16, 900


class Accounts:
    """A manager, and the lengths that its requests were promised."""

    def __init__(self, rng, kinds, lookahead):
        self.rng, self.lookahead = rng, lookahead
        sizes = {"slots": SLOTS, "blocks": BLOCKS, "max_context": CONTEXT, "lookahead": lookahead}
        self.manager, self.limits, self.plans, self.seen = make_manager(*kinds, **sizes), {}, [], set()

    def need(self, limit):
        return int(self.manager.blocks_needed(min(limit + self.lookahead, CONTEXT)))

    def held(self):
        return {request: self.manager.blocks(request).tolist() for request in self.manager.requests.tolist()}

    def reserved(self):
        return sum(max(self.need(limit) - len(self.manager.blocks(one)), 0) for one, limit in self.limits.items())

    def free(self):
        return BLOCKS - len({block for blocks in self.held().values() for block in blocks})

    def admit(self):
        prompt, new = int(self.rng.integers(0, 700)), int(self.rng.integers(0, 400))
        new = None if self.rng.random() < 0.3 else new
        fits = len(self.manager.requests) < SLOTS and prompt + (new or 0) <= CONTEXT
        needed = int(self.manager.blocks_needed(prompt)) if new is None else self.need(prompt + new)
        fits = fits and needed <= self.free() - self.reserved()
        assert self.manager.can_admit(prompt, new) == fits
        self.seen.add(f"fits {fits}")
        if new is not None and not fits:
            self.refuses(lambda: self.manager.admit(prompt, new))
        elif fits:
            request = self.manager.admit(prompt, new)
            if new is not None:
                self.limits[request] = prompt + new

    def refuses(self, call):
        before = state(self.manager)
        with pytest.raises((CacheFull, PromptTooLong)):
            call()
        assert state(self.manager) == before

    def fork(self, request):
        length, new = self.manager.length(request), int(self.rng.integers(0, 300))
        copies = len(self.manager.blocks(request)) - length // 128
        if length + new > CONTEXT or len(self.manager.requests) == SLOTS:
            self.refuses(lambda: self.manager.fork(request, new))
        elif copies + self.need(length + new) - len(self.manager.blocks(request)) > self.free() - self.reserved():
            self.refuses(lambda: self.manager.fork(request, new))
            self.seen.add("no fork")
        else:
            self.limits[self.manager.fork(request, new)] = length + new
            self.manager.take_transfers()
            self.seen.add("fork")

    def prepare(self, request, tokens):
        """Steps of one request, which meets CacheFull only beyond what it was promised."""
        length = self.manager.length(request) + tokens
        more = int(self.manager.blocks_needed(length)) - len(self.manager.blocks(request))
        promised = 0
        if request in self.limits:
            promised = max(self.need(self.limits[request]) - len(self.manager.blocks(request)), 0)
        fits = more <= self.free() - self.reserved() + min(promised, more)
        try:
            self.plans.append(self.manager.prepare_forward({request: tokens}))
        except CacheFull:
            assert not fits
            self.seen.add("full")
        except (ContextExceeded, StepTooLarge):
            pass
        else:
            assert fits

    def truncate(self, request):
        length = self.manager.length(request)
        try:
            self.manager.truncate(request, int(self.rng.choice([0, length // 128 * 128, max(length - 100, 0)])))
        except CacheFull:
            self.seen.add("cannot give back")
        except CacheError:
            return
        if self.manager.transfers_wait:
            self.manager.take_transfers()

    def check(self):
        manager, held = self.manager, self.held()
        usage, free, reserved = manager.usage(), self.free(), self.reserved()
        blocks = [block for blocks in held.values() for block in blocks]
        shared = len({block for block in blocks if blocks.count(block) > 1})
        found = usage["blocks"]
        assert (found.total, found.used, found.free) == (BLOCKS, BLOCKS - free, free)
        assert (found.shared, found.reserved, found.cached) == (shared, reserved, 0)
        assert (usage["slots"].used, usage["slots"].free) == (len(held), SLOTS - len(held))
        assert 0 <= reserved <= free
        assert_balanced(manager._ledger)

    def check_promises(self):
        """The others take what they can get, and then every promise is kept."""
        manager = copy.deepcopy(self.manager)
        for request in self.rng.permutation(manager.requests).tolist():
            with contextlib.suppress(CacheError):
                while request not in self.limits:
                    manager.prepare_forward({request: 1})
        for request in self.rng.permutation(list(self.limits)).tolist():
            grow(manager, request, self.limits[request])


@pytest.mark.parametrize("lookahead", [0, 150])
@pytest.mark.parametrize("kinds", [(CSA, HCA, SWA), (HCA, SWA)])
def test_a_random_history(rng, kinds, lookahead):
    accounts = Accounts(rng, kinds, lookahead)
    manager, wanted = accounts.manager, {"fits True", "fits False", "fork", "no fork", "full"}
    for step in steps_until(600, accounts.seen, wanted):
        requests = manager.requests.tolist()
        match rng.choice(["admit", "fork", "release", "truncate", "cancel", *["prepare"] * 4]):
            case "admit":
                accounts.admit()
            case "fork" if requests:
                accounts.fork(int(rng.choice(requests)))
            case "release" if requests:
                request = int(rng.choice(requests))
                manager.release(request)
                accounts.limits.pop(request, None)
            case "truncate" if requests:
                accounts.truncate(int(rng.choice(requests)))
            case "cancel" if accounts.plans:
                with contextlib.suppress(CacheError):
                    manager.cancel(accounts.plans.pop())
            case "prepare" if requests:
                accounts.prepare(int(rng.choice(requests)), int(rng.integers(1, 300)))
        accounts.check()
        if step % 40 == 39:
            accounts.check_promises()
    assert accounts.seen >= wanted
    manager.reset()
    accounts.limits.clear()
    accounts.check()


def test_a_promise_is_not_for_others():
    manager = make_manager(slots=3, blocks=5)
    one, other = manager.admit(100, 300), manager.admit()
    assert manager.usage()["blocks"].reserved == 4
    manager.prepare_forward({other: 131})
    with pytest.raises(CacheFull, match="1 blocks needed, 0 of 5 free"):
        manager.prepare_forward({other: 1})
    manager.prepare_forward({one: 400})
    with pytest.raises(CacheFull):
        manager.prepare_forward({one: 400})
    assert manager.usage()["blocks"].reserved == 0
    manager.release(one)
    assert manager.can_admit(0, 500)
    assert not manager.can_admit(0, 520)


def test_several_requests_of_a_step_get_what_each_was_promised():
    manager = make_manager(slots=3, blocks=4)
    one, two, three = manager.admit(0, 140), manager.admit(0, 140), manager.admit()
    with pytest.raises(CacheFull, match="5 blocks needed, 4 of 4 free"):
        manager.prepare_forward({one: 140, three: 10, two: 140})
    manager.prepare_forward({two: 140, one: 140})
    assert manager.free_blocks == 0


def test_what_shared_blocks_promise_stays_kept():
    """A request that gives back a block which its twin keeps would need another one later."""
    manager = make_manager(slots=2, blocks=4, lookahead=140)
    one = manager.admit(128, 0)  # and the drafts, three blocks
    grow(manager, one, 128)
    twin = manager.fork(one)
    manager.take_transfers()
    manager.prepare_forward({twin: 20})
    before = state(manager)
    with pytest.raises(CacheFull, match="1 blocks needed, 0 of 4 free"):
        manager.truncate(one, 0)
    assert state(manager) == before
    manager.release(twin)
    manager.truncate(one, 0)
    assert manager.usage()["blocks"].reserved == 3


def test_usage_in_bytes():
    manager = make_manager(slots=2, blocks=5)
    manager.prepare_forward({manager.admit(10, 190): 100})
    usage, schema = manager.usage(), manager.schema
    assert usage["blocks"].bytes == {
        "total": 5 * schema.bytes_per_block,
        "used": schema.bytes_per_block,
        "shared": 0,
        "cached": 0,
        "free": 4 * schema.bytes_per_block,
        "reserved": schema.bytes_per_block,
    }
    assert sum(pool.bytes["total"] for pool in usage.values()) == schema.memory_bytes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "prompt must be at least 0, got -1"),
        ((1.5,), TypeError, "prompt must be an integer"),
        ((1, -1), ValueError, "max_new_tokens must be at least 0, got -1"),
        ((1, True), TypeError, "max_new_tokens must be an integer"),
    ],
)
def test_what_is_no_number_of_tokens_is_refused(arguments, error, message):
    manager = make_manager()
    before = state(manager)
    for call in (manager.can_admit, manager.admit):
        with pytest.raises(error, match=message):
            call(*arguments)
    assert state(manager) == before


def test_a_prompt_that_never_fits_says_so():
    manager = make_manager(max_context=200)
    with pytest.raises(PromptTooLong, match="150 tokens and 51 new ones do not fit a context of 200"):
        manager.admit(150, 51)
    one = manager.admit(150, 50)
    grow(manager, one, 150)
    with pytest.raises(PromptTooLong, match="150 tokens and 60 new"):
        manager.fork(one, 60)
    assert len(manager.requests) == 1
