"""The cache against Hugging Face's implementation, for every way of cutting the sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDEN, META, POSITIONS, golden_attention, golden_tokens, golden_weights
from harness import SPEC, Driver, inputs_of, random_chunks

from dsv4_jax import PROFILES, begin

TOKENS, PREFILL = META["seq"], META["prefill"]

CHUNKS = {
    "one shot": lambda rng: [TOKENS],
    "prefill, then decode": lambda rng: [PREFILL] + [1] * (TOKENS - PREFILL),
    "ragged": lambda rng: random_chunks(rng, TOKENS, 200),
    "decode only": lambda rng: [1] * TOKENS,
}


def _step_and_read(cache, plan, weights, brought):
    """A step that also hands out what its tokens attend to, everything float32."""
    step = begin(cache, plan)
    plan = step.plan
    seen = []
    topk = jnp.asarray(GOLDEN["L1.topk_sorted"])[jnp.maximum(plan.token_position, 0)]
    for layer, arrays in enumerate(brought):
        handle = step.layer(layer)
        compressor = inputs_of(plan, SPEC, layer, weights[layer], arrays)
        indexer = inputs_of(plan, SPEC, layer, weights[layer], arrays, "index_")
        handle, before = handle.window_before(dtype=jnp.float32)
        own = handle.stored(arrays["rows"], dtype=jnp.float32)
        handle = handle.update(arrays["rows"], compressor, indexer)
        entries = None
        if layer == 1:
            handle, entries = handle.entries(topk, dtype=jnp.float32)
        elif layer == 2:
            handle, entries = handle.all_entries(6, dtype=jnp.float32)
        seen.append((before, own, entries))
        step = handle.step
    return step.end(), seen


_STEP = jax.jit(_step_and_read, donate_argnums=0)
"""One, so that steps of equal shapes are compiled once for all ways of cutting."""


def _check_attention(seen, start: int, count: int) -> None:
    for golden_row, position in enumerate(POSITIONS):
        if not start <= position < start + count:
            continue
        own_index = position - start
        for layer, (before, own, entries) in enumerate(seen):
            ages = position - np.asarray(before.positions[0])
            old = np.asarray(before.values[0])[np.asarray(before.valid[0]) & (ages < 128)]
            new = np.asarray(own)[max(0, own_index - 127) : own_index + 1]
            assert len(old) + len(new) == min(position + 1, 128)
            keys = [old, new]
            if layer == 1:
                keys.append(np.asarray(entries.values[own_index])[np.asarray(entries.valid[own_index])])
            elif layer == 2:
                keys.append(np.asarray(entries.values[0])[: (position + 1) // 128])
            got = golden_attention(layer, golden_row, np.concatenate(keys))
            expected = GOLDEN[f"L{layer}.attn_out"][golden_row]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5, err_msg=f"layer {layer}, position {position}")


@pytest.mark.parametrize(
    ("name", "hca_tail"), [*((name, "rows") for name in CHUNKS), ("ragged", "running"), ("decode only", "running")]
)
def test_entries_keys_tails_window_and_attention(device, rng, name, hca_tail):
    chunks = CHUNKS[name](rng)
    formats = dataclasses.replace(PROFILES["exact"], hca_tail=hca_tail)
    driver = Driver(golden_weights(), formats, slots=2, blocks=8)
    driver._step = _STEP
    request = driver.admit(golden_tokens())

    start = 0
    for count in chunks:
        driver.feed({request: count})
        driver.cache, seen = driver.cache
        _check_attention(seen, start, count)
        start += count
        if start in (PREFILL, TOKENS):
            _check_state(driver, request, "prefill" if start == PREFILL else "final", start)

    stored = driver.stored(request)
    for pool, name in (("csa_entries", "L1.compressed"), ("csa_keys", "L1.idx_keys"), ("hca_entries", "L2.compressed")):
        expected = GOLDEN[name]
        rows = stored[pool][0].reshape(-1, expected.shape[1])
        np.testing.assert_allclose(rows[: len(expected)], expected, rtol=0, atol=1e-5, err_msg=pool)


def _check_state(driver: Driver, request: int, tag: str, length: int) -> None:
    """Tails and window against Hugging Face's state, exactly."""
    stored = driver.stored(request)
    for layer in range(3):
        ring = stored["window"][layer]
        for position in range(length - 128, length):
            assert stored["window_positions"][layer, position % 128] == position
            np.testing.assert_array_equal(ring[position % 128], GOLDEN[f"L{layer}.swa_k"][position])

    state = f"state.{tag}."
    for pool, layer, name, ape, width in (
        ("csa_tail", 1, "compressor", "L1.ape", 512),
        ("csa_key_tail", 1, "indexer", "L1.idx_ape", 128),
        ("hca_tail", 2, "compressor", "L2.ape", 512),
    ):
        if len(stored[pool][0]) == 3:  # running
            continue
        kv, score = stored[pool][0]
        ratio = 4 if layer == 1 else 128
        open_kv = GOLDEN[f"{state}L{layer}.buffer_kv.{name}"]
        open_score = GOLDEN[f"{state}L{layer}.buffer_gate.{name}"] + GOLDEN[ape][: len(open_kv)]
        assert len(open_kv) == length % ratio
        first_current = 8 if layer == 1 else 0
        current = slice(first_current, first_current + len(open_kv))
        np.testing.assert_array_equal(kv[current], open_kv[:, -width:])
        np.testing.assert_array_equal(score[current], open_score[:, -width:])
        if layer == 1:
            open_row, previous_row = (length // 4) % 2 * 4, (length // 4 + 1) % 2 * 4
            np.testing.assert_array_equal(kv[open_row : open_row + len(open_kv)], open_kv[:, :width])
            np.testing.assert_array_equal(score[open_row : open_row + len(open_kv)], open_score[:, :width])
            previous = slice(previous_row, previous_row + 4)
            np.testing.assert_array_equal(kv[previous], GOLDEN[f"{state}L1.overlap_kv.{name}"])
            np.testing.assert_array_equal(score[previous], GOLDEN[f"{state}L1.overlap_gate.{name}"])
