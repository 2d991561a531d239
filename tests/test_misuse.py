"""Misuse that would lose rows or put them in the wrong place raises: while tracing, or, in a debug step, when it runs.

Each test names the fault. Where a fault can be seen while tracing, ``jax.eval_shape`` is all that the test runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SPEC, Driver, assert_same_bytes, inputs_of, random_tokens, random_weights, update

from dsv4_jax import (
    CacheFormats,
    CacheManager,
    CacheSchema,
    LayerKind,
    RawRows,
    Rotary,
    StepError,
    StepPlan,
    apply_rotary,
    begin,
    closing_rotary,
    init_cache,
    token_rotary,
)
from dsv4_jax.cache.errors import WrongLayerKind
from dsv4_jax.spec.rotary import rotary

SWA, CSA, HCA = range(3)


class Given:
    """A decode step of two requests, ready to be traced: its cache, plan, weights and what the tokens bring."""

    def __init__(self, rng: np.random.Generator, tokens: int = 1, **settings):
        self.driver = Driver(random_weights(rng), CacheFormats(), buckets=(2, 16), **settings)
        self.requests = [self.driver.admit(random_tokens(rng, 40)) for _ in range(2)]
        self.plan, self.brought = self.driver.prepare(dict.fromkeys(self.requests, tokens))
        self.cache, self.weights = self.driver.cache, self.driver.weights

    def inputs(self, plan: StepPlan, layer: int):
        arrays = self.brought[layer]
        return arrays["rows"], *(inputs_of(plan, SPEC, layer, self.weights[layer], arrays, p) for p in ("", "index_"))

    def trace(self, program, cache=None, plan=None):
        """Traces ``program(step)`` of a step begun on the cache and plan, or on others."""

        def run(cache, plan):
            return program(begin(cache, plan))

        return jax.eval_shape(run, self.cache if cache is None else cache, self.plan if plan is None else plan)

    def write(self, step, *layers: int):
        """The step with these layers updated."""
        for layer in layers:
            step = step.layer(layer).update(*self.inputs(step.plan, layer)).step
        return step


@pytest.fixture
def given(rng):
    return Given(rng)


def test_a_step_that_updates_every_layer_ends(given):
    assert given.trace(lambda step: given.write(step, SWA, CSA, HCA).end()).schema == given.cache.schema
    given.trace(lambda step: given.write(step, HCA, SWA, CSA).end())


# Writes that would be lost.


def test_a_layer_that_was_forgotten(given):
    with pytest.raises(StepError, match=r"1 of 3 layers not written.*layer 1 \(CSA\): append, flush, flush_keys"):
        given.trace(lambda step: given.write(step, SWA, HCA).end())
    given.trace(lambda step: given.write(step, SWA, HCA).end(partial=True))


def test_an_old_step_that_goes_on(given):
    def program(step):
        given.write(step, SWA)  # what it returns is dropped
        return given.write(step, CSA, HCA).end()

    with pytest.raises(StepError, match=r"layer 0 \(SWA\): append"):
        given.trace(program)


def test_an_old_handle_that_goes_on(given):
    def program(step):
        step = given.write(step, SWA, CSA)
        handle = step.layer(HCA)
        handle.update(*given.inputs(step.plan, HCA))
        return handle.step.end()

    with pytest.raises(StepError, match=r"layer 2 \(HCA\): append, flush"):
        given.trace(program)


def test_entries_that_are_never_stored(given):
    """append alone, without compress and flush: the entries that close would be missing."""

    def program(step):
        step = given.write(step, SWA, CSA)
        rows, compressor, _ = given.inputs(step.plan, HCA)
        return step.layer(HCA).append(rows, compressor).step.end()

    with pytest.raises(StepError, match=r"layer 2 \(HCA\): flush"):
        given.trace(program)


def test_a_layer_that_is_updated_twice(given):
    with pytest.raises(StepError, match=r"layer 1 \(CSA\): .* a second time in one step"):
        given.trace(lambda step: given.write(step, CSA, CSA))

    def appended_and_updated(step):
        rows, compressor, _ = given.inputs(step.plan, HCA)
        return step.layer(HCA).append(rows, compressor).update(rows, compressor).step

    with pytest.raises(StepError, match=r"layer 2 \(HCA\): append a second time"):
        given.trace(appended_and_updated)


def test_rows_read_at_the_wrong_time(given):
    with pytest.raises(StepError, match=r"layer 0 \(SWA\): window_before comes after"):
        given.trace(lambda step: given.write(step, SWA).layer(SWA).window_before())
    for layer, read in (
        (SWA, lambda handle: handle.window()),
        (HCA, lambda handle: handle.all_entries(4)),
        (CSA, lambda handle: handle.all_keys(4)),
        (CSA, lambda handle: handle.entries(jnp.zeros((2, 4), jnp.int32))),
    ):
        with pytest.raises(StepError, match=r"before (append|flush|flush_keys) \(or update\)"):
            given.trace(lambda step, layer=layer, read=read: read(step.layer(layer)))
        given.trace(lambda step, layer=layer, read=read: read(given.write(step, layer).layer(layer)))


# Rows that would land in the wrong place.


def test_layers_that_do_not_exist(given):
    for layer in (99, 3, -1):
        with pytest.raises(IndexError, match=f"has layers 0 to 2, got {layer}"):
            given.trace(lambda step, layer=layer: step.layer(layer))
        with pytest.raises(IndexError, match=f"has layers 0 to 2, got {layer}"):
            given.trace(lambda step, layer=layer: step.scanning().layer(layer, kind=LayerKind.CSA))
    for layer in (1.0, "1", True):
        with pytest.raises(TypeError):
            given.trace(lambda step, layer=layer: step.layer(layer))
    given.trace(lambda step: step.layer(np.int64(2)))


def test_inputs_of_another_kind(given):
    for layer, other in ((SWA, CSA), (CSA, HCA), (HCA, CSA), (HCA, SWA)):
        with pytest.raises(WrongLayerKind, match=rf"layer {layer} .* takes"):
            given.trace(lambda step, a=layer, b=other: step.layer(a).update(*given.inputs(step.plan, b)))
    with pytest.raises(WrongLayerKind, match="layer 1 is CSA, asked for as HCA"):
        given.trace(lambda step: step.layer(CSA, kind=LayerKind.HCA))


def test_a_traced_layer_in_a_step_that_counts(given):
    with pytest.raises(StepError, match=r"step\.scanning\(\)"):
        given.trace(lambda step: jax.lax.map(lambda i: step.layer(i, kind=LayerKind.CSA), jnp.arange(2)))
    with pytest.raises(StepError, match="say what kind"):
        given.trace(lambda step: jax.lax.map(lambda i: step.scanning().layer(i), jnp.arange(2)))


def test_a_traced_layer_of_another_kind_writes_nothing(given):
    """In a scan over layers, an index that is not one of the kind's: window, entries and tails stay as they are."""

    @jax.jit
    def run(cache, plan, layers):
        def body(step, layer):
            handle = step.layer(layer, kind=LayerKind.CSA)
            return handle.update(*given.inputs(step.plan, CSA)).step, None

        step = begin(cache, plan).scanning()
        return step.cache, jax.lax.scan(body, step, layers)[0].end()

    before, after = run(given.cache, given.plan, jnp.array([SWA, HCA, -1, 3, 99]))
    for (path, left), right in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), path
    before, after = run(given.cache, given.plan, jnp.array([CSA]))
    assert np.asarray(before.window[CSA]).tobytes() != np.asarray(after.window[CSA]).tobytes()


