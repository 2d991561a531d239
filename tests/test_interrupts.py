"""KeyboardInterrupt at every line of every operation of a manager: it has happened as a whole, or not at all.

What counts as the state is what the public API tells, and what the same operations then do.
"""

import contextlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from managers import make_manager
from test_blocks import assert_balanced

import dsv4_jax.host
from dsv4_jax.host.errors import CacheError
from dsv4_jax.host.manager import CacheManager

T = TypeVar("T")

HOST = Path(dsv4_jax.host.__file__).parent


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that runs in a file of dsv4_jax/host."""

    def __init__(self, line: int):
        self.line, self.seen = line, 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    @property
    def came(self) -> bool:
        """Whether there were so many lines."""
        return self.seen > self.line

    def _trace(self, frame, event, _):
        if Path(frame.f_code.co_filename).parent != HOST:
            return None
        if event == "line" and not self.came:
            self.seen += 1
            if self.came:
                raise KeyboardInterrupt
        return self._trace


def observed(manager: CacheManager) -> dict:
    """All that the public API tells."""
    requests = manager.requests.tolist()
    return {
        "free": (manager.free_slots, manager.free_blocks),
        "requests": [
            (handle, manager.slot(handle), manager.length(handle), manager.blocks(handle).tolist())
            for handle in requests
        ],
        "transfers": manager.transfers_wait,
        "usage": manager.usage(),
        "admits": [manager.can_admit(length) for length in (0, 128, 1000)],
    }


def copies(thing: T) -> Callable[[], T]:
    """Makes copies of something as it is now; by pickling, which takes a fraction of what deep copies do."""
    data = pickle.dumps(thing)
    return lambda: pickle.loads(data)


def aftermath(manager: CacheManager, plans: list) -> list:
    """What a fixed sequence of operations then gives: plans made, errors raised, lengths that can be had."""
    told = [observed(manager)]

    def attempt(operation, *arguments):
        try:
            result = operation(*arguments)
        except CacheError as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append(result)
            if hasattr(result, "packed"):
                told[-1] = result.packed.tolist()
            elif hasattr(result, "operations"):
                told[-1] = result.operations.tolist(), result.blocks.tolist()

    copied = copies(manager)
    for plan in reversed(plans):
        attempt(copied().cancel, plan)
        attempt(copied().commit, plan, 1)
    for request in manager.requests.tolist():
        for length in (0, manager.length(request) - 1, 128):
            attempt(copied().truncate, request, length)
    attempt(manager.take_transfers)
    attempt(manager.prepare_forward, dict.fromkeys(manager.requests.tolist(), 1))
    attempt(manager.prepare_forward, dict.fromkeys(manager.requests.tolist(), 70))
    attempt(manager.admit)
    attempt(manager.prepare_forward, dict.fromkeys(manager.requests.tolist()[-1:], 130))
    told.append(observed(manager))
    assert_balanced(manager._ledger)
    return told


def prepared(wipe: bool = False) -> tuple[CacheManager, list[int], list]:
    """A manager in the middle of its work, its requests, and plans: of these the second can be taken back, and
    the third be committed though the fourth is under way. The last two requests share blocks, and transfers wait.
    """
    manager = make_manager(slots=7, blocks=40, lookahead=200, wipe=wipe)
    requests = [manager.admit() for _ in range(4)]
    manager.prepare_forward(dict(zip(requests, (303, 127, 5, 1), strict=True)))
    manager.truncate(requests[0], 302)
    manager.release(requests[3])
    requests[3] = manager.admit(100, 500)
    requests.append(manager.fork(requests[0]))
    manager.take_transfers()
    first = manager.prepare_forward({requests[1]: 1})
    drafts = [manager.prepare_forward({requests[2]: count}, drafts=3) for count in (4, 130)]
    second = manager.prepare_forward(latest(requests), steps=4)
    requests.append(manager.fork(requests[4]))
    return manager, requests, [first, second, *drafts]


def assert_all_or_nothing(origin: tuple, operation: Callable, follow: Callable[[CacheManager, list], list]) -> None:
    """Interrupts an operation at each of its lines: what follows is as if it had happened, or as if it had not.

    Args:
      origin: (manager, requests, plans) to begin with.
      operation: of these three.
      follow: what can be seen afterwards, of a manager and plans that nobody needs any more.
    """
    copied = copies(origin)
    manager, requests, plans = copied()
    before = follow(*copies((manager, plans))())
    operation(manager, requests, plans)
    after = follow(*copies((manager, plans))())
    assert before != after
    outcomes, line, known = [], 0, {}
    while True:
        manager, requests, plans = copied()
        with contextlib.suppress(KeyboardInterrupt), Interrupt(line) as interrupt:
            operation(manager, requests, plans)
        # As it was left: a manager that is pickled as such tidies up first. Every copy has a name of its own.
        state = pickle.dumps([vars(manager), plans]).replace(manager._receipts._name.encode(), b"")
        if state not in known:  # what follows from a state is the same, however many lines left it
            known[state] = follow(manager, plans)
        left = known[state]
        assert left in (before, after), f"line {line}"
        outcomes.append(left == after)
        if not interrupt.came:
            break
        line += 1
    assert line > 5
    assert outcomes == sorted(outcomes), "once it has happened, it stays so"
    assert not outcomes[0]
    assert outcomes[-1]


def latest(requests: list[int]) -> dict[int, int]:
    """The tokens of the latest plan of `prepared`."""
    return {requests[3]: 40, requests[1]: 40, requests[0]: 33}


OPERATIONS = {
    "admit": lambda manager, requests, plans: manager.admit(),
    "admit with a promise": lambda manager, requests, plans: manager.admit(100, 200),
    "fork with a promise": lambda manager, requests, plans: manager.fork(requests[4], 200),
    "release what was promised": lambda manager, requests, plans: manager.release(requests[3]),
    "release": lambda manager, requests, plans: manager.release(requests[0]),
    "truncate": lambda manager, requests, plans: manager.truncate(requests[0], manager.length(requests[0]) - 1),
    "truncate what is shared": lambda manager, requests, plans: manager.truncate(requests[4], 250),
    "fork": lambda manager, requests, plans: manager.fork(requests[4]),
    "take transfers": lambda manager, requests, plans: manager.take_transfers(),
    "truncate to nothing": lambda manager, requests, plans: manager.truncate(requests[0], 0),
    "prepare": lambda manager, requests, plans: manager.prepare_forward(dict.fromkeys(requests, 60)),
    "prepare one token each": lambda manager, requests, plans: manager.prepare_forward((requests, [1] * 6)),
    "prepare the latest again": lambda manager, requests, plans: manager.prepare_forward(latest(requests)),
    "prepare steps": lambda manager, requests, plans: manager.prepare_forward(dict.fromkeys(requests, 60), steps=3),
    "cancel": lambda manager, requests, plans: manager.cancel(plans[1]),
    "cancel one": lambda manager, requests, plans: manager.cancel(plans[1], requests[1]),
    "commit": lambda manager, requests, plans: manager.commit(plans[1], [0, 3, 1]),
    "prepare drafts": lambda manager, requests, plans: manager.prepare_forward(
        dict.fromkeys(requests, 60), drafts={requests[2]: 2}
    ),
    "commit drafts": lambda manager, requests, plans: manager.commit(plans[2], lengths=[7]),
    "preempt": lambda manager, requests, plans: manager.preempt(requests[0]),
    "resume": lambda manager, requests, plans: manager.resume(manager.record(requests[4])[0], 200),
    "reset": lambda manager, requests, plans: manager.reset(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupted_at_any_line_an_operation_happened_or_did_not(name):
    operation, origin = OPERATIONS[name], prepared()
    if name.startswith(("prepare", "preempt", "resume")):
        origin[0].take_transfers()
    assert_all_or_nothing(origin, operation, aftermath)


WIPING = ("release", "truncate", "truncate what is shared", "truncate to nothing", "cancel", "commit", "preempt")


@pytest.mark.parametrize("name", WIPING)
def test_so_it_is_where_what_is_given_back_is_wiped(name):
    operation, origin = OPERATIONS[name], prepared(wipe=True)
    origin[0].take_transfers()
    assert_all_or_nothing(origin, operation, aftermath)


@pytest.mark.parametrize("read", [lambda manager: manager.free_blocks, observed], ids=["one", "all"])
def test_reading_finishes_what_was_interrupted_and_may_be_interrupted_too(read):
    origin = prepared()
    copied = copies(origin)
    manager, requests, _ = copied()
    manager.release(requests[0])
    after = observed(manager)
    for line in range(500):
        manager, requests, _ = copied()
        with contextlib.suppress(KeyboardInterrupt), Interrupt(line) as interrupt:
            manager.release(requests[0])
        if not interrupt.came:
            break
        for again in range(30):
            with contextlib.suppress(KeyboardInterrupt), Interrupt(again):
                read(manager)
        assert observed(manager) in (observed(origin[0]), after)
    else:
        pytest.fail("never reached the end")


def test_a_random_history_with_interrupts_balances(rng):
    manager, plans = make_manager(slots=4, blocks=30, lookahead=300, max_context=900), []
    tokens: tuple = ([], [])
    interrupted = 0

    def operation():
        nonlocal tokens
        requests = manager.requests.tolist()
        chosen = [handle for handle in requests if rng.random() < 0.7]
        match rng.choice(list(PROBABILITIES), p=np.array(list(PROBABILITIES.values())) / 30):
            case "admit":
                manager.admit(0, rng.choice([None, 200]))
            case "fork" if requests:
                manager.fork(rng.choice(requests), rng.choice([None, 50]))
            case "transfers":
                manager.take_transfers()
            case "release" if requests:
                manager.release(rng.choice(requests))
            case "truncate" if requests:
                request = rng.choice(requests)
                manager.truncate(request, max(0, manager.length(request) - int(rng.integers(200))))
            case "prepare":
                steps = rng.choice([None, 2, 5])
                tokens = chosen, rng.integers(1, 60, len(chosen))
                plans.append(manager.prepare_forward(tokens, steps=steps))
            case "prepare again":
                plans.append(manager.prepare_forward(tokens))
            case "cancel" if plans:
                manager.cancel(plans.pop())
            case "commit" if plans:
                manager.commit(plans.pop(), 1)
            case "reset" if rng.random() < 0.1:
                manager.reset()

    for _ in range(1500):
        with contextlib.suppress(KeyboardInterrupt, CacheError), Interrupt(int(rng.integers(1, 400))) as interrupt:
            operation()
        interrupted += interrupt.came
        held = [manager.blocks(request) for request in manager.requests.tolist()]
        flat = np.concatenate([*held, np.zeros(0, np.int32)])
        assert len(set(flat.tolist())) == 30 - manager.free_blocks
        assert manager.free_slots == 4 - len(held)
        for request, ids in zip(manager.requests.tolist(), held, strict=True):
            assert len(ids) == manager.blocks_needed(manager.length(request))
        assert_balanced(manager._ledger)
    assert interrupted > 50


PROBABILITIES = {
    "admit": 4,
    "fork": 2,
    "transfers": 6,
    "release": 1,
    "truncate": 2,
    "prepare": 4,
    "prepare again": 6,
    "cancel": 2,
    "commit": 2,
    "reset": 1,
}
