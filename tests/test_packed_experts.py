"""Experts in FP4 as a GPU multiplies them: what the kernels compute, and what a GPU is given of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for_h200

from dsv4_jax.deepseek_v4.mixture import Routing, apply_experts, experts_in_tiles, experts_packed
from dsv4_jax.deepseek_v4.packed_experts import multiplies_packed, packed_experts
from dsv4_jax.deepseek_v4.quantized import PackedFp4, quantize_block_fp8
from dsv4_jax.deepseek_v4.weights import ExpertWeights

EXPERTS, WIDTH, HIDDEN, LIMIT = 6, 256, 512, 1.0


def packed(rng: np.random.Generator, *shape: int) -> PackedFp4:
    """Any codes, and scales that make products of about 1."""
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    middle = 127 - round(np.log2(3 * shape[-1] ** 0.5))
    return jax.device_put(
        PackedFp4(codes, rng.integers(middle - 3, middle + 2, (*shape[:-1], shape[-1] // 32), np.uint8))
    )


def expert_weights(rng: np.random.Generator, experts: int = EXPERTS) -> ExpertWeights:
    return ExpertWeights(
        gate=packed(rng, experts, WIDTH, HIDDEN),
        up=packed(rng, experts, WIDTH, HIDDEN),
        down=packed(rng, experts, HIDDEN, WIDTH),
    )


def activations(rng: np.random.Generator, tokens: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((tokens, HIDDEN)), jnp.bfloat16)


def numpy_expert(gate: np.ndarray, up: np.ndarray, down: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(x @ gate.T, LIMIT), np.clip(x @ up.T, -LIMIT, LIMIT)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def distinct(rng: np.random.Generator, tokens: int) -> np.ndarray:
    return np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :2]


@pytest.mark.parametrize(
    ("tokens", "choose"),
    [
        (1, distinct),
        (9, distinct),
        (60, distinct),  # tiles of 32 rows
        (20, lambda rng, tokens: np.full((tokens, 2), 3)),  # one expert has all rows, and tiles are left over
        (20, lambda rng, tokens: np.tile([5, 2], (tokens, 1))),
    ],
)
def test_packed_experts(tokens, choose, device, rng):
    weights, x, experts = expert_weights(rng), activations(rng, tokens), choose(rng, tokens)
    shares = rng.random((tokens, 2)).astype(np.float32)
    routing = Routing(jnp.asarray(experts, jnp.int32), jnp.asarray(shares))
    run = functools.partial(experts_packed, limit=LIMIT, interpret=device.platform == "cpu")
    made = np.asarray(jax.jit(run)(weights, x, routing), np.float64)

    numbers = [np.asarray(weight.expand(jnp.float32), np.float64) for weight in weights]
    exact = np.zeros_like(made)
    for expert in range(EXPERTS):
        outputs = numpy_expert(*(stack[expert] for stack in numbers), np.asarray(x, np.float64))
        exact += ((experts == expert) * shares).sum(axis=1)[:, None] * outputs
    # Two roundings to bfloat16, of what the second product is of and of what it makes.
    assert np.abs(made - exact).max() < 0.02 * np.abs(exact).max()
    assert np.sqrt(np.mean((made - exact) ** 2)) < 0.004 * np.sqrt(np.mean(exact**2))

    # And the same two as without kernels: what is left is what sums in another order make of a rounding here and there.
    in_tiles = jax.jit(functools.partial(experts_in_tiles, limit=LIMIT))(weights, x, routing)
    assert np.sqrt(np.mean((made - np.asarray(in_tiles, np.float64)) ** 2)) < 0.001 * np.sqrt(np.mean(exact**2))


def test_every_code_with_every_scale(device):
    """Each output is one weight times 1, and exactly that weight."""
    size = 512
    diagonal = PackedFp4(np.zeros((1, size, size // 2), np.uint8), np.full((1, size, size // 32), 127, np.uint8))
    columns = np.arange(size)
    diagonal.codes[0, columns, columns // 2] = 2 << columns % 2 * 4  # the identity
    gate, up = (dataclasses.replace(diagonal, scales=diagonal.scales + np.uint8(power)) for power in (6, 256 - 6))
    down = PackedFp4(
        np.broadcast_to(np.arange(256, dtype=np.uint8), (1, size, 256)),  # a row has all pairs of codes
        np.broadcast_to((np.arange(size) % 256).astype(np.uint8)[:, None], (1, size, size // 32)),
    )
    run = functools.partial(packed_experts, limit=100.0, interpret=device.platform == "cpu")
    weights = jax.device_put(ExpertWeights(gate, up, down))
    # silu(64) is 64, so gate and up make 64 / 64 of every 1.
    x, tokens = jnp.eye(size, dtype=jnp.bfloat16), jnp.arange(size).reshape(16, 32)
    made = np.asarray(jax.jit(run)(weights, x, jnp.zeros(16, jnp.int32), tokens), np.float32).reshape(size, size).T

    expected = np.asarray(weights.down.expand(jnp.float32))[0]
    normal = (down.scales[0, :, 0] >= 2) & (down.scales[0, :, 0] <= 252)
    np.testing.assert_array_equal(made[normal], expected[normal])
    assert np.abs(made[down.scales[0, :, 0] < 2]).max() <= 2.0**-123
    assert np.isnan(made[down.scales[0, :, 0] == 255]).all()


def test_tiles_of_nobody_are_left_alone(device, rng):
    weights, x = expert_weights(rng), activations(rng, 8)
    run = jax.jit(functools.partial(packed_experts, limit=LIMIT, interpret=device.platform == "cpu"))
    tokens = jnp.tile(jnp.arange(8), (4, 1))
    made, again = (run(weights, x, jnp.array(order), tokens) for order in ([2, 6, 0, 6], [2, 0, 6, 6]))
    np.testing.assert_array_equal(made[0], again[0])
    np.testing.assert_array_equal(made[2], again[1])
    assert not np.array_equal(made[0], made[2])


def test_which_experts_are_multiplied_packed(rng):
    weights, x = expert_weights(rng), activations(rng, 2)
    assert multiplies_packed(weights, x)
    assert not multiplies_packed(weights, x.astype(jnp.float32))
    plain = jnp.zeros((EXPERTS, WIDTH, HIDDEN), jnp.bfloat16)
    fp8 = quantize_block_fp8(np.zeros((EXPERTS, WIDTH, HIDDEN), np.float32))
    for other in (plain, fp8):
        assert not multiplies_packed(weights._replace(up=other), x)
    narrow = ExpertWeights(packed(rng, 2, 96, HIDDEN), packed(rng, 2, 96, HIDDEN), packed(rng, 2, HIDDEN, 96))
    assert not multiplies_packed(narrow, x)


@pytest.mark.parametrize("tokens", [1, 64, 600])
def test_a_gpu_reads_the_codes_and_expands_nothing_in_memory(tokens, tmp_path):
    """Flash's experts, 6 for each token: two kernels that take the stacks as they are."""

    def stack(*shape: int) -> PackedFp4:
        codes, scales = (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // 32)
        return PackedFp4(*(jax.ShapeDtypeStruct(one, jnp.uint8) for one in (codes, scales)))

    weights = ExpertWeights(stack(176, 2048, 4096), stack(176, 2048, 4096), stack(176, 4096, 2048))
    routing = Routing(*(jax.ShapeDtypeStruct((tokens, 6), dtype) for dtype in (jnp.int32, jnp.float32)))
    x = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
    gpu = compile_for_h200(functools.partial(apply_experts, limit=10.0), weights, x, routing, dump=tmp_path)
    assert sum('custom_call_target="__gpu$xla.gpu.triton"' in line for line in gpu.compiled.as_text().splitlines()) == 2
    assert gpu.compiled.memory_analysis().temp_size_in_bytes < 40000 * tokens * 6 + 2**24
    assert gpu.graphs == 1
    assert not any(kind == "kWhile" for kind, _ in gpu.thunks)