def test_cos_and_sin_of_something_else(given):
    """In a decode step all of these have equal shapes."""
    rope, main = SPEC.layers[CSA].rope, SPEC.layers[SWA].rope

    def with_rotary(layer, of_compressor=None, of_rows=None):
        def program(step):
            rows, compressor, indexer = given.inputs(step.plan, layer)
            if of_rows is not None:
                rows = RawRows(rows, jnp.ones(512), of_rows(step.plan))
            if of_compressor is not None:
                compressor = compressor._replace(rotary=of_compressor(step.plan))
            return step.layer(layer).update(rows, compressor, indexer).step

        return program

    tokens, closing = functools.partial(token_rotary, rope=rope), functools.partial(closing_rotary, rope=rope)
    shapes = {r.cos.shape for r in (tokens(given.plan), closing(given.plan, ratio=4), closing(given.plan, ratio=128))}
    assert len(shapes) == 1
    given.trace(with_rotary(CSA, functools.partial(closing, ratio=4), tokens))
    given.trace(with_rotary(HCA, functools.partial(closing, ratio=128), tokens))
    for layer, of_compressor, of_rows, what in (
        (CSA, tokens, None, "compressor is for the step's tokens, expected .* closing entries of 4 tokens"),
        (CSA, functools.partial(closing, ratio=128), None, "compressor is for closing entries of 128"),
        (HCA, functools.partial(closing, ratio=4), None, "compressor is for closing entries of 4"),
        (HCA, None, functools.partial(closing, ratio=4), "rows is for closing entries of 4 .* the step's tokens"),
        (CSA, lambda plan: rotary(plan.token_position, rope), None, "positions of no known purpose"),
        (SWA, None, tokens, "rows was made with RopeSpec"),
        (CSA, lambda plan: closing_rotary(plan, 4, main), None, "compressor was made with RopeSpec"),
    ):
        with pytest.raises(StepError, match=what):
            given.trace(with_rotary(layer, of_compressor, of_rows))

    def indexer_with_tokens(step):
        rows, compressor, indexer = given.inputs(step.plan, CSA)
        return step.layer(CSA).update(rows, compressor, indexer._replace(rotary=tokens(step.plan)))

    with pytest.raises(StepError, match="indexer is for the step's tokens"):
        given.trace(indexer_with_tokens)


