"""``CacheManager(wipe=True)``: none of a request's bytes is left once it is gone, and what others could share of it."""

import functools
import itertools

import jax
import numpy as np
import pytest
from managers import make_manager
from prompts import Prompts

from dsv4_jax import PROFILES, CacheFormats, CacheManager, apply_transfers, init_cache
from dsv4_jax.host.errors import CacheError, TransfersWait
from dsv4_jax.layout.transfers import TransferKind

FORMATS = pytest.mark.parametrize(
    "formats", [*PROFILES.values(), CacheFormats(hca_tail="running")], ids=[*PROFILES, "running"]
)
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["native", "reference"])


def server(rng, formats=PROFILES["exact"], implementation="native", **sizes):
    """Requests of known tokens on a cache that is wiped, one of which stays throughout and shares nothing."""
    made = Prompts(rng, hca_tail=formats.hca_tail, formats=formats, wipe=True, lookahead=3, **sizes)
    made._apply = jax.jit(functools.partial(apply_transfers, implementation=implementation), donate_argnums=0)
    stays = made.manager.admit()
    made.ids[stays] = made.tokens(700)
    made.step({stays: 200}, told=False)
    made.transfer()
    return made


def arrays_of(cache):
    """All bytes, by array."""
    return {name: np.array(array) for name, array in cache.arrays.items()}


def assert_same(cache, expected):
    """Every byte is as expected."""
    for name, array in arrays_of(cache).items():
        assert array.tobytes() == expected[name].tobytes(), name


def changed(cache, expected):
    """The arrays that are not as expected."""
    return {name for name, array in arrays_of(cache).items() if array.tobytes() != expected[name].tobytes()}


def wiped_blocks(transfers):
    """The blocks that transfers wipe."""
    return {
        block
        for kind, _, _, offset, count in transfers.operations.tolist()
        for block in transfers.blocks[offset : offset + count].tolist()
        if kind == TransferKind.WIPE_BLOCKS
    }


@IMPLEMENTATION
@FORMATS
def test_nothing_is_left_of_requests_their_twins_drafts_and_snapshots(device, rng, formats, implementation):
    one = server(rng, formats, implementation)
    manager, before = one.manager, arrays_of(one.driver.cache)
    text = one.tokens(int(rng.integers(390, 500)))
    print("length:", text.size)
    secret = one.admit(text)
    one.prefill(secret)
    again = one.admit(text)
    assert manager.length(again) == 384
    one.prefill(again)
    twin = manager.fork(secret)
    one.ids[twin] = one.ids[secret]
    one.step({twin: 40, secret: 1})
    plan = manager.prepare_forward({secret: 4}, drafts=3)
    one.ids[secret] = np.concatenate([one.ids[secret], one.tokens(4)])
    one.driver.run(plan, one._brought(plan, {secret: manager.length(secret) - 4}, {secret: 4}))
    manager.commit(plan, lengths=[manager.length(secret) - 2])
    for request in (secret, again, twin):
        one.release(request)
    assert changed(one.driver.cache, before) >= {*before}
    one.transfer()
    kept = {*one.driver.schema.block_pools, "window", "window_positions", "csa_tail", "csa_key_tail"}
    assert changed(one.driver.cache, before) == kept, "for others"
    assert manager.match_prefix(text).length == 384
    manager.reset_prefix_cache()
    one.transfer()
    assert_same(one.driver.cache, before)


