"""Rotary embedding: frequencies to the bit, fp32 angles up to a million, rotation against float64 and golden data."""

import dataclasses
import decimal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.rotary import closing_positions, closing_rotary, token_rotary
from dsv4_jax.spec.model import ConfigError, RopeSpec
from dsv4_jax.spec.rotary import Rotary, apply_rotary, inverse_frequencies, rotary

MAIN_ROPE = RopeSpec(10_000.0)
COMPRESS_ROPE = RopeSpec(160_000.0, factor=16.0)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "dsv4_golden.npz") as data:
        names = ("rope.main_inv_freq", "rope.compress_inv_freq", "meta.positions_attn")
        layers = [f"L{layer}.{name}" for layer in range(3) for name in ("attn_out", "attn_out_irope")]
        return {name: data[name] for name in (*names, *layers)}


def rotate_float64(x, positions, frequencies, sign=1):
    """Pairs as complex numbers, angles in float64 from the fp32 product."""
    angles = (np.float32(positions)[:, None] * frequencies).astype(np.float64)
    angles = angles.reshape(len(positions), *(1,) * (x.ndim - 2), 32)
    out = x.astype(np.float64)
    pairs = (out[..., -64::2] + 1j * out[..., -63::2]) * np.exp(sign * 1j * angles)
    out[..., -64::2], out[..., -63::2] = pairs.real, pairs.imag
    return out


@pytest.mark.parametrize(("rope", "name"), [(MAIN_ROPE, "main"), (COMPRESS_ROPE, "compress")])
def test_frequencies_equal_the_golden_ones_to_the_bit(golden, rope, name):
    expected = golden[f"rope.{name}_inv_freq"]
    frequencies = inverse_frequencies(rope)
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies.view(np.int32), expected.view(np.int32))


def exact_frequency(theta, pair):
    """1 / theta ** (pair / 32) with the power rounded once to fp32, from 60 digits, and its inverse once more."""
    with decimal.localcontext(prec=60):
        power = decimal.Decimal(theta) ** (decimal.Decimal(pair) / 32)
        near = np.float32(float(power))
        # float() rounds once, fp32 once more: take the nearest of the fp32 neighbours by the exact difference.
        around = (np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf)))
        nearest = min(around, key=lambda value: abs(decimal.Decimal(float(value)) - power))
    return np.float32(1) / nearest


def test_frequencies_have_correctly_rounded_powers(rng):
    for theta in [1e4, 1.6e5, 5e4, 3.2e5, *(float(theta) for theta in rng.integers(1000, 10**7, 50))]:
        expected = [exact_frequency(theta, pair) for pair in range(32)]
        np.testing.assert_array_equal(inverse_frequencies(RopeSpec(theta)), np.array(expected, np.float32))


def test_frequencies_beside_those_of_torch():
    """Equal to the bit for the published thetas; else within the two units that torch's processors differ by."""
    with np.load(Path(__file__).parent / "data" / "torch_frequencies.npz") as data:
        thetas, *torch = (data[name] for name in ("thetas", "default", "avx2", "avx512"))
    assert not np.array_equal(torch[0], torch[2]), "one torch only: then every theta could be held to the bit"
    for theta, *of_processors in zip(thetas, *torch, strict=True):
        for frequencies in of_processors:
            ulps = 0 if theta in (10_000, 160_000) else 2
            np.testing.assert_array_max_ulp(inverse_frequencies(RopeSpec(float(theta))), frequencies, maxulp=ulps)


def test_attention_factor_scales_cos_and_sin(rng, device):
    positions = rng.integers(0, 2**20, 50).astype(np.int32)
    factor = 0.1 * np.log(16) + 1
    plain, scaled = (rotary(positions, dataclasses.replace(COMPRESS_ROPE, attention_factor=f)) for f in (1.0, factor))
    for got, unscaled in zip(scaled, plain, strict=True):
        np.testing.assert_array_equal(got, np.asarray(unscaled) * np.float32(factor))
    x = rng.standard_normal((50, 512)).astype(np.float32)
    expected = rotate_float64(x, positions, inverse_frequencies(COMPRESS_ROPE))
    expected[:, -64:] *= factor
    np.testing.assert_allclose(apply_rotary(jnp.asarray(x), scaled), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), "1", None])
def test_attention_factor_must_be_positive(factor):
    with pytest.raises(ConfigError, match="attention_factor > 0"):
        RopeSpec(10_000.0, attention_factor=factor)


@pytest.mark.parametrize(
    "positions", [np.arange(4.0, dtype=np.float32), np.int32(3), np.zeros((2, 2), np.int32), np.ones(3, bool)]
)
def test_positions_are_a_row_of_integers(positions):
    with pytest.raises(ValueError, match=r"rotary needs integer positions \[n\], got"):
        rotary(positions, MAIN_ROPE)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain = inverse_frequencies(RopeSpec(160_000.0))
    stretched = inverse_frequencies(COMPRESS_ROPE)
    turns = 65536 * plain.astype(np.float64) / (2 * np.pi)
    np.testing.assert_array_equal(stretched[turns > 2 * 32], plain[turns > 2 * 32])
    np.testing.assert_allclose(stretched[turns < 0.5], plain[turns < 0.5] / 16, rtol=3e-7)
    between = stretched / plain
    assert np.all(np.diff(between[(turns < 20) & (turns > 2)]) < 0)


