"""Products with ``BlockFp8`` weights as a GPU computes them: their numbers, and what a GPU is given of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for_h200
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.deepseek_v4.block_fp8_products import block_fp8_products, multiplies_block_fp8
from dsv4_jax.deepseek_v4.layers import grouped_linear, linear, linears, swiglu
from dsv4_jax.deepseek_v4.quantized import BlockFp8, quantize_block_fp8
from dsv4_jax.deepseek_v4.weights import ExpertWeights


def fp8(rng: np.random.Generator, out: int, columns: int, scale_dtype=np.uint8) -> BlockFp8:
    """Numbers of about 1, whose blocks differ in size."""
    sizes = np.exp(rng.standard_normal((-(-out // 128), columns // 128))).repeat(128, 0).repeat(128, 1)[:out]
    weight = rng.standard_normal((out, columns)) * sizes
    return jax.device_put(quantize_block_fp8(weight, scale_dtype=scale_dtype))


def activations(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize("scale_dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    ("tokens", "groups", "columns", "outs", "splits"),
    [
        (1, 1, 512, (192, 64), None),
        (9, 2, 256, (256,), 1),
        (33, 1, 1024, (128,), 4),
        (64, 4, 384, (256, 512), 3),
    ],
)
def test_block_fp8_products(tokens, groups, columns, outs, splits, scale_dtype, device, rng):
    weights = [fp8(rng, out, columns, scale_dtype) for out in outs]
    x = activations(rng, tokens, groups, columns)
    assert multiplies_block_fp8(x, weights)
    made = block_fp8_products(x, weights, splits=splits, interpret=device.platform == "cpu")
    for product, weight in zip(made, weights, strict=True):
        assert product.dtype == jnp.float32
        numbers = np.asarray(weight.expand(jnp.float32), np.float64).reshape(groups, -1, columns)
        exact = np.einsum("tgi,goi->tgo", np.asarray(x, np.float64), numbers).reshape(tokens, -1)
        size = np.einsum("tgi,goi->tgo", np.abs(np.asarray(x, np.float64)), np.abs(numbers)).reshape(tokens, -1)
        assert np.abs((np.asarray(product) - exact) / size).max() < 1e-5  # sums in fp32, and nothing else rounded


def test_every_code_and_every_scale(device):
    """Each output is one weight times 1, and exactly that weight."""
    codes = np.arange(256, dtype=np.uint8)[:, None] + np.arange(256, dtype=np.uint8)
    scales = np.arange(256, dtype=np.uint8)
    run = jax.jit(functools.partial(block_fp8_products, interpret=device.platform == "cpu"))
    eye = jnp.eye(256, dtype=jnp.bfloat16)[:, None]
    for begin in range(0, 256, 32):
        weights = [
            jax.device_put(BlockFp8(codes.view(jnp.float8_e4m3fn), scales[at : at + 4].reshape(2, 2)))
            for at in range(begin, begin + 32, 4)
        ]
        parts = [run(eye[at : at + 64], weights) for at in range(0, 256, 64)]
        for weight, *products in zip(weights, *parts, strict=True):
            made, expected = np.concatenate(products).T, np.asarray(weight.expand(jnp.float32))
            scale = np.asarray(weight.scales).repeat(128, 0).repeat(128, 1)
            usual = (codes % 128 != 127) & (scale > 9) & (scale < 246)
            np.testing.assert_array_equal(made[usual], expected[usual])
            assert np.isnan(made[scale == 255]).all()
            assert np.abs(made[scale < 1]).max(initial=0) <= 2.0**-118


def test_layers_multiply_as_without_the_kernel(device, rng, monkeypatch):
    """A layer's shapes with the kernel in them, on any device: leading axes, groups, two weights, SwiGLU."""
    interpreted = functools.partial(block_fp8_products, interpret=device.platform == "cpu")
    x, grouped = activations(rng, 2, 3, 256), activations(rng, 5, 2, 128)
    one, other, both = fp8(rng, 128, 256), fp8(rng, 64, 256), fp8(rng, 256, 128)
    expert = ExpertWeights(fp8(rng, 128, 256), fp8(rng, 128, 256), fp8(rng, 256, 128))
    made = {}
    for way in ("kernel", "expanded"):
        monkeypatch.setattr(
            "dsv4_jax.deepseek_v4.layers.multiplies_block_fp8",
            multiplies_block_fp8 if way == "kernel" else lambda x, weights: False,
        )
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
        monkeypatch.setattr("dsv4_jax.deepseek_v4.layers.block_fp8_products", interpreted)
        made[way] = (
            linear(x, one, dtype=jnp.float32),
            *linears(x, (one, other)),
            grouped_linear(grouped, both),
            swiglu(expert, x, 1.0),
        )
    for by_codes, expanded in zip(made["kernel"], made["expanded"], strict=True):
        assert (by_codes.shape, by_codes.dtype) == (expanded.shape, expanded.dtype)
        by_codes, expanded = np.asarray(by_codes, np.float64), np.asarray(expanded, np.float64)
        assert np.abs(by_codes - expanded).max() < 0.01 * np.abs(expanded).max()
        assert np.sqrt(np.mean((by_codes - expanded) ** 2)) < 0.001 * np.sqrt(np.mean(expanded**2))


