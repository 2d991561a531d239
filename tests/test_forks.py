"""Forks on a whole cache: both twins store what each would have stored alone, and shared bytes never change."""

import jax
import numpy as np
import pytest
from harness import Driver, assert_same_bytes, random_tokens, random_weights
from histories import steps_until
from managers import HCA, SWA, grow, make_manager, state
from test_blocks import assert_balanced

from dsv4_jax import CacheFormats, CacheFull, apply_transfers
from dsv4_jax.host.errors import CannotTruncate, LengthUnknown, StalePlan, TransfersWait
from dsv4_jax.layout.formats import HCA_TAILS

CONTEXT = 700
LOOKAHEAD = 140


class Family:
    """A cache with requests that fork, and another on which any of them is computed from nothing."""

    def __init__(self, rng, hca_tail, **sizes):
        self.rng, weights, formats = rng, random_weights(rng), CacheFormats(hca_tail=hca_tail)
        sizes = {"slots": 5, "blocks": 22, "max_context": 1024, "lookahead": LOOKAHEAD} | sizes
        self.driver, self.alone = Driver(weights, formats, **sizes), Driver(weights, formats, **sizes)
        self._apply = jax.jit(apply_transfers, donate_argnums=0)

    @property
    def manager(self):
        return self.driver.manager

    def admit(self):
        return self.driver.admit(random_tokens(self.rng, CONTEXT))

    def fork(self, request):
        """A twin, that will bring other tokens from here on."""
        twin = self.manager.fork(request)
        self.driver.sequences[twin] = self._other_from(request, self.manager.length(request))
        return twin

    def truncate(self, request, length):
        self.manager.truncate(request, length)
        self.driver.sequences[request] = self._other_from(request, length)

    def in_a_shared_block(self):
        """A request and a length, not long ago, in the middle of a block that it shares."""
        ledger = self.manager._ledger
        for request in self.rng.permutation(list(self.driver.sequences)).tolist():
            length, blocks = self.manager.length(request), self.manager.blocks(request)
            shared = (ledger.references[blocks] > 1).nonzero()[0]
            if shared.size and (cut := 128 * int(shared[-1]) + 100) >= length - LOOKAHEAD:
                return request, cut
        return None

    def _other_from(self, request, length):
        mine = self.driver.sequences[request]
        return [
            {name: np.concatenate([rows[:length], other[name][length:]]) for name, rows in layer.items()}
            for layer, other in zip(mine, random_tokens(self.rng, CONTEXT), strict=True)
        ]

    def feed(self, counts):
        if self.manager.transfers_wait:
            self.driver.cache = self._apply(self.driver.cache, self.manager.take_transfers())
        self.driver.feed(counts)

    def check(self, request):
        """What a request stored is what it stores if it is computed from nothing."""
        if self.manager.transfers_wait:
            self.driver.cache = self._apply(self.driver.cache, self.manager.take_transfers())
        length = self.manager.length(request)
        again = self.alone.admit(self.driver.sequences[request])
        if length:
            self.alone.feed({again: length})
            assert_same_bytes(
                self.driver.visible(request), self.alone.visible(again), f"request {request} of {length} tokens"
            )
        self.alone.release(again)


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 131, 132, 250, 256, 380])
def test_twins_go_their_own_ways(device, rng, hca_tail, length):
    family = Family(rng, hca_tail)
    one = family.admit()
    family.feed({one: length})
    twin, third = family.fork(one), family.fork(one)
    blocks = [family.manager.blocks(request).tolist() for request in (one, twin, third)]
    full = length // 128
    assert blocks[0][:full] == blocks[1][:full] == blocks[2][:full]
    assert len({block for held in blocks for block in held[full:]}) == sum(len(held[full:]) for held in blocks)
    for request in (one, twin, third):
        family.check(request)
    family.feed({twin: 40, one: 1, third: 129})
    family.feed({one: 140, twin: 1})
    for request in (one, twin, third):
        family.check(request)
    family.driver.release(one)
    family.feed({family.admit(): 400, twin: 10})
    for request in (twin, third):
        family.check(request)
    assert_balanced(family.manager._ledger)


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_going_back_into_a_shared_block_copies_it(device, rng, hca_tail):
    family = Family(rng, hca_tail)
    one = family.admit()
    family.feed({one: 290})
    twin = family.fork(one)
    family.truncate(twin, 290 - 60)
    assert family.manager.blocks(twin).tolist()[0] == family.manager.blocks(one).tolist()[0]
    assert family.manager.blocks(twin).tolist()[1] != family.manager.blocks(one).tolist()[1]
    family.feed({twin: 1})
    family.check(one)
    family.check(twin)
    family.truncate(one, 290 - 100)  # by now nobody shares that block
    assert not family.manager.transfers_wait
    family.feed({one: 100, twin: 30})
    family.check(one)
    family.check(twin)


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_random_families(device, rng, hca_tail):
    family, seen = Family(rng, hca_tail, blocks=13), set()
    wanted = {"fork", "truncate", "copied", "cut", "slots", "blocks", "release"}
    driver, manager = family.driver, family.manager
    for step in steps_until(200, seen, wanted):
        requests = list(driver.sequences)
        chosen = [request for request in requests if manager.length(request) < CONTEXT - 250]
        request = int(rng.choice(requests)) if requests else None
        what = str(rng.choice(["admit", "fork", "fork", "truncate", "truncate", "release", *["feed"] * 8]))
        try:
            match what:
                case "admit":
                    family.admit()
                case "fork" if requests:
                    family.fork(request)
                case "truncate" if requests:
                    before = len(manager._transfers)
                    length = manager.length(request)
                    target = length - int(rng.integers(1, min(LOOKAHEAD, length) + 1))
                    if rng.random() < 0.7:  # into a block that others have as well
                        request, target = family.in_a_shared_block() or (request, target)
                    family.truncate(request, target)
                    seen.add("copied" if len(manager._transfers) > before else "cut")
                case "release" if requests and rng.random() < 0.6:
                    driver.release(request)
                case "feed" if chosen:
                    some = [one for one in chosen if rng.random() < 0.6] or chosen[:1]
                    family.feed({one: int(rng.choice([1, rng.integers(1, 250)])) for one in some})
        except CacheFull as full:
            seen.add(full.resource)
            if full.resource == "blocks":
                driver.release(max(driver.sequences, key=manager.length))
        except (CannotTruncate, ValueError):  # nothing to take back, or it is gone
            pass
        seen.add(what)
        assert_balanced(manager._ledger)
        if step % 10 == 9 and driver.sequences:
            family.check(int(rng.choice(list(driver.sequences))))
    assert seen >= wanted
    for one in list(driver.sequences):
        family.check(one)


