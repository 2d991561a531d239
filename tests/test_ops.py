"""Every op three ways: the CPU handler against the jnp definition, and CUDA against the CPU handler.

Pooled values (`compress`) agree within fp32 rounding; everything else to the bit. test_update_op.py has the updates.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from op_operands import (
    BLOCKS,
    COMPRESSOR_IDS,
    COMPRESSORS,
    CROWDED_STEPS,
    DTYPES,
    EACH_COMPRESSOR,
    KINDS,
    LAYERS,
    LAYOUT,
    MAX_BLOCKS,
    OTHER,
    POOLS,
    RING,
    SLOTS,
    STEPS,
    assert_same,
    assert_same_tail,
    begin_step_operands,
    by_definition,
    compress_operands,
    flush_operands,
    gather_operands,
    native,
    projections,
    random_plan,
    random_pool,
    random_raw_rows,
    random_rows,
    random_table,
    random_tail,
    tokens_of,
    update_operands,
)

from dsv4_jax import (
    PROFILES,
    OperandError,
    StepPlan,
    ops,
)
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.ops.operands import Window


@OTHER
def test_begin_step(other, rng):
    operands = begin_step_operands(rng)
    plan = operands[-1]
    results = native("begin_step", *operands)
    assert_same(results, other("begin_step", *operands))
    for slot, reset in zip(plan.request_slot, plan.request_reset, strict=True):
        if reset and 0 <= slot < SLOTS:
            assert (np.asarray(results[2])[:, slot] == -1).all()
            assert (np.asarray(results[1])[slot] == np.asarray(results[0])[slot]).all()
    np.testing.assert_array_equal(results[3].packed, plan.packed)


@OTHER
@DTYPES
@pytest.mark.parametrize("name", WINDOW_FORMATS)
@pytest.mark.parametrize("ring", [RING, RING + 5])
def test_append_window(other, rng, name, dtype, ring):
    vector_format = WINDOW_FORMATS[name]
    window = random_pool(rng, vector_format, ring, SLOTS)
    positions = rng.integers(-1, 500, (LAYERS, SLOTS, ring)).astype(np.int32)
    operands = (window, positions, random_rows(rng, (LAYOUT.tokens, 512), dtype), random_plan(rng), 1)
    assert_same(
        native("append_window", *operands, format=vector_format),
        other("append_window", *operands, format=vector_format),
    )


@OTHER
@pytest.mark.parametrize("name", WINDOW_FORMATS)
@pytest.mark.parametrize("ring", [RING, RING + 5])
def test_save_displaced(other, rng, name, ring):
    """What is saved, and of which positions: the window before each request's first token, and its own tokens."""
    vector_format, plan, size = WINDOW_FORMATS[name], random_plan(rng), 120
    window = random_pool(rng, vector_format, ring, SLOTS)
    newest = int(rng.integers(0, 600))
    held = newest - (newest - np.arange(ring)) % ring  # what a ring holds after position `newest`
    positions = np.broadcast_to(np.where(rng.random(ring) < 0.9, held, -1), (LAYERS, SLOTS, ring)).astype(np.int32)
    operands = (Window(window, positions), random_rows(rng, (LAYOUT.tokens, 512), np.float32), plan, 2)
    attributes = {"format": vector_format, "size": size}
    results = [run("save_displaced", *operands, **attributes) for run in (native, other)]
    wanted = np.full((size - 1) * LAYOUT.requests + LAYOUT.tokens, -1)
    for request, (slot, brought, tokens) in enumerate(tokens_of(plan)):
        if slot < 0 or not len(brought):
            continue
        first = (size - 1) * (request + 1) + tokens[0]
        before = brought[0] - size + 1 + np.arange(size - 1)
        wanted[first - size + 1 : first] = np.where(np.isin(before, positions[2, 0]), before, -1)
        wanted[first : first + len(brought)] = brought
    kept = []
    for after, saved in results:
        assert_same(after, operands[0])
        np.testing.assert_array_equal(saved.positions, np.maximum(wanted, -1))
        rows = native("dequantize", saved.rows[0, 0], format=vector_format, rows=len(wanted), dtype=jnp.float32)
        kept.append(np.asarray(rows)[wanted >= 0])
    np.testing.assert_array_equal(*kept)
    expected = native("quantize", operands[1], format=vector_format)
    expected = native("dequantize", expected, format=vector_format, rows=LAYOUT.tokens, dtype=jnp.float32)
    for request, (slot, brought, tokens) in enumerate(tokens_of(plan)):
        if slot >= 0 and len(brought):
            own = np.flatnonzero(wanted >= 0).searchsorted((size - 1) * (request + 1) + tokens[0])
            np.testing.assert_array_equal(kept[0][own : own + len(brought)], np.asarray(expected)[list(tokens)])


