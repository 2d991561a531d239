"""The example stack: its parts against the golden data, and the cached model against the one without a cache."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import CacheFormats, LayerKind, apply_rotary, tiny_spec
from dsv4_jax.example.attention import Source, index_scores, sink_attention, top_entries
from dsv4_jax.example.full_context import compressed_entries
from dsv4_jax.example.layer import Compressed
from dsv4_jax.example.serve import Request, Served, Server
from dsv4_jax.example.text import load_text, text_requests
from dsv4_jax.example.verify import Verification, verify
from dsv4_jax.example.weights import CompressorWeights, StackWeights, init_weights
from dsv4_jax.spec.rotary import rotary

SPEC = tiny_spec()
ROPES = {layer.kind: layer.rope for layer in SPEC.layers}
GOLDEN_KINDS = [LayerKind.SWA, LayerKind.CSA, LayerKind.HCA]
EXACT = CacheFormats("fp32", "fp32", "fp32")


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
    made = Compressed(jnp.asarray(data[prefix + "kv"][:whole]), jnp.asarray(data[prefix + "gate"][:whole]))
    weights = CompressorWeights(None, None, jnp.asarray(data[prefix + "ape"]), jnp.asarray(data[prefix + "norm_w"]))
    entries = compressed_entries(weights, made, kind, ROPES[kind], SPEC)
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


def make_server(formats: CacheFormats, seed: int, *, chunk: int = 96, implementation: str = "native") -> Server:
    options = {"slots": 2, "max_context": 384, "chunk": chunk, "implementation": implementation, "record": True}
    return Server(init_weights(SPEC, seed), SPEC, formats, **options)


def make_requests(seed: int, *, greedy: bool = False) -> list[Request]:
    """Three, one more than there are slots, so that one slot is used twice."""
    return text_requests(load_text(), 3, longest_prompt=330, new_tokens=12, seed=seed, greedy=greedy)


@functools.cache
def exact_server(seed: int) -> Server:
    """One server for many tests, which thereby also use its slots and blocks again and again."""
    return make_server(EXACT, seed)


@functools.cache
def exact_run(seed: int) -> tuple[Served, ...]:
    return tuple(exact_server(seed).serve(make_requests(seed)))


def check(server: Server, served: Sequence[Served], weights: StackWeights | None = None) -> Verification:
    """What verification finds; with other weights than the server's if they are given."""
    schema = server.schema
    weights = server.weights if weights is None else weights
    result = verify(weights, schema.spec, schema.formats, served, max_context=schema.max_context)
    print(result)
    return result


@pytest.mark.parametrize(
    ("formats", "implementation"),
    [
        (EXACT, "native"),
        (CacheFormats(), "native"),
        (CacheFormats("bf16", "fp8", "bf16", keys_hadamard=True), "native"),
        (CacheFormats(), "reference"),
    ],
    ids=["exact", "default", "hadamard", "default-reference"],
)
def test_cached_model_agrees_with_full_context(formats, implementation, seed):
    """Chunked prefill mixed with decode, a slot that is used twice, any format: the same logits as without a cache."""
    server = make_server(formats, seed, implementation=implementation)
    result = check(server, server.serve(make_requests(seed)))
    assert result.positions >= 3 * 12
    assert result.passed


