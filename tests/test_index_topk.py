"""index_topk: scores against float64 on dequantized keys and rounded queries, and a choice that is exactly the best of
them, whatever the format, the batch and the cut into steps."""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import GOLDEN, META, POSITIONS, golden_tokens, golden_weights
from harness import SPEC, Driver, reader
from implementations import IMPLEMENTATIONS, ops_of

from dsv4_jax import PROFILES, CacheFormats, OperandError, StepError, begin, ops
from dsv4_jax.cache.errors import WrongLayerKind
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import KEY_FORMATS
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.ops.index.api import slab_of

EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
TOLERANCE = 2.0**-10


@dataclasses.dataclass
class Case:
    """Keys in shuffled blocks of two slots of three; the other blocks and the other layer hold 0xFF bytes."""

    format: object
    hadamard: bool
    keys: dict  # slot -> float64 [entries, 128], as stored
    pool: np.ndarray  # of 2 layers; ours is 1
    table: np.ndarray
    pages: dict  # slot -> blocks

    def run(self, plan, queries, weights, k, *, layer=1, scores=False, implementation="native"):
        function = jax.jit(
            functools.partial(
                ops_of(implementation).index_topk, format=self.format, hadamard=self.hadamard, k=k, scores=scores
            )
        )
        pool, *made = function(self.pool, self.table, plan, queries, weights, layer)
        assert np.asarray(pool).tobytes() == self.pool.tobytes()
        return [np.asarray(array) for array in made]


