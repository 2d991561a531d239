"""CacheManager: each operation and each of its errors, by example. test_manager_model.py has the random sequences."""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.host.errors import (
    CacheFull,
    CannotTruncate,
    ContextExceeded,
    InvalidStep,
    StalePlan,
    StepTooLarge,
    UnknownRequest,
)
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.presets import tiny_spec

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA


def make_manager(*kinds, hca_tail="rows", token_buckets=(8, 64, 512), **sizes) -> CacheManager:
    """A manager for a model of one layer of each kind given; CSA and HCA without any."""
    spec, kinds = tiny_spec(), kinds or (CSA, HCA)
    layers = [next(layer for layer in spec.layers if layer.kind == kind) for kind in kinds]
    spec = dataclasses.replace(spec, layers=tuple(layers))
    sizes = {"slots": 4, "blocks": 40, "max_context": 1024} | sizes
    return CacheManager(CacheSchema(spec, CacheFormats(hca_tail=hca_tail), **sizes), token_buckets=token_buckets)


def state(thing) -> dict:
    """Everything a manager remembers, as values that compare by content."""
    values = {}
    for name, value in vars(thing).items():
        if type(value).__module__.startswith("dsv4_jax.host"):
            values[name] = state(value)
        else:
            values[name] = (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else copy.copy(value)
    return values


def grow(manager: CacheManager, request: int, length: int) -> None:
    """Prepares steps until the request has `length` tokens."""
    while manager.length(request) < length:
        manager.prepare_forward({request: min(length - manager.length(request), 500)})


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


@pytest.mark.parametrize("handle", [-1, -2, 0, 1, 2**62])
def test_a_free_slot_has_no_handle(handle):
    manager = make_manager(slots=2)
    with pytest.raises(UnknownRequest, match=str(handle)):
        manager.prepare_forward({handle: 1})
    with pytest.raises(UnknownRequest, match=str(handle)):
        manager.release(handle)


def test_can_admit_counts_blocks_and_context():
    manager = make_manager(CSA, blocks=3, max_context=390)
    assert manager.can_admit(387)
    assert not manager.can_admit(388)
    assert not make_manager(CSA, blocks=40, max_context=390).can_admit(391)
    assert manager.blocks_needed(387) == 3
    assert manager.blocks_needed(388) == 4


@pytest.mark.parametrize("length", [100, np.int64(100), np.int32(388)])
def test_can_admit_gives_a_bool(length):
    manager = make_manager(CSA, blocks=3, max_context=390)
    assert manager.can_admit(length) is bool(length == 100)
    for _ in range(4):
        manager.admit()
    assert manager.can_admit(length) is False


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (-5, ValueError, "length must be at least 0, got -5"),
        (2.0, TypeError, "length must be an integer, got 2.0 of type float"),
        ("8", TypeError, "length must be an integer, got '8' of type str"),
        (None, TypeError, "length must be an integer"),
        (True, TypeError, "length must be an integer, got True"),
        (np.True_, TypeError, "length must be an integer"),
        (np.array([1, 2]), TypeError, "length must be an integer"),
    ],
)
def test_lengths_are_checked(length, error, message):
    manager = make_manager()
    request = manager.admit()
    manager.prepare_forward({request: 3})
    with pytest.raises(error, match=message):
        manager.can_admit(length)
    if error is TypeError:
        with pytest.raises(error, match=message):
            manager.truncate(request, length)


@pytest.mark.parametrize("handle", [2.0, "1", None, True, np.False_])
def test_handles_are_integers(handle):
    manager = make_manager()
    for method in (manager.length, manager.slot, manager.blocks, manager.release, lambda h: manager.truncate(h, 0)):
        with pytest.raises(TypeError, match="a request must be an integer"):
            method(handle)
    handle = np.int64(manager.admit())
    assert manager.length(handle) == 0


@pytest.mark.parametrize(
    ("buckets", "error"),
    [
        ((), ValueError),
        ((0, 8), ValueError),
        ((-1,), ValueError),
        ([2.9], TypeError),
        ([True], TypeError),
        (["8"], TypeError),
        ("8", TypeError),
        (8, TypeError),
        (None, TypeError),
    ],
)
def test_token_buckets_are_checked(buckets, error):
    with pytest.raises(error, match="token_buckets"):
        make_manager(token_buckets=buckets)


def test_token_buckets_of_numpy():
    for buckets in (np.array([8, 2]), [np.int64(8), np.int32(2)]):
        manager = make_manager(token_buckets=buckets)
        assert [layout.tokens for layout in manager.layouts] == [2, 2, 8, 8]
        assert all(type(layout.tokens) is int for layout in manager.layouts)


