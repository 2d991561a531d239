"""A step updates the donated cache where it lies: no copy of a pool, one CUDA graph, no retrace, nothing allocated.

What XLA compiled is inspected for the CPU and, without one, for an H200 (see ``aot.py``).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200, compile_traced, h200_mesh
from harness import SPEC, columns, inputs_of, random_weights, update, update_append_first, update_op_by_op
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax import (
    PROFILES,
    Cache,
    CacheFormats,
    CacheManager,
    CacheSchema,
    LayerCache,
    LayerKind,
    PlanLayout,
    StepPlan,
    begin,
    deepseek_v4_flash,
    init_cache,
    over_shards,
    tiny_spec,
)
from dsv4_jax.cache.pools import slots_axis
from dsv4_jax.layout.schema import TABLES
from dsv4_jax.tools.bench.attended_step import attended_inputs, attended_step
from dsv4_jax.tools.bench.measure import native_calls
from dsv4_jax.tools.bench.workload import schema_of as schema_in_full

STEPS = 6
LAYOUTS = {"decode": PlanLayout(8, 8), "prefill": PlanLayout(200, 8)}


def schema_of(spec, formats=PROFILES["default"]):
    return CacheSchema(spec, formats, slots=2048, blocks=1 << 16, max_context=4096, lookahead=3)


def shapes_of(schema: CacheSchema, layout: PlanLayout):
    """A step's arguments, shapes only: cache, plan, weights, what the tokens bring to each layer."""
    cache = jax.eval_shape(lambda: init_cache(schema))
    plan = StepPlan(jax.ShapeDtypeStruct((layout.size,), jnp.int32), layout)
    weights = jax.eval_shape(lambda: random_weights(np.random.default_rng(0), schema.spec))
    brought = [
        {name: jax.ShapeDtypeStruct((layout.tokens, width), jnp.bfloat16) for name, width in columns(kind).items()}
        for kind in schema.spec.layer_kinds
    ]
    return cache, plan, weights, brought


