"""How a prompt is cut into steps must not show: equal bytes for every chunking, order of ops and neighbour."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from harness import (
    Driver,
    assert_same_bytes,
    random_chunks,
    random_tokens,
    random_weights,
    tail_rows_in_use,
    update,
    update_append_first,
    update_op_by_op,
)

from dsv4_jax import PROFILES, CacheFormats
from dsv4_jax.layout.formats import ENTRY_FORMATS, HCA_TAILS, KEY_FORMATS, WINDOW_FORMATS

TOKENS = 300  # more than two rings and two HCA windows
FORMATS = {
    "exact": (PROFILES["exact"], np.float32),
    "bf16": (PROFILES["bf16"], ml_dtypes.bfloat16),
    "default": (CacheFormats(), ml_dtypes.bfloat16),
    "flashmla": (PROFILES["flashmla"], np.float32),
    "compact": (PROFILES["compact"], np.float32),
    "nvfp4": (CacheFormats("nvfp4", "fp8", "nvfp4_static", hca_tail="running"), ml_dtypes.bfloat16),
    "running": (CacheFormats(hca_tail="running"), np.float32),
}
"""Formats, and the dtype of what the tokens bring."""
TAILS = pytest.mark.parametrize("hca_tail", HCA_TAILS)


def _feed(driver: Driver, request: int, chunks: list[int]) -> None:
    for count in chunks:
        driver.feed({request: count})


def _one_shot(weights, formats, sequence, lookahead=0) -> dict[str, np.ndarray]:
    driver = Driver(weights, formats, lookahead=lookahead, step=update_op_by_op)
    request = driver.admit(sequence)
    driver.feed({request: len(sequence[0]["rows"])})
    return driver.stored(request)


def test_every_format_is_among_those_that_chunkings_are_compared_in():
    for table, name in (
        (ENTRY_FORMATS, "entry_format"),
        (WINDOW_FORMATS, "window_format"),
        (KEY_FORMATS, "key_format"),
    ):
        assert {getattr(formats, name).name for formats, _ in FORMATS.values()} == set(table)


@pytest.mark.parametrize("name", FORMATS)
def test_every_chunking_stores_the_same_bytes(device, rng, name):
    formats, dtype = FORMATS[name]
    weights, sequence = random_weights(rng), random_tokens(rng, TOKENS, dtype)
    expected = _one_shot(weights, formats, sequence)
    driver = Driver(weights, formats)
    for what, chunks in (
        ("chunks around the ring", [127, 2, 128, 43]),
        ("random chunks", random_chunks(rng, TOKENS, 90)),
        ("decode only", [1] * TOKENS),
    ):
        request = driver.admit(sequence)
        _feed(driver, request, chunks)
        assert_same_bytes(expected, driver.stored(request), f"{what} {chunks[:20]}")
        driver.release(request)  # the next one starts in a used slot and used blocks


@TAILS
@pytest.mark.parametrize("step", [update_append_first, update_op_by_op])
def test_separate_ops_in_either_order_store_the_same_bytes_and_clear_the_rest(device, rng, step, hca_tail):
    weights, sequence, formats = random_weights(rng), random_tokens(rng, TOKENS), CacheFormats(hca_tail=hca_tail)
    expected = _one_shot(weights, formats, sequence)
    driver = Driver(weights, formats, step=step)
    request = driver.admit(sequence)
    for length in range(1, TOKENS + 1):
        driver.feed({request: 1})
        if hca_tail == "running" and length % 128 == 0:
            state = np.asarray(driver.cache.pools["hca_tail"])[0, driver.manager.slot(request)]
            assert (state == np.array([-1e9, 0, 0])[:, None]).all()
    assert_same_bytes(expected, driver.stored(request), step.__name__)
    tails = [("csa_tail", 4), ("csa_key_tail", 4)] + [("hca_tail", 128)] * (hca_tail == "rows")
    for name, ratio in tails:
        tail = np.asarray(driver.cache.arrays[name])[0, driver.manager.slot(request)]
        cleared = np.setdiff1d(np.arange(tail.shape[1]), tail_rows_in_use(TOKENS, ratio))
        assert (tail[0, cleared] == 0).all()
        assert (tail[1, cleared] == -1e9).all()


@TAILS
def test_a_step_with_as_many_requests_as_tokens_may_still_bring_several_of_one(device, rng, hca_tail):
    """Buckets no larger than the number of slots: decode's kernel sees requests of many tokens and of none."""
    weights, formats = random_weights(rng), dataclasses.replace(PROFILES["flashmla"], hca_tail=hca_tail)
    sequences = [random_tokens(rng, TOKENS) for _ in range(2)]
    expected = [_one_shot(weights, formats, sequence) for sequence in sequences]
    driver = Driver(weights, formats, slots=16, blocks=64, buckets=[16])
    requests = [driver.admit(sequence) for sequence in sequences]
    while any(driver.manager.length(request) < TOKENS for request in requests):
        counts = {}
        for request in requests:
            left = TOKENS - driver.manager.length(request)
            if left and rng.random() < 0.9:
                counts[request] = min(left, int(rng.integers(1, 9)))
        if counts:
            driver.feed(counts)
    for index, request in enumerate(requests):
        assert_same_bytes(expected[index], driver.stored(request), f"request {index}")


