"""Every format an entry or an indexer key can have, and deep tails: the one-op update stores what separate ops store,
byte for byte, on each device; and the GPU stores what the CPU stores of all that is not pooled."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from harness import SPEC, Driver, assert_same_bytes, random_tokens, random_weights, update, update_op_by_op

from dsv4_jax import CacheFormats
from dsv4_jax.layout.formats import ENTRY_FORMATS, HCA_TAILS, KEY_FORMATS, WINDOW_FORMATS

TOKENS = 200
CHUNKS = [100, *[4] * 6, *[1] * 12, 3, 3, 3, 30, *[1] * 5, 20]  # prefill, drafts, decode; both kinds close in each
# Every entry format and every key format, each at least once, beside windows that vary too.
PAIRS = list(
    itertools.islice(
        zip(
            itertools.cycle(ENTRY_FORMATS), itertools.cycle(KEY_FORMATS), itertools.cycle(WINDOW_FORMATS), strict=False
        ),
        max(len(ENTRY_FORMATS), len(KEY_FORMATS), len(WINDOW_FORMATS)),
    )
)


def stored(rng_seed: int, step, formats: CacheFormats, dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rng_seed)
    weights, sequence = random_weights(rng), random_tokens(rng, TOKENS, dtype)
    # Buckets and slots alike: a step of 16 tokens is decode's, whatever each request brings.
    driver = Driver(weights, formats, slots=16, blocks=64, buckets=(16, 256), step=step)
    request = driver.admit(sequence)
    for count in CHUNKS:
        driver.feed({request: count})
    return driver.stored(request)


@pytest.mark.parametrize(
    ("entries", "keys", "window", "hca_tail"),
    [(*pair, tail) for pair, tail in zip(PAIRS, itertools.cycle(HCA_TAILS), strict=False)],
)
def test_update_stores_what_separate_ops_do(device, seed, entries, keys, window, hca_tail):
    formats = CacheFormats(entries, window, keys, hca_tail=hca_tail)
    dtype = np.float32 if len(entries) % 2 else ml_dtypes.bfloat16
    one, other = (stored(seed, step, formats, dtype) for step in (update, update_op_by_op))
    assert_same_bytes(other, one, f"{entries}, {keys}, {window}")


@pytest.mark.gpu
@pytest.mark.parametrize(("entries", "keys", "window"), PAIRS)
def test_the_gpu_stores_what_the_cpu_does_of_all_that_is_not_pooled(seed, entries, keys, window):
    formats = CacheFormats(entries, window, keys)
    each = []
    for platform in ("cpu", "gpu"):
        with jax.default_device(jax.devices(platform)[0]):
            each.append(stored(seed, update, formats, np.float32))
    pooled = ("_entries", "_keys")
    assert any(not name.endswith(pooled) for name in each[0])
    cpu, gpu = ({name: a for name, a in one.items() if not name.endswith(pooled)} for one in each)
    assert_same_bytes(cpu, gpu, f"{window}, {len(SPEC.layers)} layers")