def test_blocks_that_do_not_fit(rng):
    weight = fp8(rng, 128, 384)
    for groups, splits in ((1, 2), (4, None)):
        with pytest.raises(ValueError, match="choose blocks and parts"):
            block_fp8_products(activations(rng, 2, groups, 384), [weight], splits=splits, interpret=True)


def test_which_products_are_of_codes(rng):
    x, weight = activations(rng, 2, 1, 256), fp8(rng, 128, 256)
    assert multiplies_block_fp8(x, [weight])
    assert not multiplies_block_fp8(x.astype(jnp.float32), [weight])
    assert not multiplies_block_fp8(activations(rng, 65, 1, 256), [weight])
    assert not multiplies_block_fp8(x, [weight, weight.expand(jnp.bfloat16)])
    assert not multiplies_block_fp8(x, [weight, jax.device_put(quantize_block_fp8(np.ones((96, 256))))])
    assert not multiplies_block_fp8(
        activations(rng, 2, 1, 200), [jax.device_put(quantize_block_fp8(np.ones((64, 200))))]
    )
    assert not multiplies_block_fp8(
        activations(rng, 2, 4, 64), [jax.device_put(quantize_block_fp8(np.ones((128, 64))))]
    )


def test_layers_with_kernels_are_for_shard_map(rng):
    """Of what varies over devices and what does not; the kernels are traced on every platform."""
    mesh, x, weight = Mesh(jax.devices()[:1], ("device",)), activations(rng, 4, 256), fp8(rng, 128, 256)
    for specs in ((PartitionSpec("device"), PartitionSpec()), (PartitionSpec(), PartitionSpec("device"))):
        run = jax.jit(jax.shard_map(linear, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "device")))
        np.testing.assert_array_equal(np.asarray(run(x, weight), np.float32), np.asarray(linear(x, weight), np.float32))


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_gpu_reads_codes_and_expands_nothing_in_memory(tokens, tmp_path):
    """Flash's shapes: the weights as they are, nothing of their size in memory, gate and up in one kernel."""

    def shape(*shape: int) -> BlockFp8:
        scales = tuple(size // 128 for size in shape)
        return BlockFp8(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(scales, jnp.uint8))

    def run(x, expert, heads, wo_a, wo_b):
        low_rank = grouped_linear(heads, wo_a)
        return swiglu(expert, x, 10.0) + linear(low_rank.reshape(tokens, -1), wo_b)

    x, heads = (jax.ShapeDtypeStruct(one, jnp.bfloat16) for one in ((tokens, 4096), (tokens, 8, 4096)))
    expert = ExpertWeights(shape(2048, 4096), shape(2048, 4096), shape(4096, 2048))
    gpu = compile_for_h200(run, x, expert, heads, shape(8192, 4096), shape(4096, 8192), dump=tmp_path)
    kernels = re.findall(r'custom_call_target="__gpu\$xla.gpu.triton"', gpu.compiled.as_text())
    assert len(kernels) == 4
    # Sums in parts: up to half the codes' bytes. The largest weight expanded has 2^26.
    assert gpu.compiled.memory_analysis().temp_size_in_bytes < 2**25
    assert gpu.graphs == 1
    assert not any(kind == "kWhile" for kind, _ in gpu.thunks)