@pytest.mark.parametrize("plan", [None, 3, {}, "plan"])
def test_what_is_no_plan_is_not_taken_back(plan):
    manager = make_manager()
    with pytest.raises(TypeError, match=f"got {type(plan).__name__}"):
        manager.cancel(plan)
    with pytest.raises(TypeError, match=f"got {type(plan).__name__}"):
        manager.commit(plan, 1)


def test_reset_forgets_all_requests_and_is_as_new():
    manager, new = make_manager(), make_manager()
    requests = [manager.admit() for _ in range(3)]
    manager.prepare_forward(dict.fromkeys(requests, 150))
    plan = manager.prepare_forward({requests[2]: 9})
    manager.release(requests[1])
    manager.reset()
    assert manager.requests.size == 0
    assert (manager.free_slots, manager.free_blocks) == (4, 40)
    for request in requests:
        with pytest.raises(UnknownRequest):
            manager.length(request)
    with pytest.raises(StalePlan):
        manager.cancel(plan)
    for count in (3, 200):
        again, first = manager.admit(), new.admit()
        assert again not in requests
        np.testing.assert_array_equal(
            manager.prepare_forward({again: count}).packed, new.prepare_forward({first: count}).packed
        )


def test_a_reset_is_due_until_a_plan_of_it_stands():
    manager = make_manager(slots=2)
    one, two = manager.admit(), manager.admit()
    plan = manager.prepare_forward({two: 1, one: 1})
    assert plan.request_reset.tolist() == [1, 1]
    manager.cancel(plan)
    plan = manager.prepare_forward({two: 2, one: 2}, steps=3)
    assert plan.request_reset.tolist() == [[1, 1], [0, 0], [0, 0]]
    manager.commit(plan, [1, 0])
    plan = manager.prepare_forward({two: 2, one: 2})
    assert plan.request_reset.tolist() == [0, 1]
    manager.truncate(two, 0)
    manager.release(one)
    three = manager.admit()
    assert manager.prepare_forward({two: 2, three: 2}).request_reset.tolist() == [1, 1]


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("buckets", [(2, 9), (1, 3, 9), (9,), (4, 5, 9)], ids=str)
def test_layouts_are_those_of_all_plans(buckets, lookahead):
    """Of all counts that three requests can bring; rows are displaced where one brings more than there is to spare."""
    schema = dataclasses.replace(make_manager(slots=3).schema, lookahead=lookahead)
    manager = CacheManager(schema, token_buckets=buckets)
    requests, seen = [manager.admit() for _ in range(3)], set()
    for counts in itertools.product(range(10), repeat=3):
        if sum(counts) > 9:
            continue
        plan = manager.prepare_forward({r: n for r, n in zip(requests, counts, strict=True) if n})
        assert plan.layout.displaces == (max(counts) > lookahead + 1)
        seen.add(plan.layout)
        manager.cancel(plan)
    assert set(manager.layouts) == seen
    assert len(manager.layouts) == len(seen)


def test_layouts_have_the_buckets_sizes():
    manager = make_manager(slots=4, token_buckets=(64, 2, 64))
    assert [(layout.tokens, layout.requests) for layout in manager.layouts] == [(2, 2), (2, 2), (64, 4), (64, 4)]
    assert {layout.fingerprint for layout in manager.layouts} == {getattr(manager.schema, "fingerprint", "")}


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
        ({one: True}, InvalidStep, "token counts must be 64-bit integers, got bool"),
        (None, InvalidStep, "got NoneType"),
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
    assert (plan.layout.tokens, plan.layout.requests) == (8, 4)
    assert (plan.token_slot == -1).all()
    assert manager.length(request) == 5
    manager.cancel(plan)
    with pytest.raises(StalePlan, match="cancelled before"):
        manager.cancel(plan)


# Many steps at once


def test_steps_are_planned_as_if_one_by_one(rng):
    for kinds in ((CSA, HCA), (HCA,), (SWA,)):
        at_once, one_by_one = make_manager(*kinds, slots=4), make_manager(*kinds, slots=4)
        handles = [at_once.admit() for _ in range(4)]
        assert handles == [one_by_one.admit() for _ in range(4)]
        for _ in range(6):
            chosen = rng.permutation(handles)[: rng.integers(1, 5)]
            counts = np.ones(chosen.size, int) if rng.random() < 0.3 else rng.integers(1, 40, chosen.size)
            steps = int(rng.integers(1, 6))
            plan = at_once.prepare_forward((chosen, counts), steps=steps)
            singles = [one_by_one.prepare_forward((chosen, counts)) for _ in range(steps)]
            np.testing.assert_array_equal(plan.packed, [single.packed for single in singles])
            for handle in handles:
                assert at_once.length(handle) == one_by_one.length(handle)
                np.testing.assert_array_equal(at_once.blocks(handle), one_by_one.blocks(handle))