@FORMATS
def test_nothing_is_left_of_what_is_evicted_or_truncated(device, rng, formats):
    """What others need blocks for is wiped before they get them, even where these are not filled."""
    one = server(rng, formats, blocks=8)
    manager, before = one.manager, arrays_of(one.driver.cache)
    text = one.tokens(400)
    secret = one.admit(text)
    one.prefill(secret)
    one.release(secret)
    one.transfer()
    assert manager.usage()["blocks"].cached == 3
    large = manager.admit()
    with pytest.raises(TransfersWait):
        manager.prepare_forward({large: 700})
    assert manager.length(large) == 0
    one.transfer()
    assert manager.match_prefix(text).length == 0
    assert_same(one.driver.cache, before)

    one.ids[large] = one.tokens(700)
    one.step({large: 700}, told=False)
    slot, blocks = manager.slot(large), manager.blocks(large)
    manager.truncate(large, 0)
    assert manager.slot(large) == slot
    one.transfer()
    assert_same(one.driver.cache, before)
    one.step({large: 385}, told=False)
    one.step({large: 1}, told=False)
    blocks = manager.blocks(large)
    manager.truncate(large, 383)
    one.transfer()
    for name in one.driver.schema.block_pools:
        given_back = np.asarray(one.driver.cache.arrays[name])[:, blocks[manager.blocks(large).size :]]
        assert not given_back.view(np.uint8).any(), name


def test_wipes_trace_nothing_anew(rng):
    one = server(rng)
    lists = []
    for _ in range(3):
        request = one.admit(one.tokens(150))
        one.prefill(request)
        one.release(request)
        one.transfer()
        lists.append(one._apply._cache_size())
    assert lists == lists[:1] * 3


def test_nothing_waits_unless_it_is_wanted():
    manager = make_manager(snapshots=2)
    request = manager.admit(manager.match_prefix(np.arange(300)))
    manager.commit(manager.prepare_forward({request: 256}), 1)
    kinds = manager.take_transfers().operations[:, 0]
    assert TransferKind.WIPE not in kinds
    manager.release(request)
    manager.reset_prefix_cache()
    assert not manager.transfers_wait


def test_after_a_reset_nothing_waits():
    manager = make_manager(snapshots=2, wipe=True)
    request = manager.admit(manager.match_prefix(np.arange(300)))
    manager.commit(manager.prepare_forward({request: 256}), 1)
    manager.admit()
    manager.reset()
    assert not manager.transfers_wait


def test_a_cancelled_plan_wipes_what_earlier_drafts_may_have_written():
    """Of a plan that does not run there is nothing to wipe. But its blocks may be those of drafts that were lost."""
    manager = make_manager(wipe=True)
    request = manager.admit()
    manager.cancel(manager.prepare_forward({request: 300}))
    assert not manager.transfers_wait

    manager = make_manager(wipe=True, lookahead=200)
    request = manager.admit()
    drafted = manager.prepare_forward({request: 201}, drafts=200)
    written = manager.blocks(request)
    later = manager.prepare_forward({request: 200})
    manager.commit(drafted, lengths=[1])
    manager.cancel(later)
    wiped = wiped_blocks(manager.take_transfers())
    assert {*written.tolist()} - {*manager.blocks(request).tolist()} <= wiped


def test_steps_are_the_same_with_and_without(rng):
    """In random histories: the same plans, but for transfers that must be taken first."""
    sizes = {"slots": 4, "blocks": 14, "lookahead": 5, "snapshots": 3, "max_context": 900}
    managers = [make_manager(wipe=wipe, **sizes) for wipe in (False, True)]
    plans, refused, operations = [[], []], 0, ("admit", "commit", "truncate", "fork", "release", "cancel", "forget")
    texts = [rng.integers(0, 9, 600) for _ in range(8)]

    def prepared(manager, counts):
        nonlocal refused
        manager.take_transfers()
        try:
            return manager.prepare_forward(counts)
        except TransfersWait:
            refused += 1
            assert manager is managers[1]
            assert wiped_blocks(manager.take_transfers())
            return manager.prepare_forward(counts)

    count = itertools.count()
    while next(count) < 1500 or refused < 4:
        requests = managers[0].requests.tolist()
        request = int(rng.choice(requests)) if requests else -1
        what = rng.choice([*operations, *["step"] * 4])
        text, size, back = texts[rng.integers(8)], int(rng.integers(1, 500)), int(rng.integers(1, 200))
        some = {one: int(rng.integers(1, 200)) for one in requests if rng.random() < 0.7}
        results = []
        for manager, made in zip(managers, plans, strict=True):
            result = None
            try:
                match what:
                    case "admit":
                        result = manager.admit(manager.match_prefix(text[:size]))
                    case "step":
                        counts = {o: min(n, manager.chunk_limit(o)) for o, n in some.items() if manager.length(o) < 800}
                        made.append(prepared(manager, counts))
                        result = made[-1].packed.tolist()
                    case "commit" if made:
                        manager.commit(made.pop(), 1)
                    case "cancel" if made:
                        manager.cancel(made.pop())
                    case "truncate" if requests:
                        manager.truncate(request, max(manager.length(request) - back, 0))
                    case "fork" if requests:
                        result = manager.fork(request)
                    case "release" if requests:
                        manager.release(request)
                    case "forget" if back < 20:
                        manager.reset_prefix_cache()
            except CacheError as error:
                result = str(error)
            results.append((result, manager.usage(), manager.match_prefix(text).length))
        assert results[0] == results[1], what