@pytest.mark.parametrize("chunk", [2, 1000], ids=["token_by_token", "one_shot"])
def test_logits_do_not_depend_on_the_chunks(chunk, seed):
    """Token by token, or all prompts at once: the last logits are those of the run in ragged chunks."""
    served = make_server(EXACT, seed, chunk=chunk).serve(make_requests(seed))
    for one, other in zip(served, exact_run(seed), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(_last_logits(one), _last_logits(other), rtol=0, atol=1e-4)


def _last_logits(one) -> np.ndarray:
    record = one.steps[-1]
    return np.asarray(record.logits)[record.row]


def test_requests_are_kept_apart(seed):
    """A request served alone, in a slot that others have used, says what it says in company."""
    served = exact_run(seed)
    assert len({one.slot for one in served}) == 2  # so the third request came into a used slot
    (alone,) = exact_server(seed).serve([served[2].request])
    np.testing.assert_allclose(_last_logits(alone), _last_logits(served[2]), rtol=0, atol=1e-4)


def test_greedy_tokens_are_the_likeliest(seed):
    for one in exact_server(seed).serve(make_requests(seed, greedy=True)):
        prompt = len(one.request.prompt)
        logits = {record.first + record.tokens - 1: np.asarray(record.logits)[record.row] for record in one.steps}
        assert len(one.tokens) == one.total
        for position in range(prompt, one.total):
            assert one.tokens[position] == logits[position - 1].argmax()


def test_one_compilation_per_bucket(seed):
    exact_run(seed)
    assert dict(exact_server(seed).compiles) == {2: 1, 96: 1}


@pytest.mark.parametrize("component", ["csa_entries", "window", "csa_tail", "hca_tail", "csa_keys"])
def test_verification_sees_what_was_lost(component, seed, monkeypatch):
    """A row of a tail or window, or a few entries or keys, lost between two steps, are found."""
    server = exact_server(seed)
    # 300 tokens in chunks of 96: what is lost at position 192 was still to be pooled, attended to or chosen from.
    request = Request(load_text()[:300].astype(np.int32), 12)
    run, steps = server._step, 0

    def losing(weights, cache, plan, tokens):
        nonlocal steps
        steps += 1
        if steps == 3:
            slot, start = int(plan.request_slot[0]), int(plan.request_start[0])
            assert start == 192
            pool = cache.arrays[component]
            where = {
                "window": (1, slot, (start - 1) % 128),
                "csa_entries": (0, cache.block_table[slot, 0], slice(8)),
                "csa_keys": (0, cache.block_table[slot, 0], slice(8)),
                "csa_tail": (0, slot, 0, (start - 1) % 8),
                "hca_tail": (0, slot, 0, (start - 1) % 128),
            }[component]
            cache = cache.with_arrays({component: pool.at[where].set(0)})
        return run(weights, cache, plan, tokens)

    monkeypatch.setattr(server, "_step", losing)
    assert not check(server, server.serve([request])).passed


@pytest.mark.parametrize("leaf", ["sinks", "ape", "index_ape", "row_norm", "entry_norm", "index_head"])
def test_every_weight_has_an_effect(leaf, seed):
    """A model that leaves a weight out is not the same model: verification against it fails."""
    server = exact_server(seed)
    weights, layer = server.weights, server.weights.layers[1]
    compressor, indexer = layer.compressor, layer.indexer
    changed = {
        "sinks": layer._replace(sinks=jnp.full_like(layer.sinks, -1e9)),
        "ape": layer._replace(compressor=compressor._replace(position_bias=jnp.zeros_like(compressor.position_bias))),
        "index_ape": layer._replace(
            indexer=indexer._replace(
                keys=indexer.keys._replace(position_bias=jnp.zeros_like(indexer.keys.position_bias))
            )
        ),
        "row_norm": layer._replace(row_norm=jnp.ones_like(layer.row_norm)),
        "entry_norm": layer._replace(compressor=compressor._replace(norm=jnp.ones_like(compressor.norm))),
        "index_head": layer._replace(indexer=indexer._replace(head=jnp.ones_like(indexer.head))),
    }[leaf]
    other = weights._replace(layers=(weights.layers[0], changed, *weights.layers[2:]))
    assert not check(server, exact_run(seed), other).passed


@pytest.mark.parametrize("defect", ["repeated", "missing", "future"])
def test_verification_sees_an_impossible_choice(defect, seed):
    one = exact_run(seed)[0]
    record = one.steps[-1]
    selected = np.array(record.selected)
    chosen = selected[0, record.column]
    assert (chosen >= 0).all()  # by the end there are more entries than the indexer may choose
    chosen[0] = {"repeated": chosen[1], "missing": -1, "future": one.total // 4}[defect]
    steps = [*one.steps[:-1], record._replace(selected=selected)]
    result = check(exact_server(seed), [dataclasses.replace(one, steps=steps)])
    assert result.malformed == 1
    assert not result.passed


def test_verification_sees_nan(seed):
    one, *others = exact_run(seed)
    steps = [one.steps[0]._replace(logits=np.full_like(one.steps[0].logits, np.nan)), *one.steps[1:]]
    assert not check(exact_server(seed), [dataclasses.replace(one, steps=steps), *others]).passed


def test_text_requests(tmp_path, seed):
    """Each request reads on from its own place, and from the start again after the end."""
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)))
    requests = text_requests(load_text(path), 4, longest_prompt=70, new_tokens=50, seed=seed)
    for index, request in enumerate(requests):
        assert 30 <= len(request.prompt) <= 70
        tokens = np.concatenate([request.prompt, request.continuation])
        np.testing.assert_array_equal(tokens, (25 * index + np.arange(len(tokens))) % 100)
        assert len(request.continuation) == request.new_tokens == 50


def test_empty_text_is_refused(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(ValueError, match="empty"):
        load_text(path)