def test_what_a_rotary_is_for_passes_jit_and_own_numbers_are_taken(given):
    rope = SPEC.layers[CSA].rope
    made = jax.jit(token_rotary, static_argnums=1)(given.plan, rope)
    assert (made.purpose, made.rope) == ("tokens", rope)
    own = Rotary(made.cos, made.sin, purpose="tokens")  # of a RoPE that this package does not know
    given.trace(lambda step: step.layer(SWA).update(RawRows(given.brought[SWA]["rows"], jnp.ones(512), own)).step)
    x = jnp.ones((2, 512))
    np.testing.assert_array_equal(apply_rotary(x, own), apply_rotary(x, made))


# Steps that begin with what does not belong together.


def test_a_plan_of_several_steps(given):
    plan = given.driver.manager.prepare_forward(dict.fromkeys(given.requests, 1), steps=3)
    with pytest.raises(StepError, match=r"of 3 steps.*plan\.step\(i\)"):
        given.trace(lambda step: step.end(partial=True), plan=plan)
    given.trace(lambda step: step.end(partial=True), plan=plan.step(1))


def test_a_plan_of_another_schemas_manager(given):
    """Its slots and blocks would name others, or none, and rows vanish."""
    other = dataclasses.replace(given.cache.schema, blocks=given.cache.schema.blocks + 1)
    manager = CacheManager(other, token_buckets=(2, 16))
    plan = manager.prepare_forward({manager.admit(): 1, manager.admit(): 1})
    assert plan.packed.shape == given.plan.packed.shape
    with pytest.raises(StepError, match=r"of another cache.*Make both of one schema"):
        given.trace(lambda step: step.end(partial=True), plan=plan)


def test_arrays_that_do_not_have_the_shapes_of_the_schema(given):
    schema = given.cache.schema
    for change in ({"slots": schema.slots + 1}, {"blocks": schema.blocks * 2}, {"max_context": 2048}):
        other = dataclasses.replace(schema, **change)
        with pytest.raises(ValueError, match="its schema says"):
            given.trace(lambda step: step.end(partial=True), dataclasses.replace(given.cache, schema=other))
    assert jax.tree.map(lambda array: array.shape[0], given.cache)  # a pytree is rebuilt with anything in it


def test_an_implementation_that_does_not_exist(given):
    with pytest.raises(ValueError, match="implementation must be one of native, reference, got 'jnp'"):
        begin(given.cache, given.plan, implementation="jnp")


# What only the device knows, in a debug step.


def run_debug(given, plan, layer=None):
    """A step in debug mode, run to its end."""

    def run(cache, plan, layer):
        step = begin(cache, plan, debug=True).scanning()
        if layer is not None:
            step = step.layer(layer, kind=LayerKind.CSA).update(*given.inputs(step.plan, CSA)).step
        return step.end()

    jax.block_until_ready(jax.jit(run)(given.cache, plan, layer))
    jax.effects_barrier()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_slot", 3),
        ("request_slot", 77),
        ("token_position", 1024),
        ("table_slot", 3),
        ("table_index", 8),
        ("table_block", 32),
        ("token_request", -2),
        ("query_start", -1),
    ],
)
def test_an_index_of_the_plan_out_of_range(given, field, value):
    packed = np.array(given.plan.packed)
    packed[given.plan.layout.fields[field]][:1] = value
    run_debug(given, given.plan)
    with pytest.raises(Exception, match=rf"{field}\[0\] is {value}, there are"):
        run_debug(given, StepPlan(packed, given.plan.layout))


