"""The Hadamard transform of indexer keys: scores stay what they are if queries have it too, and only then."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from harness import Driver, random_tokens, random_weights, reader

from dsv4_jax import CacheFormats
from dsv4_jax.cache.errors import WrongLayerKind
from dsv4_jax.layout.formats import KEY_FORMATS

CSA, HCA = 1, 2
TOKENS, KEYS = 301, 75
EXACT = CacheFormats("fp32", "fp32", "fp32")
WITH_HADAMARD = dataclasses.replace(EXACT, keys_hadamard=True)


def store(weights, sequence, formats, implementation="native"):
    """One request's keys float64 [75, 128] as they are read back, and what its handle makes of queries."""
    driver = Driver(weights, formats, implementation=implementation)
    plan = driver.feed({driver.admit(sequence): TOKENS})
    handle, rows = reader(driver.cache, plan, CSA, implementation).all_keys(KEYS, dtype=jnp.float32)
    assert np.asarray(rows.valid[0]).all()
    return np.asarray(rows.values[0], np.float64), handle.transform_query


def scores(queries, keys):
    """Dot products in float64, and the size that their rounding errors are measured by."""
    queries = np.asarray(queries, np.float64)
    return queries @ keys.T, np.linalg.norm(queries, axis=-1)[..., None] * np.linalg.norm(keys, axis=-1)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_scores_stay_if_both_sides_are_transformed_and_only_then(device, rng, implementation):
    queries = rng.normal(size=(20, 4, 128)).astype(np.float32)
    tokens = random_weights(rng), random_tokens(rng, TOKENS)
    plain_keys, plain = store(*tokens, EXACT, implementation)
    keys, transform = store(*tokens, WITH_HADAMARD, implementation)
    np.testing.assert_array_equal(plain(queries), queries)
    expected, size = scores(queries, plain_keys)
    got, _ = scores(transform(queries), keys)
    assert (np.abs(got - expected) <= 1e-6 * size).all()
    for one_side, _ in (scores(queries, keys), scores(transform(queries), plain_keys)):
        assert (np.abs(one_side - expected) > 1e-2 * size).mean() > 0.5


def test_scores_of_quantized_keys_are_close_to_the_exact_ones(device, rng):
    queries = rng.normal(size=(20, 4, 128)).astype(np.float32)
    tokens = random_weights(rng), random_tokens(rng, TOKENS)
    expected, _ = scores(queries, store(*tokens, EXACT)[0])
    # A random direction sees no more of a format's round-trip error than there is of it.
    round_trip = {"fp32": 1e-6, "bf16": 2**-8, "fp8": 0.03, "nvfp4": 0.10, "nvfp4_static": 0.10, "mxfp4": 0.13}
    assert set(round_trip) == set(KEY_FORMATS)
    for name, bound in round_trip.items():
        keys, transform = store(*tokens, dataclasses.replace(WITH_HADAMARD, keys=name))
        error = np.linalg.norm(scores(transform(queries), keys)[0] - expected) / np.linalg.norm(expected)
        assert error <= 1.1 * bound, name


def test_only_csa_layers_have_queries_to_transform(rng):
    driver = Driver(random_weights(rng), WITH_HADAMARD)
    plan = driver.feed({driver.admit(random_tokens(rng, 5)): 5})
    with pytest.raises(WrongLayerKind, match=r"layer 2 \(HCA\) has no indexer"):
        reader(driver.cache, plan, HCA).transform_query(np.zeros((1, 128), np.float32))
