"""CacheManager against a plain model, over random sequences of operations.

The model is a dictionary of requests. Each simulates its ring and its tails row by row, so that what can be truncated
is found by looking for the rows that are needed, and every plan is compared with a loop over its tokens.
"""

import copy
import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_manager import make_manager, state
from test_plan import assert_fields, by_loop

from dsv4_jax.config import LayerKind
from dsv4_jax.errors import (
    CacheError,
    CacheFull,
    CannotTruncate,
    ContextExceeded,
    InvalidStep,
    StalePlan,
    StepTooLarge,
    UnknownRequest,
)
from dsv4_jax.plan import PlanLayout, StepPlan

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA
WINDOW = 128


class Request:
    """A request as the device would hold it: which token lies in which ring and tail row."""

    def __init__(self, kinds, ring):
        self.kinds, self.ring_rows = kinds, ring
        self.tokens = []
        self.ring = {}
        self.overlap, self.current, self.hca = {}, {}, {}
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
        self.ring[position % self.ring_rows] = token
        self.overlap[position % 8] = self.current[position % 4] = self.hca[position % 128] = token

    def rotate(self):
        """Clears every tail row that no later entry pools."""
        for tail, needed in ((self.overlap, self.overlap_positions), (self.current, self.current_positions)):
            kept = {self.tokens[position] for position in needed(self.length)}
            for row in [row for row, token in tail.items() if token not in kept]:
                del tail[row]
        kept = {self.tokens[position] for position in self.hca_positions(self.length)}
        for row in [row for row, token in self.hca.items() if token not in kept]:
            del self.hca[row]

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
            needs += [(self.overlap, 8, self.overlap_positions(n)), (self.current, 4, self.current_positions(n))]
        if HCA in self.kinds:
            needs += [(self.hca, 128, self.hca_positions(n))]
        return all(
            rows.get(position % size) == self.tokens[position]
            for rows, size, positions in needs
            for position in positions
        )

    def truncate(self, n):
        if n == self.length:
            return
        self.plans.clear()
        del self.tokens[n:]
        if n == 0:
            self.ring, self.overlap, self.current, self.hca = {}, {}, {}, {}


@dataclasses.dataclass
class Made:
    """A plan that was made: what the model needs to judge and to undo its cancellation."""

    plan: StepPlan
    before: dict
    serial: int
    cancelled: bool = False
    ran: bool = False


