"""CacheChecker: random histories leave nothing to find; what is damaged then is named; what nobody reads is not.

What can be read is told here from lengths, row by row, and how a NaN is stored from docs/formats.md.
"""

import copy
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for_h200
from harness import SPEC, tail_rows_in_use
from histories import steps_until
from prompts import Prompts

from dsv4_jax import (
    PROFILES,
    CacheChecker,
    CacheDamaged,
    CacheFormats,
    CacheManager,
    CacheSchema,
    begin,
    init_cache,
    tiny_spec,
)
from dsv4_jax.cache.inspection import expected_of, inspect, no_sums
from dsv4_jax.host.errors import LengthUnknown, TransfersWait
from dsv4_jax.layout.schema import TABLES

LAYERS = {"window": (0, 1, 2), "csa": (1,), "hca": (2,)}
"""The layers of the arrays whose names begin so."""

SIZES = {"lookahead": 20, "blocks": 15, "snapshots": 4, "snapshot_every": 1, "buckets": (16, 320, 1280)}

NANS = {
    "fp32": [("data", 4 * k, b"\0\0\xc0\x7f") for k in (0, 77, 127)],
    "bf16": [("data", 2 * k, b"\xc1\xff") for k in (0, 77, 127)],
    "fp8": [("data", 77, b"\x7f"), ("data", 448 + 2 * 63, b"\xc0\x7f"), ("scales", 0, b"\1\0\x80\x7f")],
    "fp8_ds_mla": [("data", 447, b"\xff"), ("data", 448, b"\x81\x7f"), ("scales", 6, b"\xff")],
    "fp8 keys": [("data", 127, b"\xff"), ("scales", 0, b"\1\0\x80\xff")],
    "nvfp4": [("scales", 7, b"\x7f"), ("scales", -4, b"\0\0\xc0\x7f")],
    "nvfp4_static": [("scales", 7, b"\xff")],
    "mxfp4": [("scales", 3, b"\xff")],
}
"""Some NaNs of each format: among a row's data or scales, from which of their bytes on, which bytes."""


