"""Ops under JAX's stricter modes: 64-bit integers, no promotion of ranks or dtypes, no NaN, no leaked tracer."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SPEC, inputs_of, random_tokens, random_weights
from implementations import IMPLEMENTATIONS

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, LayerKind, begin, init_cache

MODES = {
    "x64": functools.partial(jax.enable_x64, True),
    "rank promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "dtype promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "NaN": functools.partial(jax.debug_nans, True),
    "leaks": jax.checking_leaks,
}
FORMATS = CacheFormats("nvfp4", "fp8_ds_mla", "mxfp4", hca_tail="running")


def _step(implementation, cache, plan, weights, brought):
    """A step of every kind of layer, with each of its reads."""
    step, read = begin(cache, plan, implementation=implementation), []
    for layer, arrays in enumerate(brought):
        handle, before = step.layer(layer).window_before()
        inputs = [inputs_of(step.plan, SPEC, layer, weights[layer], arrays, prefix) for prefix in ("", "index_")]
        handle = handle.update(arrays["rows"], *inputs)
        handle, after = handle.window()
        read += [before, after, handle.stored(arrays["rows"])]
        if handle.kind is not LayerKind.SWA:
            handle, every = handle.all_entries(3)
            chosen = jnp.zeros((plan.layout.tokens, 2), jnp.int32)
            handle, entries = handle.entries(chosen)
            read += [every, entries]
        step = handle.step
    return step.end(), read


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_same(rng, mode, implementation):
    schema = CacheSchema(SPEC, FORMATS, slots=2, blocks=4, max_context=256)
    manager, weights = CacheManager(schema, token_buckets=(160,)), random_weights(rng)
    plan = manager.prepare_forward({manager.admit(): 130, manager.admit(): 7})
    brought = random_tokens(rng, plan.layout.tokens)
    made = []
    for context in (contextlib.nullcontext, MODES[mode]):
        with context():
            made.append(jax.jit(functools.partial(_step, implementation))(init_cache(schema), plan, weights, brought))
    jax.tree.map(np.testing.assert_array_equal, *made)
