"""Capacity plans against the format table's bytes and against what `init_cache` really allocates."""

import functools

import jax
import pytest
from test_schema import GIB, PUBLISHED, SPECS, windows_only

from dsv4_jax import (
    PROFILES,
    CacheFormats,
    CacheManager,
    SchemaError,
    capacity_plan,
    init_cache,
    requests_that_fit,
    tiny_spec,
)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["flash", "tiny"])
def test_a_plan_is_what_is_allocated_to_the_byte(name, profile, device, rng):
    requests, context, lookahead = int(rng.integers(1, 5)), int(rng.integers(1, 3000)), int(rng.integers(0, 5))
    plan = capacity_plan(SPECS[name], PROFILES[profile], context=context, requests=requests, lookahead=lookahead)
    cache = init_cache(plan.schema)
    real = {name: array.addressable_data(0).on_device_size_in_bytes() for name, array in cache.arrays.items()}
    assert sum(real.values()) == plan.memory_bytes
    blocks = plan.schema.blocks
    assert {array: size * requests for array, size in plan.slot_bytes.items()} | {
        array: size * blocks for array, size in plan.block_bytes.items()
    } == real
    if context >= 4:
        assert blocks == requests * plan.blocks_per_request
        assert {array: size * requests for array, size in plan.request_bytes.items()} == real
        assert plan.bytes_per_request * requests == plan.memory_bytes


@pytest.mark.parametrize(("entries", "indexer", "csa", "hca", "flash_gib", "pro_gib"), PUBLISHED)
def test_the_published_table(entries, indexer, csa, hca, flash_gib, pro_gib):
    """Bytes of a block in one layer, and of a million tokens; the arrays' shapes, traced, say the same."""
    for name, csa_layers, hca_layers, gib in (("flash", 21, 20, flash_gib), ("pro", 30, 31, pro_gib)):
        plan = capacity_plan(SPECS[name], CacheFormats(entries, "bf16", indexer), context=2**20)
        assert plan.block_bytes["csa_entries"] + plan.block_bytes["csa_keys"] == csa_layers * csa
        assert plan.block_bytes["hca_entries"] == hca_layers * hca
        growing = sum(plan.request_bytes[array] for array in plan.block_bytes)
        assert round(growing / GIB, 2) == gib
        shapes = jax.eval_shape(functools.partial(init_cache, plan.schema))
        assert sum(shapes.memory_bytes().values()) == plan.bytes_per_request


@pytest.mark.parametrize("name", SPECS)
def test_as_many_requests_as_fit_and_not_one_more(name, rng):
    formats = list(PROFILES.values())[rng.integers(len(PROFILES))]
    context, memory = int(rng.integers(4, 2**20)), int(rng.integers(8 * GIB, 200 * GIB))
    fit = requests_that_fit(SPECS[name], formats, context=context, memory_bytes=memory)
    plan = capacity_plan(SPECS[name], formats, context=context, memory_bytes=memory)
    more = capacity_plan(SPECS[name], formats, context=context, requests=fit + 1)
    assert plan.requests == fit
    assert plan.memory_bytes <= memory < more.memory_bytes
    assert plan.common_context == context
    exactly = plan.memory_bytes
    assert requests_that_fit(SPECS[name], formats, context=context, memory_bytes=exactly) == fit
    assert requests_that_fit(SPECS[name], formats, context=context, memory_bytes=exactly - 1) == fit - 1


def test_a_planned_cache_serves_what_it_promises(rng):
    """The manager can really give every request its whole context at once, and nothing more."""
    requests, context = int(rng.integers(1, 6)), int(rng.integers(1, 1500))
    plan = capacity_plan(tiny_spec(), CacheFormats(), context=context, requests=requests)
    manager = CacheManager(plan.schema, token_buckets=[context * requests])
    manager.prepare_forward({manager.admit(): context for _ in range(requests)})
    assert manager.free_slots == 0
    assert manager.free_blocks == plan.schema.blocks - requests * plan.blocks_per_request
    assert manager.free_blocks == (1 if context < 4 else 0)


def test_slots_and_memory_together_share_the_blocks_there_are():
    spec, formats = SPECS["flash"], CacheFormats()
    plan = capacity_plan(spec, formats, context=2**17, memory_bytes=20 * 10**9, requests=200)
    assert plan.requests == 200
    assert plan.memory_bytes <= 20 * 10**9 < plan.memory_bytes + sum(plan.block_bytes.values())
    assert plan.common_context < plan.context
    assert plan.common_context == plan.schema.blocks // 200 * 128
    plenty = capacity_plan(spec, formats, context=2**10, memory_bytes=20 * 10**9, requests=2)
    assert plenty == capacity_plan(spec, formats, context=2**10, requests=2)


def test_memory_that_holds_no_request_is_refused_with_what_one_takes():
    one = capacity_plan(tiny_spec(), CacheFormats(), context=5000).memory_bytes
    assert capacity_plan(tiny_spec(), CacheFormats(), context=5000, memory_bytes=one).requests == 1
    assert requests_that_fit(tiny_spec(), CacheFormats(), context=5000, memory_bytes=one - 1) == 0
    with pytest.raises(SchemaError, match=f"{one - 1:,} bytes do not hold one request of 5,000 .* takes {one:,}"):
        capacity_plan(tiny_spec(), CacheFormats(), context=5000, memory_bytes=one - 1)
    with pytest.raises(SchemaError, match="do not hold 7 slots"):
        capacity_plan(tiny_spec(), CacheFormats(), context=5000, memory_bytes=one, requests=7)


def test_requests_of_windows_only_take_no_blocks():
    plan = capacity_plan(windows_only(), PROFILES["bf16"], context=1000, memory_bytes=10**7)
    one = 3 * 128 * (1024 + 4) + 2 * 4 * 8
    assert plan.requests == 10**7 // one
    assert plan.memory_bytes == plan.requests * one
    assert plan.schema.blocks == plan.blocks_per_request == 0


@pytest.mark.parametrize("context", [1, 3])
def test_a_context_without_an_entry_still_has_a_block_in_the_pool(context):
    plan = capacity_plan(tiny_spec(), CacheFormats(), context=context, memory_bytes=10**7)
    assert (plan.blocks_per_request, plan.schema.blocks) == (0, 1)
    assert plan.memory_bytes <= 10**7 < plan.memory_bytes + plan.bytes_per_request


@pytest.mark.parametrize("sizes", [{"context": 0}, {"context": 2**20 + 1}, {"context": 5, "requests": 0}], ids=str)
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(SchemaError, match=r"max_context|slots"):
        capacity_plan(tiny_spec(), CacheFormats(), **sizes)
