"""CacheManager with drafts: lengths are the most that can be until commits tell, with later plans under way."""

import copy

import numpy as np
import pytest
from managers import make_manager, state
from test_blocks import assert_balanced

from dsv4_jax.host.errors import CacheFull, CannotTruncate, ContextExceeded, InvalidStep, StalePlan, UnknownRequest


def test_drafts_are_reserved_and_taken_back():
    manager = make_manager(lookahead=4)
    one, two = manager.admit(), manager.admit()
    manager.prepare_forward({one: 125, two: 50})
    plan = manager.prepare_forward({one: 5, two: 1}, drafts={one: 4})
    assert plan.request_start[:2].tolist() == [125, 50]
    assert (manager.length(one), manager.length(two)) == (130, 51)
    later = manager.prepare_forward({two: 2, one: 5}, drafts=[1, 4])
    assert later.request_start[:2].tolist() == [51, 130]
    assert manager.free_blocks == 40 - 2 - 1
    manager.commit(plan, lengths=[126, 51])
    assert (manager.length(one), manager.length(two)) == (131, 53)
    manager.commit(later, lengths=np.array([52, 127, -1, 5]))
    assert (manager.length(one), manager.length(two)) == (127, 52)
    assert manager.free_blocks == 40 - 1 - 1
    assert manager.prepare_forward({one: 1}).request_start[0] == 127


def test_a_later_commit_speaks_for_the_plans_before():
    manager = make_manager(lookahead=4)
    request = manager.admit()
    plans = [manager.prepare_forward({request: 5}, drafts=4) for _ in range(4)]
    manager.commit(plans[2], lengths=[3])
    assert manager.length(request) == 8
    for settled, error in ((0, "had a later plan committed"), (2, "committed before")):
        with pytest.raises(StalePlan, match=error):
            manager.commit(plans[settled], lengths=[5])
    manager.cancel(plans[3])
    assert manager.length(request) == 3
    plan = manager.prepare_forward({request: 5}, drafts=1, steps=3)
    for wrong in (2, 6, 9, 10, 14, 19):  # 3 + 4 or 5 tokens a step
        with pytest.raises(InvalidStep, match=f"cannot have {wrong} tokens after 3 steps of 5, 1 of them drafts, from"):
            manager.commit(plan, lengths=[wrong])
    manager.commit(plan, lengths=[12])
    assert manager.length(request) == 12


def test_what_is_left_of_a_plan_runs_in_its_place():
    """Before the plans that were made after it: a commit of it is no commit of theirs."""
    manager = make_manager(lookahead=4)
    one, two = manager.admit(), manager.admit()
    plan = manager.prepare_forward({one: 5, two: 5}, drafts=4)
    later = manager.prepare_forward({one: 5}, drafts=4)
    left = manager.cancel(plan, two)
    manager.commit(left, lengths=[2])
    assert (manager.length(one), manager.length(two)) == (7, 0)
    manager.commit(later, lengths=[3])
    assert manager.length(one) == 3
    plans = [manager.prepare_forward({one: 5, two: 5}, drafts=4) for _ in range(2)]
    left = manager.cancel(plans[1], two)
    manager.commit(plans[0], lengths=[5, 1])  # which left starts from
    manager.cancel(left)
    assert (manager.length(one), manager.length(two)) == (5, 1)


