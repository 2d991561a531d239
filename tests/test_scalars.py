"""The bit arithmetic under the reference codecs against NumPy and ml_dtypes: any fp32 bit pattern, jitted."""

import jax
import ml_dtypes
import numpy as np
import numpy_reference
import pytest

from dsv4_jax.arithmetic import scalars
from dsv4_jax.ops import hadamard_transform

SMALLEST_NORMAL = np.float32(2.0**-126)


@pytest.fixture(autouse=True)
def on(device):
    return device


def any_floats(rng, count=200_000):
    return rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[finite].view(np.uint32), expected[finite].view(np.uint32))


@pytest.mark.parametrize("divisor", ["any", "divides nearly", 448.0, 6.0, 2688.0, 3.7e-5])
def test_division_is_correctly_rounded(divisor, rng):
    x, y = any_floats(rng), np.abs(any_floats(rng))
    y = np.where(np.isfinite(y) & (y >= SMALLEST_NORMAL), y, np.float32(1.5))
    with np.errstate(all="ignore"):
        if divisor == "divides nearly":
            x = y * rng.integers(1, 500, len(y)).astype(np.float32)
        elif divisor != "any":
            y = np.float32(divisor)
        expected = x / y
    expected = np.where(np.abs(expected) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), expected)
    # A quotient that only rounding brings up to the smallest normal number may be that or zero: codes are the same.
    decided = ~(np.abs(expected) == SMALLEST_NORMAL)
    actual = np.asarray(jax.jit(scalars.divide)(x, y))
    assert_same_bits(actual[decided], expected[decided])


def test_e4m3_codes_are_those_of_a_saturating_cast(rng):
    x = np.concatenate([any_floats(rng), (rng.standard_normal(200_000) * 30).astype(np.float32)])
    with np.errstate(invalid="ignore"):
        expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    expected = np.where(np.isnan(x), 0x7F, expected)
    np.testing.assert_array_equal(jax.jit(scalars.e4m3_codes)(x), expected)


def test_e4m3_values_of_every_code():
    codes = np.arange(256).astype(np.uint8)
    assert_same_bits(scalars.e4m3_values(codes), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_e2m1_codes_and_values_are_those_of_a_saturating_cast(rng):
    x = np.concatenate([any_floats(rng), (rng.standard_normal(200_000) * 3).astype(np.float32)])
    x = x[~np.isnan(x)]
    expected = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    codes = np.asarray(jax.jit(scalars.e2m1_codes)(x))
    assert codes.max() <= 15
    assert_same_bits(scalars.e2m1_values(codes), np.copysign(expected, x))


def test_bfloat16_rounds_ties_to_even_and_keeps_nan(rng):
    x = any_floats(rng)
    with np.errstate(invalid="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_bits(scalars.to_float32(jax.jit(scalars.to_bfloat16)(x)), expected)


def test_e2m1_values_times_every_power_of_two():
    codes, exponents = np.meshgrid(np.arange(16), np.arange(1, 255))
    values = np.asarray(scalars.e2m1_values(codes.astype(np.uint8)))
    with np.errstate(over="ignore"):
        expected = np.ldexp(values, exponents - 127)
    assert_same_bits(jax.jit(scalars.times_power_of_two)(values, exponents.astype(np.uint8)), expected)


def test_ceil_exponent_is_the_next_power_of_two(rng):
    x = np.abs(any_floats(rng))
    x = x[(x >= SMALLEST_NORMAL) & (x <= 2.0**126)].astype(np.float64)
    x = np.concatenate([x, np.ldexp(1.0, np.arange(-126, 127))]).astype(np.float32)
    power = np.asarray(scalars.power_of_two(jax.jit(scalars.ceil_exponent)(x))).astype(np.float64)
    assert np.all(power >= x)
    assert np.all(power < 2 * x.astype(np.float64))
    assert np.all(np.frexp(power)[0] == 0.5)


def test_hadamard_transform_is_the_matrix(rng):
    x = rng.standard_normal((3, 5, 128)).astype(np.float32)
    expected = x.astype(np.float64) @ numpy_reference.hadamard_matrix(128)
    np.testing.assert_allclose(hadamard_transform(x), expected, atol=2e-6, rtol=0)


def test_hadamard_transform_keeps_scores_only_when_both_sides_have_it(rng):
    queries, keys = (rng.standard_normal((20, 128)).astype(np.float32) for _ in range(2))
    scores = queries.astype(np.float64) @ keys.T.astype(np.float64)
    transformed = [np.asarray(hadamard_transform(x)).astype(np.float64) for x in (queries, keys)]
    np.testing.assert_allclose(transformed[0] @ transformed[1].T, scores, atol=1e-4, rtol=0)
    assert np.abs(transformed[0] @ keys.T - scores).max() > 1