@OTHER
@DTYPES
@EACH_COMPRESSOR
def test_append_tail(other, rng, ratio, width, hca_tail, dtype):
    operands = (random_tail(rng, ratio, width, hca_tail), *projections(rng, ratio, width, dtype), random_plan(rng), 2)
    assert_same_tail(native("append_tail", *operands, ratio=ratio), other("append_tail", *operands, ratio=ratio))


@OTHER
@EACH_COMPRESSOR
def test_rotate(other, rng, ratio, width, hca_tail):
    operands = (random_tail(rng, ratio, width, hca_tail), random_plan(rng), 0)
    assert_same(native("rotate", *operands, ratio=ratio), other("rotate", *operands, ratio=ratio))


@OTHER
@DTYPES
@pytest.mark.parametrize(
    ("ratio", "width", "hca_tail", "hadamard"),
    [*((*compressor, False) for compressor in COMPRESSORS), (4, 128, None, True)],
    ids=[*COMPRESSOR_IDS, "indexer-hadamard"],
)
def test_compress(other, rng, ratio, width, hca_tail, dtype, hadamard):
    operands = compress_operands(rng, ratio, width, hca_tail, dtype)
    attributes = {"ratio": ratio, "eps": 1e-6, "hadamard": hadamard}
    left, right = native("compress", *operands, **attributes), other("compress", *operands, **attributes)
    np.testing.assert_allclose(left[1], right[1], rtol=0, atol=1e-5)
    assert_same(left[0], right[0])
    assert np.isfinite(np.asarray(left[1])).all()


@OTHER
@DTYPES
def test_normalize(other, rng, dtype):
    raw = random_raw_rows(rng, LAYOUT.tokens, dtype)
    left, right = native("normalize", raw, eps=1e-6), other("normalize", raw, eps=1e-6)
    if other is by_definition:
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
    else:
        assert_same(left, right)
    x = raw.rows.astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * raw.norm_weight
    np.testing.assert_allclose(np.asarray(left)[:, :448], x[:, :448], rtol=0, atol=1e-5)
    turned = (x[:, 448::2] + 1j * x[:, 449::2]) * (raw.rotary.cos + 1j * raw.rotary.sin.astype(np.float64))
    np.testing.assert_allclose(np.asarray(left)[:, 448::2], turned.real, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(left)[:, 449::2], turned.imag, rtol=0, atol=1e-5)


@OTHER
@pytest.mark.parametrize(("ratio", "vector_format"), POOLS)
def test_flush(other, rng, ratio, vector_format):
    operands, attributes = flush_operands(rng, ratio, vector_format), {"ratio": ratio, "format": vector_format}
    assert_same(native("flush", *operands, **attributes), other("flush", *operands, **attributes))


