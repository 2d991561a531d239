"""CacheManager against a plain model: a dictionary of requests, each with a simulated ring and tails to truncate by."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_plan import assert_fields, by_loop

from dsv4_jax.allocator import BlockAllocator
from dsv4_jax.config import LayerKind, tiny_spec
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
from dsv4_jax.formats import CacheFormats
from dsv4_jax.manager import CacheManager
from dsv4_jax.plan import PlanLayout, StepPlan
from dsv4_jax.schema import CacheSchema

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA
WINDOW = 128


def make_manager(*kinds, slots=4, blocks=40, max_context=1024, slack=0, token_buckets=(8, 64, 512)) -> CacheManager:
    """A manager for a model of one layer of each kind given; CSA and HCA without any."""
    spec, kinds = tiny_spec(), kinds or (CSA, HCA)
    layers = [next(layer for layer in spec.layers if layer.kind == kind) for kind in kinds]
    spec = dataclasses.replace(spec, layers=tuple(layers))
    schema = CacheSchema(spec, CacheFormats(), slots=slots, blocks=blocks, max_context=max_context, slack=slack)
    return CacheManager(schema, token_buckets=token_buckets)


def state(thing) -> dict:
    """Everything a manager or allocator remembers, as values that compare by content."""
    values = {}
    for name, value in vars(thing).items():
        if isinstance(value, BlockAllocator):
            values[name] = state(value)
        else:
            values[name] = (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else copy.copy(value)
    return values


def grow(manager: CacheManager, request: int, length: int) -> None:
    """Prepares steps until the request has `length` tokens."""
    while manager.length(request) < length:
        manager.prepare_forward({request: min(length - manager.length(request), 500)})


# The plain model


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

    def pick(self, data, *, strange=True):
        """A handle: mostly an admitted one."""
        candidates = list(self.requests) * 8
        if strange:
            candidates += [*self.released[-2:], -1, 0, 10**6, self.slots * 1000 + 1]
        return data.draw(st.sampled_from(candidates))

    @rule()
    def admit(self):
        if len(self.requests) == self.slots:
            assert not self.manager.can_admit()
            error = self.fails({CacheFull}, self.manager.admit)
            assert (error.resource, error.needed, error.free, error.total) == ("slots", 1, 0, self.slots)
            return
        assert self.manager.can_admit()
        handle = self.manager.admit()
        assert handle not in self.requests
        assert handle not in self.released
        self.slot[handle] = self.manager.slot(handle)
        self.requests[handle] = Request(self.kinds, WINDOW + self.slack)

    @rule(data=st.data())
    def release(self, data):
        handle = self.pick(data)
        if handle not in self.requests:
            self.fails({UnknownRequest}, lambda: self.manager.release(handle))
            return
        self.manager.release(handle)
        del self.requests[handle], self.slot[handle]
        self.released.append(handle)

    @rule(data=st.data())
    def truncate(self, data):
        handle = self.pick(data)
        if handle not in self.requests:
            self.fails({UnknownRequest}, lambda: self.manager.truncate(handle, 1))
            return
        request = self.requests[handle]
        length = max(request.length - data.draw(st.integers(0, 9)), 0)
        target = data.draw(st.one_of(st.just(length), st.integers(-1, request.length + 1)))
        if data.draw(st.booleans()):
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

    @rule(data=st.data(), as_arrays=st.booleans(), sizes=st.sampled_from((1, 1, 5, 131, 420)))
    def prepare(self, data, as_arrays, sizes):
        known = list(self.requests)
        count = data.draw(st.integers(0, len(known)))
        handles = data.draw(st.permutations(known))[:count]
        if data.draw(st.integers(0, 9)) == 0:
            handles.append(self.pick(data))
        counts = [data.draw(st.integers(1, sizes)) for _ in handles]
        if counts and data.draw(st.integers(0, 19)) == 0:
            counts[-1] = data.draw(st.sampled_from((0, -1, 10**6, 2**62)))
        if not as_arrays:
            counts = list(dict(zip(handles, counts, strict=True)).values())
            handles = list(dict.fromkeys(handles))
        given_tokens = (handles, counts) if as_arrays else dict(zip(handles, counts, strict=True))

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


# Requests and slots


def test_a_handle_is_never_given_out_again():
    manager = make_manager(slots=2)
    handles = []
    for _ in range(20):
        handles.append(manager.admit())
        manager.release(handles[-1])
    assert len(set(handles)) == 20
    for handle in handles:
        with pytest.raises(UnknownRequest, match=str(handle)):
            manager.length(handle)


def test_a_freed_slot_and_freed_blocks_are_the_next_ones_used():
    manager = make_manager(slots=3)
    first, second = manager.admit(), manager.admit()
    manager.prepare_forward({first: 300, second: 200})
    slot, blocks = manager.slot(first), set(manager.blocks(first).tolist())
    manager.release(first)
    third = manager.admit()
    plan = manager.prepare_forward({third: 300})
    assert manager.slot(third) == slot
    assert set(manager.blocks(third).tolist()) == blocks
    assert plan.request_reset[0] == 1


def test_release_twice():
    manager = make_manager()
    request = manager.admit()
    manager.prepare_forward({request: 9})
    manager.release(request)
    before = state(manager)
    with pytest.raises(UnknownRequest, match="not released since"):
        manager.release(request)
    assert state(manager) == before


def test_can_admit_counts_blocks_and_context():
    manager = make_manager(CSA, blocks=3, max_context=390)
    assert manager.can_admit(387)
    assert not manager.can_admit(388)
    assert not make_manager(CSA, blocks=40, max_context=390).can_admit(391)
    assert manager.blocks_needed(387) == 3
    assert manager.blocks_needed(388) == 4


@pytest.mark.parametrize("buckets", [(), (0, 8), (-1,)])
def test_token_buckets_are_checked(buckets):
    with pytest.raises(ValueError, match="token_buckets"):
        make_manager(token_buckets=buckets)


def test_layouts_are_every_shape_a_plan_can_have():
    manager = make_manager(slots=4, token_buckets=(64, 2, 64))
    assert manager.layouts == (PlanLayout(2, 2), PlanLayout(64, 4))


# Steps


def test_bad_steps_name_what_is_wrong():
    manager = make_manager(slots=2, blocks=3, max_context=600, token_buckets=(8, 512))
    one, two = manager.admit(), manager.admit()
    manager.prepare_forward({one: 200})
    cases = [
        ({one: 1, 999: 1}, UnknownRequest, "999"),
        (([one, two, one], [1, 1, 1]), InvalidStep, f"request {one} appears more than once"),
        ({one: 1, two: 0}, InvalidStep, f"request {two} is given 0 tokens"),
        (([one, two], [1]), InvalidStep, r"\(2,\) and \(1,\)"),
        (([one], [1.0]), InvalidStep, "token counts must be 64-bit integers, got float64"),
        (({"a": 1}), InvalidStep, "requests must be 64-bit integers"),
        (([2**70], [1]), InvalidStep, "requests must be 64-bit integers, got object"),
        (([one, two], [[1], [1, 2]]), InvalidStep, "must be integers"),
        ([one, two], InvalidStep, "got list"),
        ({one: 401}, ContextExceeded, "200 tokens and asks for 401 more, the context is 600: give it at most 400"),
        ({one: 1, two: 512}, StepTooLarge, "513 tokens in one step, the largest token bucket is 512"),
        ({one: 300}, CacheFull, "2 blocks needed, 1 of 3 free"),
        ({one: 60, two: 300}, CacheFull, "4 blocks needed, 1 of 3 free"),
    ]
    before = state(manager)
    for tokens, error, message in cases:
        with pytest.raises(error, match=message):
            manager.prepare_forward(tokens)
        assert state(manager) == before
    manager.prepare_forward({one: 187})


def test_mapping_and_arrays_give_the_same_plan_in_the_order_given(rng):
    by_mapping, by_arrays = make_manager(slots=4), make_manager(slots=4)
    handles = [by_mapping.admit() for _ in range(4)]
    assert handles == [by_arrays.admit() for _ in range(4)]
    for _ in range(20):
        chosen = rng.permutation(handles)[: rng.integers(1, 5)]
        counts = rng.integers(1, 20, chosen.size)
        one = by_mapping.prepare_forward(dict(zip(chosen.tolist(), counts.tolist(), strict=True)))
        other = by_arrays.prepare_forward((chosen, counts.astype(np.int32)))
        np.testing.assert_array_equal(one.packed, other.packed)
        np.testing.assert_array_equal(one.request_slot[: chosen.size], [by_mapping.slot(handle) for handle in chosen])


def test_decoding_does_not_retrace():
    manager, traces = make_manager(slots=3, max_context=512, token_buckets=(4, 64)), 0

    @jax.jit
    def step(total, plan):
        nonlocal traces
        traces += 1
        return total + (plan.request_end - plan.request_start).sum()

    total, handles = jnp.int32(0), [manager.admit() for _ in range(3)]
    for index in range(300):
        total = step(total, manager.prepare_forward(dict.fromkeys(handles[: 1 + index % 3], 1)))
    assert traces == 1
    assert total == 600


def test_no_request_gives_a_plan_that_changes_nothing():
    manager = make_manager(token_buckets=(8, 64))
    request = manager.admit()
    manager.prepare_forward({request: 5})
    plan = manager.prepare_forward({})
    assert plan.layout == PlanLayout(8, 4)
    assert (plan.token_slot == -1).all()
    assert manager.length(request) == 5
    manager.cancel(plan)
    with pytest.raises(StalePlan, match="cancelled before"):
        manager.cancel(plan)


# Cancel


def test_cancel_restores_everything_and_the_same_step_gives_the_same_plan():
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    manager.prepare_forward({one: 130})
    free, lengths = manager.free_blocks, [manager.length(one), manager.length(two)]
    plan = manager.prepare_forward({two: 300, one: 129})
    manager.cancel(plan)
    assert (manager.free_blocks, [manager.length(one), manager.length(two)]) == (free, lengths)
    again = manager.prepare_forward({two: 300, one: 129})
    np.testing.assert_array_equal(again.packed, plan.packed)
    assert again.request_reset[0] == 1


def test_cancel_in_reverse_order_only():
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    plans = [manager.prepare_forward(tokens) for tokens in ({one: 3, two: 3}, {one: 1}, {two: 1})]
    with pytest.raises(StalePlan, match="2 of the plan's 2 requests"):
        manager.cancel(plans[0])
    manager.cancel(plans[1])
    with pytest.raises(StalePlan, match=f"1 of the plan's 2 requests \\({two} for one\\) have a later plan"):
        manager.cancel(plans[0])
    manager.cancel(plans[2])
    manager.cancel(plans[0])
    assert manager.length(one) == manager.length(two) == 0
    assert manager.free_blocks == 40


def test_a_cancelled_plan_does_not_cancel_its_successor():
    manager = make_manager()
    request = manager.admit()
    cancelled = manager.prepare_forward({request: 4})
    manager.cancel(cancelled)
    manager.prepare_forward({request: 4})
    with pytest.raises(StalePlan, match="cancelled before"):
        manager.cancel(dataclasses.replace(cancelled))
    assert manager.length(request) == 4


def test_a_plan_is_stale_once_one_of_its_requests_was_released_or_truncated():
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    plan = manager.prepare_forward({one: 9, two: 9})
    manager.truncate(two, 8)
    manager.prepare_forward({two: 1})
    with pytest.raises(StalePlan, match="released or truncated"):
        manager.cancel(plan)
    plan = manager.prepare_forward({one: 1, two: 1})
    manager.release(two)
    assert manager.slot(manager.admit()) == plan.request_slot[1]
    before = state(manager)
    with pytest.raises(StalePlan, match="released or truncated"):
        manager.cancel(plan)
    assert state(manager) == before


def test_cancel_takes_only_this_managers_own_plans():
    manager, other = make_manager(), make_manager()
    plan = manager.prepare_forward({manager.admit(): 4})
    other.prepare_forward({other.admit(): 4})
    for stranger in (jax.device_put(plan), dataclasses.replace(plan, receipt=None)):
        with pytest.raises(StalePlan, match="not a plan of this manager"):
            manager.cancel(stranger)
    with pytest.raises(StalePlan, match="not a plan of this manager"):
        other.cancel(plan)
    manager.cancel(plan)


# Truncate


@pytest.mark.parametrize(
    ("kinds", "slack", "length", "target", "lowest"),
    [
        # The ring keeps 128 + slack rows, position n needs the 127 before it.
        ((SWA,), 0, 128, 1, None),
        ((SWA,), 0, 129, 128, None),
        ((SWA,), 0, 129, 127, 128),
        ((SWA,), 5, 900, 894, None),
        ((SWA,), 5, 900, 893, 894),
        # CSA: the window of 4 that is open must be the one that was open.
        ((CSA,), 0, 7, 4, None),
        ((CSA,), 0, 7, 3, 4),
        ((CSA,), 0, 8, 7, 8),
        ((CSA,), 3, 303, 300, None),
        ((CSA,), 0, 303, 301, 302),
        # HCA: the same open window of 128, or a length between windows.
        ((HCA,), 0, 127, 1, None),
        ((HCA,), 0, 128, 127, 128),
        ((HCA,), 0, 129, 128, None),
        ((HCA,), 200, 300, 256, None),
        ((HCA,), 200, 300, 128, None),
        ((HCA,), 200, 300, 255, 256),
        ((HCA,), 200, 400, 128, 384),
        ((CSA, HCA), 200, 300, 128, 300),
        ((CSA, HCA), 0, 130, 129, None),
        # Never possible.
        ((SWA,), 0, 100, -1, 1),
        ((SWA,), 0, 100, 101, 1),
    ],
)
def test_what_can_be_truncated(kinds, slack, length, target, lowest):
    manager = make_manager(*kinds, slack=slack)
    request = manager.admit()
    grow(manager, request, length)
    if lowest is None:
        manager.truncate(request, target)
        assert manager.length(request) == target
        return
    before = state(manager)
    with pytest.raises(CannotTruncate, match=f"possible are 0 and {lowest} to {length}") as raised:
        manager.truncate(request, target)
    assert raised.value.lowest == lowest
    assert state(manager) == before


def test_rows_overwritten_by_dropped_tokens_stay_lost():
    manager = make_manager(SWA)
    request = manager.admit()
    grow(manager, request, 501)
    manager.truncate(request, 500)
    with pytest.raises(CannotTruncate, match="overwritten when the request grew to 501"):
        manager.truncate(request, 499)
    grow(manager, request, 501)
    manager.truncate(request, 500)


def test_truncating_to_nothing_frees_every_block_and_resets_the_slot():
    manager = make_manager()
    request = manager.admit()
    grow(manager, request, 700)
    slot = manager.slot(request)
    manager.truncate(request, 0)
    assert manager.free_blocks == 40
    assert manager.slot(request) == slot
    plan = manager.prepare_forward({request: 2})
    assert plan.request_reset[0] == 1
    assert plan.request_start[0] == 0
    manager.truncate(request, 1)
    assert manager.length(request) == 1


def test_truncating_between_hca_windows_frees_the_blocks_of_dropped_entries():
    manager = make_manager(HCA, slack=300)
    request = manager.admit()
    grow(manager, request, 390)
    kept = manager.blocks(request)[:1].tolist()
    manager.truncate(request, 128)
    assert manager.blocks(request).tolist() == kept
    assert manager.free_blocks == 39
    plan = manager.prepare_forward({request: 128})
    assert plan.table_index[0] == 1
    assert plan.table_block[0] == manager.blocks(request)[1]
    assert plan.request_reset[0] == 0
