"""Steps of the same requests again and again, which the manager looks up and checks only once: nobody can tell."""

import copy
import pickle

import numpy as np
import pytest
from managers import make_manager

from dsv4_jax.host.errors import CacheError, CacheFull, ContextExceeded, UnknownRequest
from dsv4_jax.host.manager import CacheManager


def looked_up(manager: CacheManager, tokens, steps=None):
    """What a manager without memory of the step before does: (the plan's bytes or the error, the state after)."""
    manager = copy.deepcopy(manager)
    manager._standing = None
    return outcome(manager, tokens, steps)


def outcome(manager: CacheManager, tokens, steps=None):
    try:
        plan = manager.prepare_forward(tokens, steps=steps)
        made = plan.packed.shape, plan.packed.tobytes(), plan.layout, plan.receipt.serial
    except CacheError as error:
        made = type(error), str(error)
    held = {handle: (manager.length(handle), manager.blocks(handle).tolist()) for handle in manager.requests.tolist()}
    return made, held, manager.free_blocks, manager.free_slots


def decoding(manager: CacheManager, lengths) -> tuple[np.ndarray, np.ndarray]:
    """Requests of these lengths, to decode: what `prepare_forward` takes."""
    handles = [manager.admit() for _ in lengths]
    manager.prepare_forward(dict(zip(handles, lengths, strict=True)))
    return np.array(handles), np.ones(len(handles), np.int64)


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 2), (130, 5, 128)], ids=str)
def test_each_step_is_planned_as_if_it_were_the_first(counts, rng):
    manager = make_manager(slots=5, blocks=60, max_context=2048, lookahead=int(rng.integers(200)))
    handles, _ = decoding(manager, rng.integers(1, 150, 3))
    tokens = handles, np.array(counts)
    for _ in range(200 // max(counts) + 4):
        steps = rng.choice([None, None, None, 1, 3])
        expected = looked_up(manager, tokens, steps)
        assert outcome(manager, tokens, steps) == expected


def test_whatever_happens_between_two_steps_counts(rng):
    manager = make_manager(slots=4, blocks=24, max_context=700, lookahead=300)
    tokens, plans, repeated = decoding(manager, (127, 3, 250)), [], 0
    changes = {
        "nothing": lambda requests: None,
        "admit": lambda requests: manager.admit(),
        "release": lambda requests: manager.release(rng.choice(requests)),
        "truncate": lambda requests: manager.truncate(request := rng.choice(requests), manager.length(request) - 1),
        "forget": lambda requests: manager.truncate(rng.choice(requests), 0),
        "cancel": lambda requests: manager.cancel(plans.pop()),
        "commit": lambda requests: manager.commit(plans.pop(), 0),
        "another step": lambda requests: manager.prepare_forward({rng.choice(requests): 2}),
        "reset": lambda requests: manager.reset(),
    }
    rare = {"release": 0.05, "reset": 0.01, "nothing": 2.0}
    chances = np.array([rare.get(name, 0.2) for name in changes])
    for _ in range(400):
        if not manager.requests.size:
            tokens, plans = decoding(manager, (127, 3, 250)), []
        change = str(rng.choice(list(changes), p=chances / chances.sum()))
        try:
            changes[change](manager.requests)
        except (CacheError, IndexError):
            change = "refused"
        expected = looked_up(manager, tokens)
        before = manager.requests
        assert outcome(manager, tokens) == expected, change
        if expected[0][0] is ContextExceeded or expected[0][0] is CacheFull:
            manager.truncate(rng.choice(before), 0)
        elif expected[0][0] is UnknownRequest:
            tokens = before, np.ones(before.size, np.int64)
        else:
            repeated += 1
            plans = [manager.prepare_forward(tokens)] if rng.random() < 0.2 and manager.free_blocks > 4 else []
    assert repeated > 100


def test_the_callers_arrays_may_change_after_the_call():
    manager = make_manager(slots=4)
    handles, counts = decoding(manager, (5, 9))
    given = handles.copy(), counts.copy()
    manager.prepare_forward(given)
    given[0][:], given[1][:] = handles[::-1], (2, 1)
    expected = looked_up(manager, given)
    assert outcome(manager, given) == expected
    plan = manager.prepare_forward((handles, counts))
    assert plan.request_slot[:2].tolist() == [manager.slot(handle) for handle in handles]
    assert plan.token_position[:2].tolist() == [5 + 1 + 1, 9 + 1 + 2]


def test_a_step_refused_for_want_of_blocks_follows_once_there_are_some():
    manager = make_manager(slots=3, blocks=3)
    tokens = decoding(manager, (127, 129))
    third = manager.admit()
    manager.prepare_forward({third: 128})
    manager.prepare_forward(tokens)
    manager.prepare_forward(tokens)
    assert manager.free_blocks == 0
    for _ in range(2):
        expected = looked_up(manager, tokens)
        assert expected[0][0] is CacheFull
        assert outcome(manager, tokens) == expected
    manager.release(third)
    expected = looked_up(manager, tokens)
    assert outcome(manager, tokens) == expected
    assert isinstance(expected[0][1], bytes)


def test_the_context_ends_where_it_ends():
    manager = make_manager(slots=2, max_context=256)
    handles, counts = decoding(manager, (127, 130))
    for _ in range(126):
        manager.prepare_forward((handles, counts))
    with pytest.raises(ContextExceeded, match=f"request {handles[1]} holds 256 tokens"):
        manager.prepare_forward((handles, counts))
    assert [manager.length(handle) for handle in handles] == [253, 256]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda manager: pickle.loads(pickle.dumps(manager))])
def test_a_copy_goes_on_by_itself(copied):
    manager = make_manager(slots=3)
    tokens = decoding(manager, (127, 3))
    manager.prepare_forward(tokens)
    again = copied(manager)
    expected = looked_up(manager, tokens)
    for _ in range(5):
        manager.prepare_forward(tokens)
    made, *rest = outcome(again, tokens)
    assert (made[:3], rest) == (expected[0][:3], list(expected[1:]))