@OTHER
@pytest.mark.parametrize(("ratio", "vector_format"), POOLS)
def test_gather_entries(other, rng, ratio, vector_format):
    dtype = (jnp.float32, jnp.bfloat16)[int(rng.integers(2))]
    *operands, indices = gather_operands(rng, ratio, vector_format)
    _, table, plan = operands
    attributes = {"ratio": ratio, "format": vector_format, "dtype": dtype}
    chosen = native("gather_entries", *operands, indices, 1, **attributes)
    assert_same(chosen, other("gather_entries", *operands, indices, 1, **attributes), "gather_entries")
    everything = native("gather_all_entries", *operands, 1, entries=50, **attributes)
    assert_same(everything, other("gather_all_entries", *operands, 1, entries=50, **attributes), "gather_all_entries")

    def exists(slot, entry, visible):
        block = entry * ratio // 128
        return slot >= 0 and 0 <= entry < visible and block < MAX_BLOCKS and 0 <= table[slot, block] < BLOCKS

    by_token, by_request = np.zeros(indices.shape, bool), np.zeros((LAYOUT.requests, 50), bool)
    for request, (slot, positions, tokens) in enumerate(tokens_of(plan)):
        for token, position in zip(tokens, positions, strict=True):
            by_token[token] = [exists(slot, entry, (position + 1) // ratio) for entry in indices[token]]
        if len(positions):
            by_request[request] = [exists(slot, entry, (positions[-1] + 1) // ratio) for entry in range(50)]
    for rows, valid, entry in ((chosen[1], by_token, indices), (everything[1], by_request, np.arange(50))):
        np.testing.assert_array_equal(rows.valid, valid)
        np.testing.assert_array_equal(rows.positions, np.where(valid, ratio * entry, -1))
        assert (np.asarray(rows.values)[~valid] == 0).all()


@OTHER
@pytest.mark.parametrize(
    ("before", "dtype"), [(False, jnp.float32), (True, jnp.bfloat16)], ids=["after, to_fp32", "before, to_bf16"]
)
@pytest.mark.parametrize("name", WINDOW_FORMATS)
def test_gather_window(other, rng, name, dtype, before):
    vector_format, plan = WINDOW_FORMATS[name], random_plan(rng)
    window = random_pool(rng, vector_format, RING, SLOTS)
    newest = int(rng.integers(0, 600))
    held = newest - (newest - np.arange(RING)) % RING  # what a ring holds after position `newest`
    positions = np.broadcast_to(np.where(rng.random(RING) < 0.9, held, -1), (LAYERS, SLOTS, RING)).astype(np.int32)
    operands, attributes = (window, positions, plan, 2), {"format": vector_format, "dtype": dtype}
    left = native("gather_window", *operands, **attributes, rows=100, before=before)
    assert_same(left, other("gather_window", *operands, **attributes, rows=100, before=before))
    wanted = np.full((LAYOUT.requests, 100), -1)
    for request, (slot, brought, _) in enumerate(tokens_of(plan)):
        if slot >= 0 and len(brought):
            last = brought[0] - 1 if before else brought[-1]
            wanted[request] = last - 99 + np.arange(100)
    present = np.isin(wanted, positions[2, 0]) & (wanted >= 0)
    np.testing.assert_array_equal(left[2].valid, present)
    np.testing.assert_array_equal(left[2].positions, np.where(present, wanted, -1))


@OTHER
@pytest.mark.parametrize(
    "vector_format", [*ENTRY_FORMATS.values(), *KEY_FORMATS.values()], ids=lambda f: f"{f.name}-{f.width}"
)
def test_quantize_and_dequantize(other, rng, vector_format):
    for rows, dtype, back in ((1, np.float32, jnp.float32), (37, ml_dtypes.bfloat16, jnp.bfloat16)):
        values = random_rows(rng, (rows, vector_format.width), dtype)
        page = native("quantize", values, format=vector_format)
        assert_same(page, other("quantize", values, format=vector_format), "quantize")
        attributes = {"format": vector_format, "rows": rows, "dtype": back}
        assert_same(native("dequantize", page, **attributes), other("dequantize", page, **attributes), "dequantize")


@pytest.mark.gpu
@pytest.mark.sanitize
def test_every_kernel_in_one_program(rng):
    """For compute-sanitizer, under which loading a program takes longer than running it."""
    calls = []
    steps = [(*kind, step) for kind in KINDS for step in STEPS]
    steps += [(kind, "rows", step) for kind in ("csa", "hca") for step in CROWDED_STEPS]
    for index, (kind, hca_tail, step) in enumerate(steps):
        dtype, profile = (np.float32, ml_dtypes.bfloat16)[index % 2], list(PROFILES)[index % len(PROFILES)]
        operands = update_operands(rng, kind, hca_tail, step, index % 3 == 0, dtype, profile)
        calls.append((f"update_{kind}", *operands))
    calls.append(("begin_step", begin_step_operands(rng), {}))
    for ratio, width, hca_tail in COMPRESSORS:
        operands = compress_operands(rng, ratio, width, hca_tail, np.float32)
        calls.append(("compress", operands, {"ratio": ratio, "eps": 1e-6, "hadamard": width == 128}))
        tail, *inputs, _, _, _, plan, layer = operands
        calls.append(("append_tail", (tail, *inputs, plan, layer), {"ratio": ratio}))
        calls.append(("rotate", (tail, plan, layer), {"ratio": ratio}))
    for ratio, vector_format in (
        (4, ENTRY_FORMATS["fp8"]),
        (128, ENTRY_FORMATS["fp8_ds_mla"]),
        (128, ENTRY_FORMATS["nvfp4"]),
        (4, KEY_FORMATS["mxfp4"]),
    ):
        attributes = {"ratio": ratio, "format": vector_format}
        calls.append(("flush", flush_operands(rng, ratio, vector_format), attributes))
        *operands, indices = gather_operands(rng, ratio, vector_format)
        calls.append(("gather_entries", (*operands, indices, 1), attributes | {"dtype": jnp.bfloat16}))
        calls.append(("gather_all_entries", (*operands, 1), attributes | {"dtype": jnp.float32, "entries": 50}))

    def run(operands):
        return [
            getattr(ops, name)(*given, **attributes)
            for given, (name, _, attributes) in zip(operands, calls, strict=True)
        ]

    operands = [given for _, given, _ in calls]
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.jit(run)(operands)
    with jax.default_device(jax.devices("gpu")[0]):
        results = jax.jit(run)(operands)
    for (name, _, attributes), left, right in zip(calls, expected, results, strict=True):
        if name.startswith("update"):
            assert_same(left[0], right[0], f"{name} {attributes}: the window,")
        elif name in ("compress", "append_tail"):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)
        else:
            assert_same(left, right, name)


def test_an_empty_step_changes_nothing(rng):
    """Padding alone, as an invalid mask: every pool comes back as it was."""
    plan = build_plan(LAYOUT, [], [], [], [])
    table, fp8 = random_table(rng), ENTRY_FORMATS["fp8"]
    window, positions = random_pool(rng, fp8, RING, SLOTS), rng.integers(0, 9, (LAYERS, SLOTS, RING)).astype(np.int32)
    tails = [random_tail(rng, 4, 512), random_tail(rng, 4, 128), random_tail(rng, 128, 512)]
    tables = table, random_table(rng), positions
    assert_same(native("begin_step", *tables, plan)[:3], tables)
    rows = random_rows(rng, (LAYOUT.tokens, 512), np.float32)
    assert_same(native("append_window", window, positions, rows, plan, 0, format=fp8), (window, positions))
    for tail, ratio in zip(tails, (4, 4, 128), strict=True):
        inputs = projections(rng, ratio, tail.shape[-1], np.float32)
        assert_same(native("append_tail", tail, *inputs, plan, 0, ratio=ratio), tail)
        assert_same(native("rotate", tail, plan, 0, ratio=ratio), tail)
    pool = random_pool(rng, fp8, 32)
    entries = random_rows(rng, (LAYOUT.closing_size(4), 512), np.float32)
    assert_same(native("flush", pool, entries, table, plan, 0, ratio=4, format=fp8), pool)


@pytest.mark.parametrize("layer", [-1, LAYERS, 10**9])
def test_a_layer_that_is_not_there_writes_nothing(rng, layer):
    plan, fp8 = random_plan(rng, astray=False), ENTRY_FORMATS["fp8"]
    window, positions = random_pool(rng, fp8, RING, SLOTS), rng.integers(0, 9, (LAYERS, SLOTS, RING)).astype(np.int32)
    rows = random_rows(rng, (LAYOUT.tokens, 512), np.float32)
    assert_same(native("append_window", window, positions, rows, plan, layer, format=fp8), (window, positions))
    tail = random_tail(rng, 4, 512)
    assert_same(native("append_tail", tail, *projections(rng, 4, 512, np.float32), plan, layer, ratio=4), tail)
    assert_same(native("rotate", tail, plan, layer, ratio=4), tail)
    pool = random_pool(rng, fp8, 32)
    entries = random_rows(rng, (LAYOUT.closing_size(4), 512), np.float32)
    table = rng.permutation(BLOCKS).reshape(SLOTS, MAX_BLOCKS).astype(np.int32)
    assert_same(native("flush", pool, entries, table, plan, layer, ratio=4, format=fp8), pool)


MISTAKES = {
    "rows": ("append_window", {"rows": np.zeros((LAYOUT.tokens, 511), np.float32)}),
    "rows dtype": ("append_window", {"rows": np.zeros((LAYOUT.tokens, 512), np.float16)}),
    "positions": ("append_window", {"positions": np.zeros((LAYERS, SLOTS, RING), np.float32)}),
    "window": ("append_window", {"window": np.zeros((LAYERS, SLOTS, RING * 576), np.uint8)}),
    "kv": ("append_tail", {"kv": np.zeros((LAYOUT.tokens, 512), np.float32)}),
    "gate": ("append_tail", {"gate": np.zeros((LAYOUT.tokens, 1024), np.float16)}),
    "position_bias": ("append_tail", {"position_bias": np.zeros((128, 1024), np.float32)}),
    "tail": ("append_tail", {"tail": np.zeros((LAYERS, SLOTS, 2, 8, 512), np.float32)}),
    "plan": ("append_tail", {"plan": StepPlan(np.zeros(7, np.int32), LAYOUT)}),
    "entries": ("flush", {"entries": np.zeros((3, 512), np.float32)}),
    "block_table": ("flush", {"block_table": np.zeros((SLOTS, MAX_BLOCKS), np.int16)}),
    "pool": ("flush", {"pool": np.zeros((LAYERS, BLOCKS, 32, 512), np.float32)}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_operand_is_named_while_tracing(mistake):
    fp8 = ENTRY_FORMATS["fp8"]
    plan = build_plan(LAYOUT, [0], [0], [5], [True])
    right = {
        "append_window": {
            "window": np.zeros((LAYERS, SLOTS, *fp8.page_shape(RING)), np.uint8),
            "positions": np.zeros((LAYERS, SLOTS, RING), np.int32),
            "rows": np.zeros((LAYOUT.tokens, 512), np.float32),
            "plan": plan,
        },
        "append_tail": {
            "tail": np.zeros((LAYERS, SLOTS, 2, 12, 512), np.float32),
            "kv": np.zeros((LAYOUT.tokens, 1024), np.float32),
            "gate": np.zeros((LAYOUT.tokens, 1024), np.float32),
            "position_bias": np.zeros((4, 1024), np.float32),
            "plan": plan,
        },
        "flush": {
            "pool": np.zeros((LAYERS, BLOCKS, *fp8.page_shape(32)), np.uint8),
            "entries": np.zeros((LAYOUT.closing_size(4), 512), np.float32),
            "block_table": np.zeros((SLOTS, MAX_BLOCKS), np.int32),
            "plan": plan,
        },
    }
    attributes = {"append_window": {"format": fp8}, "append_tail": {"ratio": 4}, "flush": {"ratio": 4, "format": fp8}}
    op, wrong = MISTAKES[mistake]
    function = functools.partial(getattr(ops, op), layer=0, **attributes[op])
    jax.eval_shape(function, **right[op])
    with pytest.raises(OperandError, match=rf"{op}: {mistake.split()[0]}( has|: )"):
        jax.eval_shape(function, **right[op] | wrong)


def test_a_call_that_is_not_aliased_is_refused_by_name(rng):
    """What a caller of the bare FFI target gets: the handler checks for itself and names the operand."""
    tail = jnp.asarray(random_tail(rng, 4, 512))
    plan = build_plan(LAYOUT, [0], [0], [5], [True])
    unaliased = jax.ffi.ffi_call("dsv4_rotate", jax.ShapeDtypeStruct(tail.shape, tail.dtype))
    with pytest.raises(Exception, match="dsv4 rotate: tail is updated in place"):
        jax.block_until_ready(
            unaliased(
                tail,
                plan.packed,
                np.int32(0),
                tokens=np.int64(LAYOUT.tokens),
                requests=np.int64(LAYOUT.requests),
                ratio=np.int64(4),
            )
        )