def stacked(tree, count: int):
    """The shapes of `count` of these."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), tree)


def read_and_write(handle: LayerCache, weights, arrays) -> tuple[LayerCache, list]:
    """Everything that a layer can ask of its cache, reads before and after the writes."""
    layer = handle.schema.spec.layer_kinds.index(handle.kind)
    inputs = [inputs_of(handle.plan, handle.schema.spec, layer, weights, arrays, p) for p in ("", "index_")]
    handle, before = handle.window_before()
    seen = [before, handle.stored(arrays["rows"])]
    handle = handle.update(arrays["rows"], *inputs)
    handle, after = handle.window()
    seen.append(after)
    if handle.kind is LayerKind.CSA:
        handle, keys = handle.all_keys(16)
        handle, chosen = handle.entries(jnp.arange(16) + jnp.zeros_like(handle.visible)[:, None])
        heads = handle.schema.spec.index_num_heads
        queries = jnp.broadcast_to(arrays["rows"][:, None, :128], (len(arrays["rows"]), heads, 128))
        handle, best, scores = handle.index_topk(queries, queries[..., 0], k=16, scores=True)
        seen += [keys, chosen, best, scores]
    elif handle.kind is LayerKind.HCA:
        handle, entries = handle.all_entries(8)
        seen.append(entries)
    queries = jnp.ones((handle.plan.layout.tokens, 8, 512), jnp.bfloat16)
    chosen = {"indices": jnp.zeros((handle.plan.layout.tokens, 16), jnp.int32)} if handle.kind is LayerKind.CSA else {}
    handle, attended = handle.attend(queries, **chosen)
    seen.append(attended)
    return handle, sum(jnp.sum(array, dtype=jnp.float32) for array in jax.tree.leaves(seen))


def every_layer(cache, plan, weights, brought):
    """One step of all layers, unrolled."""
    step, seen = begin(cache, plan), 0.0
    for layer, arrays in enumerate(brought):
        handle, read = read_and_write(step.layer(layer), weights[layer], arrays)
        step, seen = handle.step, seen + read
    return step.end(), seen


def layers_by_scan(cache, plan, weights, brought):
    """One step with a ``lax.scan`` over the layers of each kind; weights and brought are lists of them, stacked."""
    step, seen = begin(cache, plan).scanning(), 0.0
    kinds = cache.schema.spec.layer_kinds
    for number, kind in enumerate(LayerKind):
        layers = jnp.array([layer for layer, other in enumerate(kinds) if other is kind])

        def one_layer(step, xs, kind=kind):
            layer, weights, arrays = xs
            handle, seen = read_and_write(step.layer(layer, kind=kind), weights, arrays)
            return handle.step, seen

        step, read = jax.lax.scan(one_layer, step, (layers, weights[number], brought[number]))
        seen = seen + read.sum()
    return step.end(), seen


def steps_by_scan(cache, plans, weights, brought):
    """Several steps in one dispatch: a ``lax.scan`` over stacked plans."""
    return jax.lax.scan(lambda cache, plan: every_layer(cache, plan, weights, brought), cache, plans)


def arguments(program, schema: CacheSchema, layout: PlanLayout):
    """The shapes that one of the three programs takes."""
    cache, plan, weights, brought = shapes_of(schema, layout)
    if program is steps_by_scan:
        return cache, stacked(plan, STEPS), weights, brought
    if program is layers_by_scan:
        kinds = schema.spec.layer_kinds
        weights = [stacked(weights[kinds.index(kind)], kinds.count(kind)) for kind in LayerKind]
        brought = [stacked(brought[kinds.index(kind)], kinds.count(kind)) for kind in LayerKind]
    return cache, plan, weights, brought


def budget(cache: Cache) -> int:
    """Temporary memory allowed: less than any pool of values takes, so that not one fits in."""
    sizes = cache.memory_bytes()
    return min(size for name, size in sizes.items() if name not in (*TABLES, "window_positions")) - 1


PROGRAMS = pytest.mark.parametrize("program", [every_layer, layers_by_scan, steps_by_scan])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@PROGRAMS
@LAYOUT
def test_in_place_on_the_cpu(program, layout):
    given = arguments(program, schema_of(tiny_spec()), layout)
    compiled = jax.jit(program, donate_argnums=0).lower(*given).compile()
    assert_in_place(compiled, given[0], temporary_bytes=budget(given[0]))


@PROGRAMS
@LAYOUT
def test_in_place_on_an_h200(program, layout, tmp_path):
    given = arguments(program, schema_of(tiny_spec()), layout)
    gpu = compile_for_h200(program, *given, dump=tmp_path, donate_argnums=0)
    assert_in_place(gpu.compiled, given[0], temporary_bytes=budget(given[0]))


@pytest.mark.parametrize("program", [every_layer, update_op_by_op, update_append_first])
@pytest.mark.parametrize(
    "formats",
    [PROFILES["exact"], PROFILES["compact"], CacheFormats(hca_tail="running")],
    ids=["exact", "compact", "running"],
)
def test_in_place_whatever_is_stored_in_whatever_order(program, formats, tmp_path):
    """Pools of plain arrays and of bytes, one op for all writes of a layer and single ones."""
    given = arguments(program, schema_of(tiny_spec(), formats), LAYOUTS["decode"])
    compiled = jax.jit(program, donate_argnums=0).lower(*given).compile()
    assert_in_place(compiled, given[0], temporary_bytes=budget(given[0]))
    gpu = compile_for_h200(program, *given, dump=tmp_path, donate_argnums=0)
    assert_in_place(gpu.compiled, given[0], temporary_bytes=budget(given[0]))
    assert_one_graph(gpu)


# Sizes at which slices of the plan begin at multiples of 128 bytes, and others.
STEPS_OF_MANY_SIZES = [(1, 1), (8, 8), (64, 64), (200, 8), (256, 64)]


def assert_one_graph(gpu):
    """All native calls of a step are in one CUDA graph, and only begin_step reads the plan that came."""
    (reader,) = gpu.readers("plan.packed")
    assert "dsv4_begin_step" in reader
    assert gpu.custom_calls(captured=False) == 0
    assert gpu.custom_calls(captured=True) == native_calls(gpu.compiled) > 0
    assert gpu.graphs == 1
    assert gpu.wrapped_calls == 0


@pytest.mark.parametrize("size", STEPS_OF_MANY_SIZES, ids=lambda size: f"{size[0]} tokens of {size[1]}")
def test_all_of_a_step_is_in_one_cuda_graph(size, tmp_path):
    given = arguments(every_layer, schema_of(tiny_spec()), PlanLayout(*size))
    assert_one_graph(compile_for_h200(every_layer, *given, dump=tmp_path, donate_argnums=0))


# A scan over layers is not here: its body slices weights by the loop counter, which XLA keeps out of graphs, and a call
# that it schedules between two slices stays outside with them. In a scan over steps only the plan is sliced; how many
# graphs that makes of a step depends on whether this XLA waits for the slice at once.
@LAYOUT
def test_all_of_a_step_in_a_scan_is_in_cuda_graphs(layout, tmp_path):
    given = arguments(steps_by_scan, schema_of(tiny_spec()), layout)
    gpu = compile_for_h200(steps_by_scan, *given, dump=tmp_path, donate_argnums=0)
    assert gpu.custom_calls(captured=False) == 0
    assert gpu.custom_calls(captured=True) == native_calls(gpu.compiled) > 0


def test_a_step_of_the_whole_model_is_in_place_and_one_cuda_graph(tmp_path):
    """DeepSeek-V4-Flash, 43 layers."""
    given = arguments(every_layer, schema_of(deepseek_v4_flash()), LAYOUTS["decode"])
    gpu = compile_for_h200(every_layer, *given, dump=tmp_path, donate_argnums=0)
    assert_in_place(gpu.compiled, given[0], temporary_bytes=budget(given[0]))
    assert_one_graph(gpu)
    assert native_calls(gpu.compiled) > 43


def test_a_decode_step_in_long_contexts_is_in_place_and_one_cuda_graph(tmp_path):
    """What the benchmark times: DeepSeek-V4-Flash, 64 requests of 65,536 tokens, written, chosen from, attended to."""
    spec, layout = deepseek_v4_flash(), PlanLayout(64, 64, displaces=False)
    cache = jax.eval_shape(lambda: init_cache(schema_in_full(spec, layout.requests, 65_536)))
    plan = StepPlan(jax.ShapeDtypeStruct((layout.size,), jnp.int32), layout)
    inputs = jax.eval_shape(lambda plan: attended_inputs(spec, plan), plan)
    gpu = compile_for_h200(attended_step, cache, plan, inputs, dump=tmp_path, donate_argnums=0)
    assert_in_place(gpu.compiled, cache, temporary_bytes=64 << 20)
    assert_one_graph(gpu)
    assert native_calls(gpu.compiled) == 1 + 2 * len(spec.layers) + spec.count(LayerKind.CSA)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_step_of_shards_is_in_place_without_communication_and_one_cuda_graph_a_device(devices, tmp_path):
    mesh = h200_mesh(devices, "data")
    schema, everywhere = schema_of(tiny_spec()), NamedSharding(mesh, PartitionSpec())

    def side_by_side(array, axis=0):
        shape = (*array.shape[:axis], devices * array.shape[axis], *array.shape[axis + 1 :])
        spec = PartitionSpec(*[None] * axis, "data")
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, spec))

    def step_of_a_shard(cache, plan, weights, brought):
        cache, seen = every_layer(cache, plan, weights, brought)
        return cache, seen[None]

    one, plan, weights, brought = shapes_of(schema, LAYOUTS["decode"])
    arrays = {name: side_by_side(array, slots_axis(name)) for name, array in one.arrays.items()}
    cache = dataclasses.replace(one, shards=devices, partitioned=True).with_arrays(arrays)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), weights)
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": (PartitionSpec("data"),)}
    step = over_shards(step_of_a_shard, mesh, **specs)
    traced = step.trace(cache, *jax.tree.map(side_by_side, (plan,)), weights, jax.tree.map(side_by_side, brought))
    gpu = compile_traced(traced, tmp_path)
    assert_in_place(gpu.compiled, dict(schema.arrays), temporary_bytes=budget(one))
    assert_one_graph(gpu)
    communication = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(communication, gpu.compiled.as_text())


def _not_donated(cache, plan, weights, brought):
    return every_layer(cache, plan, weights, brought)


def _keeps_the_old_cache(cache, plan, weights, brought):
    return every_layer(cache, plan, weights, brought), cache.pools["csa_entries"]


def _slices_a_layer_out(cache, plan, weights, brought):
    changed = cache.pools["hca_entries"].at[0].set(cache.pools["hca_entries"][0, ::-1])
    return every_layer(cache.with_arrays({"hca_entries": changed}), plan, weights, brought)


@pytest.mark.parametrize("program", [_not_donated, _keeps_the_old_cache, _slices_a_layer_out])
def test_the_assertion_sees_a_copied_pool(program):
    given = arguments(program, schema_of(tiny_spec()), LAYOUTS["decode"])
    donated = () if program is _not_donated else 0
    compiled = jax.jit(program, donate_argnums=donated).lower(*given).compile()
    with pytest.raises(AssertionError, match=r"aliased|temporaries|copied"):
        assert_in_place(compiled, given[0], temporary_bytes=budget(given[0]))


SMALL = CacheSchema(SPEC, PROFILES["default"], slots=4, blocks=16, max_context=512)


def test_buffers_stay_where_they_are():
    """Weaker than what is compiled, since a pool can be copied out and back; but this is what ran."""
    cache, manager = init_cache(SMALL), CacheManager(SMALL, token_buckets=(2,))
    weights = random_weights(np.random.default_rng(0))
    brought = zero_tokens(2)
    step = jax.jit(update, donate_argnums=0)
    requests = [manager.admit(), manager.admit()]
    before = pointers(cache)
    for _ in range(5):
        old, cache = cache, step(cache, manager.prepare_forward(dict.fromkeys(requests, 1)), weights, brought)
        assert all(array.is_deleted() for array in jax.tree.leaves(old))
        assert pointers(cache) == before


def pointers(cache: Cache) -> list[int]:
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(cache)]


def zero_tokens(tokens: int):
    """What `tokens` tokens bring to each layer of SPEC, all zeros."""
    return [
        {name: jnp.zeros((tokens, width), jnp.bfloat16) for name, width in columns(kind).items()}
        for kind in SPEC.layer_kinds
    ]


def test_no_retrace_in_300_steps_of_changing_batches(rng):
    """One trace for each token bucket in use, whoever is admitted, released or skipped."""
    buckets, traced = (1, 2, 4), []

    def counted(cache, plan, weights, brought):
        traced.append(plan.layout.tokens)
        return update(cache, plan, weights, brought)

    step = jax.jit(counted, donate_argnums=0)
    cache, manager = init_cache(SMALL), CacheManager(SMALL, token_buckets=buckets)
    weights, brought = random_weights(rng), {bucket: zero_tokens(bucket) for bucket in buckets}
    running, sizes = [], set()
    for _ in range(300):
        if running and rng.random() < 0.1:
            manager.release(running.pop(rng.integers(len(running))))
        while not running or (manager.free_slots and rng.random() < 0.2):
            running.append(manager.admit())
        active = rng.permutation(running)[: rng.integers(1, len(running) + 1)]
        plan = manager.prepare_forward(dict.fromkeys(active.tolist(), 1))
        cache = step(cache, plan, weights, brought[plan.layout.tokens])
        sizes.add(len(active))
    assert sizes == set(range(1, SMALL.slots + 1))
    assert sorted(traced) == sorted(buckets)
    assert step._cache_size() == len(buckets)


def test_taking_a_handle_allocates_nothing():
    cache, manager = init_cache(SMALL), CacheManager(SMALL, token_buckets=(1,))
    step = begin(cache, manager.prepare_forward({manager.admit(): 1}))
    before = {id(array) for array in jax.live_arrays()}
    handles = [step.layer(layer) for layer in range(len(SPEC.layers))]
    assert [handle.kind for handle in handles] == list(SPEC.layer_kinds)
    assert {id(array) for array in jax.live_arrays()} == before
    assert all(handle.step.cache is step.cache for handle in handles)
