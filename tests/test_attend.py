"""attend against the golden data, and in every format against float64 over the rows as stored."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import FP32, LAYER, Encoded, HeldRows, assert_attended, plan_of, poisoned, softmax_attention
from golden import GOLDEN, POSITIONS
from implementations import IMPLEMENTATIONS, ops_of

from dsv4_jax import OperandError, Rotary, ops
from dsv4_jax.layout.formats import ENTRY_FORMATS, WINDOW_FORMATS
from dsv4_jax.ops.attend.api import Split, split_of_token
from dsv4_jax.ops.attend.operands import Displaced
from dsv4_jax.ops.operands import Window

EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
PAIRS = list(itertools.product(WINDOW_FORMATS, ENTRY_FORMATS))
HEADS = (8, 16, 32, 64, 128, 3)


@EACH
@pytest.mark.parametrize("layer", range(3))
def test_attention_is_the_reference_models(device, layer, implementation):
    """Every golden query, each a request of its own whose ring ends at it, equals Hugging Face's within 1e-5."""
    prefix, slots = f"L{layer}.", np.arange(len(POSITIONS))
    held = HeldRows(FP32, FP32, ratio=(4, 4, 128)[layer], ring=128, slots=len(slots), blocks=9)
    held.put_window(dict(enumerate(POSITIONS)), Encoded.of(GOLDEN[prefix + "swa_k"], FP32), lambda _, at: at)
    queries, plan = jnp.asarray(GOLDEN[prefix + "q"]), plan_of(slots, POSITIONS, np.ones_like(slots))
    options = {"sinks": jnp.asarray(GOLDEN[prefix + "sinks"]), "dtype": jnp.float32, "implementation": implementation}
    if layer:
        held.table = np.broadcast_to(8 - np.arange(9, dtype=np.int32), (len(slots), 9))  # all share the blocks
        compressed = GOLDEN[prefix + "compressed"]
        entries = np.arange(len(compressed))
        held.put_entries([(0, entry) for entry in entries], Encoded.of(compressed, FP32), entries)
    chosen = jnp.asarray(GOLDEN["L1.topk_sorted"][POSITIONS], jnp.int32) if layer == 1 else None

    attended = held.attend(queries, plan, chosen, 9 if layer else None, **options)

    np.testing.assert_allclose(attended.output, GOLDEN[prefix + "attn_out"], rtol=0, atol=1e-5)


