"""Drawing the next token: by the probabilities, and by nothing but a request's own logits, seed and position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.deepseek_v4.sampling import Sampling, next_tokens

run = functools.partial(jax.jit(next_tokens, static_argnames="sampling"))
COUNT = 4096


def drawn(logits: np.ndarray, seed: int, sampling: Sampling) -> np.ndarray:
    """Of one request, at so many positions: how often each token came."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (COUNT, len(logits)))
    seeds = np.full(COUNT, seed % 2**32, np.uint32)
    tokens = run(rows, seeds, np.arange(COUNT, dtype=np.int32), sampling=sampling)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = np.exp(logits / temperature - (logits / temperature).max())
    return scaled / scaled.sum()


def test_greedy_is_the_likeliest(rng):
    logits = rng.standard_normal((5, 40)).astype(np.float32)
    tokens = run(logits, np.zeros(5, np.uint32), np.zeros(5, np.int32), sampling=Sampling())
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.7)])
def test_frequencies_are_the_probabilities(temperature, top_p, rng, seed):
    logits = rng.standard_normal(12).astype(np.float32)
    expected = probabilities(logits, temperature)
    order = np.argsort(-expected)
    before = np.cumsum(expected[order]) - expected[order]
    left_out = order[before >= top_p]
    expected[left_out] = 0
    expected /= expected.sum()
    found = drawn(logits, seed, Sampling(temperature, top_p))
    assert (len(left_out) > 0) == (top_p < 1)
    assert (found[left_out] == 0).all()
    # Six standard deviations.
    deviation = np.sqrt(COUNT * expected * (1 - expected))
    assert (np.abs(found - COUNT * expected) <= 6 * deviation + 1).all()


def test_a_tiny_top_p_is_greedy(rng, seed):
    logits = rng.standard_normal(12).astype(np.float32)
    assert drawn(logits, seed, Sampling(1.0, 1e-30))[logits.argmax()] == COUNT


def test_a_draw_depends_on_logits_seed_and_position_alone(rng):
    logits = rng.standard_normal((16, 50)).astype(np.float32)
    seeds, positions = rng.integers(0, 2**32, 16, dtype=np.uint32), rng.integers(0, 1000, 16, dtype=np.int32)
    sampling = Sampling(2.0, 0.9)
    tokens = np.asarray(run(logits, seeds, positions, sampling=sampling))
    order = rng.permutation(16)
    np.testing.assert_array_equal(run(logits[order], seeds[order], positions[order], sampling=sampling), tokens[order])
    for changed in (
        run(logits, seeds + 1, positions, sampling=sampling),
        run(logits, seeds, positions + 1, sampling=sampling),
    ):
        assert (np.asarray(changed) != tokens).any()


@pytest.mark.parametrize("values", [(-0.1, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="must be"):
        Sampling(*values)
