"""A step updates the donated cache where it lies: no copy of a pool, one CUDA graph, no retrace, nothing allocated.

What XLA compiled is inspected for the CPU and, without one, for an H200 (see ``aot.py``).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200
from harness import SPEC, columns, inputs_of, random_weights, update

from dsv4_jax import (
    PROFILES,
    Cache,
    CacheManager,
    CacheSchema,
    LayerCache,
    LayerKind,
    PlanLayout,
    StepPlan,
    begin_step,
    deepseek_v4_flash,
    init_cache,
    tiny_spec,
)

SLOTS, STEPS = 8, 6
LAYOUTS = {"decode": PlanLayout(SLOTS, SLOTS), "prefill": PlanLayout(200, SLOTS)}


def schema_of(spec, formats="default"):
    return CacheSchema(spec, PROFILES[formats], slots=SLOTS, blocks=512, max_context=4096, slack=3)


def shapes_of(schema: CacheSchema, layout: PlanLayout):
    """A step's arguments, shapes only: cache, plan, weights, what the tokens bring to each layer."""
    cache = Cache(**schema.arrays, schema=schema)
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
    """Everything that a layer can ask of its cache, reads before, between and after the writes."""
    inputs = [inputs_of(handle.plan, handle.schema.spec, handle.layer, weights, arrays, p) for p in ("", "index_")]
    handle, before = handle.window_before()
    seen = [before, handle.stored(arrays["rows"])]
    if handle.kind is not LayerKind.SWA:
        handle, old = handle.all_entries(8)
        seen.append(old)
    handle = handle.update(arrays["rows"], *inputs)
    handle, after = handle.window()
    seen.append(after)
    if handle.kind is LayerKind.CSA:
        handle, keys = handle.all_keys(16)
        handle, chosen = handle.entries(jnp.arange(16) + jnp.zeros_like(handle.visible)[:, None])
        seen += [keys, chosen]
    elif handle.kind is LayerKind.HCA:
        handle, entries = handle.all_entries(8)
        seen.append(entries)
    return handle, seen


def every_layer(cache, plan, weights, brought):
    """One step of all layers, unrolled."""
    cache = begin_step(cache, plan)
    seen = []
    for layer, arrays in enumerate(brought):
        handle, read = read_and_write(LayerCache(cache, plan, layer), weights[layer], arrays)
        cache = handle.cache
        seen.append(read)
    return cache, seen


def layers_by_scan(cache, plan, weights, brought):
    """One step with a ``lax.scan`` over the layers of each kind; weights and brought are lists of them, stacked."""
    cache = begin_step(cache, plan)
    kinds = cache.schema.spec.layer_kinds
    for number, kind in enumerate(LayerKind):
        layers = jnp.array([layer for layer, other in enumerate(kinds) if other is kind])

        def one_layer(cache, xs, kind=kind):
            layer, index, weights, arrays = xs
            handle = LayerCache(cache, plan, kinds.index(kind), layer_index=layer, kind_index=index)
            handle, seen = read_and_write(handle, weights, arrays)
            return handle.cache, seen

        cache, _ = jax.lax.scan(one_layer, cache, (layers, jnp.arange(layers.size), weights[number], brought[number]))
    return cache


def steps_by_scan(cache, plans, weights, brought):
    """Several steps in one dispatch: a ``lax.scan`` over stacked plans and inputs."""

    def one_step(cache, xs):
        plan, brought = xs
        return every_layer(cache, plan, weights, brought)

    return jax.lax.scan(one_step, cache, (plans, brought))


def arguments(program, schema: CacheSchema, layout: PlanLayout):
    """The shapes that one of the three programs takes."""
    cache, plan, weights, brought = shapes_of(schema, layout)
    if program is steps_by_scan:
        return cache, stacked(plan, STEPS), weights, stacked(brought, STEPS)
    if program is layers_by_scan:
        kinds = schema.spec.layer_kinds
        weights = [stacked(weights[kinds.index(kind)], kinds.count(kind)) for kind in LayerKind]
        brought = [stacked(brought[kinds.index(kind)], kinds.count(kind)) for kind in LayerKind]
    return cache, plan, weights, brought


def budget(cache: Cache) -> int:
    """Temporary memory allowed: less than any pool of values takes, so that not one fits in."""
    sizes = cache.memory_bytes()
    return min(size for name, size in sizes.items() if name not in ("block_table", "window_positions")) - 1


PROGRAMS = pytest.mark.parametrize("program", [every_layer, layers_by_scan, steps_by_scan])


@PROGRAMS
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_in_place_on_the_cpu(program, layout):
    given = arguments(program, schema_of(tiny_spec()), layout)
    compiled = jax.jit(program, donate_argnums=0).lower(*given).compile()
    m = compiled.memory_analysis(); print(m.alias_size_in_bytes, m.temp_size_in_bytes, budget(given[0]))
    assert_in_place(compiled, given[0], temporary_bytes=budget(given[0]))


@PROGRAMS
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_in_place_and_in_graphs_on_an_h200(program, layout, tmp_path):
    given = arguments(program, schema_of(tiny_spec()), layout)
    gpu = compile_for_h200(program, *given, dump=tmp_path, donate_argnums=0)
    m = gpu.compiled.memory_analysis(); print(m.alias_size_in_bytes, m.temp_size_in_bytes, budget(given[0]))
    print(gpu.thunks)
    assert_in_place(gpu.compiled, given[0], temporary_bytes=budget(given[0]))
    assert gpu.custom_calls(captured=False) == 0
    assert gpu.custom_calls(captured=True) == native_calls(gpu.compiled)


def native_calls(compiled: jax.stages.Compiled) -> int:
    return len(re.findall(r'custom_call_target="dsv4_', compiled.as_text()))