def draw_step(rng, held, heads, count):
    """Decode tokens at the start, inside and at the end of windows, and padding: held rows, the step, what it asks."""
    lasts = {5: 0, 1: 2, 3: 3, 0: 127, 2: 128, 6: 700, 4: 1027}
    held.draw(rng, lasts)
    plan = plan_of(list(lasts), list(lasts.values()), [1] * len(lasts), padding=2)
    indices = [rng.integers(-3, 1 + (last + 9) // held.ratio, size=count) for last in (*lasts.values(), 9, 9)]
    tokens = len(indices)
    queries = jnp.asarray(15 * rng.normal(size=(tokens, heads, 512)), jnp.bfloat16)
    angles = rng.normal(size=(tokens, 32)).astype(np.float32)
    given = {
        "sinks": jnp.asarray(rng.normal(size=heads), jnp.float32),
        "rotary": Rotary(jnp.cos(angles), jnp.sin(angles)),
        "dtype": jnp.float32,
    }
    return lasts, plan, jnp.asarray(np.stack(indices), jnp.int32), queries, given


# Every kernel of the GPU's fast path and the portable ones, and both ways of finding entries.
SANITIZED = [("fp8", "fp8"), ("bf16", "nvfp4"), ("fp8_ds_mla", "fp8_ds_mla"), ("fp8", "bf16"), ("fp32", "nvfp4_static")]


def sanitized(pair):
    """The pair as a parameter, to be run under compute-sanitizer too if it is one of a few."""
    return pytest.param("native", pair, marks=[pytest.mark.sanitize] * (pair in SANITIZED))


SOME = [("fp32", "fp8"), ("fp8", "nvfp4"), ("fp8_ds_mla", "fp8_ds_mla"), ("bf16", "nvfp4_static")]


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(
    ("implementation", "pair"), [sanitized(pair) for pair in PAIRS] + [("reference", pair) for pair in SOME]
)
def test_rows_as_stored(device, rng, implementation, pair, ratio):
    """Indices in any order, twice, below 0 and not visible, more than are visible; what is not seen is NaN."""
    heads = HEADS[(PAIRS.index(pair) + ratio) % len(HEADS)]
    held = HeldRows(WINDOW_FORMATS[pair[0]], ENTRY_FORMATS[pair[1]], ratio=ratio, ring=132 - ratio % 8, slots=8)
    lasts, plan, indices, queries, given = draw_step(rng, held, heads, count=40)
    chosen = indices if ratio == 4 else None

    attended = held.attend(queries, plan, chosen, 6, **given, implementation=implementation)

    exact = device.platform == "cpu" or "fp32" in pair
    for token, (slot, last) in enumerate(lasts.items()):
        rows = held.seen(slot, last, np.arange(6) if chosen is None else indices[token])
        assert_attended(attended, token, queries[token], rows, given["sinks"], given["rotary"], exact=exact)
    assert (np.asarray(attended.output[len(lasts) :]) == 0).all()
    assert (np.asarray(attended.lse[len(lasts) :]) == -np.inf).all()


@pytest.mark.parametrize(
    ("implementation", "name"), [("reference", "fp8"), *(("native", name) for name in WINDOW_FORMATS)]
)
def test_the_window_alone(device, rng, implementation, name):
    """With its rows, and with none: a layer that does not exist gives zeros and -inf, sinks or not."""
    held = HeldRows(WINDOW_FORMATS[name], FP32, ratio=4, ring=128, slots=8)
    lasts, plan, _, queries, given = draw_step(rng, held, 8, count=1)

    attended = held.attend(queries, plan, None, None, **given, implementation=implementation)

    exact = device.platform == "cpu" or name == "fp32"
    for token, (slot, last) in enumerate(lasts.items()):
        rows = held.seen(slot, last, [])
        assert_attended(attended, token, queries[token], rows, given["sinks"], given["rotary"], exact=exact)
    for sinks in (None, given["sinks"]):
        nothing = held.attend(queries, plan, None, None, layer=2, sinks=sinks, implementation=implementation)
        assert (np.asarray(nothing.output, np.float32) == 0).all()
        assert (np.asarray(nothing.lse) == -np.inf).all()


def test_one_visible_entry_and_no_window(device, rng):
    """The output is that entry, whatever the query; with a sink as large as its logit, half of it."""
    held = HeldRows(FP32, FP32, ratio=4, ring=128, slots=2)
    held.draw(rng, {1: 6})
    plan, queries = plan_of([1], [6], [1]), jnp.asarray(rng.normal(size=(1, 8, 512)), jnp.float32)
    indices = jnp.asarray([[7, -1, 0, 1, -5, 2**31 - 1]], jnp.int32)
    attend = functools.partial(held.attend, queries, plan, indices, None, layer=-1, dtype=jnp.float32)
    alone = attend()
    entry = held.seen(1, 6, [0])[-1:]
    np.testing.assert_allclose(alone.output[0], np.broadcast_to(entry, (8, 512)), rtol=0, atol=1e-6)
    half = attend(sinks=alone.lse[0])
    np.testing.assert_allclose(half.output, alone.output / 2, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(half.lse, alone.lse)


def test_parts_merge_by_their_lse(device, rng):
    """Window and half of the entries here, the other half there, the sink once: the same as all at once."""
    held = HeldRows(FP32, ENTRY_FORMATS["bf16"], ratio=4, ring=128, slots=8)
    lasts, plan, indices, queries, given = draw_step(rng, held, 16, count=64)
    attend = functools.partial(held.attend, queries, plan, dtype=jnp.float32)
    whole = attend(indices, None, sinks=given["sinks"])
    first, second = attend(indices[:, :20], None), attend(indices[:, 20:], None, layer=-1)
    lse = np.logaddexp(first.lse, second.lse)
    weights = [np.exp(part.lse - np.logaddexp(lse, given["sinks"])) for part in (first, second)]
    merged = sum(w[..., None] * part.output for w, part in zip(weights, (first, second), strict=True))
    count = len(lasts)
    np.testing.assert_allclose(merged[:count], whole.output[:count], rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse[:count], whole.lse[:count], rtol=0, atol=1e-5)


def test_heads_are_apart(device, rng):
    """A shard of the heads gives what all of them give, bit for bit on the CPU."""
    held = HeldRows(WINDOW_FORMATS["fp8"], ENTRY_FORMATS["fp8"], ratio=4, ring=128, slots=8)
    lasts, plan, indices, queries, given = draw_step(rng, held, 16, count=40)
    whole = held.attend(queries, plan, indices, None, **given)
    sinks = given.pop("sinks")
    shard = held.attend(queries[:, 8:], plan, indices, None, sinks=sinks[8:], **given)
    atol = 0 if device.platform == "cpu" else 1e-5
    np.testing.assert_allclose(shard.output[: len(lasts)], whole.output[: len(lasts), 8:], rtol=0, atol=atol)
    np.testing.assert_allclose(shard.lse[: len(lasts)], whole.lse[: len(lasts), 8:], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("window_name", "entries_name"),
    [pytest.param("fp8", "fp8", marks=pytest.mark.sanitize), ("bf16", "nvfp4"), ("fp32", "fp32")],
)
@pytest.mark.parametrize("requests", [1, 2])
def test_a_million_tokens(device, rng, window_name, entries_name, requests):
    """HCA: as many entries as there are blocks, shared by few tokens: a GPU gives parts of them to several clusters."""
    last, entries = 1_048_575, 4200
    held = HeldRows(WINDOW_FORMATS[window_name], ENTRY_FORMATS[entries_name], ratio=128, ring=128, slots=2, blocks=4200)
    held.draw(rng, dict.fromkeys(range(requests), last), entries=4200)
    plan = plan_of(range(requests), [last] * requests, [1] * requests)
    queries = jnp.asarray(15 * rng.normal(size=(requests, 64, 512)), jnp.bfloat16)

    attended = held.attend(queries, plan, None, entries)
    again = held.attend(queries, plan, None, entries)

    exact = device.platform == "cpu" or window_name == "fp32"
    for slot in range(requests):
        rows = held.seen(slot, last, np.arange(entries))
        assert_attended(attended, slot, queries[slot], rows, None, None, exact=exact)
        if device.platform == "cpu":  # sums of this many rows lose nothing: two units in the last place of the log
            _, lse = softmax_attention(queries[slot], rows, None, None, slot)
            np.testing.assert_allclose(attended.lse[slot], lse, rtol=0, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, attended, again)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 16), (8, 8), (20, 4), (60, 2), (140, 1)])
