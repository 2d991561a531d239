"""No score is special: gates of -inf, of -1e9 and far below are scores like any other, in float64 and in every way."""

import dataclasses

import ml_dtypes
import numpy as np
import numpy_reference
import pytest
from harness import SPEC, Driver, random_chunks, random_tokens, random_weights

from dsv4_jax import PROFILES, LayerKind
from dsv4_jax.spec.rotary import inverse_frequencies

TOKENS = 400
RUNNING = dataclasses.replace(PROFILES["exact"], hca_tail="running")
LOWEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)

MASKED = [-np.inf, -1e9, -2e9, LOWEST]
MASKS = pytest.mark.parametrize("mask", MASKED, ids=["-inf", "-1e9", "-2e9", "lowest"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["native", "reference"])


def _masked(rng, mask):
    """A sequence with about half of its gates masked, by token and by channel, and some stretches of tokens entirely.

    Tokens 0 to 3 and 8 to 15 are whole windows of CSA, the latter two of them, tokens 128 to 255 one of HCA.
    """
    sequence = random_tokens(rng, TOKENS)
    for arrays in sequence:
        for name in ("gate", "index_gate"):
            if name not in arrays:
                continue
            arrays[name][rng.random(TOKENS) < 0.5] = mask
            arrays[name][rng.random(arrays[name].shape) < 0.3] = mask
            arrays[name][0:4] = arrays[name][8:16] = arrays[name][128:256] = mask
    return sequence


def _expected(weights, sequence, layer, prefix, ratio):
    of_layer, brought = SPEC.layers[layer], sequence[layer]
    given = (brought[f"{prefix}kv"], brought[f"{prefix}gate"], weights[layer][f"{prefix}ape"])
    with np.errstate(invalid="ignore"):  # all scores of a channel -inf: NaN, as a softmax of them is
        return numpy_reference.entries(
            *given, weights[layer][f"{prefix}norm"], inverse_frequencies(of_layer.rope), ratio, SPEC.norm_eps
        )


@pytest.mark.parametrize(
    ("implementation", "mask"),
    [*(("native", mask) for mask in MASKED), ("reference", -np.inf), ("reference", LOWEST)],
    ids=str,
)
@pytest.mark.parametrize("hca_tail", ["rows", "running"])
def test_entries_are_those_of_float64(device, rng, mask, implementation, hca_tail):
    weights, sequence = random_weights(rng), _masked(rng, mask)
    formats = RUNNING if hca_tail == "running" else PROFILES["exact"]
    driver = Driver(weights, formats, implementation=implementation, buckets=(1, 90))
    request = driver.admit(sequence)
    for count in random_chunks(rng, TOKENS, 90):
        driver.feed({request: count})
    stored = driver.stored(request)
    pools = {
        "csa_entries": (LayerKind.CSA, ""),
        "csa_keys": (LayerKind.CSA, "index_"),
        "hca_entries": (LayerKind.HCA, ""),
    }
    for name, (kind, prefix) in pools.items():
        layer = SPEC.layer_kinds.index(kind)
        expected = _expected(weights, sequence, layer, prefix, kind.ratio)
        assert np.isnan(expected).any() == (mask == -np.inf)
        entries = stored[name][0].reshape(-1, expected.shape[1])[: len(expected)]
        np.testing.assert_allclose(entries, expected, rtol=0, atol=1e-4, err_msg=name)


@MASKS
@IMPLEMENTATIONS
def test_one_token_a_step(device, rng, mask, implementation):
    """Decode steps, which have kernels of their own; entry 0 of CSA has no window before it whatever its scores."""
    weights, sequence = random_weights(rng), _masked(rng, mask)
    driver = Driver(weights, RUNNING, implementation=implementation)
    request = driver.admit(sequence)
    for _ in range(20):
        driver.feed({request: 1})
    stored = driver.stored(request)
    for name, prefix in (("csa_entries", ""), ("csa_keys", "index_")):
        expected = _expected(weights, sequence, 1, prefix, 4)[:5]
        np.testing.assert_allclose(stored[name][0, 0, :5], expected, rtol=0, atol=1e-4, err_msg=name)


def test_a_running_tail_of_low_scores_goes_on(device, rng):
    """Scores below -1e9 from a window's first token on."""
    weights, sequence = random_weights(rng), random_tokens(rng, TOKENS)
    sequence[2]["gate"][:] -= np.float32(3e9)
    driver = Driver(weights, RUNNING)
    request = driver.admit(sequence)
    for count in (100, 28, 1, 127):
        driver.feed({request: count})
    expected = _expected(weights, sequence, 2, "", 128)[:2]
    np.testing.assert_allclose(driver.stored(request)["hca_entries"][0, :2, 0], expected, rtol=0, atol=1e-4)