class Damaged:
    """A cache whose bytes can be written, and what its requests may read."""

    def __init__(self, prompts: Prompts):
        self.cache, self.manager, self.schema = prompts.driver.cache, prompts.manager, prompts.driver.schema
        self.arrays = {name: np.array(array) for name, array in self.cache.arrays.items()}
        self.live = [request for request in prompts.ids if self.manager.length(request)]

    def formatted(self, name):
        """The format of an array's rows, and how many a page has."""
        formats = self.schema.formats
        if name == "window":
            return formats.window_format, self.schema.ring
        return formats.key_format if name == "csa_keys" else formats.entry_format, 1 if name == "hca_entries" else 32

    def bytes(self, name):
        """An array's bytes, [layers, pages, bytes of a page]."""
        array = self.arrays[name]
        return array.reshape(*array.shape[:2], -1).view(np.uint8)

    def row(self, name, row):
        """Where a row's data lies in a page, and where its scales do: two ranges of bytes."""
        vector_format, rows = self.formatted(name)
        data, scales = vector_format.data_bytes, vector_format.scale_bytes
        start = rows * data + row * scales
        return {"data": np.arange(row * data, (row + 1) * data), "scales": np.arange(start, start + scales)}

    def read(self, request):
        """Every row that a request's next token may read: (array, page, row), twice the tails' rows."""
        length, slot, lookahead = self.manager.length(request), self.manager.slot(request), self.schema.lookahead
        blocks = self.manager.blocks(request).tolist()
        for position in range(max(length - 127, 0), length):
            yield "window", slot, position % self.schema.ring
        for name, ratio in (("csa_entries", 4), ("csa_keys", 4), ("hca_entries", 128)):
            rows = 128 // ratio
            for entry in range(length // ratio):
                yield name, blocks[entry // rows], entry % rows
        for name, ratio in (("csa_tail", 4), ("csa_key_tail", 4), ("hca_tail", 128)):
            if self.arrays[name].ndim == 5:
                for row in tail_rows_in_use(length, ratio, lookahead):
                    yield name, slot, row
            elif length % ratio:
                yield from ((name, slot, 3 * ((length - 1) % (1 + lookahead)) + part) for part in range(3))

    def where(self, name, page, row):
        """The bytes of a row, as an index of ``bytes`` behind the layer."""
        if "tail" not in name:
            return page, np.concatenate(list(self.row(name, row).values()))
        shape = self.arrays[name].shape[2:]
        places = np.arange(4 * np.prod(shape)).reshape(*shape[:-1], -1)
        return page, (places[row] if len(shape) == 2 else places[:, row]).reshape(-1)

    def put_nan(self, rng, name, layer, page, row):
        """Stores a NaN in some place of a row."""
        if "tail" in name:
            tail = self.arrays[name][layer, page]
            part = tail[row] if tail.ndim == 2 else tail[rng.integers(2), row]
            part[rng.integers(part.size)] = np.nan
            return
        vector_format, _ = self.formatted(name)
        known = "fp8 keys" if (name, vector_format.name) == ("csa_keys", "fp8") else vector_format.name
        part, offset, stored = NANS[known][rng.integers(len(NANS[known]))]
        first = self.row(name, row)[part][offset]
        self.bytes(name)[layer, page, first : first + len(stored)] = np.frombuffer(stored, np.uint8)

    def faults(self, checker):
        """What the checker, which goes on as it is, finds."""
        arrays = {name: jnp.asarray(array) for name, array in self.arrays.items()}
        try:
            copy.copy(checker).check(self.cache.with_arrays(arrays), self.manager.contents())
        except CacheDamaged as damaged:
            return damaged.faults
        return ()


def random_history(rng, formats, least):
    """A cache after a random history, checked now and then."""
    prompts, checker, seen = (
        Prompts(rng, formats.hca_tail, poison=True, formats=formats, **SIZES),
        CacheChecker(),
        set(),
    )
    texts, wanted = prompts.texts(), {"hit", "new", "full", "fork", "truncate", "release"}
    compared = 0
    for _ in steps_until(least, seen, wanted):
        prompts.act(texts, seen)
        if rng.random() < 0.5:
            continue
        prompts.transfer()
        before, contents = checker._before, prompts.manager.contents()
        checker.check(prompts.driver.cache, contents)
        compared += int(expected_of(contents, before and before[0]).same_blocks.sum())
    assert seen >= wanted
    assert compared > 10
    if not any(prompts.manager.length(request) for request in prompts.ids) or not prompts.manager._prefix.snapshots:
        request = prompts.admit(prompts.tokens(300))
        prompts.prefill(request)
    prompts.transfer()
    checker.check(prompts.driver.cache, prompts.manager.contents())
    return prompts, checker


@pytest.mark.parametrize(
    "formats",
    [
        CacheFormats("fp8", "bf16", "nvfp4", hca_tail="running"),
        CacheFormats("nvfp4", "fp8", "fp8"),
        PROFILES["deepseek"],
        CacheFormats("nvfp4_static", "fp8_ds_mla", "nvfp4_static", hca_tail="running"),
    ],
    ids=lambda formats: f"{formats.entries}-{formats.window}-{formats.keys}-{formats.hca_tail}",
)
def test_damage_after_a_random_history_is_named(rng, formats):
    prompts, checker = random_history(rng, formats, 40)
    assert Damaged(prompts).faults(checker) == ()
    for _ in range(3):
        for damage in (nan_in_a_row, byte_of_a_closed_block, byte_of_a_snapshot, wrong_position, wrong_block):
            damaged = Damaged(prompts)
            name, layer, requests = damage(rng, damaged)
            faults = damaged.faults(checker)
            assert {(fault.array, fault.layer) for fault in faults} == {(name, layer)}, (damage.__name__, faults)
            assert {fault.requests for fault in faults} == {requests}, (damage.__name__, requests, faults)
    damaged = Damaged(prompts)
    spoil_all_but_what_is_read(damaged)
    assert damaged.faults(checker) == ()


def any_or_an_end(rng, values):
    """One of them; often the first or the last, beyond which others are not read."""
    return values[rng.choice([0, len(values) - 1, rng.integers(len(values))])]


def layer_of(rng, damaged, name):
    """A random layer of an array: (its row in the array, its index in the model)."""
    layers = LAYERS[name.split("_")[0]]
    assert len(layers) == len(damaged.arrays[name])
    row = int(rng.integers(len(layers)))
    return row, layers[row]


def owners_of(damaged, name, page):
    """Handles of those that have a slot, or a block."""
    if "entries" in name or "keys" in name:
        return tuple(
            sorted(
                (request for request in damaged.live if page in damaged.manager.blocks(request)),
                key=damaged.manager.slot,
            )
        )
    return tuple(request for request in damaged.live if damaged.manager.slot(request) == page)


def nan_in_a_row(rng, damaged):
    rows = list(damaged.read(int(rng.choice(damaged.live))))
    name = str(rng.choice(sorted({row[0] for row in rows})))
    _, page, row = any_or_an_end(rng, [found for found in rows if found[0] == name])
    at, layer = layer_of(rng, damaged, name)
    damaged.put_nan(rng, name, at, page, row)
    return name, layer, owners_of(damaged, name, page)


def byte_of_a_closed_block(rng, damaged):
    closed = {
        int(block)
        for request in damaged.live
        for block in damaged.manager.blocks(request)[: damaged.manager.length(request) // 128]
    }
    closed |= set(damaged.manager._prefix._hash_of)
    block, name = int(rng.choice(sorted(closed))), str(rng.choice(["csa_entries", "csa_keys", "hca_entries"]))
    at, layer = layer_of(rng, damaged, name)
    page = damaged.bytes(name)[at, block]
    page[rng.integers(page.size)] ^= rng.integers(1, 256, dtype=np.uint8)
    return name, layer, owners_of(damaged, name, block)


def byte_of_a_snapshot(rng, damaged):
    snapshot = damaged.schema.slots + int(rng.choice(list(damaged.manager._prefix.snapshots._hash_of)))
    name = str(rng.choice(["window", "csa_tail", "csa_key_tail"]))
    at, layer = layer_of(rng, damaged, name)
    page = damaged.bytes(name)[at, snapshot]
    page[rng.integers(page.size)] ^= rng.integers(1, 256, dtype=np.uint8)
    return name, layer, ()


def wrong_position(rng, damaged):
    request = int(rng.choice(damaged.live))
    length, (at, layer) = damaged.manager.length(request), layer_of(rng, damaged, "window_positions")
    position = any_or_an_end(rng, range(max(length - 127, 0), length))
    ring = damaged.arrays["window_positions"][at, damaged.manager.slot(request)]
    other = rng.choice([-1, position + 1, position + ring.size, position - ring.size, *rng.integers(-9, 2000, 3)])
    ring[position % ring.size] = other + (other == position)
    return "window_positions", layer, (request,)


def wrong_block(rng, damaged):
    name = str(rng.choice(TABLES))
    request = int(rng.choice([request for request in damaged.live if damaged.manager.blocks(request).size]))
    place = int(rng.integers(damaged.manager.blocks(request).size))
    slot = damaged.manager.slot(request)
    row, right = damaged.arrays[name][slot], [int(damaged.manager.blocks(request)[place])]
    if name == "write_table" and place < damaged.manager.contents().shared[slot]:
        right.append(-1)
    row[place] = rng.choice(np.setdiff1d([-(2**31), *range(-1, damaged.schema.blocks + 3), 2**31 - 1], right))
    return name, None, (request,)


def spoil_all_but_what_is_read(damaged):
    """0xff in every byte of live slots and open blocks that no request's next token reads."""
    read = {}
    for request in damaged.live:
        for name, page, row in damaged.read(request):
            read.setdefault((name, page), []).append(damaged.where(name, page, row)[1])
    for request in damaged.live:
        slot, blocks = damaged.manager.slot(request), damaged.manager.blocks(request)
        damaged.arrays["block_table"][slot, blocks.size :] = 10**6
        pages = [(name, slot) for name in ("window", "csa_tail", "csa_key_tail", "hca_tail")]
        if damaged.manager.length(request) % 128 and blocks.size > damaged.manager.length(request) // 128:
            pages += [(name, int(blocks[-1])) for name in ("csa_entries", "csa_keys", "hca_entries")]
        for name, page in pages:
            stored = damaged.bytes(name)[:, page]
            unread = np.ones(stored.shape[1], bool)
            for where in read.get((name, page), ()):
                unread[where] = False
            stored[:, unread] = 0xFF


def test_what_is_written_anew_between_two_checks_is_no_damage(rng):
    """A full block by a request that went back, and by another request; a snapshot of another prefix."""
    prompts, checker, seen = Prompts(rng, **SIZES | {"lookahead": 140, "snapshots": 1, "blocks": 4}), CacheChecker(), []

    def check():
        prompts.transfer()
        cache, contents = prompts.driver.cache, prompts.manager.contents()
        checker.check(cache, contents)
        seen.append(({name: np.array(array) for name, array in cache.arrays.items()}, contents))

    one = prompts.admit(prompts.tokens(400))
    prompts.prefill(one)
    check()
    prompts.manager.truncate(one, 300)
    prompts.ids[one] = np.concatenate([prompts.ids[one][:300], prompts.tokens(100)])
    prompts.prefill(one)
    check()
    prompts.release(one)
    prompts.prefill(prompts.admit(prompts.tokens(400)))
    check()
    for (arrays, contents), (later, _) in itertools.pairwise(seen):
        block = contents.table[0, 2]
        assert (arrays["csa_entries"][:, block] != later["csa_entries"][:, block]).any()
    assert all(contents.readable[contents.table[0, 2]] == 128 for _, contents in seen)
    assert (seen[1][0]["window"][:, 4] != seen[2][0]["window"][:, 4]).any()
    assert all(contents.lengths[4] for _, contents in seen)


def made_up(spec, length=260, **sizes):
    """A cache as if a step of one request had run: with its blocks and positions, and zeros; its manager."""
    schema = CacheSchema(spec, CacheFormats(), slots=2, blocks=8, max_context=512, **sizes)
    manager = CacheManager(schema, token_buckets=[512])
    plan = manager.prepare_forward({manager.admit(): length})
    cache = begin(init_cache(schema), plan).end(partial=True)
    last = length - 1 - (length - 1 - np.arange(schema.ring)) % schema.ring
    positions = np.array(cache.window_positions)
    positions[:, 0] = np.where(last < 0, -1, last)
    return cache.with_arrays({"window_positions": jnp.asarray(positions)}), manager


def test_each_layer_of_a_model_is_named(rng):
    cache, manager = made_up(tiny_spec())
    checker = CacheChecker()
    checker.check(cache, manager.contents())
    block, kinds = int(manager.blocks(manager.requests[0])[0]), tiny_spec().layer_kinds
    for layer, kind in enumerate(kinds):
        row = kinds[:layer].count(kind)
        arrays = {"window": (layer, 0), f"{kind.value}_entries": (row, block)}
        for name, place in arrays.items():
            if name not in cache.arrays:
                continue
            spoiled = np.array(cache.arrays[name])
            spoiled.view(np.uint8)[place] = 0xFF
            with pytest.raises(CacheDamaged) as caught:
                copy.copy(checker).check(cache.with_arrays({name: jnp.asarray(spoiled)}), manager.contents())
            assert {(fault.array, fault.layer) for fault in caught.value.faults} == {(name, layer)}
            assert f"{name} of layer {layer}" in str(caught.value)


@pytest.mark.parametrize(("back", "seen"), [(1, True), (127, True), (128, False), (132, False)])
def test_the_ends_of_the_window(back, seen):
    """The next token sees 127 tokens before it; 8 rows more are kept for going back."""
    cache, manager = made_up(SPEC, lookahead=8)
    row = (260 - back) % cache.schema.ring
    spoiled = {
        "window": cache.window.at[1, 0, row, 77].set(jnp.nan),
        "window_positions": cache.window_positions.at[1, 0, row].add(cache.schema.ring),
    }
    for name, array in spoiled.items():
        faults = ()
        try:
            CacheChecker().check(cache.with_arrays({name: array}), manager.contents())
        except CacheDamaged as damaged:
            faults = damaged.faults
        assert [fault.array for fault in faults] == [name] * seen


def test_words():
    """What a report looks like, and that it goes on until the damage is gone."""
    cache, manager = made_up(SPEC)
    (request,), checker = manager.requests.tolist(), CacheChecker()
    checker.check(cache, manager.contents())
    one, two, _ = manager.blocks(request).tolist()
    entries, keys = (np.array(cache.arrays[name]) for name in ("csa_entries", "csa_keys"))
    entries[0, one, 3] ^= 1
    keys[0, two, 64 * 32 + 12 * 5] = 0x7F  # the first scale of row 5
    positions = np.array(cache.window_positions)
    positions[2, 0, 7] = -5
    arrays = {"csa_entries": entries, "csa_keys": keys, "window_positions": positions}
    damaged = cache.with_arrays({name: jnp.asarray(array) for name, array in arrays.items()})
    damaged = damaged.with_arrays({"block_table": damaged.block_table.at[0, 1].set(one)})
    whose = f"(request {request})"
    for _ in range(2):
        with pytest.raises(CacheDamaged) as caught:
            checker.check(damaged, manager.contents())
        assert list(map(str, caught.value.faults)) == [
            f"block_table, place 1 of slot 0, tokens 128 to 255 {whose}: it names block {one}, the manager says {two}; "
            f"{one} is that of request {request}",
            f"window_positions of layer 2, row 7 of the ring of slot 0 {whose}: it says position -5, where there "
            "should be 135",
            f"csa_keys of layer 1, row 5, tokens 148 to 151 of block {two}, place 1 of a request {whose}: it holds a "
            "NaN, and can be read",
            f"csa_entries of layer 1, block {one}, place 0 of a request {whose}: its bytes changed since the last "
            "check, and nobody may write it",
            f"csa_keys of layer 1, block {two}, place 1 of a request {whose}: its bytes changed since the last check, "
            "and nobody may write it",
        ]
    checker.check(cache, manager.contents())


def test_a_ledger_that_contradicts_itself_is_named():
    cache, manager = made_up(SPEC)
    (request,), ledger = manager.requests.tolist(), manager._ledger
    one, two, _ = manager.blocks(request).tolist()
    ledger.references[one] = 2
    with pytest.raises(CacheDamaged, match=rf"block {one} in the manager's ledger \(request {request}\): 2 requests"):
        CacheChecker().check(cache, manager.contents())
    ledger.references[one], ledger.place[two] = 1, 0
    with pytest.raises(CacheDamaged, match=rf"block {two} in .*it is at place 1 of a request, and meant for place 0"):
        CacheChecker().check(cache, manager.contents())


def test_what_cannot_be_checked_yet_is_refused(rng):
    _, manager = made_up(SPEC, lookahead=2)
    (request,) = manager.requests.tolist()
    plan = manager.prepare_forward({request: 3}, drafts=2)
    with pytest.raises(LengthUnknown, match=f"request {request} cannot be checked"):
        manager.contents()
    manager.commit(plan, lengths=[262])
    manager.fork(request)
    with pytest.raises(TransfersWait):
        manager.contents()
    manager.take_transfers()
    smaller = made_up(SPEC)[1].contents()
    manager.contents()
    other = CacheSchema(SPEC, CacheFormats(), slots=3, blocks=8, max_context=512)
    with pytest.raises(ValueError, match=re.escape("the contents are of another cache: table [2, 4]")):
        CacheChecker().check(init_cache(other), smaller)


def test_large_pools_are_not_copied():
    """Neither as they are nor as fp32. (A CPU copies bf16.)"""
    schema = CacheSchema(SPEC, CacheFormats("fp8_ds_mla", "fp32", "mxfp4"), 512, 1 << 16, 4096, 3, 64)
    cache = jax.eval_shape(lambda: init_cache(schema))
    expected = expected_of(CacheManager(schema, token_buckets=[1]).contents(), None)
    sums = jax.eval_shape(lambda: no_sums(init_cache(schema)))
    compiled = inspect.lower(cache, expected, sums).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 26 < min(schema.memory_bytes, 1 << 30)


def test_large_pools_are_not_copied_on_an_h200(tmp_path):
    schema = CacheSchema(SPEC, dataclasses.replace(PROFILES["bf16"], keys="nvfp4"), 512, 1 << 16, 4096, 3, 64)
    cache = jax.eval_shape(lambda: init_cache(schema))
    expected = expected_of(CacheManager(schema, token_buckets=[1]).contents(), None)
    sums = jax.eval_shape(lambda: no_sums(init_cache(schema)))
    gpu = compile_for_h200(inspect, cache, expected, sums, dump=tmp_path)
    assert gpu.compiled.memory_analysis().temp_size_in_bytes < 1 << 26
