"""CacheManager: requests, slots, blocks and plans, and each of their errors, by example.

test_taking_back.py has cancel, commit and truncate, test_manager_model.py random sequences of all.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from managers import make_manager, state

from dsv4_jax.host.errors import (
    CacheFull,
    ContextExceeded,
    InvalidStep,
    StalePlan,
    StepTooLarge,
    UnknownRequest,
)
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.spec.kinds import LayerKind

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA


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
        (-5, ValueError, "prompt must be at least 0, got -5"),
        (2.0, TypeError, "prompt must be an integer, got 2.0 of type float"),
        ("8", TypeError, "prompt must be an integer, got '8' of type str"),
        (None, TypeError, "prompt must be an integer"),
        (True, TypeError, "prompt must be an integer, got True"),
        (np.True_, TypeError, "prompt must be an integer"),
        (np.array([1, 2]), TypeError, "prompt must be an integer"),
    ],
)
def test_lengths_are_checked(length, error, message):
    manager = make_manager()
    request = manager.admit()
    manager.prepare_forward({request: 3})
    with pytest.raises(error, match=message):
        manager.can_admit(length)
    message = message.replace("prompt", "length")
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