def test_bad_drafts_change_nothing():
    manager, other = make_manager(lookahead=4), make_manager(lookahead=0)
    one, two = manager.admit(), manager.admit()
    before = state(manager)
    cases = [
        ({one: 6}, {one: 5}, "5 drafts among its 6 tokens.* is 4"),
        ({one: 3}, {one: 3}, "3 drafts among its 3 tokens: one token at least is none"),
        ({one: 3}, {one: -1}, "-1 drafts"),
        ({one: 3}, {two: 1}, f"request {two} has drafts and no tokens"),
        ({one: 3, two: 3}, [1], r"one for each of 2 requests; got int64 \[1\]"),
        ({one: 3}, 1.0, "float64"),
        ({one: 3}, True, "bool"),
        ({one: 3}, [[1], [1, 2]], "must be integers"),
    ]
    for tokens, drafts, message in cases:
        with pytest.raises(InvalidStep, match=message):
            manager.prepare_forward(tokens, drafts=drafts)
        assert state(manager) == before
    with pytest.raises(InvalidStep, match="is 0"):
        other.prepare_forward({other.admit(): 2}, drafts=1)
    with pytest.raises(ContextExceeded):
        manager.prepare_forward({one: 5}, drafts=4, steps=205)
    manager.prepare_forward({one: 5}, drafts=0)
    plan = manager.prepare_forward({one: 5, two: 2}, drafts={one: 4})
    before = state(manager)
    for given, message in (
        ({"steps_run": [1, 1]}, f"request {one} has drafts .* give commit lengths"),
        ({"steps_run": 1, "lengths": [9, 2]}, "either"),
        ({"lengths": [9]}, r"each of the plan's 2 requests; got int64 \[1\]"),
        ({"lengths": 9}, r"got int64 \[\]"),
        ({"lengths": [9.0, 2.0]}, "float64"),
        ({"lengths": [[9], [1, 2]]}, "must be integers"),
    ):
        with pytest.raises(InvalidStep, match=message):
            manager.commit(plan, **given)
        assert state(manager) == before


def test_truncate_needs_to_know_the_length():
    manager = make_manager(lookahead=4)
    request = manager.admit()
    manager.prepare_forward({request: 300})
    plan = manager.prepare_forward({request: 4}, drafts=3)
    with pytest.raises(CannotTruncate, match="how many of its drafts were kept is not known"):
        manager.truncate(request, 303)
    manager.commit(plan, lengths=[302])
    with pytest.raises(CannotTruncate, match="possible are 0 and 300 to 302"):
        manager.truncate(request, 299)
    manager.truncate(request, 300)  # 4 less than the longest, drafts included
    plan = manager.prepare_forward({request: 4}, drafts=3)
    manager.truncate(request, 0)
    with pytest.raises(StalePlan):
        manager.commit(plan, lengths=[1])
    assert manager.prepare_forward({request: 4}).request_reset[0] == 1
    manager.truncate(request, 3)


def test_a_request_that_never_ran_its_reset_has_no_later_plan():
    manager = make_manager(lookahead=4)
    request = manager.admit()
    plan, later = (manager.prepare_forward({request: 2}, drafts=1) for _ in range(2))
    with pytest.raises(StalePlan, match="ran no step of the plan that resets its slot"):
        manager.commit(plan, lengths=[0])
    manager.cancel(later)
    manager.commit(plan, lengths=[0])
    assert manager.prepare_forward({request: 1}).request_reset[0] == 1


class UnderWay:
    """A plan that was made: what it was made with, and which of its requests are still as it left them."""

    def __init__(self, plan, tokens, drafts, steps):
        self.plan, self.tokens, self.drafts, self.steps = plan, tokens, drafts, steps
        self.live = set(tokens)

    def most(self, request):
        return self.tokens[request] * self.steps if request in self.live else 0


