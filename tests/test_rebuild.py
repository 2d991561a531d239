"""Requests that share blocks without a snapshot: their state is computed again, and what they share is not written."""

import numpy as np
import pytest
from prompts import Prompts
from test_blocks import assert_balanced
from test_deepseek_v4 import all_logits, model
from test_prefix_books import make

from dsv4_jax import CacheChecker, CacheDamaged, CacheManager, CacheSchema, ShardedManager, apply_transfers, init_cache
from dsv4_jax.host.errors import CannotTruncate
from dsv4_jax.layout.formats import HCA_TAILS, PROFILES

LAYERS = 3
"""Of the models of ``Prompts`` and ``make``."""


def blocks_of(prompts, blocks):
    """What blocks hold, byte for byte."""
    arrays, pools = prompts.driver.cache.arrays, prompts.driver.schema.block_pools
    return {name: np.asarray(arrays[name])[:, blocks].tobytes() for name in pools}


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
@pytest.mark.parametrize("formats", ["default", "exact", "flashmla"])
@pytest.mark.parametrize("cut", [1000, 100, 1])
def test_a_rebuilt_request_goes_on_as_if_computed(device, rng, hca_tail, formats, cut):
    """In chunks and token by token, whatever the tokens bring whose windows lack rows; others read on meanwhile."""
    if cut == 1 and formats != "default":
        pytest.skip("slow, and one format's tokens take the same way as another's")
    prompts = Prompts(rng, hca_tail, poison=True, formats=PROFILES[formats], snapshots=0, rebuild=True)
    manager, blocks = prompts.manager, 6 if cut > 1 else LAYERS + 1
    shared = prompts.tokens(128 * blocks + 3)
    first = prompts.admit(shared)
    prompts.prefill(first)
    others = manager.blocks(first)[:blocks]
    before = blocks_of(prompts, others)

    match = manager.match_prefix(np.concatenate([shared[:-3], prompts.tokens(200)]))
    start = 128 * (blocks - LAYERS)
    assert (match.length, match.stored) == (start, 128 * blocks)
    assert manager.can_admit(match)
    second = prompts.admit(match.tokens)
    np.testing.assert_array_equal(manager.blocks(second), others)
    text = prompts.ids[second]
    # All but the last 128 of these tokens have vectors that a window without all its rows may have made.
    prompts.ids[second] = np.concatenate([text[:start], prompts.tokens(128 * (LAYERS - 1)), text[start + 256 :]])
    while manager.length(second) < 128 * blocks:
        count = min(int(rng.integers(1, cut + 1)), 128 * blocks - manager.length(second))
        counts = {second: count} | ({first: 1} if rng.random() < 0.1 and manager.length(first) < 1000 else {})
        prompts.step(counts, told=False)
        assert manager.blocks(second).size == blocks
    prompts.ids[second] = text
    assert blocks_of(prompts, others) == before
    prompts.check(second)
    for count in (1, 1, int(rng.integers(1, 130)), 60, 1):
        prompts.step({second: count})
        prompts.check(second)
    prompts.check(first)
    assert_balanced(manager._ledger)


@pytest.fixture
def shared(rng):
    """A server whose cache has the blocks of 768 tokens, and no snapshot; these tokens and one more."""
    prompts = Prompts(rng, poison=True, rebuild=True, snapshots=2, slots=4)
    ids = prompts.tokens(769)
    first = prompts.admit(ids)
    for tokens in (700, 69):  # no step ends where a snapshot is due
        prompts.step({first: tokens})
    assert prompts.manager.usage()["snapshots"].cached == 0
    return prompts, ids


def test_the_first_to_come_leaves_a_snapshot(device, shared):
    """Not before its state is there; the next one takes it, and does not rebuild."""
    prompts, ids = shared
    manager = prompts.manager
    second = prompts.admit(ids)
    assert (manager.length(second), manager.chunk_limit(second)) == (384, 384)
    prompts.step({second: 128})
    prompts.step({second: 128})
    assert not manager.transfers_wait
    prompts.step({second: manager.chunk_limit(second)})
    third = manager.match_prefix(ids)
    assert third.length == third.stored == 768
    third = prompts.admit(ids)
    prompts.step({third: 1, second: 1})
    for request in (second, third):
        prompts.check(request)


def test_a_snapshot_is_taken_where_it_leaves_fewer_tokens(device, shared):
    prompts, ids = shared
    manager = prompts.manager
    branch = np.concatenate([ids[:640], prompts.tokens(129)])
    second = prompts.admit(branch)  # rebuilt from 256 on, up to 640 where the prompts part
    prompts.prefill(second)
    prompts.check(second)
    other = manager.match_prefix(ids)
    assert (other.length, other.stored) == (640, 640), "768 would be rebuilt from 384 on"
    nothing = manager.match_prefix(ids[:120])
    assert (nothing.length, nothing.stored) == (0, 0)