@pytest.mark.parametrize(("dtype", "hca_tail"), [(np.float32, "rows"), (ml_dtypes.bfloat16, "running")])
def test_a_step_of_thousands_of_tokens_stores_what_separate_ops_do(device, rng, dtype, hca_tail):
    """So many windows that a thread block closes several, some of them begun by earlier steps."""
    weights, formats = random_weights(rng), CacheFormats(hca_tail=hca_tail)
    lengths = rng.integers(1500, 2500, 3).tolist()
    begun = [0, int(rng.integers(1, 8)), int(rng.integers(8, 300))]
    print("tokens of each request:", lengths, "of which in an earlier step:", begun)
    sequences = [random_tokens(rng, length, dtype) for length in lengths]
    stored = []
    for step in (update, update_op_by_op):
        driver = Driver(weights, formats, blocks=64, max_context=2560, buckets=(512, 8192), step=step)
        requests = [driver.admit(sequence) for sequence in sequences]
        driver.feed({request: count for request, count in zip(requests, begun, strict=True) if count})
        rest = [length - count for length, count in zip(lengths, begun, strict=True)]
        driver.feed(dict(zip(requests, rest, strict=True)))
        stored.append([driver.stored(request) for request in requests])
    for index, (one, other) in enumerate(zip(*stored, strict=True)):
        assert_same_bytes(one, other, f"request {index}")


@TAILS
def test_requests_are_kept_apart(device, rng, hca_tail):
    weights, formats = random_weights(rng), CacheFormats(hca_tail=hca_tail)
    sequences = [random_tokens(rng, TOKENS) for _ in range(3)]
    expected = [_one_shot(weights, formats, sequence) for sequence in sequences]
    driver = Driver(weights, formats, slots=3)
    requests = [driver.admit(sequence) for sequence in sequences]
    while any(driver.manager.length(request) < TOKENS for request in requests):
        counts = {}
        for request in rng.permutation(requests).tolist():
            left = TOKENS - driver.manager.length(request)
            if left and rng.random() < 0.8:
                counts[request] = int(rng.integers(1, min(left, 80) + 1)) if rng.random() < 0.5 else 1
        if counts:
            driver.feed(counts)
    for index, request in enumerate(requests):
        assert_same_bytes(expected[index], driver.stored(request), f"request {index}")


@TAILS
def test_a_reused_slot_and_block_show_nothing_of_their_former_owner(device, rng, hca_tail):
    weights, sequence, formats = random_weights(rng), random_tokens(rng, TOKENS), CacheFormats(hca_tail=hca_tail)

    def poison(cache, **values):
        """Fills arrays by dtype: whatever a former owner left."""
        return jax.tree.map(lambda pool: pool.at[...].set(values.get(pool.dtype.name, pool)), cache)

    fresh = Driver(weights, formats, slots=1, blocks=3, step=update_op_by_op)
    fresh.cache = poison(fresh.cache, uint8=255)  # what no row is written to stays as it is
    only = fresh.admit(sequence)
    fresh.feed({only: TOKENS})
    driver = Driver(weights, formats, slots=1, blocks=3)
    first = driver.admit(random_tokens(rng, TOKENS))
    driver.feed({first: TOKENS})
    driver.cache = poison(driver.cache, uint8=255, float32=np.nan)
    driver.release(first)
    second = driver.admit(sequence)
    driver.feed({second: 6})
    positions = driver.stored(second)["window_positions"]
    assert positions[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert (positions[:, 6:] == -1).all()
    _feed(driver, second, random_chunks(rng, TOKENS - 6, 50))
    assert_same_bytes(fresh.stored(only), driver.stored(second), "second owner")


@pytest.mark.parametrize(
    ("formats", "at"),
    [
        (CacheFormats(), 132),
        # From a running tail only whole windows can be dropped.
        (dataclasses.replace(PROFILES["exact"], hca_tail="running"), 128),
        (dataclasses.replace(PROFILES["exact"], hca_tail="running"), 256),
    ],
    ids=["rows-132", "running-128", "running-256"],
)
def test_truncate_to_a_remembered_length_goes_on_as_if_the_rest_had_not_been(device, rng, formats, at):
    """Multiples of 4: three more tokens leave the same CSA window open."""
    weights = random_weights(rng)
    kept, dropped = random_tokens(rng, TOKENS), random_tokens(rng, 3)
    expected = _one_shot(weights, formats, kept, lookahead=4)
    driver = Driver(weights, formats, lookahead=4)
    detour = [
        {name: np.concatenate([array[:at], other[name], array[at + 3 :]]) for name, array in layer.items()}
        for layer, other in zip(kept, dropped, strict=True)
    ]
    request = driver.admit(detour)
    driver.feed({request: at})
    driver.feed({request: 3})
    driver.manager.truncate(request, at)
    driver.sequences[request] = kept
    _feed(driver, request, random_chunks(rng, TOKENS - at, 50))
    stored = driver.stored(request)
    rings = ("window", "window_positions")  # which keep rows of what was dropped
    assert_same_bytes({n: a for n, a in expected.items() if n not in rings}, stored, "after truncate")
