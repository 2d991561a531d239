"""The parts of the computation without a cache, against the golden data of Hugging Face's model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import CompressorInputs, LayerKind, apply_rotary, rotary, tiny_spec
from dsv4_jax.deepseek_v4.full_context import compressed_entries
from dsv4_jax.deepseek_v4.gathered import Source, index_scores, sink_attention, top_entries

SPEC = tiny_spec()
ROPES = {layer.kind: layer.rope for layer in SPEC.layers}
GOLDEN_KINDS = [LayerKind.SWA, LayerKind.CSA, LayerKind.HCA]


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / "dsv4_golden.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def fp32_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("layer", range(3))
def test_attention_is_the_reference_models(layer):
    """Attention over window rows and selected or all entries, then the inverse rotation, equals Hugging Face's."""
    data, kind = golden(), GOLDEN_KINDS[layer]
    prefix = f"L{layer}."
    positions = data["meta.positions_attn"]
    age = positions[:, None] - np.arange(len(data[prefix + "swa_k"]))
    sources = [Source(jnp.asarray(data[prefix + "swa_k"]), jnp.asarray((age >= 0) & (age < 128)))]
    if kind is LayerKind.CSA:
        chosen = data[prefix + "topk_sorted"][positions]
        rows = data[prefix + "compressed"][np.maximum(chosen, 0)]
        sources.append(Source(jnp.asarray(rows), jnp.asarray(chosen >= 0)))
    elif kind is LayerKind.HCA:
        rows = data[prefix + "compressed"]
        seen = np.arange(len(rows)) < (positions[:, None] + 1) // 128
        sources.append(Source(jnp.asarray(rows), jnp.asarray(seen)))

    attended = sink_attention(jnp.asarray(data[prefix + "q"]), sources, jnp.asarray(data[prefix + "sinks"]))

    np.testing.assert_allclose(attended, data[prefix + "attn_out"], rtol=0, atol=1e-5)
    unrotated = apply_rotary(attended, rotary(jnp.asarray(positions), ROPES[kind]), inverse=True)
    np.testing.assert_allclose(unrotated, data[prefix + "attn_out_irope"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "prefix", "expected"),
    [
        (LayerKind.CSA, "L1.", "L1.compressed"),
        (LayerKind.CSA, "L1.idx_", "L1.idx_keys"),
        (LayerKind.HCA, "L2.", "L2.compressed"),
    ],
)
def test_whole_sequence_compression_is_the_reference_models(kind, prefix, expected):
    data = golden()
    whole = data[prefix + "kv"].shape[0] // kind.ratio * kind.ratio
    kv, gate = jnp.asarray(data[prefix + "kv"][:whole]), jnp.asarray(data[prefix + "gate"][:whole])
    bias, norm = jnp.asarray(data[prefix + "ape"]), jnp.asarray(data[prefix + "norm_w"])
    angles = rotary(jnp.arange(0, whole, kind.ratio), ROPES[kind])
    entries = compressed_entries(CompressorInputs(kv, gate, bias, norm, angles), kind, SPEC.norm_eps)
    np.testing.assert_allclose(entries, data[expected], rtol=0, atol=1e-4)


def test_indexer_chooses_what_the_reference_model_chooses():
    data = golden()
    positions = data["meta.positions_attn"]
    heads = data["L1.idx_w"].shape[1]
    scores = index_scores(
        jnp.asarray(data["L1.idx_q"]),
        jnp.asarray(data["L1.idx_w"]) * (128 * heads) ** -0.5,
        jnp.asarray(data["L1.idx_keys"]),
    )
    visible = (positions + 1) // 4
    chosen = np.asarray(top_entries(scores, jnp.asarray(visible), 32))

    seen = np.arange(scores.shape[1]) < visible[:, None]
    np.testing.assert_allclose(np.where(seen, scores, 0), np.where(seen, data["L1.idx_score"], 0), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(_sets(chosen), _sets(data["L1.topk_sorted"][positions]))


def _sets(indices: np.ndarray) -> np.ndarray:
    return np.sort(indices, axis=1)


def test_top_entries_sees_nothing_beyond_visible(rng):
    scores = rng.standard_normal((6, 40)).astype(np.float32)
    visible = np.array([0, 1, 5, 16, 39, 40])
    chosen = np.asarray(top_entries(jnp.asarray(scores), jnp.asarray(visible), 8))
    for row, count in enumerate(visible):
        best = np.argsort(-scores[row, :count], kind="stable")[:8]
        np.testing.assert_array_equal(chosen[row], np.pad(best, (0, 8 - len(best)), constant_values=-1))


def test_query_that_sees_nothing_gets_zeros(rng):
    queries = jnp.asarray(rng.standard_normal((2, 3, 512)), jnp.float32)
    rows = jnp.asarray(rng.standard_normal((5, 512)), jnp.float32)
    mask = jnp.array([[False] * 5, [True] * 5])
    attended = np.asarray(sink_attention(queries, [Source(rows, mask)], jnp.zeros(3)))
    np.testing.assert_array_equal(attended[0], 0)
    assert np.abs(attended[1]).min(axis=-1).max() > 0
