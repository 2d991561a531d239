"""The parts of the model that Hugging Face's logits show one setting of: every score, any sizes, against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_for_h200

import dsv4_jax.deepseek_v4.mixture as mixture_module
from dsv4_jax import tiny_spec
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.hyper_connections import collapse, connect, mixing
from dsv4_jax.deepseek_v4.layers import fused_products, grouped_linear, linear
from dsv4_jax.deepseek_v4.mixture import (
    Routing,
    apply_experts,
    experts_by_row,
    experts_in_tiles,
    lay_out,
    mixture,
    route,
)
from dsv4_jax.deepseek_v4.quantized import BlockFp8, quantize_block_fp8
from dsv4_jax.deepseek_v4.weights import ExpertWeights, HyperConnectionWeights, MixtureWeights

SPEC = tiny_spec()
CONFIG = DeepseekV4Config(
    spec=SPEC,
    vocabulary=50,
    q_lora_rank=32,
    o_lora_rank=16,
    o_groups=2,
    num_experts=6,
    experts_per_token=2,
    expert_width=24,
    routed_scaling=1.5,
    swiglu_limit=1.0,
    hashed=(False,) * len(SPEC.layers),
)
HIDDEN = SPEC.hidden_size


@pytest.fixture(autouse=True)
def fp32_products():
    with jax.default_matmul_precision("highest"):
        yield


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def expert_weights(rng: np.random.Generator, *stack: int) -> ExpertWeights:
    width = CONFIG.expert_width
    return ExpertWeights(
        gate=normal(rng, *stack, width, HIDDEN, scale=HIDDEN**-0.5),
        up=normal(rng, *stack, width, HIDDEN, scale=HIDDEN**-0.5),
        down=normal(rng, *stack, HIDDEN, width, scale=width**-0.5),
    )


def mixture_weights(rng: np.random.Generator, *, hashed: bool = False) -> MixtureWeights:
    experts, per_token = CONFIG.num_experts, CONFIG.experts_per_token
    table = np.argsort(rng.random((CONFIG.vocabulary, experts)), axis=1)[:, :per_token].astype(np.int32)
    return MixtureWeights(
        gate=normal(rng, experts, HIDDEN, scale=HIDDEN**-0.5),
        bias=None if hashed else normal(rng, experts),
        token_experts=table if hashed else None,
        experts=expert_weights(rng, experts),
        shared=expert_weights(rng),
    )


def on_device(weights):
    return jax.tree.map(jnp.asarray, weights)


def run_mixture(weights: MixtureWeights, config: DeepseekV4Config, x: jax.Array, tokens: jax.Array) -> jax.Array:
    return mixture(weights, config, x, route(weights, config, x, tokens))


def numpy_expert(weights: ExpertWeights, x: np.ndarray, limit: float) -> np.ndarray:
    gate, up = x @ weights.gate.T.astype(np.float64), x @ weights.up.T.astype(np.float64)
    gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
    return (gate / (1 + np.exp(-gate)) * up) @ weights.down.T


def numpy_mixture(weights: MixtureWeights, config: DeepseekV4Config, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    made = []
    for row, token in zip(x.astype(np.float64), tokens, strict=True):
        products = weights.gate.astype(np.float64) @ row
        scores = {
            "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
            "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
            "softmax": lambda z: np.exp(z) / np.exp(z).sum(),
        }[config.scoring](products)
        if weights.token_experts is None:
            chosen = np.argsort(-(scores + weights.bias))[: config.experts_per_token]
        else:
            chosen = weights.token_experts[token]
        shares = scores[chosen] / (scores[chosen].sum() if config.norm_topk_prob else 1)
        output = numpy_expert(weights.shared, row, config.swiglu_limit)
        for expert, share in zip(chosen, shares * config.routed_scaling, strict=True):
            one = ExpertWeights(*(stack[expert] for stack in weights.experts))
            output = output + share * numpy_expert(one, row, config.swiglu_limit)
        made.append(output)
    return np.stack(made)


@pytest.mark.parametrize(
    ("scoring", "norm"), [("sqrtsoftplus", True), ("sqrtsoftplus", False), ("sigmoid", True), ("softmax", False)]
)
def test_mixture_with_every_score(scoring, norm, rng):
    config = dataclasses.replace(CONFIG, scoring=scoring, norm_topk_prob=norm)
    weights, x, tokens = mixture_weights(rng), normal(rng, 9, HIDDEN), rng.integers(0, 50, 9)
    made = run_mixture(on_device(weights), config, jnp.asarray(x), jnp.asarray(tokens))
    np.testing.assert_allclose(made, numpy_mixture(weights, config, x, tokens), rtol=0, atol=2e-5)


def test_hash_layers_look_the_token_up(rng):
    weights, x, tokens = mixture_weights(rng, hashed=True), normal(rng, 9, HIDDEN), rng.integers(0, 50, 9)
    made = run_mixture(on_device(weights), CONFIG, jnp.asarray(x), jnp.asarray(tokens))
    np.testing.assert_allclose(made, numpy_mixture(weights, CONFIG, x, tokens), rtol=0, atol=2e-5)


def test_bias_chooses_and_weighs_nothing(rng):
    weights, x = mixture_weights(rng), jnp.asarray(normal(rng, 20, HIDDEN))
    bias = np.zeros(CONFIG.num_experts, np.float32)
    bias[[1, 4]] = 100
    routing = route(on_device(weights._replace(bias=bias)), CONFIG, x, jnp.zeros(20, jnp.int32))
    np.testing.assert_array_equal(np.sort(routing.experts, axis=1), [[1, 4]] * 20)
    np.testing.assert_allclose(np.sum(routing.shares, axis=1), CONFIG.routed_scaling, rtol=1e-6)
    assert np.std(routing.shares) > 0.01


@pytest.mark.parametrize(
    ("way", "tokens", "at_once"),
    [
        (experts_in_tiles, 1, 100),
        (experts_in_tiles, 40, 100),
        (experts_in_tiles, 40, 1),
        (experts_in_tiles, 700, 4),
        (experts_by_row, 1, 100),
        (experts_by_row, 40, 100),
    ],
)
def test_experts(way, tokens, at_once, rng, monkeypatch):
    """From one row of an expert to many tiles of it, experts that nobody chose, and many batches of experts."""
    monkeypatch.setattr(mixture_module, "_EXPANDED_BYTES", at_once * 3 * CONFIG.expert_width * HIDDEN * 4)
    weights, x, shares = expert_weights(rng, CONFIG.num_experts), normal(rng, tokens, HIDDEN), normal(rng, tokens, 2)
    outputs = [
        numpy_expert(ExpertWeights(*(stack[expert] for stack in weights)), x.astype(np.float64), CONFIG.swiglu_limit)
        for expert in range(CONFIG.num_experts)
    ]
    run = jax.jit(functools.partial(way, limit=CONFIG.swiglu_limit))
    for experts in (
        np.argsort(rng.random((tokens, CONFIG.num_experts)), axis=1)[:, :2],
        np.full((tokens, 2), 3),  # a table may name an expert twice
        np.tile([5, 2], (tokens, 1)),
    ):
        routing = Routing(jnp.asarray(experts, jnp.int32), jnp.asarray(shares))
        made = run(on_device(weights), jnp.asarray(x), routing)
        expected = sum(
            ((experts == expert) * shares).sum(axis=1)[:, None] * output for expert, output in enumerate(outputs)
        )
        np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 8), (40, 8), (70, 32), (400, 16)])  # the last by a sort
def test_tiles_hold_every_row_once(tokens, rows, rng):
    experts, assigned = 9, 3 * tokens
    tiles = experts + assigned // rows
    for chosen in (rng.integers(0, experts, (tokens, 3)), np.full((tokens, 3), 4), np.full((tokens, 3), experts - 1)):
        routing = Routing(jnp.asarray(chosen, jnp.int32), jnp.zeros(chosen.shape))
        laid_out = jax.jit(lambda routing: lay_out(routing, experts, tiles, rows))(routing)
        expert_of_tile, token_of_row, place = map(np.asarray, laid_out)
        assert len(np.unique(place)) == assigned
        np.testing.assert_array_equal(expert_of_tile[place // rows], chosen)
        np.testing.assert_array_equal(
            token_of_row[place // rows, place % rows], np.broadcast_to(np.arange(tokens)[:, None], chosen.shape)
        )
        # Those of an expert fill its tiles; nobody's come last, and no row is of a token that is not there.
        used = sum(-(-int((chosen == expert).sum()) // rows) for expert in range(experts))
        np.testing.assert_array_equal(expert_of_tile < experts, np.arange(tiles) < used)
        assert token_of_row.min() >= 0
        assert token_of_row.max() < tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Doubled:
    """A "quantized" weight: its numbers are twice its codes."""

    codes: jax.Array

    @property
    def shape(self):
        return self.codes.shape

    def expand(self, dtype):
        assert self.codes.ndim == 2, f"expanded {self.shape} at once"
        return 2 * self.codes.astype(dtype)


def test_quantized_experts_are_expanded_one_at_a_time(rng):
    weights, x, tokens = mixture_weights(rng), jnp.asarray(normal(rng, 30, HIDDEN)), jnp.zeros(30, jnp.int32)
    plain = run_mixture(on_device(weights), CONFIG, x, tokens)
    halved = weights._replace(experts=ExpertWeights(*(Doubled(jnp.asarray(stack / 2)) for stack in weights.experts)))
    np.testing.assert_allclose(run_mixture(on_device(halved), CONFIG, x, tokens), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_of_one_row(dtype, rng):
    """What GPUs compute for a single row is what is computed for more."""
    weight = jax.device_put(quantize_block_fp8(normal(rng, 160, 200)))
    numbers = np.asarray(weight.expand(jnp.float32), np.float64)
    x = jnp.asarray(normal(rng, 1, 200), dtype)
    (made,) = fused_products(x, (weight,))
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, np.asarray(x, np.float64) @ numbers.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(made, linear(x, weight, dtype=jnp.float32), rtol=0, atol=1e-4)

    grouped = jnp.asarray(normal(rng, 1, 5, 200), dtype)  # each group by 32 of the rows
    expected = np.einsum("tgi,goi->tgo", np.asarray(grouped, np.float64), numbers.reshape(5, 32, 200))
    np.testing.assert_allclose(fused_products(grouped, (weight,), (5,))[0], expected, rtol=0, atol=1e-4)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.3  # of a result in that dtype, up to 70
    np.testing.assert_allclose(grouped_linear(grouped, weight).astype(jnp.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_decoding_expands_no_expert_on_a_gpu(tokens, tmp_path):
    """Experts of Flash's size in E4M3, 6 for each token: nothing in memory but rows, and no loop."""

    def fp8(*shape):
        scales = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        return BlockFp8(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(scales, jnp.uint8))

    weights = ExpertWeights(fp8(128, 2048, 4096), fp8(128, 2048, 4096), fp8(128, 4096, 2048))
    routing = Routing(*(jax.ShapeDtypeStruct((tokens, 6), dtype) for dtype in (jnp.int32, jnp.float32)))
    run = functools.partial(apply_experts, limit=10.0)
    gpu = compile_for_h200(run, weights, jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16), routing, dump=tmp_path)
    one_expert = 3 * 2048 * 4096 * 2
    assert gpu.compiled.memory_analysis().temp_size_in_bytes < one_expert
    assert not any(kind == "kWhile" for kind, _ in gpu.thunks)


