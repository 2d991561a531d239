"""JAX's strict modes: every op and read traces, runs and stores the same bytes under each of them.

A prefill by separate ops, then a decode step by one op a layer, with all reads between, in both implementations.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SPEC, Driver, assert_same_bytes, inputs_of, random_tokens, random_weights, write_op_by_op

from dsv4_jax import (
    CacheFormats,
    LayerKind,
    RawRows,
    apply_rotary,
    begin,
    token_rotary,
)

MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "NaNs raise": lambda: jax.debug_nans(True),
    "leaks raise": jax.checking_leaks,
}


def read(handle, arrays):
    """Every read of a layer: (handle, results)."""
    handle, window = handle.window(dtype=jnp.float32)
    results = [window, handle.stored(arrays["rows"])]
    if handle.kind is not LayerKind.SWA:
        indices = jnp.arange(-1, 5, dtype=jnp.int32)[None, :] + jnp.zeros((arrays["rows"].shape[0], 1), jnp.int32)
        handle, chosen = handle.entries(indices)
        handle, entries = handle.all_entries(40, dtype=jnp.float32)
        results += [handle.visible, chosen, entries]
    if handle.kind is LayerKind.CSA:
        handle, keys = handle.all_keys(40)
        results += [keys, handle.transform_query(jnp.ones((3, 128), jnp.bfloat16))]
    return handle, results


def step(cache, plan, weights, brought, stopped, *, implementation, separate_ops):
    """One step that writes and reads every layer; `separate_ops` chooses how it writes."""
    results = []
    step = begin(cache, plan.stop(stopped).rebase(plan.request_start), implementation=implementation)
    for layer, arrays in enumerate(brought):
        angles = token_rotary(step.plan, SPEC.layers[layer].rope)
        compressor = inputs_of(step.plan, SPEC, layer, weights[layer], arrays)
        indexer = inputs_of(step.plan, SPEC, layer, weights[layer], arrays, "index_")
        handle, before = step.layer(layer).window_before()
        results.append(before)
        raw = RawRows(arrays["rows"], jnp.ones(512, jnp.float32), angles)
        if separate_ops:
            rows = apply_rotary(handle.normalize(raw), angles, inverse=True)
            handle = write_op_by_op(handle, rows, compressor, indexer)
        else:
            handle = handle.update(raw, compressor, indexer)
        handle, rows = read(handle, arrays)
        results.append(rows)
        step = handle.step
    return step.end(), results


def run(seed, implementation, hca_tail, modes=()):
    """What the scenario stores and reads, by name; the device's part under the given modes."""
    rng = np.random.default_rng(seed)
    driver = Driver(random_weights(rng), CacheFormats(hca_tail=hca_tail), slots=3, blocks=6, buckets=(4, 140))
    requests = [driver.admit(random_tokens(rng, 160)) for _ in range(2)]
    found = {}
    for counts, separate_ops in (((127, 7), True), ((1, 1), False)):
        plan, brought = driver.prepare(dict(zip(requests, counts, strict=True)))
        brought = jax.tree.map(jnp.nan_to_num, brought)  # a read of padding that is NaN gives NaN, as it should
        run_step = jax.jit(functools.partial(step, implementation=implementation, separate_ops=separate_ops))
        stopped = np.zeros(plan.layout.requests, bool)
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(MODES[mode]())
            driver.cache, results = run_step(driver.cache, plan, driver.weights, brought, stopped)
        for index, array in enumerate(jax.tree.leaves(results)):
            found[f"read {index} of the step of {sum(counts)} tokens"] = np.asarray(array)
    return found | {name: np.asarray(array) for name, array in driver.cache.arrays.items()}


@functools.cache
def as_usual(seed, implementation, hca_tail):
    return run(seed, implementation, hca_tail)


@pytest.mark.parametrize(
    ("implementation", "hca_tail", "modes"),
    [
        pytest.param("native", "rows", ("x64",), id="native, x64"),
        pytest.param("native", "rows", tuple(mode for mode in MODES if mode != "x64"), id="native, all that raise"),
        pytest.param("reference", "running", tuple(MODES), id="reference, all of them"),
    ],
)
def test_a_mode_changes_no_byte(seed, implementation, hca_tail, modes):
    expected = as_usual(seed, implementation, hca_tail)
    found = run(seed, implementation, hca_tail, modes)
    assert found.keys() == expected.keys()
    assert_same_bytes(expected, found, " and ".join(modes))
