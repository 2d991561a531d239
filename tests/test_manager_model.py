"""CacheManager against a plain model, over random sequences of operations.

The model is a dictionary of requests. Each simulates its ring and its tails row by row, so that what can be truncated
is found by looking for the rows that are needed, and every plan is compared with a loop over its tokens.
"""

import contextlib
import copy
import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from managers import make_manager, state
from test_blocks import assert_balanced
from test_plan import assert_fields, by_loop

from dsv4_jax.host.errors import (
    CacheError,
    CacheFull,
    CannotTruncate,
    ContextExceeded,
    InvalidStep,
    StalePlan,
    StepTooLarge,
    UnknownRequest,
)
from dsv4_jax.layout.formats import HCA_TAILS
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.kinds import LayerKind

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA
WINDOW = 128


class Request:
    """A request as the device would hold it: which token lies in which ring and tail row."""

    def __init__(self, kinds, lookahead, hca_tail):
        self.kinds, self.lookahead, self.hca_tail = kinds, lookahead, hca_tail
        self.ring_rows, depth = WINDOW + lookahead, -(-lookahead // 4) * 4
        self.overlap_rows, self.current_rows, self.hca_rows = 8 + depth, 4 + depth, 128 + lookahead
        self.tokens, self.peak = [], 0
        self.ring = {}
        self.overlap, self.current, self.hca = {}, {}, {}
        self.states = {}  # of a running tail: the token that each is the state after
        self.plans = []

    @property
    def length(self):
        return len(self.tokens)

    def blocks_needed(self, length):
        if CSA in self.kinds:
            return len({entry // 32 for entry in range(length // 4)})
        return len(range(length // 128)) if HCA in self.kinds else 0

    def append(self, token):
        position = self.length
        self.tokens.append(token)
        self.peak = max(self.peak, self.length)
        self.ring[position % self.ring_rows] = token
        self.overlap[position % self.overlap_rows] = self.current[position % self.current_rows] = token
        self.hca[position % self.hca_rows] = token
        self.states[position % (1 + self.lookahead)] = token

    def rotate(self):
        """Clears every tail row that no later entry pools, also if the latest `lookahead` tokens are taken back."""
        for tail, needed in (
            (self.overlap, self.overlap_positions),
            (self.current, self.current_positions),
            (self.hca, self.hca_positions),
        ):
            earliest = needed(max(self.length - self.lookahead, 0))
            kept = {self.tokens[position] for position in (*earliest, *range(earliest.stop, self.length))}
            kept |= {self.tokens[position] for position in needed(self.length)}
            for row in [row for row, token in tail.items() if token not in kept]:
                del tail[row]

    @staticmethod
    def overlap_positions(n):
        return range(max(n // 4 * 4 - 4, 0), n)

    @staticmethod
    def current_positions(n):
        return range(n // 4 * 4, n)

    @staticmethod
    def hca_positions(n):
        return range(n // 128 * 128, n)

    def can_be_truncated_to(self, n):
        """Whether every row that position n and later ones need is there."""
        if n == 0 or n == self.length:
            return True
        if not 0 < n < self.length:
            return False
        needs = [(self.ring, self.ring_rows, range(max(n - WINDOW + 1, 0), n))]
        if CSA in self.kinds:
            needs += [(self.overlap, self.overlap_rows, self.overlap_positions(n))]
            needs += [(self.current, self.current_rows, self.current_positions(n))]
        if HCA in self.kinds and self.hca_tail == "running" and self.hca_positions(n):
            needs += [(self.states, 1 + self.lookahead, range(n - 1, n))]
        elif HCA in self.kinds:
            needs += [(self.hca, self.hca_rows, self.hca_positions(n))]
        return all(
            rows.get(position % size) == self.tokens[position]
            for rows, size, positions in needs
            for position in positions
        )

    def bring(self, tokens, name):
        """One step of `tokens` tokens, each unlike any other."""
        for index in range(tokens):
            self.append((name, self.length, index))
        self.rotate()

    def truncate(self, n):
        if n == self.length:
            return
        self.plans.clear()
        del self.tokens[n:]
        if n == 0:
            self.ring, self.overlap, self.current, self.hca, self.states = {}, {}, {}, {}, {}
            self.peak = 0

    def must_be_truncated_to(self, n):
        """Whether truncating is promised: all that is possible, or with a lookahead down to that below the peak."""
        return self.can_be_truncated_to(n) and (n == 0 or not self.lookahead or n >= self.peak - self.lookahead)


@dataclasses.dataclass
class Made:
    """A plan that was made: what the model needs to judge and to undo its cancellation."""

    plan: StepPlan
    before: dict
    counts: list
    steps: int
    serial: int
    slots: list
    settled: bool = False
    ran: bool = False


class ManagerMachine(RuleBasedStateMachine):
    """Random operations on a manager and on the plain model; they must agree, and failures must change nothing."""

    @initialize(
        kinds=st.sampled_from(((CSA, HCA, SWA), (CSA,), (HCA, SWA), (SWA,))),
        slots=st.integers(1, 4),
        blocks=st.integers(1, 14),
        lookahead=st.sampled_from((0, 0, 3, 150)),
        max_context=st.sampled_from((130, 517, 900)),
        hca_tail=st.sampled_from(HCA_TAILS),
    )
    def start(self, kinds, slots, blocks, lookahead, max_context, hca_tail):
        self.kinds, self.slots, self.blocks, self.max_context = kinds, slots, blocks, max_context
        self.buckets, self.lookahead, self.hca_tail = (8, 50, 400), lookahead, hca_tail
        sizes = {"slots": slots, "blocks": blocks, "max_context": max_context, "lookahead": lookahead}
        self.manager = make_manager(*kinds, hca_tail=hca_tail, token_buckets=self.buckets, **sizes)
        self.requests = {}
        self.slot = {}
        self.released = []
        self.made = []
        self.serial = 0
        self.device_table = {}
        for _ in range(slots - 1):
            self.admit_one()

    def fails(self, expected, call):
        """`call` raises one of `expected` and changes nothing."""
        before = state(self.manager)
        with pytest.raises(CacheError) as raised:
            call()
        assert type(raised.value) in expected, raised.value
        assert state(self.manager) == before
        return raised.value

    def held(self):
        return sum(request.blocks_needed(request.length) for request in self.requests.values())

    def strange_handle(self, data):
        unknown = data.draw(st.sampled_from([*self.released[-2:], -1, 0, self.slots - 1, 10**6, 2**62, -(2**62)]))
        return -1 if unknown in self.requests else unknown

    def admit_one(self):
        handle = self.manager.admit()
        assert handle not in self.requests
        assert handle not in self.released
        self.slot[handle] = self.manager.slot(handle)
        self.requests[handle] = Request(self.kinds, self.lookahead, self.hca_tail)

    @rule()
    def admit(self):
        if len(self.requests) == self.slots:
            assert not self.manager.can_admit()
            error = self.fails({CacheFull}, self.manager.admit)
            assert (error.resource, error.needed, error.free, error.total) == ("slots", 1, 0, self.slots)
            return
        assert self.manager.can_admit()
        self.admit_one()

    @rule(data=st.data())
    def strange_request(self, data):
        handle, method = self.strange_handle(data), data.draw(st.sampled_from(("length", "slot", "blocks", "release")))
        self.fails({UnknownRequest}, lambda: getattr(self.manager, method)(handle))
        self.fails({UnknownRequest}, lambda: self.manager.truncate(handle, 0))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data):
        handle = data.draw(st.sampled_from(list(self.requests)))
        self.manager.release(handle)
        del self.requests[handle], self.slot[handle]
        self.released.append(handle)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def truncate(self, data):
        handle = data.draw(st.sampled_from(list(self.requests)))
        request = self.requests[handle]
        target = request.length - data.draw(st.one_of(st.integers(0, 3), st.integers(-1, request.length + 1)))
        if data.draw(st.integers(0, 5)) == 0:
            target = target // 128 * 128
        if request.must_be_truncated_to(target):
            self.manager.truncate(handle, target)
            request.truncate(target)
            return
        if request.can_be_truncated_to(target):
            with contextlib.suppress(CannotTruncate):
                self.manager.truncate(handle, target)
                request.truncate(target)
            return
        error = self.fails({CannotTruncate}, lambda: self.manager.truncate(handle, target))
        if request.length:
            lengths = range(request.length + 1)
            assert all(request.can_be_truncated_to(n) for n in lengths[error.lowest :])
            assert error.lowest == 1 or not request.must_be_truncated_to(error.lowest - 1)

    @rule(data=st.data(), largest=st.sampled_from((1, 5, 131, 420)), as_arrays=st.booleans())
    def prepare_anything(self, data, largest, as_arrays):
        known = list(self.requests)
        handles = data.draw(st.permutations(known))[: data.draw(st.integers(0, len(known)))]
        if data.draw(st.integers(0, 5)) == 0:
            handles.append(self.strange_handle(data))
        if handles and data.draw(st.integers(0, 5)) == 0:
            handles.append(handles[0])
        counts = [data.draw(st.integers(1, largest)) for _ in handles]
        if counts and data.draw(st.integers(0, 5)) == 0:
            counts[-1] = data.draw(st.sampled_from((0, -1, 10**6, 2**62)))
        self.prepare(handles, counts, as_arrays)

    @precondition(lambda self: self.requests)
    @rule(steps=st.integers(1, 9), as_arrays=st.booleans(), at_once=st.booleans())
    def decode(self, steps, as_arrays, at_once):
        for _ in range(1 if at_once else steps):
            self.prepare(list(self.requests), [1] * len(self.requests), as_arrays, steps if at_once else None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), largest=st.sampled_from((1, 5, 131)), steps=st.integers(-1, 7), as_arrays=st.booleans())
    def prepare_steps(self, data, largest, steps, as_arrays):
        handles = data.draw(st.lists(st.sampled_from(list(self.requests)), unique=True))
        self.prepare(handles, [data.draw(st.integers(1, largest)) for _ in handles], as_arrays, steps)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.one_of(st.integers(1, 400), st.sampled_from((4, 127, 128, 129, 256))))
    def prefill(self, data, count):
        self.prepare([data.draw(st.sampled_from(list(self.requests)))], [count], as_arrays=False)

    def prepare(self, handles, counts, as_arrays, at_once=None):
        """A step, or several `at_once`, on the manager and on the model, which says what should be raised."""
        steps = 1 if at_once is None else at_once
        known = list(self.requests)
        if as_arrays:
            given_tokens = handles, counts
        else:
            given_tokens = dict(zip(handles, counts, strict=True))
            handles, counts = list(given_tokens), list(given_tokens.values())
        expected = set()
        if not set(handles) <= set(known):
            expected.add(UnknownRequest)
        if len(set(handles)) < len(handles) or min(*counts, steps, 1) < 1:
            expected.add(InvalidStep)
        if sum(counts) > self.buckets[-1]:
            expected.add(StepTooLarge)
        growth = [
            (self.requests[handle], tokens * steps)
            for handle, tokens in zip(handles, counts, strict=True)
            if handle in known
        ]
        if any(request.length + tokens > self.max_context for request, tokens in growth):
            expected.add(ContextExceeded)
        if not expected:
            needed = sum(r.blocks_needed(r.length + tokens) - r.blocks_needed(r.length) for r, tokens in growth)
            if needed > self.blocks - self.held():
                expected.add(CacheFull)
        if expected:
            error = self.fails(expected, lambda: self.manager.prepare_forward(given_tokens, steps=at_once))
            if isinstance(error, CacheFull):
                there = ("blocks", needed, self.blocks - self.held(), self.blocks)
                assert (error.resource, error.needed, error.free, error.total) == there
            return

        plan = self.manager.prepare_forward(given_tokens, steps=at_once)
        for step, one in enumerate([plan] if at_once is None else [plan.step(step) for step in range(steps)]):
            self.check_plan(one, {handle: self.requests[handle] for handle in handles}, counts, step)
        for handle, tokens in zip(handles, counts, strict=True):
            assert self.manager.length(handle) == self.requests[handle].length + steps * tokens
        self.serial += 1
        before = {handle: copy.deepcopy(self.requests[handle]) for handle in handles}
        slots = [self.slot[handle] for handle in handles]
        self.made.append(Made(plan, before, counts, steps, self.serial, slots))
        for handle, tokens in zip(handles, counts, strict=True):
            for _ in range(steps):
                self.requests[handle].bring(tokens, self.serial)
            self.requests[handle].plans.append(self.serial)

    def check_plan(self, plan, before, counts, step):
        """One step of a plan; ``before`` has its requests, handle -> as it was when the plan was made."""
        slots = [self.slot[handle] for handle in before]
        starts = [request.length + step * tokens for request, tokens in zip(before.values(), counts, strict=True)]
        changes = []
        for handle, slot, start, tokens in zip(before, slots, starts, counts, strict=True):
            needed, blocks = self.requests[handle].blocks_needed, self.manager.blocks(handle)
            changes += [(slot, index, blocks[index]) for index in range(needed(start), needed(start + tokens))]
        bucket = min(bucket for bucket in self.buckets if bucket >= sum(counts))
        assert (plan.layout.tokens, plan.layout.requests) == (bucket, min(self.slots, bucket))
        assert_fields(plan, by_loop(plan.layout, slots, starts, counts, [start == 0 for start in starts], changes))

    @precondition(lambda self: any(not made.ran for made in self.made))
    @rule(data=st.data())
    def cancel(self, data):
        made = data.draw(st.sampled_from([made for made in self.made if not made.ran][-6:]))
        if made.settled or not self.is_latest(made):
            self.fails({StalePlan}, lambda: self.manager.cancel(made.plan))
            return
        left = self.manager.cancel(made.plan)
        assert (left.packed[..., left.layout.fields["request_slot"]] == -1).all()
        self.requests.update(copy.deepcopy(made.before))
        made.settled = made.ran = True

    @precondition(lambda self: any(len(made.before) > 1 and not made.ran for made in self.made))
    @rule(data=st.data())
    def cancel_some(self, data):
        """Takes some requests out of a plan. The others may have later plans."""
        plans = [made for made in self.made if len(made.before) > 1 and not made.ran]
        made = data.draw(st.sampled_from(plans[-6:]))
        chosen = data.draw(st.lists(st.sampled_from(list(made.before)), min_size=1, unique=True))
        if not set(chosen) <= set(self.requests):
            self.fails({UnknownRequest, StalePlan}, lambda: self.manager.cancel(made.plan, chosen))
            return
        unchanged = all(self.has_plan(handle, made) for handle in made.before)
        if made.settled or not unchanged or not self.is_latest(made, chosen):
            self.fails({StalePlan}, lambda: self.manager.cancel(made.plan, chosen))
            return
        strangers = [handle for handle in self.requests if handle not in made.before]
        if strangers:
            self.fails({InvalidStep}, lambda: self.manager.cancel(made.plan, [*chosen, strangers[0]]))
        old, made.plan = made.plan, self.manager.cancel(made.plan, chosen)
        self.fails({StalePlan}, lambda: self.manager.cancel(old))
        left = [(h, tokens) for h, tokens in zip(made.before, made.counts, strict=True) if h not in chosen]
        self.requests.update({handle: copy.deepcopy(made.before.pop(handle)) for handle in chosen})
        made.counts, made.slots = [tokens for _, tokens in left], [self.slot[handle] for handle, _ in left]
        for step in range(made.steps):
            plan = made.plan if made.plan.packed.ndim == 1 else made.plan.step(step)
            self.check_plan(plan, made.before, made.counts, step)

    @precondition(lambda self: self.made)
    @rule(data=st.data(), several=st.booleans())
    def commit(self, data, several):
        """The device runs everything up to a plan, that one with some requests stopped on the way; the host hears."""
        made = data.draw(
            st.sampled_from([made for made in self.made if not several or made.steps > 1][-4:] or self.made)
        )
        live = [handle for handle in made.before if self.has_plan(handle, made)]
        if made.settled or not self.is_latest(made, live) or (made.before and not live):
            self.fails({StalePlan}, lambda: self.manager.commit(made.plan, made.steps))
            return
        fewest = made.steps if made.ran else 0
        run = [data.draw(st.integers(fewest, made.steps)) for _ in made.before]
        wrong = [*run[:-1], data.draw(st.sampled_from((-1, made.steps + 1)))] if run else [1] * 99
        self.fails({InvalidStep}, lambda: self.manager.commit(made.plan, wrong))
        for earlier in self.made[: self.made.index(made)]:
            self.run_on_device(earlier)
        self.run_on_device(made, dict(zip(made.slots, run, strict=True)))
        self.manager.commit(made.plan, run)
        made.settled = True
        for (handle, before), tokens, ran in zip(made.before.items(), made.counts, run, strict=True):
            if handle not in live:
                continue
            request = self.requests[handle] = copy.deepcopy(before)
            request.plans.clear()
            for _ in range(ran):
                request.bring(tokens, made.serial)

    def has_plan(self, handle, made):
        """Whether a plan's request is as the plan, and maybe later ones, left it."""
        return handle in self.requests and made.serial in self.requests[handle].plans

    def is_latest(self, made, handles=None):
        """Whether a plan is the latest of these of its requests, or of all."""
        handles = made.before if handles is None else handles
        return all(self.has_plan(handle, made) and self.requests[handle].plans[-1] == made.serial for handle in handles)

    def run_on_device(self, made, steps_run=None):
        """What a plan does to the block table, if requests stop after `steps_run` (by slot) steps."""
        if made.ran:
            return
        made.ran = True
        for step in range(made.steps):
            plan = made.plan.step(step) if made.plan.packed.ndim == 2 else made.plan
            runs = {
                slot: steps_run is None or step < steps_run[slot] for slot in plan.request_slot.tolist() if slot >= 0
            }
            for slot, reset in zip(plan.request_slot.tolist(), plan.request_reset.tolist(), strict=True):
                if reset and runs[slot]:
                    self.device_table[slot] = {}
            changes = zip(plan.table_slot.tolist(), plan.table_index.tolist(), plan.table_block.tolist(), strict=True)
            for slot, index, block in changes:
                if slot >= 0 and runs[slot]:
                    self.device_table[slot][index] = block

    @rule()
    def run(self):
        """The device runs the plans in order; its block table must then say what the manager says."""
        for made in self.made:
            self.run_on_device(made)
        for handle, request in self.requests.items():
            row = self.device_table.get(self.slot[handle], {})
            blocks = self.manager.blocks(handle).tolist()
            assert [row[index] for index in range(request.blocks_needed(request.length))] == blocks

    @invariant()
    def agrees(self):
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        assert set(manager.requests.tolist()) == set(self.requests)
        assert manager.free_slots == self.slots - len(self.requests)
        assert manager.free_blocks == self.blocks - self.held()
        assert manager.can_admit(128) == (manager.can_admit() and manager.blocks_needed(128) <= manager.free_blocks)
        blocks = []
        for handle, request in self.requests.items():
            assert manager.length(handle) == request.length
            assert manager.slot(handle) == self.slot[handle]
            assert len(manager.blocks(handle)) == request.blocks_needed(request.length)
            blocks += manager.blocks(handle).tolist()
        assert len(set(blocks)) == len(blocks)
        assert set(blocks) <= set(range(self.blocks))
        assert len(set(self.slot.values())) == len(self.slot)
        assert set(self.slot.values()) <= set(range(self.slots))
        ledger = manager._ledger
        assert sorted(ledger.table[ledger.table >= 0].tolist()) == sorted(blocks)
        assert_balanced(ledger)


ManagerMachine.TestCase.settings = settings(deadline=None, max_examples=120, stateful_step_count=40)
TestManagerMachine = ManagerMachine.TestCase
