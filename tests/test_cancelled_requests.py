"""One request out of a prepared step, or of a half-read prompt: the others never notice, and nothing of it is left."""

import numpy as np
import pytest
from harness import Driver, assert_same_bytes, random_tokens, random_weights
from managers import make_manager, state

from dsv4_jax import CacheFormats
from dsv4_jax.host.errors import InvalidStep, StalePlan, UnknownRequest
from dsv4_jax.layout.formats import HCA_TAILS


@pytest.mark.parametrize("steps", [None, 4])
def test_what_is_left_is_the_plan_of_the_others(steps):
    manager, other = make_manager(), make_manager()
    one, two, three = (manager.admit() for _ in range(3))
    assert [other.admit() for _ in range(3)] == [one, two, three]
    for each in (manager, other):
        each.prepare_forward({one: 126, three: 2})
    free, plan = manager.free_blocks, manager.prepare_forward({one: 9, two: 55, three: 1}, steps=steps)
    left = manager.cancel(plan, two)
    expected = other.prepare_forward({one: 9, three: 1}, steps=steps)
    assert left.layout == expected.layout != plan.layout
    for name, where in left.layout.fields.items():
        if name != "table_block":  # two's blocks lie between those of the others
            np.testing.assert_array_equal(left.packed[..., where], expected.packed[..., where], err_msg=name)
    handed_out = left.table_block[left.table_slot == manager.slot(one)]
    np.testing.assert_array_equal(handed_out, manager.blocks(one)[1:])
    assert manager.length(two) == 0
    assert manager.free_blocks == other.free_blocks < free
    assert manager.prepare_forward({two: 1}).request_reset[0] == 1


def test_requests_leave_a_plan_one_after_the_other():
    manager = make_manager()
    requests = [manager.admit() for _ in range(4)]
    before, plan = manager.free_blocks, manager.prepare_forward(dict.fromkeys(requests, 100))
    for position, request in enumerate(requests):
        assert plan.request_slot.tolist() == [manager.slot(r) for r in requests[position:]] + [-1] * position
        plan = manager.cancel(plan, request)
    assert (plan.request_slot == -1).all()
    assert manager.free_blocks == before
    assert [manager.length(request) for request in requests] == [0] * 4


def test_the_others_may_have_later_plans_which_stay_as_they_are():
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    first = manager.prepare_forward({one: 130, two: 130})
    later = manager.prepare_forward({one: 3})
    left = manager.cancel(first, [two])
    with pytest.raises(StalePlan, match="have a later plan"):
        manager.cancel(left, one)
    manager.cancel(later)
    manager.cancel(left)
    assert manager.length(one) == manager.length(two) == 0
    assert manager.free_blocks == 40


def test_what_cannot_be_taken_out_changes_nothing():
    manager = make_manager()
    one, two, three = (manager.admit() for _ in range(3))
    plan = manager.prepare_forward({one: 1, two: 1})
    before = state(manager)
    cases = [
        (three, InvalidStep, f"no tokens of request {three}"),
        ([one, 999], UnknownRequest, "999"),
        ([[one]], InvalidStep, r"one handle or several, got int64 \[1, 1\]"),
        (1.0, InvalidStep, "got float64"),
        (True, InvalidStep, "got bool"),
    ]
    for requests, error, message in cases:
        with pytest.raises(error, match=message):
            manager.cancel(plan, requests)
        assert state(manager) == before
    manager.release(two)
    with pytest.raises(StalePlan, match="released or truncated"):
        manager.cancel(plan, one)


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_a_prompt_is_given_up_half_way_among_others(device, rng, hca_tail):
    """Steps mix chunks of prompts and decoding. One request leaves a prepared step, and the cache; its slot goes on."""
    weights, formats = random_weights(rng), CacheFormats(hca_tail=hca_tail)
    drivers = [Driver(weights, formats, slots=3, blocks=14) for _ in range(2)]
    decodes, reads, gone, next_one = (random_tokens(rng, 700) for _ in range(4))
    cuts = [int(cut) for cut in rng.integers(100, 160, 4)]
    print("chunks", cuts)
    subject, twin = drivers
    a, b, given_up = subject.admit(decodes), subject.admit(reads), subject.admit(gone)
    assert [twin.admit(decodes), twin.admit(reads)] == [a, b]
    subject.feed({a: 250, given_up: 200, b: 3})
    subject.feed({given_up: cuts[0], a: 1, b: cuts[1]})
    plan, _ = subject.prepare({a: 1, given_up: cuts[2], b: cuts[3]})
    left = subject.manager.cancel(plan, given_up)
    subject.run(left, subject.brought({a: 1, b: cuts[3]}, left))
    subject.release(given_up)
    assert subject.manager.free_blocks == 14 - sum(len(subject.manager.blocks(r)) for r in (a, b))
    for step in ({a: 250, b: 3}, {a: 1, b: cuts[1]}, {a: 1, b: cuts[3]}):
        twin.feed(step)
    fresh = [driver.admit(next_one) for driver in drivers]
    for driver, new in zip(drivers, fresh, strict=True):
        driver.feed({new: 130, a: 1, b: 1})
        driver.feed({new: 1, a: 1, b: 1})
    for mine, other in zip((a, b, fresh[0]), (a, b, fresh[1]), strict=True):
        assert_same_bytes(subject.visible(mine), twin.visible(other), f"request {mine}")