def test_bad_steps_at_once_change_nothing():
    manager = make_manager(CSA, slots=2, blocks=5, max_context=600, token_buckets=(8, 64))
    one, two = manager.admit(), manager.admit()
    manager.prepare_forward({one: 50}, steps=4)
    cases = [
        ({one: 1}, 0, InvalidStep, "steps must be an integer of at least 1.*got 0"),
        ({one: 1}, 2.0, InvalidStep, "got 2.0"),
        ({one: 1}, True, InvalidStep, "got True"),
        ({one: 1}, np.True_, InvalidStep, "steps must be an integer"),
        ({one: 50}, 9, ContextExceeded, "200 tokens and asks for 450 more, the context is 600: give it at most 400"),
        ({one: 1}, 2**62, ContextExceeded, "asks for 4611686018427387904 more"),
        ({one: 2**62}, 2**62, ContextExceeded, "the context is 600"),
        ({one: 1, two: 64}, 2, StepTooLarge, "65 tokens in one step"),
        ({one: 32, two: 32}, 9, CacheFull, "5 blocks needed, 3 of 5 free"),
    ]
    before = state(manager)
    for tokens, steps, error, message in cases:
        with pytest.raises(error, match=message):
            manager.prepare_forward(tokens, steps=steps)
        assert state(manager) == before
    manager.prepare_forward({one: 32, two: 32}, steps=5)
    assert manager.free_blocks == 0


def test_cancel_takes_back_all_steps():
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    manager.prepare_forward({one: 100})
    free = manager.free_blocks
    plan = manager.prepare_forward({two: 60, one: 20}, steps=5)
    manager.cancel(plan)
    assert (manager.free_blocks, manager.length(one), manager.length(two)) == (free, 100, 0)
    again = manager.prepare_forward({two: 60, one: 20}, steps=5)
    np.testing.assert_array_equal(again.packed, plan.packed)


def test_commit_keeps_the_steps_that_ran():
    manager = make_manager(CSA, slots=3)
    one, two, three = (manager.admit() for _ in range(3))
    manager.prepare_forward({one: 100, two: 130})
    plan = manager.prepare_forward({three: 2, one: 40, two: 40}, steps=8)
    assert [manager.length(request) for request in (one, two, three)] == [420, 450, 16]
    assert manager.free_blocks == 40 - 4 - 4 - 1
    held = manager.blocks(two)
    manager.commit(plan, np.array([0, 1, 8]))
    assert [manager.length(request) for request in (one, two, three)] == [140, 450, 0]
    assert manager.free_blocks == 40 - 2 - 4
    np.testing.assert_array_equal(manager.blocks(two), held)
    # What did not run is planned again, table changes and resets included.
    plan = manager.prepare_forward({three: 1, one: 120})
    assert plan.request_reset[:2].tolist() == [1, 0]
    assert plan.request_start[:2].tolist() == [0, 140]
    assert (plan.table_slot[0], plan.table_index[0]) == (manager.slot(one), 2)
    assert plan.table_block[0] == manager.blocks(one)[2]


def test_commit_takes_one_number_or_the_devices_padded_array():
    for steps_run in (3, np.int32(3), [3, 3], jnp.array([3, 3, 0, 77])):
        manager = make_manager(slots=4)
        one, two = manager.admit(), manager.admit()
        manager.commit(manager.prepare_forward({one: 1, two: 2}, steps=5), steps_run)
        assert (manager.length(one), manager.length(two)) == (3, 6)
    manager.commit(manager.prepare_forward({one: 4}), 0)
    assert manager.length(one) == 3
    manager.commit(manager.prepare_forward({}, steps=2), 1)


def test_bad_commits_change_nothing():
    manager, other = make_manager(), make_manager()
    one, two = manager.admit(), manager.admit()
    plan = manager.prepare_forward({one: 60, two: 3}, steps=4)
    before = state(manager)
    cases = [
        ([1, 5], f"request {two} cannot have run 5 steps of a plan of 4"),
        ([-1, 4], f"request {one} cannot have run -1 steps"),
        ([1, 2, 3], r"each of the plan's 2 requests; got int64 \[3\]"),
        ([[1, 2]], r"int64 \[1, 2\]"),
        (1.0, "float64"),
        (True, "bool"),
        (None, "object"),
        ([[1], [1, 2]], "must be integers"),
    ]
    for steps_run, message in cases:
        with pytest.raises(InvalidStep, match=message):
            manager.commit(plan, steps_run)
        assert state(manager) == before
    for stranger, owner in ((jax.device_put(plan), manager), (plan, other)):
        with pytest.raises(StalePlan, match="not a plan of this manager"):
            owner.commit(stranger, 1)
    later = manager.prepare_forward({two: 1})
    with pytest.raises(StalePlan, match=f"{two} for one\\) have a later plan"):
        manager.commit(plan, 1)
    manager.cancel(later)
    manager.commit(plan, [4, 1])
    before = state(manager)
    for again in (lambda: manager.commit(plan, 1), lambda: manager.cancel(plan)):
        with pytest.raises(StalePlan, match="committed before"):
            again()
        assert state(manager) == before
    plan = manager.prepare_forward({one: 1, two: 1}, steps=3)
    manager.release(two)
    with pytest.raises(StalePlan, match="released or truncated"):
        manager.commit(plan, 1)
    plan = manager.prepare_forward({one: 1}, steps=3)
    manager.cancel(plan)
    with pytest.raises(StalePlan, match="cancelled before"):
        manager.commit(plan, 1)