def pages_of(rows, format):
    """[rows, 128] -> pages of 32 rows and what they hold, float64."""
    if not format.quantized:
        stored = rows.astype(format.dtype)
        return stored.reshape(-1, 32, 128), stored.astype(np.float64)
    page = ops.quantize(jnp.asarray(rows), format=format)
    stored = np.asarray(ops.dequantize(page, format=format, rows=len(rows), dtype=jnp.float32), np.float64)
    page, split = np.asarray(page), len(rows) * format.data_bytes
    parts = [part.reshape(len(rows) // 32, -1) for part in (page[:split], page[split:])]
    return np.concatenate(parts, axis=1), stored


def case_of(rng, name, *, entries=(640, 320), hadamard=False, duplicated=False, binades=0):
    """Keys of very different sizes, over so many `binades` more; with `duplicated` every one comes several times."""
    format, keys, pages = KEY_FORMATS[name], {}, {}
    blocks = [-(-count // 32) for count in entries]
    order = rng.permutation(sum(blocks) + 3)
    pool = np.full((2, len(order), *format.page_shape(32)), 0xFF, np.uint8)
    if not format.quantized:
        pool = np.full(pool.shape, np.nan, format.dtype)
    table = np.full((3, max(blocks) + 1), -1, np.int32)
    for slot, count in zip((2, 0), blocks, strict=True):
        rows = rng.normal(size=(count * 32, 128)) * np.exp(rng.normal(size=(count * 32, 1)))
        rows *= 2.0 ** rng.uniform(-binades / 2, binades / 2, size=(count * 32, 1))
        if duplicated:
            rows = rows[rng.integers(0, 40, count * 32)]
        stored, keys[slot] = pages_of(rows.astype(np.float32), format)
        pages[slot], order = order[:count], order[count:]
        pool[1, pages[slot]], table[slot, :count] = stored, pages[slot]
    return Case(format, hadamard, keys, pool, table, pages)


def plan_of(starts, counts, tokens=None):
    """Tokens of the requests in slots 2 and 0, with padding."""
    layout = PlanLayout(sum(counts) + 3 if tokens is None else tokens, 2)
    return build_plan(layout, [2, 0], starts, counts, [False, False])


def queries_of(rng, tokens, heads, dtype=np.float32):
    queries = rng.normal(size=(tokens, heads, 128)) * np.exp(rng.normal(size=(tokens, heads, 1)))
    return queries.astype(dtype), (rng.normal(size=(tokens, heads)) * 0.1).astype(np.float32)


def rounded(queries, case):
    """Queries as the op's definition rounds them, float64."""
    x = np.asarray(queries, np.float32)
    if case.hadamard:
        x = np.asarray(ops.hadamard_transform(jnp.asarray(x)))
    if case.format.name == "fp32":
        return x.astype(np.float64)
    if case.format.name == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    halves = case.format.name.startswith("nvfp4")
    amax = np.clip(np.abs(x).max(-1, keepdims=True), 1e-4, 2.0**120).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(amax * (8 if halves else 1)))
    kind = np.float16 if halves else ml_dtypes.float8_e4m3fn
    return (x / scale).astype(kind).astype(np.float64) * scale


def check_scores(case, plan, queries, weights, everything):
    """All scores of every token: within the tolerance of float64. Returns how many tokens saw entries."""
    ids, scores = everything
    exact, tokens = rounded(queries, case), 0
    for token, (slot, position) in enumerate(zip(plan.token_slot, plan.token_position, strict=True)):
        visible = (position + 1) // 4 if slot >= 0 else 0
        np.testing.assert_array_equal(ids[token, :visible], np.arange(visible))
        assert np.all(ids[token, visible:] == -1)
        assert np.all(scores[token, visible:] == -np.inf)
        if visible:
            products = np.maximum(exact[token] @ case.keys[slot][:visible].T, 0)
            parts = weights[token].astype(np.float64)[:, None] * products
            error = np.abs(scores[token, :visible] - parts.sum(0)) / (np.abs(parts).sum(0) + 1e-30)
            assert error.max() <= TOLERANCE, f"token {token}, entry {error.argmax()}: {error.max()}"
            tokens += 1
    return tokens


def best(scores, k):
    """The exact choice: by score, NaN last, then by id; ascending."""
    scores = scores + 0.0
    rank = np.lexsort((np.arange(len(scores)), np.where(np.isnan(scores), 0, -scores), np.isnan(scores)))
    return np.sort(rank[:k])


def check_choice(chosen, everything, k):
    """The chosen entries are exactly the best of the scores, which come along unchanged."""
    ids, scores = chosen
    for token, all_scores in enumerate(everything[1]):
        visible = int((everything[0][token] >= 0).sum())
        expected = best(all_scores[:visible], k)
        np.testing.assert_array_equal(ids[token], np.pad(expected, (0, k - len(expected)), constant_values=-1))
        np.testing.assert_array_equal(scores[token, : len(expected)], all_scores[expected])
        assert np.all(scores[token, len(expected) :] == -np.inf)


def check(case, rng, starts, counts, *, heads, k, dtype=np.float32, implementation="native"):
    """Scores, and the choice of k with and without them."""
    plan = plan_of(starts, counts)
    queries, weights = queries_of(rng, plan.layout.tokens, heads, dtype)
    run = functools.partial(case.run, plan, queries, weights, implementation=implementation)
    everything = run(case.table.shape[1] * 32, scores=True)
    assert check_scores(case, plan, queries, weights, everything) == sum(counts)
    chosen = run(k, scores=True)
    check_choice(chosen, everything, k)
    if implementation == "native":
        np.testing.assert_array_equal(run(k)[0], chosen[0])


@pytest.mark.parametrize("implementation", [pytest.param("native", marks=pytest.mark.sanitize), "reference"])
@pytest.mark.parametrize("name", KEY_FORMATS)
def test_scores_and_choice(device, rng, name, implementation):
    check(case_of(rng, name, entries=(352, 64)), rng, [1350, 90], [5, 7], heads=20, k=24, implementation=implementation)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "native") for name in KEY_FORMATS), ("mxfp4", "reference")]
)
def test_transformed_keys(device, rng, name, implementation):
    case = case_of(rng, name, hadamard=True)
    check(case, rng, [2511, 1200], [1, 1], heads=64, k=512, dtype=ml_dtypes.bfloat16, implementation=implementation)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "bf16"])
def test_more_heads_than_a_fast_kernel_takes(device, rng, name):
    check(case_of(rng, name, hadamard=True), rng, [2500, 900], [2, 3], heads=70, k=100)


@EACH
def test_equal_scores_take_the_lowest_entries(device, rng, implementation):
    check(
        case_of(rng, "mxfp4", duplicated=True), rng, [2500, 1100], [4, 3], heads=8, k=77, implementation=implementation
    )


def test_zeros_of_both_signs_are_equal(device, rng):
    case, plan = case_of(rng, "fp8"), plan_of([2500, 1100], [2, 2])
    queries, weights = queries_of(rng, plan.layout.tokens, 8)
    for sign in (1, -1):
        ids, scores = case.run(plan, 0 * queries, sign * np.abs(weights), 40, scores=True)
        assert np.all(ids[:4] == np.arange(40))
        assert np.all(scores[:4] == 0)


