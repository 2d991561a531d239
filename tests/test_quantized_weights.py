"""Quantized weights by their definitions in NumPy: expansion to the bit, quantizers by the nearest of all codes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.deepseek_v4.quantized import (
    BlockFp8,
    Nvfp4,
    PackedFp4,
    quantize_block_fp8,
    quantize_nvfp4,
    quantize_packed_fp4,
    scaled_matmul,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

expand_to = {dtype: jax.jit(lambda weight, dtype=dtype: weight.expand(dtype)) for dtype in (jnp.float32, jnp.bfloat16)}


def e4m3(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Any E4M3 numbers but NaN."""
    codes = rng.integers(0, 0x7F, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    return codes.view(ml_dtypes.float8_e4m3fn)


def unpacked(codes: np.ndarray) -> np.ndarray:
    """The numbers of packed E2M1 codes, the low nibble first."""
    values = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]))
    values[..., 0::2], values[..., 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
    return values


def spread(scales: np.ndarray, rows: int, columns: int, shape: tuple[int, ...]) -> np.ndarray:
    """Every scale over its block."""
    return scales.repeat(rows, axis=-2).repeat(columns, axis=-1)[..., : shape[-2], : shape[-1]]


def block_fp8_values(weight: BlockFp8) -> np.ndarray:
    codes, scales = np.asarray(weight.codes), np.asarray(weight.scales)
    factors = np.ldexp(1.0, scales.astype(int) - 127) if scales.dtype == np.uint8 else scales.astype(np.float64)
    return codes.astype(np.float64) * spread(factors, 128, 128, codes.shape)


def packed_fp4_values(weight: PackedFp4) -> np.ndarray:
    values = unpacked(np.asarray(weight.codes))
    return values * spread(np.ldexp(1.0, np.asarray(weight.scales).astype(int) - 127), 1, 32, values.shape)


def nvfp4_factors(weight: Nvfp4) -> np.ndarray:
    """Of each element, as float32."""
    scales, unit = np.asarray(weight.scales).astype(np.float32), np.asarray(weight.global_scale)
    return spread(scales * unit[..., None, None], 1, 16, weight.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ue8m0_scaled_weights_expand_exactly(dtype, rng):
    fp8 = BlockFp8(e4m3(rng, 2, 200, 300), rng.integers(10, 240, (2, 2, 3), np.uint8))
    fp4 = PackedFp4(rng.integers(0, 256, (2, 5, 32), np.uint8), rng.integers(3, 250, (2, 5, 2), np.uint8))
    for weight, values in ((fp8, block_fp8_values(fp8)), (fp4, packed_fp4_values(fp4))):
        found = np.asarray(expand_to[dtype](weight))
        assert found.dtype == dtype
        assert found.shape == weight.shape
        np.testing.assert_array_equal(found.astype(np.float64), values)


def test_fp32_scaled_weights_expand_to_the_rounded_product(rng):
    fp8 = BlockFp8(e4m3(rng, 2, 200, 300), rng.lognormal(-4, 2, (2, 2, 3)).astype(np.float32))
    np.testing.assert_array_equal(expand_to[jnp.float32](fp8), block_fp8_values(fp8).astype(np.float32))
    nvfp4 = Nvfp4(
        rng.integers(0, 256, (2, 5, 32), np.uint8),
        np.abs(e4m3(rng, 2, 5, 4)),
        rng.lognormal(-4, 2, 2).astype(np.float32),
    )
    product = unpacked(nvfp4.codes).astype(np.float32) * nvfp4_factors(nvfp4)
    np.testing.assert_array_equal(expand_to[jnp.float32](nvfp4), product)
    np.testing.assert_array_equal(expand_to[jnp.bfloat16](nvfp4), product.astype(ml_dtypes.bfloat16))


def test_the_extreme_ue8m0_bytes():
    """255 is NaN; 0 is 2^-127, which times 448 is a normal number again."""
    largest = np.full((128, 256), 448, ml_dtypes.float8_e4m3fn)
    found = np.asarray(expand_to[jnp.float32](BlockFp8(largest, np.array([[255, 254]], np.uint8))))
    assert np.isnan(found[:, :128]).all()
    assert np.isinf(found[:, 128:]).all()  # 448 * 2^127: beyond float32
    codes = np.array([[0x77] * 32], np.uint8)
    found = np.asarray(expand_to[jnp.float32](PackedFp4(codes, np.array([[1, 254]], np.uint8))))
    np.testing.assert_array_equal(found[:, :32], np.float32(6 * 2.0**-126))
    assert np.isinf(found[:, 32:]).all()


def random_matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Of numbers whose sizes differ by row and column; one row of zeros."""
    weight = rng.standard_normal(shape) * rng.lognormal(0, 3, (*shape[:-1], 1)) * rng.lognormal(0, 1, shape[-1])
    weight[..., 1, :] = 0
    return weight.astype(np.float32)


def nearest_distance(weight: np.ndarray, grid: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """How far the nearest of all codes is from each number."""
    return np.abs(grid * factors[..., None] - weight[..., None]).min(axis=-1)


E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
E4M3 = E4M3[np.isfinite(E4M3)]


def test_block_fp8_takes_the_nearest_code(rng):
    weight = random_matrix(rng, 2, 140, 130)
    for scale_dtype in (np.uint8, np.float32):
        quantized = quantize_block_fp8(weight, scale_dtype=scale_dtype)
        assert quantized.scales.dtype == scale_dtype
        assert quantized.shape == weight.shape
        for block in np.ndindex(2, 2, 2):
            stack, rows, columns = block[0], *(slice(128 * n, 128 * n + 128) for n in block[1:])
            part, scale = weight[stack, rows, columns].astype(np.float64), np.asarray(quantized.scales)[block]
            needed = np.abs(part).max() / 448
            if scale_dtype == np.uint8:
                scale = np.ldexp(1.0, int(scale) - 127)
                assert scale / 2 < needed <= scale
            else:
                assert scale == pytest.approx(needed, rel=1e-6)
            distance = np.abs(block_fp8_values(quantized)[stack, rows, columns] - part)
            nearest = nearest_distance(part, E4M3, np.full(part.shape, float(scale)))
            np.testing.assert_allclose(distance, nearest, rtol=0, atol=1e-6 * np.abs(part).max())


def test_packed_fp4_takes_the_nearest_code(rng):
    weight = random_matrix(rng, 2, 7, 96)
    quantized = quantize_packed_fp4(weight)
    factors = np.ldexp(1.0, np.asarray(quantized.scales).astype(int) - 127)
    needed = np.abs(weight.reshape(2, 7, 3, 32)).max(-1) / 6
    assert ((factors / 2 < needed) & (needed <= factors))[needed > 0].all()
    distance = np.abs(packed_fp4_values(quantized) - weight)
    np.testing.assert_array_equal(distance, nearest_distance(weight, E2M1, spread(factors, 1, 32, weight.shape)))


def test_nvfp4_takes_the_nearest_code(rng):
    weight = random_matrix(rng, 2, 7, 96)
    quantized = quantize_nvfp4(weight)
    largest = np.abs(weight).max(axis=(1, 2))
    np.testing.assert_allclose(quantized.global_scale, largest / (6 * 448), rtol=1e-6)
    factors = nvfp4_factors(quantized).astype(np.float64)
    distance = np.abs(unpacked(np.asarray(quantized.codes)) * factors - weight)
    nearest = nearest_distance(weight, E2M1, factors)
    np.testing.assert_allclose(distance, nearest, rtol=0, atol=1e-6 * largest.max())
    # A block's scale is its amax / 6 in E4M3, which has 3 bits after the first.
    amax = np.abs(weight.reshape(2, 7, 6, 16)).max(-1)
    ratio = 6 * factors[..., ::16] / np.where(amax == 0, np.inf, amax)
    in_range = amax / 6 > 2.0**-6 * np.asarray(quantized.global_scale)[:, None, None]
    assert (np.abs(ratio - 1) <= 1 / 17)[in_range].all()


def test_a_power_of_two_that_just_suffices_is_the_scale(rng):
    """The largest number is then the largest code."""
    exponent = int(rng.integers(-20, 20))
    fp8 = quantize_block_fp8(np.full((1, 32), np.ldexp(448.0, exponent)))
    fp4 = quantize_packed_fp4(np.full((1, 32), np.ldexp(6.0, exponent)))
    assert fp8.scales.item() == fp4.scales.item() == exponent + 127
    assert (np.asarray(fp8.codes).astype(float) == 448).all()
    assert (np.asarray(fp4.codes) == 0x77).all()


@pytest.mark.parametrize("quantize", [quantize_packed_fp4, quantize_nvfp4])
def test_columns_that_fall_into_no_groups_are_refused(quantize):
    with pytest.raises(ValueError, match="40 columns"):
        quantize(np.zeros((2, 40), np.float32))


def test_zeros_stay_zeros():
    for quantize in (quantize_block_fp8, quantize_packed_fp4, quantize_nvfp4):
        assert not np.asarray(expand_to[jnp.float32](quantize(np.zeros((4, 64), np.float32)))).any()


def test_one_index_picks_an_expert_of_every_array(rng):
    for quantize in (quantize_block_fp8, quantize_packed_fp4, quantize_nvfp4):
        stack = quantize(rng.standard_normal((3, 8, 64)))
        one = jax.tree.map(lambda array: array[2], stack)
        assert one.shape == (8, 64)
        np.testing.assert_array_equal(expand_to[jnp.float32](one), expand_to[jnp.float32](stack)[2])


def test_expansion_takes_no_memory_beside_its_result():
    numbers = np.zeros((3, 200, 320), np.float32)
    for quantize in (quantize_block_fp8, quantize_packed_fp4, quantize_nvfp4):
        memory = expand_to[jnp.bfloat16].lower(quantize(numbers)).compile().memory_analysis()
        assert memory.output_size_in_bytes == 2 * numbers.size
        assert memory.temp_size_in_bytes == 0


def test_bytes_are_those_of_codes_and_scales():
    weight = np.zeros((4, 256, 512), np.float32)
    assert quantize_block_fp8(weight).nbytes == 4 * (256 * 512 + 2 * 4)
    assert quantize_packed_fp4(weight).nbytes == 4 * (256 * 256 + 256 * 16)
    assert quantize_nvfp4(weight).nbytes == 4 * (256 * 256 + 256 * 32 + 4)


def test_scaled_matmul_multiplies_what_the_codes_stand_for(rng, monkeypatch):
    """JAX's own has no CPU implementation: by its definition, the product is near that of the numbers."""

    def definition(lhs, rhs, lhs_scales, rhs_scales):
        assert lhs.dtype == rhs.dtype == jnp.float4_e2m1fn
        assert lhs_scales.dtype == rhs_scales.dtype == jnp.float8_e4m3fn
        lhs, rhs, lhs_scales, rhs_scales = (np.asarray(x, np.float64) for x in (lhs, rhs, lhs_scales, rhs_scales))
        lhs, rhs = lhs * lhs_scales.repeat(16, -1), rhs * rhs_scales.repeat(16, -1)
        return jnp.asarray(np.einsum("bmk,bnk->bmn", lhs, rhs), jnp.float32)

    x, numbers = rng.standard_normal((5, 256)), rng.standard_normal((24, 256)) / 16
    x *= rng.lognormal(0, 5, (5, 1))  # each token has its own global scale
    weight = jax.tree.map(jnp.asarray, quantize_nvfp4(numbers))
    monkeypatch.setattr(jax.nn, "scaled_matmul", definition)
    found = np.asarray(scaled_matmul(jnp.asarray(x, jnp.float32), weight), np.float64)
    expected = x @ numbers.T
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error < 0.3).all()


def test_scaled_matmul_is_jaxs_on_cuda_and_refused_on_the_cpu():
    weight = jax.tree.map(jnp.asarray, quantize_nvfp4(np.ones((16, 32), np.float32)))
    x = jnp.ones((4, 32))
    lowered = jax.jit(scaled_matmul).trace(x, weight).lower(lowering_platforms=("cuda",))
    assert "block_scaled_dot" in lowered.as_text()
    with pytest.raises(NotImplementedError, match="scaled_matmul"):
        jax.jit(scaled_matmul).trace(x, weight).lower(lowering_platforms=("cpu",))