def test_what_ran_before_a_commit_cannot_be_cancelled():
    manager = make_manager()
    request = manager.admit()
    first = manager.prepare_forward({request: 5})
    manager.commit(manager.prepare_forward({request: 1}, steps=3), 0)
    assert manager.length(request) == 5
    with pytest.raises(StalePlan, match="had a later plan committed"):
        manager.cancel(first)


def test_steps_that_did_not_run_have_overwritten_nothing():
    manager = make_manager(SWA)
    request = manager.admit()
    grow(manager, request, 128)
    manager.commit(manager.prepare_forward({request: 1}, steps=50), 0)
    manager.truncate(request, 1)
    assert manager.length(request) == 1


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
    ("kinds", "lookahead", "length", "target", "lowest"),
    [
        # The ring keeps 128 + lookahead rows, position n needs the 127 before it.
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
        ((HCA,), 0, 100, 1, None),
        ((HCA,), 200, 300, 255, None),
        ((HCA,), 200, 400, 128, 199),
        ((CSA, HCA), 200, 300, 128, None),
        # Whatever is there, as many tokens as the lookahead can be taken back, across windows of either kind.
        ((CSA,), 1, 8, 7, None),
        ((CSA,), 1, 8, 3, 4),
        ((CSA,), 8, 900, 892, None),
        ((CSA,), 8, 900, 891, 892),
        ((CSA,), 6, 900, 893, None),
        ((CSA, HCA), 4, 386, 382, None),
        ((CSA, HCA), 4, 386, 380, 381),
        ((HCA,), 4, 386, 382, None),
        ((HCA,), 1, 386, 383, 384),
        ((CSA, HCA), 0, 130, 129, None),
        # Never possible.
        ((SWA,), 0, 100, -1, 1),
        ((SWA,), 0, 100, 101, 1),
    ],
)
def test_what_can_be_truncated(kinds, lookahead, length, target, lowest):
    assert_truncates(make_manager(*kinds, lookahead=lookahead), length, target, lowest)


def assert_truncates(manager, length, target, lowest):
    """A request of that length can be truncated to the target, or not and nothing changes but to `lowest` and above."""
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


@pytest.mark.parametrize(
    ("kinds", "length", "target", "lowest"),
    [
        ((HCA,), 127, 126, 127),
        ((HCA,), 129, 128, None),
        ((HCA,), 130, 128, None),
        ((HCA,), 130, 129, 130),
        ((HCA,), 129, 127, 128),
        ((HCA,), 300, 128, None),
        ((HCA,), 300, 255, 300),
        ((CSA, HCA), 131, 128, None),
        ((CSA, HCA), 131, 129, 131),
        ((CSA, HCA), 132, 128, None),
        ((CSA, HCA), 132, 130, 132),
        ((CSA,), 7, 5, None),
    ],
)
def test_from_a_running_tail_only_whole_windows_can_be_dropped(kinds, length, target, lowest):
    assert_truncates(make_manager(*kinds, hca_tail="running", lookahead=200), length, target, lowest)


def test_rows_overwritten_by_dropped_tokens_stay_lost():
    manager = make_manager(SWA)
    request = manager.admit()
    grow(manager, request, 501)
    manager.truncate(request, 500)
    with pytest.raises(CannotTruncate, match="overwritten when the request grew to 501"):
        manager.truncate(request, 499)
    grow(manager, request, 501)
    manager.truncate(request, 500)


def test_a_new_start_forgets_how_long_the_request_was():
    manager = make_manager(SWA, slots=1)
    request = manager.admit()
    grow(manager, request, 900)
    manager.truncate(request, 899)
    manager.truncate(request, 0)
    grow(manager, request, 130)
    manager.truncate(request, 129)
    manager.release(request)
    request = manager.admit()
    grow(manager, request, 129)
    manager.truncate(request, 128)
    assert manager.length(request) == 128


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
    manager = make_manager(HCA, lookahead=300)
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