@pytest.mark.parametrize(("layer", "message"), [(3, "0 to 2, got 3"), (-1, "got -1"), (HCA, "layer 2 is HCA")])
def test_a_traced_layer_out_of_range(given, layer, message):
    run_debug(given, given.plan, CSA)
    with pytest.raises(Exception, match=message):
        run_debug(given, given.plan, layer)


def test_debug_off_costs_nothing(given):
    texts = [
        str(jax.make_jaxpr(lambda c, p, on=on: begin(c, p, debug=on).cache)(given.cache, given.plan))
        for on in (False, True)
    ]
    assert ["callback" in text for text in texts] == [False, True]


# What must work all the same.


def expected(given):
    return jax.jit(update)(given.cache, given.plan, given.weights, given.brought)


def assert_same_cache(left, right, what):
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(left)]
    leaves = [dict(zip(names, map(np.asarray, jax.tree.leaves(cache)), strict=True)) for cache in (left, right)]
    assert_same_bytes(*leaves, what)


def test_a_handle_passes_jit_checkpoint_and_cond(given):
    def one_layer(handle, inputs):
        return handle.update(*inputs)

    def by_jit(step, layer):
        return jax.jit(one_layer)(step.layer(layer), given.inputs(step.plan, layer)).step

    def by_checkpoint(step, layer):
        return jax.checkpoint(one_layer)(step.layer(layer), given.inputs(step.plan, layer)).step

    def by_cond(step, layer):
        handle, inputs = step.layer(layer), given.inputs(step.plan, layer)
        there = step.plan.longest[0] > 0
        return jax.lax.cond(there, lambda: handle.update(*inputs), lambda: handle.update(*inputs)).step

    for way in (by_jit, by_checkpoint, by_cond):
        got = jax.jit(
            lambda cache, plan, way=way: functools.reduce(way, range(3), begin(cache, plan)).end(),
        )(given.cache, given.plan)
        assert_same_cache(got, expected(given), way.__name__)


def test_a_handle_passes_scan(given):
    """Reads in the body of a scan, the handle in its carry."""

    def program(step):
        handle = given.write(step, HCA).layer(HCA)
        handle, read = jax.lax.scan(lambda handle, _: handle.window(), handle, None, length=3)
        return handle.step.end(partial=True), read

    _, read = given.trace(program)
    assert read.values.shape == (3, 2, 128, 512)


def test_a_whole_step_in_a_branch(given):
    def run(cache, plan):
        return jax.lax.cond(
            plan.longest[0] > 0, lambda: given.write(begin(cache, plan), SWA, CSA, HCA).end(), lambda: cache
        )

    assert_same_cache(jax.jit(run)(given.cache, given.plan), expected(given), "cond")


def test_a_misuse_inside_a_branch_is_seen(given):
    def run(cache, plan):
        return jax.lax.cond(plan.longest[0] > 0, lambda: given.write(begin(cache, plan), SWA).end(), lambda: cache)

    with pytest.raises(StepError, match="2 of 3 layers not written"):
        jax.eval_shape(run, given.cache, given.plan)


def test_window_before_is_what_the_tokens_still_see(rng):
    """One token's window but itself: window - 1 rows, all valid once there are as many tokens."""
    driver = Driver(random_weights(rng), dataclasses.replace(CacheFormats(), window="fp32"), buckets=(1, 256))
    sequence = random_tokens(rng, 201)
    request = driver.admit(sequence)
    driver.feed({request: 200})
    plan, _ = driver.prepare({request: 1})
    _, rows = begin(driver.cache, plan).layer(SWA).window_before(dtype=jnp.float32)
    assert rows.values.shape == (1, 127, 512)
    np.testing.assert_array_equal(rows.positions[0], np.arange(200 - 127, 200))
    np.testing.assert_array_equal(rows.values[0], sequence[SWA]["rows"][200 - 127 : 200])
    assert np.asarray(rows.valid).all()


def test_a_manager_and_a_cache_of_one_schema_fit(rng):
    schema = CacheSchema(SPEC, CacheFormats(), 2, 8, 512)
    plan = CacheManager(schema, token_buckets=(2,)).prepare_forward({})
    assert jax.eval_shape(lambda c, p: begin(c, p).end(partial=True), init_cache(schema), plan).schema == schema