def test_however_many_blocks_share_a_token(device, rng, tokens, blocks):
    """A chunk of any number of tokens within a deep ring, each with 512 entries of its own: ten tiles of rows."""
    start, heads, count = 2200, 8, 512
    assert split_of_token(tokens, heads, 128, count)[:2] == (blocks, 1)
    held = HeldRows(
        WINDOW_FORMATS["bf16"], ENTRY_FORMATS["fp8"], ratio=4, ring=128 + tokens, slots=2, blocks=-(-2400 // 128)
    )
    held.draw(rng, {1: start + tokens - 1})
    indices = np.stack([rng.permutation((start + token + 1) // 4)[:count] for token in range(tokens)])
    queries = jnp.asarray(15 * rng.normal(size=(tokens, heads, 512)), jnp.bfloat16)

    attended = held.attend(queries, plan_of([1], [start], [tokens]), jnp.asarray(indices, jnp.int32), None)

    for token in {0, tokens // 2, tokens - 1}:
        rows = held.seen(1, start + token, indices[token])
        assert_attended(attended, token, queries[token], rows, None, None, exact=False)


@pytest.mark.parametrize(
    ("tokens", "heads", "count", "split"),
    [
        (1, 64, 512, Split(16, 1, 16)),  # every 16 heads with blocks of their own
        (1, 64, 0, Split(2, 1, 64)),  # the window's two tiles
        (8, 64, 512, Split(8, 1, 64)),  # seven clusters of 16 blocks run at once
        (64, 64, 512, Split(2, 1, 64)),
        (67, 64, 512, Split(1, 1, 64)),
        (64, 128, 1024, Split(1, 1, 64)),
        (1, 64, 8192, Split(16, 5, 64)),  # 130 tiles: two for each of 80 blocks
        (8, 64, 8192, Split(2, 8, 64)),
        (64, 64, 8192, Split(2, 1, 64)),
    ],
)
def test_how_a_token_is_split(tokens, heads, count, split):
    assert split_of_token(tokens, heads, 128, count) == split


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        ("reference", "fp8"),
        pytest.param("native", "fp8", marks=pytest.mark.sanitize),
        *(("native", name) for name in WINDOW_FORMATS if name != "fp8"),
    ],
)
def test_displaced_rows(device, rng, implementation, name):
    """A chunk longer than the ring: its early tokens see rows that the ring has lost, where they were saved."""
    window_format, start, tokens, slot = WINDOW_FORMATS[name], 300, 200, 1
    last = start + tokens - 1
    rows = Encoded.of((0.1 * rng.normal(size=(last + 1, 512))).astype(np.float32), window_format)
    held = HeldRows(window_format, FP32, ratio=4, ring=128, slots=2)
    held.put_window({slot: last}, rows, lambda _, at: at)
    # Only what the ring has lost is saved; request 1's row of position p is 127 * 2 + p - start.
    count = 127 * 2 + tokens
    at = np.arange(start - 127, last - 128 + 1)
    saved = 127 * 2 + at - start
    page = poisoned(window_format, 1, 1, count)
    rows.put(page[0], count, np.zeros_like(at), saved, at)
    positions = np.full(count, -1, np.int32)
    positions[saved] = at
    queries = jnp.asarray(15 * rng.normal(size=(tokens, 2, 512)), jnp.bfloat16)

    attended = held.attend(
        queries, plan_of([0, slot], [50, start], [0, tokens]), None, None, dtype=jnp.float32,
        displaced=Displaced(page, positions), implementation=implementation,
    )  # fmt: skip

    exact = device.platform == "cpu" or name == "fp32"
    for token in (*range(0, tokens, 23), tokens - 1):
        seen = rows.values[start + token - 127 : start + token + 1]
        assert_attended(attended, token, queries[token], seen, None, None, exact=exact)


def test_queries_and_outputs_in_either_dtype(device, rng):
    """bf16 queries are their fp32 values; a bf16 output is the fp32 one rounded."""
    held = HeldRows(WINDOW_FORMATS["fp8"], ENTRY_FORMATS["fp8"], ratio=4, ring=128, slots=8)
    _, plan, indices, queries, given = draw_step(rng, held, 64, count=40)
    exact = held.attend(queries.astype(jnp.float32), plan, indices, None, **given)
    rounded = held.attend(queries, plan, indices, None, **given | {"dtype": jnp.bfloat16})
    np.testing.assert_array_equal(rounded.output, exact.output.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded.lse, exact.lse)


WRONG = {
    "queries": (lambda given: given | {"queries": given["queries"][..., :64]}, r"queries has shape \[3, 8, 64\]"),
    "no heads": (lambda given: given | {"queries": given["queries"][:, :0]}, "queries have no heads"),
    "indices": (lambda given: given | {"indices": given["indices"].astype(np.int16)}, "indices has dtype int16"),
    "sinks": (lambda given: given | {"sinks": np.zeros(3, np.float32)}, r"sinks has shape \[3\], expected \[8\]"),
    "size": (lambda given: given | {"size": 200}, "a window of 200 asked of a ring of 128"),
    "scale": (lambda given: given | {"scale": "large"}, "scale is 'large', expected a number"),
    "dtype": (lambda given: given | {"dtype": jnp.float16}, "dtype is float16"),
    "ratio": (lambda given: given | {"ratio": 3}, "ratio is 3"),
    "pool": (lambda given: given | {"pool": given["pool"][..., :-1]}, "pool has shape"),
    "window": (lambda given: given | {"window_format": ENTRY_FORMATS["nvfp4"]}, "windows are not stored as nvfp4"),
    "displaced": (
        lambda given: given | {"displaced": Displaced(np.zeros((1, 1, 5, 512), np.float32), np.zeros(5, np.int32))},
        r"displaced.positions has shape \[5\], expected \[384\]",
    ),
}


def _operands(rng):
    held = HeldRows(FP32, FP32, ratio=4, ring=128, slots=3)
    held.draw(rng, {0: 5, 1: 300, 2: 9})
    return {
        "window": held.window,
        "pool": held.pool,
        "block_table": held.table,
        "queries": jnp.zeros((3, 8, 512)),
        "indices": jnp.zeros((3, 4), jnp.int32),
        "plan": plan_of([0, 1, 2], [5, 300, 9], [1, 1, 1]),
        "layer": LAYER,
        "kind_layer": LAYER,
        "ratio": 4,
        "window_format": FP32,
        "entry_format": FP32,
    }


@EACH
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(rng, implementation, what):
    change, message = WRONG[what]
    with pytest.raises(OperandError, match=f"attend_entries: {message}"):
        jax.eval_shape(lambda: ops_of(implementation).attend_entries(**change(_operands(rng))))


@EACH
def test_derivatives_and_vmap_are_refused(rng, implementation):
    given = _operands(rng)
    queries = given.pop("queries")

    def loss(queries):
        return jnp.sum(ops_of(implementation).attend_entries(queries=queries, **given)[2].lse)

    with pytest.raises(OperandError, match="attend_entries has no derivative"):
        jax.grad(loss)(queries)
    with pytest.raises(OperandError, match=r"attend_entries has no rule for jax\.vmap"):
        jax.vmap(loss)(queries[None])


def test_pools_come_back_as_they_were(rng):
    given = _operands(rng)
    window, pool, _ = ops.attend_entries(**given)
    assert isinstance(window, Window)
    jax.tree.map(np.testing.assert_array_equal, (window, pool), (given["window"], given["pool"]))
