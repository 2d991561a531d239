"""The prefix cache on a whole cache: a request that begins with a hit stores what it would have stored without."""

import numpy as np
import pytest
from histories import steps_until
from prompts import Prompts
from test_blocks import assert_balanced

from dsv4_jax.host.errors import CannotTruncate
from dsv4_jax.layout.formats import HCA_TAILS

EVERY_TAIL = pytest.mark.parametrize("hca_tail", HCA_TAILS)


@EVERY_TAIL
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("owner", ["runs on", "released"])
def test_a_hit_goes_on_as_if_computed(device, rng, hca_tail, blocks, owner):
    """Its first owner has overwritten its own window since, or is gone and so is its slot's state."""
    prompts = Prompts(rng, hca_tail, poison=True)
    shared = prompts.tokens(128 * blocks)
    first = prompts.admit(np.concatenate([shared, prompts.tokens(30)]))
    prompts.prefill(first)
    prompts.step({first: 100})
    if owner == "released":
        prompts.release(first)
        other = prompts.admit(prompts.tokens(50))
        prompts.prefill(other)
    second = prompts.admit(np.concatenate([shared, prompts.tokens(200)]))
    assert prompts.manager.length(second) == 128 * blocks
    prompts.check(second)
    assert prompts.manager.chunk_limit(second) == 128
    prompts.prefill(second, cut=int(rng.integers(1, 90)))
    for _ in range(5):
        prompts.step({second: 1})
    for request in prompts.ids:
        prompts.check(request)
    assert_balanced(prompts.manager._ledger)


def test_a_hit_leaves_a_token_to_compute(device, rng):
    prompts = Prompts(rng)
    ids = prompts.tokens(384)
    prompts.prefill(prompts.admit(ids))
    assert prompts.manager.match_prefix(ids).length == 256
    assert prompts.manager.match_prefix(ids[:256]).length == 0  # nobody kept what was there after 128
    longer = prompts.admit(np.concatenate([ids, ids]))
    assert prompts.manager.length(longer) == 256
    prompts.prefill(longer)  # by where the prompts part, and so by 384
    assert prompts.manager.match_prefix(np.concatenate([ids, [1]])).length == 384
    prompts.check(longer)


@EVERY_TAIL
def test_prompts_that_part_leave_a_snapshot_there(device, rng, hca_tail):
    prompts = Prompts(rng, hca_tail)
    system = prompts.tokens(300)
    users = [np.concatenate([system, prompts.tokens(170)]) for _ in range(3)]
    found = []
    for ids in users:
        request = prompts.admit(ids)
        found.append(prompts.manager.length(request))
        prompts.prefill(request)
        prompts.check(request)
    assert found == [0, 0, 256]


def test_tenants_with_different_salts_share_nothing(device, rng):
    prompts = Prompts(rng, blocks=30)
    ids = prompts.tokens(300)
    prompts.prefill(prompts.admit(ids, salt=b"one"))
    assert prompts.manager.match_prefix(ids, salt=b"two").length == 0
    assert prompts.manager.match_prefix(ids).length == 0
    assert prompts.manager.match_prefix(ids, salt=b"one").length == 256
    other = prompts.admit(ids, salt=b"two")
    prompts.prefill(other)
    assert prompts.manager.usage()["blocks"].shared == 0


def test_what_the_manager_was_not_told_is_not_shared(device, rng):
    prompts = Prompts(rng, snapshot_every=1)
    ids = prompts.tokens(200)
    request = prompts.admit(ids)
    prompts.step({request: 128}, commit=False)
    assert prompts.manager.match_prefix(ids).length == 0
    prompts.step({request: 72})
    prompts.step({request: 56})  # up to 256
    known = prompts.ids[request]
    assert prompts.manager.match_prefix(np.concatenate([known, [0]])).length == 256
    prompts.step({request: 60}, told=False)
    prompts.step({request: 68})  # told, but not what came before
    known = prompts.ids[request]
    assert prompts.manager.match_prefix(np.concatenate([known, [0]])).length == 256
    twin = prompts.admit(np.concatenate([known[:256], prompts.tokens(40)]))
    prompts.prefill(twin)
    prompts.check(twin)


def test_a_missed_snapshot_is_counted(device, rng):
    prompts = Prompts(rng)
    ids = prompts.tokens(300)
    request = prompts.admit(ids)
    assert prompts.manager.chunk_limit(request) == 256
    prompts.step({request: 300})
    assert prompts.manager.metrics()["prefix_snapshots_missed"] == 1
    assert prompts.manager.match_prefix(ids).length == 0
    again = prompts.admit(ids)
    prompts.prefill(again)
    assert prompts.manager.match_prefix(ids).length == 256
    metrics = prompts.manager.metrics()
    assert (metrics["prefix_cache_queries"], metrics["prefix_cache_hits"]) == (600, 0)


