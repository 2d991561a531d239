"""Caches of several shards, and caches on several devices that no step may take; a step through jax.export."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_devices import environment_of

from dsv4_jax import CacheManager, CacheSchema, PlanLayout, init_cache
from dsv4_jax.cache.pools import Cache, check_one_shard
from dsv4_jax.layout.formats import PROFILES
from dsv4_jax.layout.schema import SchemaError
from dsv4_jax.spec.presets import tiny_spec

SCHEMA = CacheSchema(tiny_spec(), PROFILES["default"], slots=2, blocks=4, max_context=256)


def on_four_devices(code):
    """Runs code in a process of its own, with four CPU devices."""
    program = PREAMBLE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment_of(4), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


PREAMBLE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dsv4_jax import CacheSchema, init_cache, tiny_spec
from dsv4_jax.cache.pools import ShardingError, check_one_shard
from dsv4_jax.layout.formats import PROFILES
from dsv4_jax.layout.schema import TABLES

schema = CacheSchema(tiny_spec(), PROFILES["default"], slots=2, blocks=4, max_context=256)

def refuses(function, *arguments, says):
    try:
        function(*arguments)
    except ShardingError as error:
        assert says in str(error), error
    else:
        raise AssertionError("nothing was refused")

def step(cache):
    check_one_shard(cache)
    return cache.with_arrays({"block_table": cache.block_table + 1})

meshes = [jax.make_mesh((4,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)]
"""


def test_a_partitioned_cache_is_refused_while_tracing():
    on_four_devices("""
        for mesh in meshes:
            wide = CacheSchema(tiny_spec(), PROFILES["default"], slots=4, blocks=4, max_context=256)
            split = init_cache(wide)
            spec = dict.fromkeys(TABLES, P("data"))
            split = split.with_arrays({
                name: jax.device_put(array, NamedSharding(mesh, spec.get(name, P(None, "data"))))
                for name, array in split.arrays.items()
            })
            refuses(jax.jit(step), split, says="jax.shard_map")
            refuses(jax.jit(step).lower, split, says="jax.shard_map")
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), split)
            refuses(jax.jit(step).lower, abstract, says="jax.shard_map")
            refuses(jax.jit(lambda cache: jax.lax.scan(lambda c, _: (step(c), None), cache, None, 2)), split,
                    says="partitioned")
            try:
                init_cache(wide, device=NamedSharding(mesh, P("data")))
            except ShardingError as error:
                assert "mesh=mesh" in str(error)
            else:
                raise AssertionError
            whole = jax.device_put(init_cache(wide), NamedSharding(mesh, P()))
            assert (np.asarray(jax.jit(step)(whole).block_table) == 0).all()
    """)


def test_shards_lie_side_by_side_and_a_step_sees_one():
    on_four_devices("""
        for mesh in meshes:
            cache = init_cache(schema, mesh=mesh, axis="data")
            assert cache.shards == 4 and cache.schema == schema
            for name, array in cache.arrays.items():
                assert array.sharding.spec == (P("data") if name in TABLES else P(None, "data")), name
                assert array.addressable_data(3).shape == schema.arrays[name].shape
            assert sum(cache.memory_bytes().values()) == 4 * schema.memory_bytes
            refuses(jax.jit(step), cache, says="4 side by side")
            specs = cache.partition_specs("data")
            for body in (step, lambda cache: jax.lax.scan(lambda c, _: (step(c), None), cache, None, 1)[0]):
                mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=specs), donate_argnums=0)
                cache = mapped(cache)
                assert cache.shards == 4, cache.shards
                for name, array in cache.arrays.items():
                    shape = schema.arrays[name].shape
                    assert array.addressable_data(3).shape == shape, (name, array.sharding)
            assert (np.asarray(cache.block_table) == 1).all()
            text = mapped.lower(cache).compile().as_text()
            assert not any(op in text for op in ("all-gather", "all-reduce", "all-to-all")), text
            within = jax.jit(lambda c: jax.shard_map(step, mesh=mesh, in_specs=(c.partition_specs("data"),),
                                                     out_specs=c.partition_specs("data"))(c))
            assert (np.asarray(within(cache).block_table) == 2).all()
    """)


def test_mesh_and_axis_come_together():
    mesh = jax.make_mesh((1,), ("data",))
    for given in ({"mesh": mesh}, {"axis": "data"}, {"mesh": mesh, "axis": "data", "device": jax.devices()[0]}):
        with pytest.raises(ValueError, match="a device, or a mesh and an axis of it"):
            init_cache(SCHEMA, **given)
    with pytest.raises(ValueError, match="has the axes data; got model"):
        init_cache(SCHEMA, mesh=mesh, axis="model")
    assert init_cache(SCHEMA, mesh=mesh, axis="data").shards == 1


def test_arrays_that_are_not_the_schemas_are_told():
    cache = init_cache(SCHEMA)
    check_one_shard(cache)
    for changed in (jnp.zeros((2, 3), jnp.int32), cache.block_table.astype(jnp.int16)):
        with pytest.raises(ValueError, match=r"block_table is int.*its schema says int32\[2, 2\]"):
            check_one_shard(cache.with_arrays({"block_table": changed}))
    with pytest.raises(KeyError, match="csa_pages"):
        cache.with_arrays({"csa_pages": 0})


def test_a_cache_is_rebuilt_whatever_its_leaves_are():
    cache = init_cache(SCHEMA)
    shapes = jax.tree.map(lambda array: array.shape, cache)
    assert isinstance(shapes, Cache)
    assert shapes.pools["csa_tail"] == (2, 2, 2, 12, 512)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]]
    assert {".window", ".block_table", ".window_positions", ".pools['csa_key_tail']", ".pools['hca_entries']"} < {
        *paths
    }
    assert jax.tree.structure(jax.tree.map(lambda array: None, cache)).num_leaves == 0


def test_a_step_over_cache_and_plan_is_exported_and_read_back():
    pytest.importorskip("flatbuffers")  # which jax.export serializes with
    layout = PlanLayout(tokens=4, requests=2)
    manager = CacheManager(SCHEMA, token_buckets=[layout.tokens])
    plan, cache = manager.prepare_forward({manager.admit(): 3}), init_cache(SCHEMA)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, plan):
        return cache.with_arrays({"block_table": cache.block_table + plan.token_position[2]}), plan

    exported = jax.export.deserialize(bytearray(jax.export.export(step)(cache, plan).serialize()))
    cache, back = exported.call(cache, plan)
    assert cache.schema == SCHEMA
    assert back.layout == plan.layout
    assert np.asarray(cache.block_table).tolist() == [[1, 1], [1, 1]]


def test_a_schema_survives_json_and_nothing_else_is_one():
    for name, formats in PROFILES.items():
        schema = CacheSchema(tiny_spec(), formats, 3, 5, 1000, 7)
        assert CacheSchema.from_json(schema.to_json()) == schema, name
    for text in ("", "[]", "{}", "null", SCHEMA.to_json().replace("slots", "shelves")):
        with pytest.raises(SchemaError, match="no cache schema"):
            CacheSchema.from_json(text)
