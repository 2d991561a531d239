"""KeyboardInterrupt at every line of what shares prefixes: each operation has happened as a whole, or not at all."""

import contextlib

import numpy as np
import pytest
from managers import make_manager
from test_interrupts import aftermath, assert_all_or_nothing, copies

from dsv4_jax import CacheManager
from dsv4_jax.host.errors import TransfersWait

TEXT = np.arange(700, dtype=np.int32) % 300


def prepared(wipe: bool = False) -> tuple[CacheManager, list[int], list]:
    """A manager two of whose requests share blocks, while others are idle; the requests; and plans: of a prompt's end,
    a settled one, one that ends where a snapshot is worth it, and one after tokens were taken back.
    """
    sizes = {"slots": 5, "blocks": 14, "lookahead": 140, "snapshots": 2}
    manager = CacheManager(
        make_manager(**sizes).schema, token_buckets=(8, 64, 1024), snapshot_every=1, events=True, wipe=wipe
    )
    gone = manager.admit(manager.match_prefix(TEXT[:400] + 1))
    manager.commit(manager.prepare_forward({gone: 384}), 1)
    manager.release(gone)
    manager.take_transfers()
    first = manager.admit(manager.match_prefix(TEXT[:300]), 50)
    manager.commit(manager.prepare_forward({first: 256}), 1)
    manager.take_transfers()
    second = manager.admit(manager.match_prefix(TEXT[:500]))
    manager.take_transfers()
    manager.take_events()
    plans = [manager.prepare_forward({second: 244}), manager.prepare_forward({first: 47})]
    manager.commit(plans[1], 1, tokens=None)
    manager.truncate(first, 300)
    third = manager.admit(manager.match_prefix(TEXT[:130] + 2))
    plans.append(manager.prepare_forward({third: 128}))
    plans.append(manager.prepare_forward({first: 84}))
    return manager, [first, second, third], plans


def told(manager, plan, requests, counts):
    manager.commit(plan, lengths=plan.request_end, tokens={r: TEXT[:n] for r, n in zip(requests, counts, strict=True)})


OPERATIONS = {
    "admit a hit": lambda manager, r, plans: manager.admit(manager.match_prefix(TEXT[:600]), 100),
    "admit what lay idle": lambda manager, r, plans: manager.admit(manager.match_prefix(TEXT[:600] + 1)),
    "admit what is new": lambda manager, r, plans: manager.admit(manager.match_prefix(TEXT[:200] + 9)),
    "commit a prompt": lambda manager, r, plans: manager.commit(plans[0], 1),
    "commit with a snapshot": lambda manager, r, plans: manager.commit(plans[2], 1),
    "commit told tokens": lambda manager, r, plans: told(manager, plans[3], r[:1], [84]),
    "release": lambda manager, r, plans: manager.release(r[0]),
    "release what was evicted": lambda manager, r, plans: manager.release(r[1]),
    "fork": lambda manager, r, plans: manager.fork(r[1]),
    "cut a known block": lambda manager, r, plans: manager.truncate(r[1], 380),
    "cut to nothing": lambda manager, r, plans: manager.truncate(r[1], 0),
    "evict": lambda manager, r, plans: manager.prepare_forward({r[2]: 700}),
    "forget all": lambda manager, r, plans: manager.reset_prefix_cache(),
    "reset": lambda manager, r, plans: manager.reset(),
    "take events": lambda manager, r, plans: manager.take_events(),
    "take transfers": lambda manager, r, plans: manager.take_transfers(),
}


def followed(manager: CacheManager, plans: list) -> list:
    """All that is told, and what then follows."""
    texts = [TEXT[:690], TEXT[:690] + 1, TEXT[:690] + 2]
    seen = [
        manager.usage(),
        manager.metrics(),
        [manager.match_prefix(text).length for text in texts],
        [manager.chunk_limit(request) for request in manager.requests.tolist()],
        [manager.can_admit(manager.match_prefix(text), 300) for text in texts],
        copies(manager)().take_events(),
    ]
    told = aftermath(manager, plans)
    return [*seen, *told, manager.take_events(), [manager.match_prefix(text).length for text in texts]]


@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupted_at_any_line_an_operation_happened_or_did_not(name):
    operation, origin = OPERATIONS[name], prepared()
    if name == "take events":
        origin[0].commit(origin[2][0], 1)
    if name in ("take transfers", "cut a known block"):
        origin[0].commit(origin[2][2], 1)
        origin[0].commit(origin[2][0], 1)
    assert_all_or_nothing(origin, operation, followed)


REBUILT = {
    "admit": lambda manager, r, plans: manager.admit(manager.match_prefix(TEXT[:600]), 100),
    "admit from nothing": lambda manager, r, plans: manager.admit(manager.match_prefix(TEXT[:300])),
    "fork": lambda manager, r, plans: manager.fork(r[1]),
    "cut to nothing": lambda manager, r, plans: manager.truncate(r[1], 0),
    "release": lambda manager, r, plans: manager.release(r[1]),
    "commit its end": lambda manager, r, plans: manager.commit(plans[0], 1),
}


@pytest.mark.parametrize("name", REBUILT)
def test_so_it_is_where_states_are_rebuilt(name):
    """Beside a request that has all of the text, and one that has begun to bring back the state at its fourth block."""
    manager = CacheManager(make_manager(slots=4, blocks=14, snapshots=2).schema, token_buckets=(8, 1024), rebuild=True)
    requests, plans = [], []
    for end in (600, 512):
        requests.append(manager.admit(manager.match_prefix(TEXT[:600])))
        manager.take_transfers()
        plans = [manager.prepare_forward({requests[-1]: end - manager.length(requests[-1])})]
        if end == 600:
            manager.commit(plans[0], 1)
    assert_all_or_nothing((manager, requests, plans), REBUILT[name], followed)


def waiting(operation):
    """The operation, which may have others to be done first."""

    def attempt(*origin):
        with contextlib.suppress(TransfersWait):
            operation(*origin)

    return attempt


@pytest.mark.parametrize("name", ["admit what is new", "fork", "release", "cut a known block", "evict", "forget all"])
def test_so_it_is_where_what_is_given_up_is_wiped(name):
    """A step that needs idle blocks gives these up and is refused: that is one operation, the next one plans it."""
    origin = prepared(wipe=True)
    if name == "cut a known block":
        origin[0].commit(origin[2][2], 1)
        origin[0].commit(origin[2][0], 1)
    origin[0].take_transfers()
    assert_all_or_nothing(origin, waiting(OPERATIONS[name]), followed)
    if name == "evict":
        manager, requests, _ = origin
        with pytest.raises(TransfersWait):
            manager.prepare_forward({requests[2]: 700})
        manager.take_transfers()
        assert_all_or_nothing(origin, OPERATIONS[name], followed)