def test_hyper_connection(rng):
    """What goes into a sublayer, and how its output and the streams make the next streams, in float64."""
    n, tokens = CONFIG.hc_mult, 3
    m = (2 + n) * n
    fn, base, scale = normal(rng, m, n * HIDDEN, scale=0.1), normal(rng, m), 1 + normal(rng, 3)
    streams, output = normal(rng, tokens, n, HIDDEN), normal(rng, tokens, HIDDEN)

    mixed = mixing(on_device(HyperConnectionWeights(fn, base, scale)), CONFIG, jnp.asarray(streams))
    given = collapse(jnp.asarray(streams), mixed.into)
    after = connect(jnp.asarray(streams), jnp.asarray(output), mixed)

    for token in range(tokens):
        flat = streams[token].astype(np.float64).reshape(-1)
        products = fn.astype(np.float64) @ (flat / np.sqrt(np.mean(flat**2) + SPEC.norm_eps))
        into = 1 / (1 + np.exp(-(products[:n] * scale[0] + base[:n]))) + CONFIG.hc_eps
        out = 2 / (1 + np.exp(-(products[n : 2 * n] * scale[1] + base[n : 2 * n])))
        beside = np.exp(products[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n)
        beside = beside / beside.sum(axis=1, keepdims=True) + CONFIG.hc_eps
        for iteration in range(CONFIG.hc_sinkhorn_iters):
            if iteration:
                beside /= beside.sum(axis=1, keepdims=True) + CONFIG.hc_eps
            beside /= beside.sum(axis=0, keepdims=True) + CONFIG.hc_eps
        np.testing.assert_allclose(given[token], into @ streams[token], rtol=0, atol=2e-5)
        expected = beside.T @ streams[token] + np.outer(out, output[token])
        np.testing.assert_allclose(after[token], expected, rtol=0, atol=2e-5)