def test_a_resumed_request_has_its_blocks_wiped_first():
    sizes = {"slots": 3, "blocks": 5, "snapshots": 2, "wipe": True}
    manager = make_manager(**sizes)
    parked = manager.admit(manager.match_prefix(np.arange(300)))
    manager.commit(manager.prepare_forward({parked: 256}), 1)
    manager.take_transfers()
    record = manager.preempt(parked)
    other = manager.admit(manager.match_prefix(np.arange(300) + 7))
    manager.take_transfers()
    manager.commit(manager.prepare_forward({other: 256}), 1)
    manager.take_transfers()
    manager.release(other)
    manager.take_transfers()
    large = manager.admit()
    manager.prepare_forward({large: 100})  # the only free block
    fresh = CacheManager(manager.schema, token_buckets=(512,), wipe=True)
    idle = manager.usage()["blocks"].cached
    assert idle == 4
    shared = manager.match_prefix(np.arange(300)).length // 128
    assert shared == 2
    handle, places = manager.resume(record)  # both of its blocks are there still
    assert places.shared == 2
    manager.release(handle)
    manager.take_transfers()
    stranger = fresh.admit()
    fresh.prepare_forward({stranger: 256})
    record = fresh.preempt(stranger)  # of tokens that nobody knows
    with pytest.raises(TransfersWait):
        manager.resume(record)
    assert manager.usage()["blocks"].cached == 2
    wiped = wiped_blocks(manager.take_transfers())
    _, places = manager.resume(record)
    assert {*places.blocks.tolist()} <= wiped


def test_new_caches_and_wiped_ones_are_equal(rng):
    """All requests gone: the whole cache is as ``init_cache`` made it."""
    one = server(rng, CacheFormats(hca_tail="running"))
    for request in list(one.ids):
        one.release(request)
    one.manager.reset_prefix_cache()
    one.transfer()
    assert_same(one.driver.cache, arrays_of(init_cache(one.driver.schema)))


@pytest.mark.parametrize("takes", ["fork", "truncate"])
def test_a_copy_that_takes_a_kept_block_has_it_wiped_before(takes):
    manager = make_manager(slots=3, blocks=5, snapshots=2, lookahead=1, wipe=True)
    known = manager.admit(manager.match_prefix(np.arange(300)))
    manager.commit(manager.prepare_forward({known: 256}), 1)
    manager.release(known)
    manager.take_transfers()
    request = manager.admit()
    manager.prepare_forward({request: 384 if takes == "truncate" else 300})
    if takes == "truncate":
        manager.fork(request)
    manager.take_transfers()
    usage = manager.usage()["blocks"]
    assert (usage.free, usage.cached) == (0, 2)
    manager.fork(request) if takes == "fork" else manager.truncate(request, 383)
    transfers = manager.take_transfers()
    kinds = transfers.operations[:, 0].tolist()
    assert kinds.index(TransferKind.WIPE_BLOCKS) < kinds.index(TransferKind.COPY_BLOCK)
    assert wiped_blocks(transfers) == {transfers.operations[kinds.index(TransferKind.COPY_BLOCK), 1]}