@EACH
def test_nan_scores_and_missing_blocks_come_last(device, rng, implementation):
    case, plan = case_of(rng, "bf16"), plan_of([2399, 639], [1, 1])
    case.pool[1, case.pages[2][3], 7] = np.nan
    case.table[0, 1] = -1
    case.table[0, 2] = 10**6
    queries, weights = queries_of(rng, plan.layout.tokens, 8)
    run = functools.partial(case.run, plan, queries, weights, scores=True, implementation=implementation)
    everything = run(case.table.shape[1] * 32)
    assert np.argwhere(np.isnan(everything[1][0])).ravel().tolist() == [3 * 32 + 7]
    assert np.argwhere(np.isnan(everything[1][1])).ravel().tolist() == list(range(32, 96))
    for k in (140, 90):  # with missing ones among the chosen, and without
        check_choice(run(k), everything, k)


@EACH
def test_a_layer_that_does_not_exist_has_no_keys(device, rng, implementation):
    case, plan = case_of(rng, "nvfp4"), plan_of([2399, 639], [1, 1])
    queries, weights = queries_of(rng, plan.layout.tokens, 8)
    ids, scores = case.run(plan, queries, weights, 9, layer=2, scores=True, implementation=implementation)
    np.testing.assert_array_equal(ids[:2], np.broadcast_to(np.arange(9), (2, 9)))
    assert np.isnan(scores[:2]).all()


@pytest.mark.parametrize("name", KEY_FORMATS)
@pytest.mark.parametrize("scale", [2.0**-13, 2.0**40])
def test_large_and_small_queries_and_uneven_weights(device, rng, name, scale):
    """bf16 keys times such queries exceed what a half holds; weights differ by 2^20."""
    case, plan = case_of(rng, name), plan_of([2400, 600], [1, 9])
    queries, weights = queries_of(rng, plan.layout.tokens, 16)
    queries, weights = queries * np.float32(scale), weights * 2.0 ** rng.integers(-20, 1, weights.shape)
    weights = weights.astype(np.float32)
    everything = case.run(plan, queries, weights, case.table.shape[1] * 32, scores=True)
    check_scores(case, plan, queries, weights, everything)


@pytest.mark.parametrize("name", KEY_FORMATS)
def test_the_choice_does_not_depend_on_batch_and_chunks(device, rng, name):
    case, counts, starts = case_of(rng, name), [21, 14], [2000, 900]
    whole = plan_of(starts, counts, tokens=35)
    queries, weights = queries_of(rng, 35, 16)
    together = case.run(whole, queries, weights, 33, scores=True)
    for token in rng.permutation(35)[:6]:
        slot, position = whole.token_slot[token], whole.token_position[token]
        alone = build_plan(PlanLayout(1, 1), [slot], [position], [1], [False])
        single = case.run(alone, queries[token : token + 1], weights[token : token + 1], 33, scores=True)
        for part, of_single in zip(together, single, strict=True):
            np.testing.assert_array_equal(part[token], of_single[0])


