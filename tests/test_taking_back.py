"""CacheManager takes back: plans that did not run (cancel), or not to their end (commit), and tokens (truncate)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from managers import grow, make_manager, state

from dsv4_jax.host.errors import (
    CannotTruncate,
    InvalidStep,
    StalePlan,
)
from dsv4_jax.spec.kinds import LayerKind

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA


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
        (None, "either steps_run or lengths"),
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
    manager.truncate(one, 0)
    with pytest.raises(StalePlan, match=r"2 of the plan's 2 requests .* released or truncated"):
        manager.commit(plan, 1)
    plan = manager.prepare_forward({one: 1}, steps=3)
    manager.cancel(plan)
    with pytest.raises(StalePlan, match="cancelled before"):
        manager.commit(plan, 1)


def test_commit_passes_over_requests_that_are_gone():
    manager = make_manager()
    one, two, three = (manager.admit() for _ in range(3))
    plan = manager.prepare_forward({one: 60, two: 60, three: 60}, steps=4)
    manager.release(two)
    manager.truncate(three, 0)
    new = manager.admit()
    manager.prepare_forward({new: 9})
    manager.commit(plan, [1, 2, 3])
    assert [manager.length(request) for request in (one, three, new)] == [60, 0, 9]
    with pytest.raises(StalePlan, match="committed before"):
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
    ("kinds", "lookahead", "length", "target", "lowest"),
    [
        ((HCA,), 0, 127, 126, 127),
        ((HCA,), 0, 129, 128, None),
        ((HCA,), 0, 130, 129, 130),
        ((HCA,), 0, 129, 127, 128),
        ((HCA,), 3, 127, 124, None),
        ((HCA,), 3, 127, 123, 124),
        ((HCA,), 3, 130, 127, None),
        ((HCA,), 3, 132, 128, None),
        ((HCA,), 3, 132, 127, 128),
        ((HCA,), 3, 300, 297, None),
        ((HCA,), 3, 300, 296, 297),
        ((HCA,), 200, 300, 100, None),
        ((HCA,), 200, 300, 99, 100),
        ((HCA,), 200, 400, 128, 200),
        ((CSA, HCA), 3, 131, 128, None),
        ((CSA, HCA), 3, 131, 127, 128),
        ((CSA,), 200, 7, 5, None),
    ],
)
def test_a_running_tail_goes_back_as_far_as_it_has_states(kinds, lookahead, length, target, lowest):
    assert_truncates(make_manager(*kinds, hca_tail="running", lookahead=lookahead), length, target, lowest)


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
