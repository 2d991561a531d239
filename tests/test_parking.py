"""Requests leave the cache and come back, through host memory and files: each byte is what it would have been."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200
from harness import SPEC, Driver, assert_same_bytes, random_tokens, random_weights
from prompts import Prompts
from test_blocks import assert_balanced

from dsv4_jax import (
    PROFILES,
    CacheFormats,
    CacheFull,
    CacheManager,
    CacheSchema,
    RequestState,
    StateError,
    apply_transfers,
    init_cache,
    load_state,
    preempt,
    resume,
    save_state,
    take_state,
    tensor_files,
)
from dsv4_jax.host.errors import LengthUnknown, NothingCached, PromptTooLong, TransfersWait, UnknownRequest
from dsv4_jax.layout.formats import HCA_TAILS
from dsv4_jax.layout.schema import TABLES
from dsv4_jax.parking import arrays, files

CONTEXT = 900
_apply = jax.jit(apply_transfers, donate_argnums=0)


def through_memory(state, tmp_path):
    return state


def through_bytes(state, tmp_path):
    return RequestState.from_bytes(state.to_bytes())


def through_a_file(state, tmp_path):
    save_state(tmp_path / "request", state)
    return load_state(tmp_path / "request")


class Pair:
    """A cache whose requests come and go, and another on which the same requests stay."""

    def __init__(self, rng, formats, **sizes):
        self.rng, weights = rng, random_weights(rng)
        self.driver = Driver(weights, formats, **sizes)
        self.alone = Driver(weights, formats, slots=4, blocks=40, lookahead=sizes.get("lookahead", 0))
        self.twin = {}

    @property
    def manager(self):
        return self.driver.manager

    def admit(self):
        sequence = random_tokens(self.rng, CONTEXT)
        request = self.driver.admit(sequence)
        self.twin[request] = self.alone.admit(sequence)
        return request

    def feed(self, counts):
        self.apply()
        self.driver.feed(counts)
        self.alone.feed({self.twin[request]: count for request, count in counts.items()})

    def apply(self):
        if self.manager.transfers_wait:
            self.driver.cache = _apply(self.driver.cache, self.manager.take_transfers())

    def preempt(self, request):
        return preempt(self.driver.cache, self.manager, request), self.driver.sequences.pop(request), request

    def resume(self, parked, **options):
        state, sequence, before = parked
        request, self.driver.cache = resume(self.driver.cache, self.manager, state, **options)
        self.driver.sequences[request], self.twin[request] = sequence, self.twin[before]
        return request

    def check(self, request):
        assert_same_bytes(self.driver.visible(request), self.alone.visible(self.twin[request]), f"request {request}")


def test_a_resumed_request_compiles_no_step_again(device, rng):
    """Arrays of the cache that came from the host are to JAX what the others are."""
    schema = CacheSchema(SPEC, CacheFormats(), slots=2, blocks=8, max_context=512)
    manager, cache = CacheManager(schema, token_buckets=(2, 256)), init_cache(schema)
    step = jax.jit(lambda cache: jax.tree.map(lambda array: array + 0, cache), donate_argnums=0)
    transfer = jax.jit(lambda cache, transfers: apply_transfers(cache, transfers), donate_argnums=0)
    for _ in range(3):
        request = manager.admit()
        manager.prepare_forward({request: 200})
        cache = step(cache)
        state = preempt(cache, manager, request)
        request, cache = resume(cache, manager, state)
        twin = manager.fork(request)
        cache = transfer(cache, manager.take_transfers())
        manager.release(request)
        manager.release(twin)
    assert (step._cache_size(), transfer._cache_size()) == (1, 1)


@pytest.mark.parametrize("through", [through_memory, through_bytes, through_a_file])
@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_a_preempted_request_goes_on_bit_for_bit(device, rng, tmp_path, hca_tail, through):
    """While others go on in its slot and blocks; at several lengths, some with an open block, one beyond a chunk."""
    pair = Pair(rng, CacheFormats(hca_tail=hca_tail), slots=2, blocks=14, lookahead=3)
    other = pair.admit()
    pair.feed({other: 100})
    for length in (1, 128, 386, 700):
        one = pair.admit()
        pair.feed({one: length})
        slot = pair.manager.slot(one)
        state, *rest = pair.preempt(one)
        with pytest.raises(UnknownRequest):
            pair.manager.length(one)
        third = pair.admit()
        assert pair.manager.slot(third) == slot
        pair.feed({third: 500, other: 1})
        pair.driver.release(third)
        again = pair.resume((through(state, tmp_path), *rest))
        assert (state.length, pair.manager.length(again)) == (length, length)
        pair.check(again)
        pair.check(other)
        pair.feed({again: 5, other: 7})
        pair.manager.truncate(again, length + 3)  # what was taken back before can be taken back after
        pair.alone.manager.truncate(pair.twin[again], length + 3)
        pair.feed({again: 140})
        pair.check(again)
        pair.driver.release(again)
        pair.alone.release(pair.twin[again])
        pair.alone.release(pair.twin[third])
    assert_balanced(pair.manager._ledger)
    assert pair.manager.metrics()["num_preemptions"] == 4


def test_a_state_moves_to_a_cache_of_other_sizes(device, rng):
    """More slots, fewer blocks, a shorter context, snapshots: of blocks in another order."""
    weights, sequence = random_weights(rng), random_tokens(rng, CONTEXT)
    one = Driver(weights, PROFILES["default"], slots=2, blocks=20)
    other = Driver(weights, PROFILES["default"], slots=5, blocks=9, max_context=800, snapshots=2)
    for driver in (one, other):
        driver.feed({driver.admit(random_tokens(rng, 300)): 200})
    request = one.admit(sequence)
    one.feed({request: 450})
    state = take_state(one.cache, one.manager, request)
    moved, other.cache = resume(other.cache, other.manager, state, max_new_tokens=100)
    other.sequences[moved] = sequence
    assert other.manager.usage()["blocks"].reserved == 1
    for _ in range(3):
        one.feed({request: 29})
        other.feed({moved: 29})
    assert_same_bytes(other.visible(moved), one.visible(request), "moved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": CacheFormats(entries="fp8")}, r"formats\.entries is 'bf16' there and 'fp8' here"),
        ({"lookahead": 3}, r"lookahead is 0\.0 there and 3\.0 here"),
        ({"spec": dataclasses.replace(SPEC, layers=SPEC.layers[::-1])}, r"spec\.layers\.0\.kind is 'swa' there and"),
        ({"max_context": 256}, None),
        ({"blocks": 2}, None),
    ],
    ids=["formats", "lookahead", "model", "context", "blocks"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_has_changed(device, rng, change, message):
    driver = Driver(random_weights(rng), CacheFormats(entries="bf16"))
    request = driver.admit(random_tokens(rng, 300))
    driver.feed({request: 290})
    state = take_state(driver.cache, driver.manager, request)
    schema = dataclasses.replace(driver.schema, **change)
    manager, cache = CacheManager(schema, token_buckets=[16]), init_cache(schema)
    kind = StateError if message else PromptTooLong if "max_context" in change else CacheFull
    with pytest.raises(kind, match=message) as error:
        resume(cache, manager, state)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert (manager.free_slots, manager.free_blocks) == (schema.slots, schema.blocks)
    assert not any(array.is_deleted() for array in cache.arrays.values())


def test_arrays_that_are_not_a_requests_are_refused(rng, small_state):
    """As a file can hold them whose checksums are right."""
    schema = CacheSchema(SPEC, PROFILES["default"], slots=2, blocks=8, max_context=1024)
    record, slot, blocks = small_state.record, small_state.slot, small_state.blocks
    last = {name: pages[:, :-1] for name, pages in blocks[-1].items()}
    wrong = {
        r"3 blocks for 500 tokens": {"record": dataclasses.replace(record, length=500, peak=500)},
        r"has the arrays window_positions": {"slot": {"window_positions": slot["window_positions"]}},
        r"window_positions is float32": {"slot": slot | {"window_positions": slot["window_positions"] * np.float32(1)}},
        r"csa_tail is float32 \[1, 2, 12, 511\]": {"slot": slot | {"csa_tail": slot["csa_tail"][..., :-1]}},
        r"has 0 chunks of blocks": {"blocks": ()},
        r"has blocks of csa_keys": {"blocks": ({"csa_keys": blocks[0]["csa_keys"]},)},
        r"blocks of \w+ are uint8": {"blocks": (last,)},
    }
    for message, change in wrong.items():
        manager, cache = CacheManager(schema, token_buckets=[16]), init_cache(schema)
        with pytest.raises(StateError, match=message):
            resume(cache, manager, dataclasses.replace(small_state, **change))
        assert (manager.free_slots, manager.free_blocks) == (2, 8)


def test_what_is_under_way_is_waited_for(device, rng):
    driver = Driver(random_weights(rng), CacheFormats(), lookahead=2)
    request = driver.admit(random_tokens(rng, 300))
    driver.feed({request: 140})
    twin = driver.manager.fork(request)
    driver.sequences[twin] = driver.sequences[request]
    with pytest.raises(TransfersWait):
        preempt(driver.cache, driver.manager, request)
    driver.cache = _apply(driver.cache, driver.manager.take_transfers())
    state = take_state(driver.cache, driver.manager, twin)
    driver.manager.fork(request)
    with pytest.raises(TransfersWait):
        resume(driver.cache, driver.manager, state)
    driver.cache = _apply(driver.cache, driver.manager.take_transfers())
    plan = driver.manager.prepare_forward({request: 3}, drafts=2)
    with pytest.raises(LengthUnknown, match="cannot be recorded"):
        take_state(driver.cache, driver.manager, request)
    driver.manager.commit(plan, lengths=[141])
    assert take_state(driver.cache, driver.manager, request).length == 141


def test_a_prefix_in_a_file_is_one_in_the_cache_again(device, rng, tmp_path):
    """Saved by one server; another one, which never saw the prompt, loads it, and its requests begin there."""
    one = Prompts(rng)
    ids = np.concatenate([one.tokens(384), one.tokens(60)])
    match = one.manager.match_prefix(ids, salt=b"a")
    with pytest.raises(NothingCached, match="nothing of these 444 tokens is cached"):
        take_state(one.driver.cache, one.manager, match)
    one.prefill(one.admit(ids, salt=b"a"))
    one.transfer()
    save_state(tmp_path / "prefix", take_state(one.driver.cache, one.manager, one.manager.match_prefix(ids, salt=b"a")))

    other = Prompts(rng, poison=True)
    other.bank = one.bank
    other.driver.weights = other.alone.weights = one.driver.weights
    state = load_state(tmp_path / "prefix")
    assert (state.length, state.tokens.tolist()) == (384, ids[:384].tolist())
    request, other.driver.cache = resume(other.driver.cache, other.manager, state)
    other.transfer()
    other.manager.release(request)
    longer = np.concatenate([ids[:400], other.tokens(100)])
    assert other.manager.match_prefix(longer).length == 0
    again = other.admit(longer, salt=b"a")
    assert other.manager.length(again) == 384
    other.prefill(again)
    other.check(again)


def test_resuming_shares_what_the_cache_still_has(device, rng):
    prompts = Prompts(rng, blocks=9)
    ids = prompts.tokens(700)
    request = prompts.admit(ids)
    prompts.prefill(request)
    blocks = prompts.manager.blocks(request)
    prompts.transfer()
    state = preempt(prompts.driver.cache, prompts.manager, request)
    assert prompts.manager.usage()["blocks"].cached == 5
    taken = prompts.admit(prompts.tokens(6 * 128))
    prompts.prefill(taken)
    prompts.transfer()
    left = prompts.manager.usage()["blocks"].cached
    prompts.release(taken)
    again, prompts.driver.cache = resume(prompts.driver.cache, prompts.manager, state)
    prompts.ids[again] = prompts.ids.pop(request)
    assert left == 3
    assert prompts.manager.blocks(again)[:left].tolist() == blocks[:left].tolist()
    prompts.step({again: 80})
    prompts.check(again)
    assert_balanced(prompts.manager._ledger)


def test_a_request_preempted_without_its_state_is_computed_again_from_what_is_cached(device, rng):
    prompts = Prompts(rng, snapshot_every=1)
    long, short, unknown = prompts.admit(prompts.tokens(400), salt=b"s"), prompts.admit(prompts.tokens(90)), None
    prompts.prefill(long)
    prompts.prefill(short)
    unknown = prompts.manager.admit()
    lost = {request: prompts.manager.lost_tokens(request) for request in (long, short, unknown)}
    assert lost == {long: 16, short: 90, unknown: 0}
    assert prompts.manager.propose_victim() == unknown
    prompts.manager.release(unknown)
    assert prompts.manager.propose_victim() == long
    assert prompts.manager.propose_victim([short]) == short
    assert prompts.manager.propose_victim([]) is None
    prompts.transfer()
    record = prompts.manager.preempt(long)
    np.testing.assert_array_equal(record.tokens, prompts.ids[long])
    again = prompts.admit(record.tokens, salt=record.salt)
    assert prompts.manager.length(again) == 384
    prompts.prefill(again)
    prompts.check(again)


@pytest.fixture
def small_state(rng):
    driver = Driver(random_weights(rng), PROFILES["default"])
    request = driver.admit(random_tokens(rng, 300))
    driver.feed({request: 290})
    return take_state(driver.cache, driver.manager, request)


def test_a_damaged_file_is_refused(rng, small_state):
    data = small_state.to_bytes()
    at = sorted({*rng.integers(0, len(data), 60).tolist(), *rng.integers(0, 3000, 60).tolist()})
    for place in at:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        try:
            again = RequestState.from_bytes(damaged)
        except StateError:
            continue
        assert again.to_bytes() == data, f"byte {place} of {len(data)}"
    for size in (0, 7, 8, *rng.integers(0, len(data), 5).tolist(), len(data) - 1):
        with pytest.raises(StateError):
            RequestState.from_bytes(data[:size])
    with pytest.raises(StateError):
        RequestState.from_bytes(data + b"0")


def forge(state, blocks, pages):
    """A file of a state's record with another number of blocks, and of these arrays; its checksums are right."""
    tensors, metadata = tensor_files.decode(np.frombuffer(state.to_bytes(), np.uint8), Path("state"))
    kept = {"tokens": tensors["tokens"].array} | {f"blocks.{name}": array for name, array in pages.items()}
    digests = {name: files._digest(array) for name, array in kept.items()}
    text = json.dumps(json.loads(metadata["dsv4_jax.request"]) | {"blocks": blocks, "sha256": digests})
    digest = hashlib.sha256(text.encode()).hexdigest()
    return b"".join(tensor_files.encode(kept, {"dsv4_jax.request": text, "dsv4_jax.request.sha256": digest}))