class ManagerMachine(RuleBasedStateMachine):
    """Random operations on a manager and on the plain model; they must agree, and failures must change nothing."""

    @initialize(
        kinds=st.sampled_from(((CSA, HCA, SWA), (CSA,), (HCA, SWA), (SWA,))),
        slots=st.integers(1, 4),
        blocks=st.integers(1, 14),
        slack=st.sampled_from((0, 0, 3, 150)),
        max_context=st.sampled_from((130, 517, 900)),
    )
    def start(self, kinds, slots, blocks, slack, max_context):
        self.kinds, self.slots, self.blocks, self.max_context, self.slack = kinds, slots, blocks, max_context, slack
        self.buckets = (8, 50, 400)
        self.manager = make_manager(
            *kinds, slots=slots, blocks=blocks, max_context=max_context, slack=slack, token_buckets=self.buckets
        )
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
        self.requests[handle] = Request(self.kinds, WINDOW + self.slack)

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
        if request.can_be_truncated_to(target):
            self.manager.truncate(handle, target)
            request.truncate(target)
            return
        error = self.fails({CannotTruncate}, lambda: self.manager.truncate(handle, target))
        if request.length:
            possible = [request.can_be_truncated_to(n) for n in range(request.length + 1)]
            assert all(possible[error.lowest :])
            assert error.lowest == 1 or not possible[error.lowest - 1]

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
    @rule(steps=st.integers(1, 9), as_arrays=st.booleans())
    def decode(self, steps, as_arrays):
        for _ in range(steps):
            self.prepare(list(self.requests), [1] * len(self.requests), as_arrays)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.one_of(st.integers(1, 400), st.sampled_from((4, 127, 128, 129, 256))))
    def prefill(self, data, count):
        self.prepare([data.draw(st.sampled_from(list(self.requests)))], [count], as_arrays=False)

    def prepare(self, handles, counts, as_arrays):
        """One step on the manager and on the model; what it should raise follows from the model."""
        known = list(self.requests)
        if as_arrays:
            given_tokens = handles, counts
        else:
            given_tokens = dict(zip(handles, counts, strict=True))
            handles, counts = list(given_tokens), list(given_tokens.values())
        expected = set()
        if not set(handles) <= set(known):
            expected.add(UnknownRequest)
        if len(set(handles)) < len(handles) or min(counts, default=1) < 1:
            expected.add(InvalidStep)
        if sum(counts) > self.buckets[-1]:
            expected.add(StepTooLarge)
        steps = [
            (self.requests[handle], tokens) for handle, tokens in zip(handles, counts, strict=True) if handle in known
        ]
        if any(request.length + tokens > self.max_context for request, tokens in steps):
            expected.add(ContextExceeded)
        if not expected:
            needed = sum(r.blocks_needed(r.length + tokens) - r.blocks_needed(r.length) for r, tokens in steps)
            if needed > self.blocks - self.held():
                expected.add(CacheFull)
        if expected:
            error = self.fails(expected, lambda: self.manager.prepare_forward(given_tokens))
            if isinstance(error, CacheFull):
                there = ("blocks", needed, self.blocks - self.held(), self.blocks)
                assert (error.resource, error.needed, error.free, error.total) == there
            return

        plan = self.manager.prepare_forward(given_tokens)
        self.check_plan(plan, handles, counts)
        self.serial += 1
        self.made.append(Made(plan, {handle: copy.deepcopy(self.requests[handle]) for handle in handles}, self.serial))
        for (request, tokens), made in zip(steps, [self.made[-1]] * len(steps), strict=True):
            closed = request.length // 4 < (request.length + tokens) // 4
            for index in range(tokens):
                request.append((made.serial, id(request), index))
            if closed:
                request.rotate()
            request.plans.append(made.serial)

    def check_plan(self, plan, handles, counts):
        slots = [self.slot[handle] for handle in handles]
        starts = [self.requests[handle].length for handle in handles]
        changes = []
        for handle, slot, start, tokens in zip(handles, slots, starts, counts, strict=True):
            needed = self.requests[handle].blocks_needed
            blocks = self.manager.blocks(handle)
            assert self.manager.length(handle) == start + tokens
            assert len(blocks) == needed(start + tokens)
            changes += [(slot, index, blocks[index]) for index in range(needed(start), needed(start + tokens))]
        bucket = min(bucket for bucket in self.buckets if bucket >= sum(counts))
        assert plan.layout == PlanLayout(bucket, min(self.slots, bucket))
        assert_fields(plan, by_loop(plan.layout, slots, starts, counts, [start == 0 for start in starts], changes))

    @precondition(lambda self: any(not made.ran for made in self.made))
    @rule(data=st.data())
    def cancel(self, data):
        made = data.draw(st.sampled_from([made for made in self.made if not made.ran][-6:]))
        known = all(handle in self.requests for handle in made.before)
        latest = known and all(self.requests[handle].plans[-1:] == [made.serial] for handle in made.before)
        if made.cancelled or not latest:
            self.fails({StalePlan}, lambda: self.manager.cancel(made.plan))
            return
        self.manager.cancel(made.plan)
        self.requests.update(copy.deepcopy(made.before))
        made.cancelled = True

    @rule()
    def run(self):
        """The device runs the plans in order; its block table must then say what the manager says."""
        for made in self.made:
            if made.ran or made.cancelled:
                continue
            plan = made.plan
            for slot, reset in zip(plan.request_slot.tolist(), plan.request_reset.tolist(), strict=True):
                if reset:
                    self.device_table[slot] = {}
            changes = zip(plan.table_slot.tolist(), plan.table_index.tolist(), plan.table_block.tolist(), strict=True)
            for slot, index, block in changes:
                if slot >= 0:
                    self.device_table[slot][index] = block
        for made in self.made:
            made.ran = True
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
        table = manager._block_table
        assert sorted(table[table >= 0].tolist()) == sorted(blocks)


ManagerMachine.TestCase.settings = settings(deadline=None, max_examples=200, stateful_step_count=40)
TestManagerMachine = ManagerMachine.TestCase