def test_no_snapshot_is_taken_of_a_later_state(device, rng):
    """The plan that ended where a snapshot was due is committed when the next one has run."""
    prompts = Prompts(rng)
    ids = prompts.tokens(300)
    request = prompts.admit(ids)
    plans = [prompts.step({request: count}, commit=False) for count in (256, 44)]
    for plan, start, end in zip(plans, (0, 256), (256, 300), strict=True):
        prompts.manager.commit(plan, lengths=[end], tokens=[ids[start:end]])
    assert not prompts.manager.transfers_wait
    assert prompts.manager.metrics()["prefix_snapshots_missed"] == 1
    prompts.release(request)
    assert prompts.manager.match_prefix(ids).length == 0
    again = prompts.admit(ids)
    prompts.prefill(again)
    prompts.check(again)


def test_going_back_below_a_hit(device, rng):
    prompts = Prompts(rng, lookahead=140)
    ids = prompts.tokens(300)
    prompts.prefill(prompts.admit(ids))
    request = prompts.admit(ids)
    prompts.step({request: 44})
    with pytest.raises(CannotTruncate, match=r"it began at 256.* possible are 0 and 256 to 300"):
        prompts.manager.truncate(request, 255)
    prompts.manager.truncate(request, 256)
    prompts.ids[request] = np.concatenate([ids[:256], prompts.tokens(200)])
    prompts.step({request: 150})
    prompts.check(request)
    prompts.manager.truncate(request, 0)
    prompts.ids[request] = prompts.tokens(300)
    prompts.step({request: 300})
    prompts.check(request)


def test_forgetting_prefixes_leaves_requests_as_they_are(device, rng):
    prompts = Prompts(rng, lookahead=140)
    ids = prompts.tokens(300)
    prompts.prefill(prompts.admit(ids))
    request = prompts.admit(ids)
    prompts.step({request: 44})
    prompts.manager.reset_prefix_cache()
    assert prompts.manager.match_prefix(ids).length == 0
    twin = prompts.manager.fork(request)
    prompts.ids[twin] = ids
    prompts.step({request: 100, twin: 120})
    for one in (request, twin):
        with pytest.raises(CannotTruncate, match="it began at 256"):
            prompts.manager.truncate(one, 255)
        prompts.check(one)
        prompts.release(one)
    other = prompts.admit(prompts.tokens(300))
    prompts.step({other: 256})
    prompts.step({other: 44})
    prompts.manager.truncate(other, 200)
    prompts.ids[other] = np.concatenate([prompts.ids[other][:200], prompts.tokens(90)])
    prompts.step({other: 90})
    prompts.check(other)


def test_a_known_block_that_is_cut_is_no_longer_known(device, rng):
    prompts = Prompts(rng, lookahead=140, snapshot_every=1)
    request = prompts.admit(prompts.tokens(10))
    for _ in range(3):
        prompts.step({request: prompts.manager.chunk_limit(request)})
    ids = np.concatenate([prompts.ids[request], [0]])
    assert prompts.manager.match_prefix(ids).length == 384
    prompts.manager.truncate(request, 300)
    assert prompts.manager.match_prefix(ids).length == 256
    prompts.ids[request] = np.concatenate([ids[:300], prompts.tokens(200)])
    prompts.step({request: 84})
    other = np.concatenate([prompts.ids[request][:384], [0]])
    assert prompts.manager.match_prefix(other).length == 384
    assert prompts.manager.match_prefix(ids).length == 256
    twin = prompts.admit(other)
    for one in (request, twin):
        prompts.check(one)


@EVERY_TAIL
def test_random_traffic(device, rng, hca_tail):
    """Prompts of few beginnings, cut anyhow; forks, tokens taken back, plans cancelled, little room."""
    prompts = Prompts(rng, hca_tail, poison=True, lookahead=140, blocks=15, snapshots=4, snapshot_every=1)
    manager, seen = prompts.manager, set()
    texts = prompts.texts()
    wanted = {"hit", "new", "full", "fork", "truncate", "release"}
    for step in steps_until(240, seen, wanted):
        prompts.act(texts, seen)
        assert_balanced(manager._ledger)
        if step % 12 == 11 and prompts.ids:
            prompts.check(int(rng.choice(list(prompts.ids))))
    print(manager.metrics())
    assert seen >= wanted
    for one in list(prompts.ids):
        prompts.check(one)