@pytest.mark.parametrize("rope", [MAIN_ROPE, COMPRESS_ROPE])
def test_cos_and_sin_are_of_the_fp32_product(rope, rng, device):
    positions = np.concatenate([[0, 1, 2**20 - 1], rng.integers(0, 2**20, 200)]).astype(np.int32)
    frequencies = inverse_frequencies(rope)
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    for function in (rotary, jax.jit(rotary, static_argnums=1)):
        result = function(positions, rope)
        assert result.cos.shape == result.sin.shape == (203, 32)
        assert result.cos.dtype == result.sin.dtype == jnp.float32
        np.testing.assert_allclose(result.cos, np.cos(angles), rtol=0, atol=2e-7)
        np.testing.assert_allclose(result.sin, np.sin(angles), rtol=0, atol=2e-7)


def test_negative_positions_rotate_nothing():
    result = rotary(jnp.array([-1, -(2**31), 0], jnp.int32), COMPRESS_ROPE)
    np.testing.assert_array_equal(result.cos, np.ones((3, 32), np.float32))
    np.testing.assert_array_equal(result.sin, np.zeros((3, 32), np.float32))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_inverse_rotation_of_golden_attention_outputs(golden, layer, device):
    rope = MAIN_ROPE if layer == 0 else COMPRESS_ROPE
    rotation = rotary(golden["meta.positions_attn"], rope)
    outputs, expected = golden[f"L{layer}.attn_out"], golden[f"L{layer}.attn_out_irope"]
    np.testing.assert_allclose(apply_rotary(outputs, rotation, inverse=True), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(apply_rotary(jnp.asarray(expected), rotation), outputs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (512,), (3, 128), (2, 3, 512)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_against_complex_float64(shape, inverse, rng):
    positions = rng.integers(0, 2**20, 7).astype(np.int32)
    x = rng.standard_normal((7, *shape)).astype(np.float32)
    rotated = apply_rotary(jnp.asarray(x), rotary(positions, COMPRESS_ROPE), inverse=inverse)
    expected = rotate_float64(x, positions, inverse_frequencies(COMPRESS_ROPE), -1 if inverse else 1)
    np.testing.assert_allclose(rotated, expected, rtol=0, atol=3e-6)
    np.testing.assert_array_equal(rotated[..., :-64], x[..., :-64])


def test_bf16_is_rotated_in_fp32_and_rounded_once(rng):
    positions = rng.integers(0, 2**20, 50).astype(np.int32)
    x = jnp.asarray(rng.standard_normal((50, 512)), jnp.bfloat16)
    rotated = apply_rotary(x, rotary(positions, MAIN_ROPE))
    expected = rotate_float64(np.asarray(x, np.float32), positions, inverse_frequencies(MAIN_ROPE))
    assert rotated.dtype == jnp.bfloat16
    # Half a step of bf16 is 2**-9 of the value's power of two; a little more for the fp32 sums before it.
    np.testing.assert_allclose(np.asarray(rotated, np.float64), expected, rtol=2**-8 * 1.01, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    rotation = rotary(jnp.arange(4), MAIN_ROPE)
    for x in (jnp.zeros((3, 512)), jnp.zeros((4, 63)), jnp.zeros(512)):
        with pytest.raises(ValueError, match="apply_rotary needs x"):
            apply_rotary(x, rotation)
    with pytest.raises(ValueError, match="apply_rotary needs x"):
        apply_rotary(jnp.zeros((4, 512)), Rotary(rotation.cos, rotation.sin[:, :16]))


@pytest.mark.parametrize("ratio", [4, 128])
def test_closing_entries_are_at_their_first_token(ratio, rng):
    starts = rng.integers(0, 2**20 - 600, 3)
    positions = np.concatenate([np.arange(start, start + rng.integers(1, 600)) for start in starts])
    positions = np.concatenate([positions, [-1] * 5]).astype(np.int32)
    last = [index for index, position in enumerate(positions) if position >= 0 and position % ratio == ratio - 1]
    closing = np.array([*last, -1, -1], np.int32)
    plan = SimpleNamespace(token_position=positions, closing=lambda asked: {ratio: closing}[asked])
    expected = [positions[index] // ratio * ratio for index in last] + [-1, -1]

    np.testing.assert_array_equal(closing_positions(plan, ratio), expected)
    for got, wanted in zip(
        closing_rotary(plan, ratio, COMPRESS_ROPE), rotary(np.int32(expected), COMPRESS_ROPE), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    assert np.all(np.asarray(closing_rotary(plan, ratio, COMPRESS_ROPE).cos)[-2:] == 1)
    for got, wanted in zip(token_rotary(plan, MAIN_ROPE), rotary(positions, MAIN_ROPE), strict=True):
        np.testing.assert_array_equal(got, wanted)