class Server:
    """Random operations on a manager. Of each request it keeps how long it is for certain, and the plans after that."""

    def __init__(self, rng):
        self.rng, self.blocks, self.lookahead = rng, int(rng.integers(3, 20)), int(rng.integers(1, 9))
        sizes = {"blocks": self.blocks, "lookahead": self.lookahead, "max_context": 600, "slots": 3}
        self.manager = make_manager(token_buckets=(9, 50, 300), **sizes)
        self.certain, self.plans, self.commits = {}, [], 0

    def most(self, request):
        return self.certain[request] + sum(plan.most(request) for plan in self.plans)

    @staticmethod
    def needed(length):
        return len({entry // 32 for entry in range(length // 4)})

    def admit(self):
        if len(self.certain) < 3:
            self.certain[self.manager.admit()] = 0

    def release(self):
        if self.certain:
            request = int(self.rng.choice(list(self.certain)))
            self.manager.release(request)
            del self.certain[request]
            for plan in self.plans:
                plan.live.discard(request)

    def prepare(self):
        if not self.certain:
            return
        rng, before = self.rng, {request: self.most(request) for request in self.certain}
        chosen = [request for request in before if rng.random() < 0.7] or list(before)[:1]
        tokens = {request: int(rng.choice([1, rng.integers(1, 10), rng.integers(1, 90)])) for request in chosen}
        drafts = {r: int(rng.integers(0, min(self.lookahead, n - 1) + 1)) for r, n in tokens.items()}
        steps = int(rng.choice([1, 1, 3]))
        added = sum(self.needed(before[r] + n * steps) - self.needed(before[r]) for r, n in tokens.items())
        too_long = any(before[r] + n * steps > 600 for r, n in tokens.items())
        if too_long or added > self.manager.free_blocks:
            with pytest.raises(ContextExceeded if too_long else CacheFull):
                self.manager.prepare_forward(tokens, drafts=drafts, steps=steps)
            return
        plan = self.manager.prepare_forward(tokens, drafts=drafts, steps=steps)
        first = plan.step(0)
        assert first.request_start[: len(chosen)].tolist() == [before[request] for request in chosen]
        assert first.request_reset[: len(chosen)].tolist() == [int(before[request] == 0) for request in chosen]
        self.plans.append(UnderWay(plan, tokens, drafts, steps))

    def cancel(self):
        """All of the latest plan, or one request."""
        if not self.plans:
            return
        last = self.plans[-1]
        chosen = set(last.tokens)
        if chosen and self.rng.integers(2):
            chosen = {int(self.rng.choice(list(chosen)))}
        if last.live != set(last.tokens):
            with pytest.raises((StalePlan, UnknownRequest)):
                self.manager.cancel(last.plan, list(chosen))
            return
        last.plan = self.manager.cancel(last.plan, np.array(list(chosen), np.int64))
        last.live -= chosen
        last.tokens = {request: tokens for request, tokens in last.tokens.items() if request in last.live}
        if not last.live:
            self.plans.pop()

    def commit(self):
        """Of a plan that all plans before have run with, each step of each request keeping what it may."""
        if not self.plans:
            return
        index = int(self.rng.choice([0, 0, self.rng.integers(len(self.plans))]))
        plan, ran, later = self.plans[index], self.plans[: index + 1], self.plans[index + 1 :]
        kept = dict.fromkeys(plan.tokens, 7)
        for request in plan.live:
            kept[request] = self.certain[request]
            for one in ran:
                if request in one.live:
                    kept[request] += one.most(request)
                    kept[request] -= int(self.rng.integers(0, one.drafts[request] + 1, one.steps).sum())
        if not plan.live and plan.tokens:
            with pytest.raises(StalePlan):
                self.manager.commit(plan.plan, lengths=list(kept.values()))
            self.plans.remove(plan)
            return
        whole = [request for request in plan.live if any(request in one.live for one in later)]
        whole = [request for request in whole if not any(request in o.live and o.drafts[request] for o in ran)]
        if whole and plan.tokens[whole[0]] * plan.steps > 1:
            wrong = kept | {whole[0]: kept[whole[0]] - (plan.tokens[whole[0]] if plan.steps > 1 else kept[whole[0]])}
            with pytest.raises((StalePlan, InvalidStep)):
                self.manager.commit(plan.plan, lengths=list(wrong.values()))
        self.manager.commit(plan.plan, lengths=list(kept.values()))
        self.commits += 1
        for request in set(plan.live):
            self.certain[request] = kept[request]
            for one in ran:
                one.live.discard(request)
        self.plans.remove(plan)

    def check(self):
        manager = self.manager
        held = [manager.blocks(request).tolist() for request in self.certain]
        for request, ids in zip(self.certain, held, strict=True):
            assert manager.length(request) == self.most(request)
            assert len(ids) == self.needed(self.most(request))
        flat = [block for ids in held for block in ids]
        assert len(set(flat)) == len(flat) == self.blocks - manager.free_blocks
        assert_balanced(manager._ledger)


def test_a_random_history_of_drafts(rng):
    commits = 0
    for _ in range(12):
        server = Server(rng)
        for _ in range(150):
            operation = rng.choice(["admit", "release", "prepare", "cancel", "commit"], p=[0.15, 0.04, 0.46, 0.1, 0.25])
            getattr(server, operation)()
            if rng.random() < 0.1:
                server.manager = copy.deepcopy(server.manager)
            server.check()
        commits += server.commits
    assert commits > 100
