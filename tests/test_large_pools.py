"""Pools whose byte offsets pass 2^31 (on the CPU) and 2^32 (on the GPU) are written and read where they should be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_formats
import pytest
from harness import random_tokens, random_weights, reader, update

from dsv4_jax import CacheFormats, CacheSchema, LayerKind, init_cache, ops, tiny_spec
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import ENTRY_FORMATS
from dsv4_jax.layout.plan import PlanLayout

FORMAT = ENTRY_FORMATS["fp8_ds_mla"]
LAYERS = 2


@pytest.fixture
def large(device):
    """The number of bytes that a pool must be larger than: 2^32 on the GPU, 2^31 on the CPU, whose memory is shared."""
    return 2**32 if device.platform == "gpu" else 2**31


def pages_around_the_limits(pages, page_bytes):
    """(layer, page) of the first and last page of both layers and of those that hold byte 2^31, 2^32 and 2^33."""
    places = [0, pages - 1, pages, 2 * pages - 1]
    places += [limit // page_bytes for limit in (2**31, 2**32, 2**33) if limit < LAYERS * pages * page_bytes]
    return [divmod(place, pages) for place in sorted(set(places))]


def pages_in_use(pool):
    """bool [layers, pages]: which pages hold anything but zeros; NumPy goes over 2^31 bytes faster than one by one."""
    return np.asarray(pool).reshape(*pool.shape[:2], -1).view(np.uint64).any(axis=-1)


def tails_in_use(tail):
    """bool [layers, slots]: which slots' tails have any kv but zeros."""
    return np.asarray(tail)[:, :, 0].any(axis=(2, 3))


def donating(op, **attributes):
    """The op, jitted, with its first operand donated as a step does."""
    return jax.jit(functools.partial(op, **attributes), donate_argnums=0)


def test_entries_are_flushed_and_gathered(large, rng):
    page_bytes = FORMAT.page_bytes(32)
    blocks = large // page_bytes // LAYERS + 10_000
    pool = jnp.zeros((LAYERS, blocks, page_bytes), jnp.uint8)
    assert pool.size > large
    places = pages_around_the_limits(blocks, page_bytes)
    for layer in range(LAYERS):
        pages = [page for where, page in places if where == layer]
        slots = np.arange(len(pages), dtype=np.int32)
        table = np.array(pages, np.int32)[:, None]
        layout = PlanLayout(tokens=128 * len(pages), requests=len(pages))
        plan = build_plan(layout, slots, slots * 0, slots * 0 + 128, True)
        entries = rng.normal(size=(layout.closing_size(4), 512)).astype(np.float32)
        pool = donating(ops.flush, ratio=4, format=FORMAT)(pool, entries, table, plan, layer)
        gather = donating(ops.gather_all_entries, ratio=4, format=FORMAT, entries=32, dtype=jnp.float32)
        pool, rows = gather(pool, table, plan, layer)
        assert np.asarray(rows.valid).all()
        for index, page in enumerate(pages):
            expected = numpy_formats.encode_page(entries[32 * index : 32 * (index + 1)], "fp8_ds_mla")
            np.testing.assert_array_equal(pool[layer, page], expected)
            decoded = numpy_formats.decode_page(expected, "fp8_ds_mla", 32, 512)
            np.testing.assert_array_equal(rows.values[index], decoded)
    assert [tuple(place) for place in np.argwhere(pages_in_use(pool)).tolist()] == places


def of_kind(kind):
    """A model of two layers of a kind."""
    spec = tiny_spec()
    return dataclasses.replace(spec, layers=tuple(layer for layer in spec.layers if layer.kind is kind)[:1] * LAYERS)


def run_steps(schema, slots, blocks, tokens, weights):
    """127 tokens and one more for a request in each of these slots, whose only block is given; the final cache."""
    slots, cache = np.asarray(slots), init_cache(schema)
    table = np.full((schema.slots, schema.max_blocks), -1, np.int32)
    table[slots, 0] = blocks
    step = jax.jit(update, donate_argnums=0)
    for start, count in ((0, 127), (127, 1)):
        layout = PlanLayout(tokens=count * len(slots), requests=len(slots))
        changes = (slots, slots * 0, blocks) if start == 0 else None
        plan = build_plan(layout, slots, slots * 0 + start, slots * 0 + count, start == 0, changes)
        brought = [
            {
                name: np.concatenate([of[layer][name][start : start + count] for of in tokens])
                for name in tokens[0][layer]
            }
            for layer in range(LAYERS)
        ]
        cache = step(cache, plan, weights, brought)
    np.testing.assert_array_equal(cache.block_table, table)
    return cache, plan


@pytest.mark.parametrize(("kind", "by"), [(LayerKind.CSA, "blocks"), (LayerKind.HCA, "slots")])
def test_steps_write_what_they_write_to_a_small_cache(large, rng, kind, by):
    """Blocks make the entries' pool large, slots the tails: HCA keeps 512 KiB per slot and layer."""
    spec, formats = of_kind(kind), CacheFormats("fp8_ds_mla", "fp8", "mxfp4")
    if by == "slots" and large == 2**32:
        large = 2**33  # tails are counted in floats: more than 2^31 of them
    page_bytes = FORMAT.page_bytes(32) if by == "blocks" else 4 * 2 * 128 * 512
    pages = large // page_bytes // LAYERS + 100
    places = sorted({page for _, page in pages_around_the_limits(pages, page_bytes)})
    few = np.arange(len(places))
    weights, tokens = random_weights(rng, spec), [random_tokens(rng, 128, spec=spec) for _ in places]
    small, small_plan = run_steps(CacheSchema(spec, formats, len(few), len(few), 128), few, few, tokens, weights)

    where = {"slots": few, "blocks": few} | {by: np.array(places)}
    sizes = {"slots": len(few), "blocks": len(few)} | {by: pages}
    cache, plan = run_steps(
        CacheSchema(spec, formats, max_context=128, **sizes), where["slots"], where["blocks"], tokens, weights
    )
    pool = cache.pools["csa_entries"] if by == "blocks" else cache.pools["hca_tail"]
    assert pool.nbytes > large
    schema = cache.schema
    for name in schema.block_pools if by == "blocks" else ("window", "window_positions", *schema.tails):
        np.testing.assert_array_equal(cache.arrays[name][:, np.array(places)], small.arrays[name], err_msg=name)
    if by == "blocks":
        used = pages_in_use(cache.pools["csa_entries"])
    else:
        used = tails_in_use(cache.pools["hca_tail"])
        np.testing.assert_array_equal(used, pages_in_use(cache.window))
    assert (np.flatnonzero(used.all(0)) == places).all()
    assert used.sum() == LAYERS * len(places)

    for layer in range(LAYERS):
        read = [reader(*pair, layer) for pair in ((cache, plan), (small, small_plan))]
        (_, rows), (_, expected) = (handle.all_entries(128 // kind.ratio) for handle in read)
        jax.tree.map(np.testing.assert_array_equal, rows, expected)
        (_, rows), (_, expected) = (handle.window() for handle in read)
        jax.tree.map(np.testing.assert_array_equal, rows, expected)
