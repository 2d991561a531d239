"""The running HCA tail (max, denominator, sum) beside the tail of 128 rows: same entries, and the right softmax."""

import dataclasses

import ml_dtypes
import numpy as np
import numpy_reference
import pytest
from harness import SPEC, Driver, assert_same_bytes, random_chunks, random_tokens, random_weights

from dsv4_jax import PROFILES
from dsv4_jax.ops.checks import IMPLEMENTATIONS
from dsv4_jax.spec.rotary import inverse_frequencies

TOKENS = 530
HCA_LAYER = 2
RUNNING = dataclasses.replace(PROFILES["exact"], hca_tail="running")


def _fed(weights, formats, sequence, chunks):
    driver = Driver(weights, formats)
    request = driver.admit(sequence)
    for count in chunks:
        driver.feed({request: count})
    return driver.stored(request)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["one shot", "random chunks", "decode only"])
def test_entries_are_those_of_the_rows(device, rng, dtype, how):
    weights, sequence = random_weights(rng), random_tokens(rng, TOKENS, dtype)
    chunks = {"one shot": [TOKENS], "random chunks": random_chunks(rng, TOKENS, 90), "decode only": [1] * TOKENS}[how]
    rows, running = (_fed(weights, formats, sequence, chunks) for formats in (PROFILES["exact"], RUNNING))
    assert rows.pop("hca_tail").nbytes == 512 << 10
    assert running.pop("hca_tail").nbytes == 6 << 10
    entries, expected = running.pop("hca_entries"), rows.pop("hca_entries")
    np.testing.assert_allclose(entries, expected, rtol=0, atol=1e-5)
    assert_same_bytes(rows, running, "all but the tail and its entries")


@pytest.mark.parametrize("spread", [1, 30, 1e4], ids=lambda spread: f"scores-{spread:g}")
def test_state_and_entries_against_float64(device, rng, spread):
    """Also where scores rise and fall so far that rows before a new maximum weigh nothing."""
    weights, sequence = random_weights(rng), random_tokens(rng, TOKENS)
    layer, brought = weights[HCA_LAYER], sequence[HCA_LAYER]
    brought["gate"] *= np.float32(spread)
    stored = _fed(weights, RUNNING, sequence, random_chunks(rng, TOKENS, 200))

    of_layer = SPEC.layers[HCA_LAYER]
    given = (brought["kv"], brought["gate"], layer["ape"], layer["norm"], inverse_frequencies(of_layer.rope))
    expected = numpy_reference.entries(*given, 128, SPEC.norm_eps)
    np.testing.assert_allclose(stored["hca_entries"][0, : len(expected), 0], expected, rtol=0, atol=1e-5)

    assert_is_state(stored["hca_tail"][0], layer, brought, TOKENS)


def assert_is_state(state, layer, brought, length):
    """A state is that of the window that is open at a length, computed in float64."""
    window = slice((length - 1) // 128 * 128, length)
    score = numpy_reference.scores(brought["gate"], layer["ape"])[window].astype(np.float64)
    weight = np.exp(score - score.max(0))
    largest, denominator, total = state
    np.testing.assert_array_equal(largest, score.max(0))
    np.testing.assert_allclose(denominator, weight.sum(0), rtol=1e-5)
    np.testing.assert_allclose(total, (weight * brought["kv"][window]).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lookahead", [1, 4, 150])
def test_states_of_the_latest_tokens(device, rng, implementation, lookahead):
    """However they came, also across windows; after a token that closed a window there is none."""
    weights, sequence = random_weights(rng), random_tokens(rng, TOKENS)
    driver = Driver(weights, RUNNING, slots=1, lookahead=lookahead, implementation=implementation)
    request, done = driver.admit(sequence), 0
    chunks = [int(rng.integers(120, 130)), *random_chunks(rng, 170, 90), *random_chunks(rng, 90, 5)]
    for count in [*chunks, 1, 1, 1]:
        driver.feed({request: count})
        done += count
        if done not in (chunks[0], sum(chunks)) and rng.random() > 0.1:
            continue
        tail = np.asarray(driver.cache.arrays["hca_tail"])[0, driver.manager.slot(request)].reshape(-1, 3, 512)
        assert len(tail) == 1 + lookahead
        for length in range(max(done - lookahead, 1), done + 1):
            if length % 128:
                assert_is_state(tail[(length - 1) % (1 + lookahead)], weights[HCA_LAYER], sequence[HCA_LAYER], length)
