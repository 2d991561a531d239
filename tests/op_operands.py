"""Random operands for every op: pools full of random bytes, steps of random requests, some of which point nowhere.

And the ways to run an op: the CPU handler, the jnp definition, and CUDA.
"""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import (
    PROFILES,
    CompressorInputs,
    RawRows,
    Rotary,
    StepPlan,
    deepseek_v4_pro,
    ops,
)
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.ops.operands import Compressed, Window
from dsv4_jax.spec.rotary import inverse_frequencies

SLOTS, BLOCKS, MAX_BLOCKS, LAYERS, RING = 5, 40, 8, 3, 128
LAYOUT = PlanLayout(tokens=600, requests=5)
ROPE = deepseek_v4_pro().layers[2].rope


@functools.cache
def jitted(name, attributes):
    """One function an op and its attributes, so that equal shapes are compiled once."""
    return jax.jit(functools.partial(getattr(ops, name), **dict(attributes)))


def native(name, *operands, **attributes):
    """An op by its CPU handler, or, with an implementation, by that."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jitted(name, tuple(attributes.items()))(*operands)


def by_definition(name, *operands, **attributes):
    """An op by the jnp definition."""
    return native(name, *operands, implementation="reference", **attributes)


def on_gpu(name, *operands, **attributes):
    """An op by its CUDA handler."""
    with jax.default_device(jax.devices("gpu")[0]):
        return jitted(name, tuple(attributes.items()))(*operands)


OTHER = pytest.mark.parametrize(
    "other", [by_definition, pytest.param(on_gpu, marks=pytest.mark.gpu)], ids=["reference", "cuda"]
)
"""Another way to run an op than by its CPU handler."""


def assert_same(left, right, what=""):
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes(), f"{what} result {index}: {np.count_nonzero(a != b)} elements differ"


def random_plan(rng, *, astray=True):
    """A step of random requests; some of its slots, positions and blocks point nowhere."""
    requests = int(rng.integers(1, LAYOUT.requests + 1))
    slots = rng.permutation(SLOTS)[:requests]
    counts = np.where(rng.random(requests) < 0.4, 1, rng.integers(1, 121, requests))
    starts = rng.integers(0, 500, requests) * rng.integers(0, 2, requests)
    changes = (rng.integers(-2, SLOTS + 2, 4), np.arange(4) * 2, rng.integers(0, BLOCKS, 4))
    packed = build_plan(LAYOUT, slots, starts, counts, starts == 0, changes).packed.copy()
    if astray and requests > 1:
        fields = {name: packed[where] for name, where in LAYOUT.fields.items()}
        lost = slots[0]
        nowhere = rng.choice([SLOTS, SLOTS + 100, -9])
        fields["token_slot"][fields["token_slot"] == lost] = nowhere
        fields["request_slot"][0] = nowhere
        closing = fields["closing_4"]
        closing[-1] = rng.choice([LAYOUT.tokens, 10**6, -3])
    return StepPlan(packed, LAYOUT)


def random_pool(rng, vector_format, rows, pages=BLOCKS):
    """A pool full of stored random rows; page padding holds random bytes."""
    shape = (LAYERS, pages, *vector_format.page_shape(rows))
    if not vector_format.quantized:
        return rng.normal(size=shape).astype(vector_format.dtype)
    pool = rng.integers(0, 256, shape).astype(np.uint8)
    count = LAYERS * pages * rows
    page = np.asarray(
        native("quantize", random_rows(rng, (count, vector_format.width), np.float32), format=vector_format)
    )
    codes = vector_format.data_bytes * count
    end = codes + vector_format.scale_bytes * count
    used = rows * vector_format.data_bytes
    pool[..., :used] = page[:codes].reshape(LAYERS, pages, used)
    pool[..., used : rows * vector_format.row_bytes] = page[codes:end].reshape(LAYERS, pages, -1)
    return pool


def random_rows(rng, shape, dtype):
    """Values over many magnitudes, with zeros and rows of zeros."""
    values = rng.normal(size=shape) * np.exp2(rng.integers(-20, 10, (*shape[:-1], 1)))
    values[rng.random(shape) < 0.02] = 0
    values[0] = 0
    return values.astype(dtype)


def random_raw_rows(rng, tokens, dtype):
    angles = rng.normal(size=(tokens, 32)).astype(np.float32)
    weight = (1 + 0.2 * rng.normal(size=512)).astype(np.float32)
    return RawRows(rng.normal(size=(tokens, 512)).astype(dtype), weight, Rotary(np.cos(angles), np.sin(angles)))


def random_table(rng):
    table = rng.integers(0, BLOCKS, (SLOTS, MAX_BLOCKS)).astype(np.int32)
    table[rng.random(table.shape) < 0.1] = rng.choice([-1, BLOCKS, -(2**31)])
    return table


def random_tail(rng, ratio, width, hca_tail="rows", slots=SLOTS):
    if ratio == 128 and hca_tail == "running":
        tail = rng.normal(size=(LAYERS, slots, 3, width)).astype(np.float32)
        tail[:, :, 1] = 1 + np.abs(tail[:, :, 1])  # a denominator: the heaviest row weighs 1
        return tail
    return rng.normal(size=(LAYERS, slots, 2, 12 if ratio == 4 else 128, width)).astype(np.float32)


def assert_same_tail(left, right):
    """A running tail agrees within rounding, one of rows to the bit."""
    if left.ndim == 4:
        np.testing.assert_array_equal(left[:, :, 0], right[:, :, 0])
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    else:
        assert_same(left, right)


def projections(rng, ratio, width, dtype):
    columns = 2 * width if ratio == 4 else width
    shape = (LAYOUT.tokens, columns)
    kv, gate = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    return kv, gate, rng.normal(size=(ratio, columns)).astype(np.float32)


COMPRESSORS = [(4, 512, None), (4, 128, None), (128, 512, "rows"), (128, 512, "running")]
COMPRESSOR_IDS = ["csa", "indexer", "hca", "hca-running"]
EACH_COMPRESSOR = pytest.mark.parametrize(("ratio", "width", "hca_tail"), COMPRESSORS, ids=COMPRESSOR_IDS)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["fp32", "bf16"])
POOLS = [
    *(pytest.param(4, f, id=f"csa-{f.name}") for f in ENTRY_FORMATS.values()),
    *(pytest.param(128, f, id=f"hca-{f.name}") for f in ENTRY_FORMATS.values()),
    *(pytest.param(4, f, id=f"keys-{f.name}") for f in KEY_FORMATS.values()),
]


def begin_step_operands(rng):
    positions = rng.integers(-1, 500, (LAYERS, SLOTS, RING)).astype(np.int32)
    return random_table(rng), random_table(rng), positions, random_plan(rng)


def compress_operands(rng, ratio, width, hca_tail, dtype):
    closing = LAYOUT.closing_size(ratio)
    angles = rng.integers(0, 10**6, (closing, 1)).astype(np.float32) * inverse_frequencies(ROPE)
    weight = (1 + 0.2 * rng.normal(size=width)).astype(np.float32)
    tail, inputs = random_tail(rng, ratio, width, hca_tail), projections(rng, ratio, width, dtype)
    return tail, *inputs, weight, np.cos(angles), np.sin(angles), random_plan(rng), 1


DECODE = PlanLayout(tokens=24, requests=24)
STEPS = {
    "prefill": (PlanLayout(tokens=600, requests=5), [130, 1, 5, 300, 2]),
    "decode": (DECODE, [1] * 20),
    "decode of several tokens": (DECODE, [1, 9, 1, 6, 5]),
}
# Kernels spread the work by how many requests and windows there are.
CROWDED_STEPS = {
    "decode of 37 requests": (PlanLayout(tokens=40, requests=40), [1] * 37),
    "decode of 69 requests": (PlanLayout(tokens=70, requests=70), [1] * 69),
    "69 short requests": (PlanLayout(tokens=85, requests=70), [1] * 60 + [2] * 9),
    "10 long requests": (PlanLayout(tokens=2600, requests=10), [300, 220] * 5),
}
KINDS = [("swa", None), ("csa", None), ("hca", "rows"), ("hca", "running")]


def update_operands(rng, kind, hca_tail, step, raw, dtype, profile):
    """(operands, attributes) of update_<kind>; one request was stopped, some blocks are missing."""
    formats = PROFILES[profile]
    layout, counts = (STEPS | CROWDED_STEPS)[step]
    slots, table_width = max(24, layout.requests), 4
    starts = rng.integers(0, 100, len(counts)) * rng.integers(0, 2, len(counts)) + rng.choice([0, 3, 127], len(counts))
    chosen = rng.permutation(slots)[: len(counts)]
    packed = build_plan(layout, chosen, starts, counts, [False] * len(counts)).packed.copy()
    lost = layout.fields["request_slot"].start
    packed[layout.fields["token_slot"]][packed[layout.fields["token_slot"]] == packed[lost]] = -1
    packed[lost] = -1  # a request that was stopped
    plan = StepPlan(packed, layout)
    table = rng.permutation(slots * table_width).reshape(slots, table_width).astype(np.int32)
    table[rng.random(table.shape) < 0.1] = -1

    window_format = formats.window_format
    window = Window(
        random_pool(rng, window_format, RING, slots), rng.integers(-1, 500, (LAYERS, slots, RING)).astype(np.int32)
    )
    rows = random_raw_rows(rng, layout.tokens, dtype)
    rows = rows if raw else rows.rows
    if kind == "swa":
        return (window, rows, plan, 1), {"format": window_format, "eps": 1e-6}
    ratio = 4 if kind == "csa" else 128

    def compressed(width, vector_format):
        pool = random_pool(rng, vector_format, 128 // ratio, slots * table_width)
        return Compressed(pool, random_tail(rng, ratio, width, hca_tail, slots))

    def inputs(width):
        columns = 2 * width if ratio == 4 else width
        angles = rng.normal(size=(layout.closing_size(ratio), 32)).astype(np.float32)
        kv, gate = (rng.normal(size=(layout.tokens, columns)).astype(dtype) for _ in range(2))
        position_bias = rng.normal(size=(ratio, columns)).astype(np.float32)
        weight = (1 + 0.2 * rng.normal(size=width)).astype(np.float32)
        return CompressorInputs(kv, gate, position_bias, weight, Rotary(np.cos(angles), np.sin(angles)))

    attributes = {"window_format": window_format, "entry_format": formats.entry_format, "eps": 1e-6}
    entries = compressed(512, formats.entry_format)
    if kind == "hca":
        return (window, entries, rows, inputs(512), table, plan, 1, 2), attributes
    keys = compressed(128, formats.key_format)
    attributes |= {"key_format": formats.key_format, "hadamard": formats.keys_hadamard}
    return (window, entries, keys, rows, inputs(512), inputs(128), table, plan, 1, 2), attributes


def flush_operands(rng, ratio, vector_format):
    pool = random_pool(rng, vector_format, 128 // ratio)
    entries = random_rows(rng, (LAYOUT.closing_size(ratio), vector_format.width), np.float32)
    # A block belongs to one slot: shared blocks would make two writers meet.
    table = rng.permutation(BLOCKS).reshape(SLOTS, MAX_BLOCKS).astype(np.int32)
    table[rng.random(table.shape) < 0.1] = -1
    return pool, entries, table, random_plan(rng), 2


def gather_operands(rng, ratio, vector_format):
    """Pool, block table, plan and indices of a gather; some requests, blocks and indices are astray."""
    limit = MAX_BLOCKS * 128 // ratio
    indices = rng.integers(-3, limit + 9, (LAYOUT.tokens, 9)).astype(np.int32)
    return random_pool(rng, vector_format, 128 // ratio), random_table(rng), random_plan(rng), indices


def tokens_of(plan):
    """(slot, positions, flat indices) of each request that a plan brings; slot -1 where it is astray."""
    for request, slot in enumerate(np.asarray(plan.request_slot)):
        first, end = np.asarray(plan.query_start)[request : request + 2]
        yield (slot if 0 <= slot < SLOTS else -1), np.asarray(plan.token_position)[first:end], range(first, end)
