"""Compressors whose projections are NVFP4 weights, expanded to bfloat16 in the step: entries and keys in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_reference as reference
from test_quantized_weights import nvfp4_factors, unpacked

from dsv4_jax import PROFILES, CacheManager, CacheSchema, begin, closing_rotary, init_cache, token_rotary
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.projections import project
from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from dsv4_jax.spec.rotary import inverse_frequencies

TOKENS = 128


def test_entries_and_keys(tmp_path, seed, rng):
    config = dict(SMALL_CONFIG) | {"num_hidden_layers": 1, "compress_ratios": [4], "n_routed_experts": 2}
    write_random_checkpoint(tmp_path / "checkpoint", config, seed)
    plain = load_checkpoint(tmp_path / "checkpoint")[1].layers[0].attention
    model, weights = load_checkpoint(tmp_path / "checkpoint", nvfp4_compressors=True)
    attention = weights.layers[0].attention
    rope = model.spec.layers[0].rope

    def step(attention, cache, plan, x):
        running = begin(cache, plan)
        angles = token_rotary(running.plan, rope), closing_rotary(running.plan, 4, rope)
        made = project(attention, model, x, *angles)
        layer = running.layer(0).update(made.rows, made.compressor, made.indexer)
        layer, entries = layer.all_entries(TOKENS // 4, dtype=jnp.float32)
        layer, keys = layer.all_keys(TOKENS // 4, dtype=jnp.float32)
        return entries.values, keys.values

    schema = CacheSchema(model.spec, PROFILES["exact"], slots=1, blocks=1, max_context=TOKENS)
    manager = CacheManager(schema, token_buckets=(TOKENS,))
    plan = manager.prepare_forward({manager.admit(): TOKENS})
    x = jnp.asarray(rng.standard_normal((TOKENS, model.spec.hidden_size)), jnp.bfloat16)
    entries, keys = jax.jit(step)(attention, init_cache(schema), plan, x)

    def expected(compressor, numbers):
        kv, gate = (np.asarray(x, np.float64) @ numbers(weight).T for weight in (compressor.kv, compressor.gate))
        bias, norm = np.asarray(compressor.position_bias), np.asarray(compressor.norm, np.float64)
        return reference.entries(kv, gate, bias, norm, inverse_frequencies(rope), 4, model.spec.norm_eps)

    def stored(weight):
        product = unpacked(np.asarray(weight.codes)).astype(np.float32) * nvfp4_factors(weight)
        return product.astype(ml_dtypes.bfloat16).astype(np.float64)

    def before(weight):
        return np.asarray(weight, np.float64)

    compressors = (
        (entries, attention.compressor, plain.compressor),
        (keys, attention.indexer.compressor, plain.indexer.compressor),
    )
    for found, nvfp4, original in compressors:
        found = np.asarray(found)[0]
        np.testing.assert_allclose(found, expected(nvfp4, stored), rtol=0, atol=1e-4)
        exact = expected(original, before)
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert error < 0.15  # rounding the weights alone makes 0.1 of it