def check_any_distribution(rng, entries):
    """Scores over 60 binades, of both signs or of one; few that differ; two that differ; all equal."""
    starts, counts = [4 * entries - 8, 4 * (entries // 2) - 5], [2, 2]
    plan = plan_of(starts, counts)
    queries, weights = queries_of(rng, plan.layout.tokens, 8)
    for duplicated in (False, True):
        case = case_of(rng, "fp8", entries=(entries, entries // 2), duplicated=duplicated, binades=60)
        run = functools.partial(case.run, plan, queries, scores=True)
        for given in (weights, np.abs(weights), -np.abs(weights), 0 * weights):
            k = int(rng.integers(1, 600))
            check_choice(run(given, k), run(given, case.table.shape[1] * 32), k)
    # One page of keys over and over, and here and there another.
    case.table[:] = case.pages[2][0]
    case.table[:, :: int(rng.integers(40, 60))] = case.pages[2][1]
    check_choice(run(np.abs(weights), 512), run(np.abs(weights), case.table.shape[1] * 32), 512)


def test_any_distribution_of_scores(device, rng):
    check_any_distribution(rng, 1300)


@pytest.mark.parametrize("blocks", [8192, 9400])
def test_a_million_tokens(device, rng, blocks):
    """Of 262,144 entries and more that share 64 blocks, so that many scores are equal."""
    case, entries = case_of(rng, "mxfp4", entries=(64 * 32, 32)), blocks * 32
    case.table = case.pages[2][rng.integers(0, 64, (3, blocks))].astype(np.int32)
    plan = build_plan(PlanLayout(2, 2), [2, 0], [4 * entries - 1, 300000], [1, 1], [False, False])
    queries, weights = queries_of(rng, 2, 8)
    everything = case.run(plan, queries, weights, entries, scores=True)
    assert (everything[0][0] == np.arange(entries)).all()
    check_choice(case.run(plan, queries, weights, 512, scores=True), everything, 512)


@pytest.mark.parametrize(("tokens", "entries"), [(1, 32), (256, 16384), (2048, 262144), (8192, 4096), (5, 1 << 22)])
def test_workspaces_stay_below_64_megabytes(tokens, entries):
    slab, capacity = slab_of(tokens, entries)
    assert 1 <= slab <= tokens
    assert capacity >= entries
    assert capacity % 128 == 0
    assert slab * (4 * capacity + 64 * 128 * 2 + 256) <= 64 << 20


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("chunks", [[META["seq"]], [517, 100, 1, 85]])
def test_golden_choice(device, monkeypatch, hadamard, chunks):
    """Hugging Face's indexer, through a layer of the cache."""
    heads = GOLDEN["L1.idx_w"].shape[1]
    monkeypatch.setattr(harness, "SPEC", dataclasses.replace(SPEC, index_num_heads=heads))
    formats = dataclasses.replace(PROFILES["exact"], keys_hadamard=hadamard)
    driver = Driver(golden_weights(), formats)
    request = driver.admit(golden_tokens())
    start, seen = 0, 0
    for count in chunks:
        plan = driver.feed({request: count})
        queries = np.full((plan.layout.tokens, heads, 128), np.nan, np.float32)
        weights = np.full((plan.layout.tokens, heads), np.nan, np.float32)
        here = [(row, at - start) for row, at in enumerate(POSITIONS) if start <= at < start + count]
        for row, token in here:
            queries[token] = GOLDEN["L1.idx_q"][row]
            weights[token] = GOLDEN["L1.idx_w"][row] * (128 * heads) ** -0.5
        _, chosen = reader(driver.cache, plan, 1).index_topk(queries, weights, k=32)
        for row, token in here:
            expected = np.sort(GOLDEN["L1.topk_sorted"][POSITIONS[row]])
            np.testing.assert_array_equal(np.sort(np.asarray(chosen)[token]), expected)
        start, seen = start + count, seen + len(here)
    assert seen == len(POSITIONS)


def test_misuse_is_refused():
    case = case_of(np.random.default_rng(0), "fp8")
    plan = plan_of([100, 50], [1, 1])
    queries, weights = queries_of(np.random.default_rng(0), 5, 4)
    good = {
        "pool": case.pool,
        "block_table": case.table,
        "plan": plan,
        "queries": queries,
        "head_weights": weights,
        "layer": 1,
        "format": case.format,
        "k": 4,
    }
    wrong = {
        "queries has shape": {"queries": queries[:, :, :64]},
        "queries has dtype": {"queries": queries.astype(np.float16)},
        "head_weights has shape": {"head_weights": weights[:, :3]},
        "block_table has dtype": {"block_table": case.table.astype(np.float32)},
        "pool has": {"format": KEY_FORMATS["mxfp4"]},
        "k is 0": {"k": 0},
        "k is 1.5": {"k": 1.5},
    }
    for message, change in wrong.items():
        with pytest.raises(OperandError, match=message):
            ops.index_topk(**good | change)
    with pytest.raises(ValueError, match="implementation"):
        ops.index_topk(**good, implementation="fast")
    with pytest.raises(OperandError, match="no derivative"):
        jax.grad(lambda q: ops.index_topk(**good | {"queries": q, "scores": True})[2].sum())(jnp.asarray(queries))


def test_misuse_of_a_layer_is_refused():
    driver = Driver(golden_weights(), CacheFormats())
    request = driver.admit(golden_tokens())
    plan = driver.feed({request: 3})
    heads = driver.schema.spec.index_num_heads
    queries, weights = jnp.zeros((3, heads, 128)), jnp.zeros((3, heads))
    with pytest.raises(WrongLayerKind, match="no keys"):
        reader(driver.cache, plan, 0).index_topk(queries, weights)
    with pytest.raises(WrongLayerKind, match="no indexer"):
        reader(driver.cache, plan, 2).index_topk(queries, weights)
    with pytest.raises(StepError, match="index_topk before flush_keys"):
        begin(driver.cache, driver.manager.prepare_forward({request: 3})).layer(1).index_topk(queries, weights)
    with pytest.raises(OperandError, match="heads"):
        reader(driver.cache, plan, 1).index_topk(queries[:, 1:], weights[:, 1:])


# What only kernels have: clusters for long rows, several slabs, groups of tokens that share the keys they read.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("entries", "name"),
    [
        pytest.param(
            entries, name, marks=[pytest.mark.sanitize] * ((entries, name) in {(16384, "fp8"), (60000, "mxfp4")})
        )
        for entries in (3000, 16384, 30000, 60000, 120000)
        for name in KEY_FORMATS
    ],
)
def test_long_rows_on_the_gpu(rng, name, entries):
    case = case_of(rng, name, entries=(entries, entries // 2))
    starts = [4 * entries - 12, 2 * entries - 40]
    check(case, rng, starts, [9, 31], heads=64, k=512, dtype=ml_dtypes.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "bf16"])
def test_many_tokens_on_the_gpu(rng, name):
    """A chunk of several slabs and a wide batch choose what each of their tokens chooses alone."""
    case = case_of(rng, name, entries=(16384, 9000))
    starts, counts = [64000, 34000], [900, 300]
    whole = plan_of(starts, counts, tokens=1200)
    slab, _ = slab_of(1200, case.table.shape[1] * 32)
    assert slab < 900
    queries, weights = queries_of(rng, 1200, 64)
    together = case.run(whole, queries, weights, 512, scores=True)
    for token in [0, 7, slab - 1, slab, 899, 900, 1199, *rng.permutation(1200)[:9]]:
        slot, position = whole.token_slot[token], whole.token_position[token]
        alone = build_plan(PlanLayout(1, 1), [slot], [position], [1], [False])
        single = case.run(alone, queries[token : token + 1], weights[token : token + 1], 512, scores=True)
        for part, of_single in zip(together, single, strict=True):
            np.testing.assert_array_equal(part[token], of_single[0])


@pytest.mark.gpu
def test_all_scores_alike_on_the_gpu(rng):
    """More candidates than are ranked against each other, in one block and over a cluster."""
    for entries in (8000, 16384, 60000):
        case = case_of(rng, "fp8", entries=(entries, 4000), duplicated=True)
        plan = plan_of([4 * entries - 20, 15000], [2, 3])
        queries, weights = queries_of(rng, plan.layout.tokens, 64)
        everything = case.run(plan, queries, weights, case.table.shape[1] * 32, scores=True)
        check_choice(case.run(plan, queries, weights, 512, scores=True), everything, 512)
        ids, _ = case.run(plan, queries, 0 * weights, 512, scores=True)
        assert np.all(ids[:5] == np.arange(512))


@pytest.mark.gpu
@pytest.mark.parametrize("entries", [3000, 9000, 16384, 30000, 50000, 120000])
def test_any_distribution_of_scores_on_the_gpu(rng, entries):
    """In every kernel of the selection: one block and clusters of them, with all rounds of bins."""
    check_any_distribution(rng, entries)


@pytest.mark.gpu
def test_the_gpu_chooses_what_the_cpu_chooses(rng):
    """Where scores differ by more than the tolerance."""
    for name in KEY_FORMATS:
        case, plan = case_of(rng, name), plan_of([2500, 1000], [3, 2])
        queries, weights = queries_of(rng, plan.layout.tokens, 64)
        by = {}
        for platform in ("cpu", "gpu"):
            with jax.default_device(jax.devices(platform)[0]):
                by[platform] = case.run(plan, queries, weights, case.table.shape[1] * 32, scores=True)
        exact = rounded(queries, case)
        for token in range(5):
            keys = case.keys[plan.token_slot[token]][: (plan.token_position[token] + 1) // 4]
            size = (np.abs(weights[token])[:, None] * np.maximum(exact[token] @ keys.T, 0)).sum(0)
            cpu, gpu = (by[platform][1][token, : len(keys)] for platform in ("cpu", "gpu"))
            assert np.all(np.abs(cpu - gpu) <= 2 * TOLERANCE * size + 1e-30)