def test_blocks_without_bytes_are_refused(small_state):
    """A small file does not make millions of chunks by saying two billion blocks."""
    assert RequestState.from_bytes(forge(small_state, 1, {"csa_keys": np.ones((1, 1, 8), np.uint8)})).record.blocks == 1
    many = 2**31 - 1
    for shape in (None, (0, many, 8), (1, many, 0)):
        data = forge(small_state, many, {} if shape is None else {"csa_keys": np.zeros(shape, np.uint8)})
        assert len(data) < 10_000
        with pytest.raises(StateError, match=f"has other tensors than a request of {many} blocks"):
            RequestState.from_bytes(data)


def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path, small_state):
    """SIGKILL before each call to the operating system that it makes, and half way through each write."""
    longer = dataclasses.replace(small_state, record=dataclasses.replace(small_state.record, worth=(1, 2, 3)))
    for name, state in (("old", small_state), ("new", longer)):
        (tmp_path / f"{name}.bytes").write_bytes(state.to_bytes())
    program = """
        import os, signal, sys
        from pathlib import Path
        from dsv4_jax.parking import files

        folder, path = Path(sys.argv[1]), Path(sys.argv[1]) / "state"
        old, new = ((folder / f"{name}.bytes").read_bytes() for name in ("old", "new"))
        parts, kept = [new[:1000], new[1000:5000], new[5000:]], {"old": 0, "new": 0}
        for last in range(100):
            path.write_bytes(old)
            child = os.fork()
            if child == 0:
                calls = iter(range(last, -1, -1))
                def killed(call, half):
                    def counted(*arguments, **options):
                        if next(calls) == 0:
                            half(*arguments)
                            os.kill(os.getpid(), signal.SIGKILL)
                        return call(*arguments, **options)
                    return counted
                write = os.write
                for name in ("open", "fsync", "close", "replace"):
                    setattr(os, name, killed(getattr(os, name), lambda *_: None))
                os.write = killed(write, lambda file, data: write(file, data[: len(data) // 2]))
                files.write(path, parts)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = path.read_bytes()
            kept["old" if found == old else "new" if found == new else sys.exit(f"torn at call {last}")] += 1
            if not os.WIFSIGNALED(status):
                sys.exit(0 if found == new and kept["old"] > 5 and kept["new"] > 1 else f"{kept}, {status}")
        sys.exit("it never ended")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert load_state(tmp_path / "state").record.worth == (1, 2, 3)


FORMATS = pytest.mark.parametrize("formats", [PROFILES["exact"], PROFILES["default"]], ids=["exact", "default"])


def programs(formats):
    """What reads and writes a large cache, with its arguments, shapes only: the first argument is what is written."""
    schema = CacheSchema(SPEC, formats, slots=512, blocks=1 << 16, max_context=4096, snapshots=64)
    cache = jax.eval_shape(lambda: init_cache(schema))
    int32 = jax.ShapeDtypeStruct((), np.int32)
    like = lambda array, *size: jax.ShapeDtypeStruct((array.shape[0], *size, *array.shape[2:]), array.dtype)  # noqa: E731
    tables = {name: cache.arrays[name] for name in TABLES}
    slot = {name: cache.arrays[name] for name in arrays.slot_arrays(schema, 0)}
    pools = {name: cache.arrays[name] for name in schema.block_pools}
    row = jax.ShapeDtypeStruct((schema.max_blocks,), np.int32)
    yield (
        lambda given, at, row, rows: arrays._write_slot.__wrapped__(*given, at, row, rows),
        ((tables, slot), int32, row, {name: like(array) for name, array in slot.items()}),
    )
    yield (
        arrays._write_blocks.__wrapped__,
        (pools, jax.ShapeDtypeStruct((64,), np.int32), {name: like(pool, 64) for name, pool in pools.items()}),
    )


@FORMATS
def test_states_are_written_in_place(formats, tmp_path):
    for number, (program, given) in enumerate(programs(formats)):
        compiled = jax.jit(program, donate_argnums=0).lower(*given).compile()
        assert_in_place(compiled, given[0], temporary_bytes=1 << 16)
        (dump := tmp_path / str(number)).mkdir()
        gpu = compile_for_h200(program, *given, dump=dump, donate_argnums=0)
        assert_in_place(gpu.compiled, given[0], temporary_bytes=1 << 16)


def test_no_retrace_for_states_of_any_length(rng):
    schema = CacheSchema(SPEC, CacheFormats(), slots=2, blocks=400, max_context=50_000)
    cache, manager = init_cache(schema), CacheManager(schema, token_buckets=[50_000])
    for length in (49_000, 100, 200, 300, 700, 1500, 3000, 6000):  # chunks of every padded size, 1 to 64 blocks
        request = manager.admit()
        manager.prepare_forward({request: length})
        state = preempt(cache, manager, request)
        request, cache = resume(cache, manager, state)
        manager.release(request)
    traced = arrays._read_blocks._cache_size(), arrays._write_blocks._cache_size(), arrays._write_slot._cache_size()
    for length in rng.integers(1, 50_000, 10).tolist():
        request = manager.admit()
        manager.prepare_forward({request: length})
        request, cache = resume(cache, manager, preempt(cache, manager, request))
        manager.release(request)
    now = arrays._read_blocks._cache_size(), arrays._write_blocks._cache_size(), arrays._write_slot._cache_size()
    assert now == traced