def test_a_fork_of_nothing_is_a_new_request():
    manager = make_manager()
    twin = manager.fork(manager.admit())
    assert not manager.transfers_wait
    assert manager.prepare_forward({twin: 3}).request_reset[0] == 1


@pytest.mark.parametrize("kinds", [(HCA, SWA), (SWA,)])
def test_models_without_csa_have_no_open_blocks(kinds):
    manager = make_manager(*kinds, blocks=4)
    one = manager.admit()
    grow(manager, one, 300)
    twin = manager.fork(one)
    assert manager.blocks(twin).tolist() == manager.blocks(one).tolist()
    assert manager.free_blocks == (2 if HCA in kinds else 4)


def test_prepare_forward_waits_for_transfers():
    manager = make_manager()
    one = manager.admit()
    grow(manager, one, 200)
    manager.fork(one)
    before = state(manager)
    with pytest.raises(TransfersWait, match="4 transfers wait"):
        manager.prepare_forward({one: 1})
    assert state(manager) == before
    taken = manager.take_transfers()
    assert not manager.transfers_wait
    manager.prepare_forward({one: 1})
    for again in (manager.take_transfers(again=True), taken):
        assert (again.operations[:, 0] > 0).sum() == 4
    assert (manager.take_transfers().operations[:, 0] > 0).sum() == 0


def test_what_cannot_be_forked_changes_nothing():
    manager = make_manager(slots=3, blocks=4, lookahead=3)
    one, other = manager.admit(), manager.admit()
    manager.prepare_forward({one: 200, other: 200})
    before = state(manager)
    with pytest.raises(CacheFull, match="1 blocks needed, 0 of 4 free"):
        manager.fork(one)
    assert state(manager) == before
    manager.truncate(other, 0)
    plan = manager.prepare_forward({one: 3}, drafts=2)
    before = state(manager)
    with pytest.raises(LengthUnknown, match="commit their plans first"):
        manager.fork(one)
    assert state(manager) == before
    manager.commit(plan, lengths=[201])
    later = manager.prepare_forward({one: 1})
    manager.fork(one)
    for settle in (manager.cancel, lambda plan: manager.commit(plan, 0)):
        with pytest.raises(StalePlan):
            settle(later)
    before = state(manager)
    with pytest.raises(CacheFull, match="slots"):
        manager.fork(one)
    assert state(manager) == before


def test_a_shared_block_that_cannot_be_copied_is_not_cut():
    manager = make_manager(slots=2, blocks=4, lookahead=200)
    one = manager.admit()
    grow(manager, one, 300)
    twin = manager.fork(one)
    before = state(manager)
    with pytest.raises(CacheFull, match="blocks"):
        manager.truncate(twin, 200)
    assert state(manager) == before
    manager.truncate(twin, 128)  # nothing is open there
    manager.truncate(one, 200)
    assert manager.free_blocks == 2