def test_what_may_happen_to_a_request_that_is_being_rebuilt(device, shared):
    prompts, ids = shared
    manager = prompts.manager
    second = prompts.admit(ids)
    prompts.step({second: 200})
    assert manager.length(second) == 584
    with pytest.raises(CannotTruncate, match="being rebuilt, from the blocks of its first 768 tokens") as caught:
        manager.truncate(second, 583)
    assert caught.value.lowest == 584
    cache = prompts.driver.cache
    CacheChecker().check(cache, manager.contents())
    slot, block = manager.slot(second), int(manager.blocks(second)[4])
    writes = cache.with_arrays({"write_table": cache.write_table.at[slot, 4].set(block)})
    with pytest.raises(CacheDamaged, match=f"names block {block}, which the request may only read while"):
        CacheChecker().check(writes, manager.contents())

    twin = manager.fork(second)
    prompts.ids[twin] = ids
    np.testing.assert_array_equal(manager.blocks(twin), manager.blocks(second))
    prompts.step({twin: 185, second: 1})
    prompts.check(twin)

    manager.cancel(manager.prepare_forward({second: 150}))
    assert (manager.length(second), manager.blocks(second).size) == (585, 6)
    record, places = manager.record(second)
    assert (record.length, record.blocks, places.blocks.size) == (0, 0, 0)
    np.testing.assert_array_equal(record.tokens, ids)
    manager.truncate(second, 0)
    assert manager.blocks(second).size == 0
    prompts.step({second: 300})
    prompts.check(second)
    assert manager.blocks(second)[0] != manager.blocks(twin)[0]
    prompts.release(second)
    prompts.release(twin)
    assert_balanced(manager._ledger)


def computed(manager, ids, *ends):
    """A request of this prompt, in steps up to these lengths."""
    request = manager.admit(manager.match_prefix(ids))
    for end in ends:
        manager.take_transfers()
        manager.commit(manager.prepare_forward({request: end - manager.length(request)}), 1)
    manager.take_transfers()
    return request


def test_a_request_that_begins_with_blocks_alone_can_be_cut_to_nothing(rng):
    """Even before its first step: it then reads nothing of the prompt that it was admitted with."""
    manager = CacheManager(make(snapshots=2).schema, token_buckets=(1024,), rebuild=True)
    ids = rng.integers(0, 99, 257).astype(np.int32)
    first = computed(manager, ids, 250, 257)
    second = computed(manager, ids)
    assert (manager.length(second), manager.blocks(second).size) == (0, 2)
    manager.truncate(second, 0)
    assert not manager.blocks(second).size
    manager.prepare_forward({second: 257})
    assert not {*manager.blocks(first).tolist()} & {*manager.blocks(second).tolist()}
    assert_balanced(manager._ledger)


def test_what_a_request_that_is_being_rebuilt_would_lose(rng):
    """What it has computed since it was admitted: preempted, it can begin again where it did."""
    manager = CacheManager(make(snapshots=2).schema, token_buckets=(1024,), rebuild=True)
    ids = rng.integers(0, 99, 897).astype(np.int32)
    first = computed(manager, ids, 890, 897)
    begin = manager.match_prefix(ids).length
    second = computed(manager, ids)
    assert 0 < manager.length(second) == begin
    assert (manager.lost_tokens(second), manager.propose_victim()) == (0, second)
    manager.commit(manager.prepare_forward({second: 100}), 1)
    assert manager.lost_tokens(second) == 100
    third = computed(manager, ids, 896)  # a snapshot is there now
    assert manager.match_prefix(ids).length == 896
    assert manager.lost_tokens(second) == 0
    record = manager.preempt(second)
    again = manager.admit(manager.match_prefix(record.tokens))
    assert manager.length(again) == 896
    for request in (first, third, again):
        manager.release(request)
    assert_balanced(manager._ledger)


def test_of_several_shards_the_one_that_leaves_fewest_tokens_is_chosen(rng):
    """And to be recorded, the one whose snapshot is furthest, however many blocks lie elsewhere."""
    schema = make(snapshots=2).schema
    shards = ShardedManager(schema, 3, token_buckets=(1024,), rebuild=True)
    ids = rng.integers(0, 99, 897).astype(np.int32)
    computed(shards.managers[1], ids[:257], 256)
    computed(shards.managers[2], ids, 890, 897)
    match = shards.match_prefix(ids)
    assert (match.length, match.stored) == (640, 896)
    rooms = shards.rooms(match)
    assert [(room.cached, room.stored) for room in rooms] == [(0, 0), (256, 256), (640, 896)]
    assert shards.place(shards.admit(match))[0] == 2
    assert shards.shard_to_record(match) == 1
    short = shards.match_prefix(ids[:250])
    assert (short.length, short.stored) == (0, 128)
    assert shards.best_shard(short) == 1, "the blocks of shards 1 and 2 are as good, shard 0 has none"


def test_only_who_says_so_rebuilds(rng):
    manager, ids = make(snapshots=2), rng.integers(0, 99, 300).astype(np.int32)
    first = manager.admit(manager.match_prefix(ids))
    manager.commit(manager.prepare_forward({first: 300}), 1)
    assert manager.match_prefix(ids).stored == 0


def test_the_model_needs_no_more_tokens_again(rng):
    """Logits behind a prompt whose last 128 tokens a layer were computed again are those of all of it computed."""
    chosen = model("flash")
    layers = len(chosen.config.spec.layers)
    schema = CacheSchema(chosen.config.spec, PROFILES["exact"], slots=2, blocks=2 * layers + 8, max_context=1024)
    manager, cache = CacheManager(schema, token_buckets=(300,), rebuild=True), init_cache(schema)
    prompt = rng.integers(0, chosen.config.vocabulary, 128 * (layers + 2) + 40)
    found = []
    for start in (0, 256):
        request = manager.admit(manager.match_prefix(prompt))
        assert manager.length(request) == start
        if manager.transfers_wait:
            cache = apply_transfers(cache, manager.take_transfers())
        parts = []
        while (done := manager.length(request)) < prompt.size:
            plan = manager.prepare_forward({request: min(300, prompt.size - done)})
            part = prompt[done : manager.length(request)]
            cache, logits = all_logits("flash")(chosen.weights, cache, plan, plan.pack_tokens(part))
            parts.append(np.asarray(logits)[: part.size])
            manager.commit(plan, 1)
        found.append(np.concatenate(parts)[-40:])
    assert found[0].std() > 0.5
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-5)
