"""The Cache pytree: what an empty one holds, how much memory it really takes, and how it passes through jit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.pools import Cache, init_cache
from dsv4_jax.layout.formats import PROFILES
from dsv4_jax.layout.schema import TABLES, CacheSchema
from dsv4_jax.spec.presets import tiny_spec

ARRAYS = [
    *TABLES,
    "window",
    "window_positions",
    "csa_entries",
    "csa_keys",
    "hca_entries",
    "csa_tail",
    "csa_key_tail",
    "hca_tail",
]


def schema_of(profile="default", **sizes):
    return CacheSchema(tiny_spec(), PROFILES[profile], **({"slots": 3, "blocks": 5, "max_context": 500} | sizes))


@pytest.mark.parametrize("profile", PROFILES)
def test_empty_cache(profile, device):
    schema = schema_of(profile, lookahead=2)
    cache = init_cache(schema)
    assert cache.schema == schema
    for name in ARRAYS:
        array = cache.arrays[name]
        assert (array.shape, array.dtype) == (schema.arrays[name].shape, schema.arrays[name].dtype)
        assert array.devices() == {device}
        values = np.asarray(array.astype(jnp.float32))
        if name.endswith("_tail"):
            assert np.all(values[:, :, 0] == 0)
            assert np.all(values[:, :, 1] == np.float32(-1e9))
        else:
            assert np.all(values == (-1 if name in (*TABLES, "window_positions") else 0))


@pytest.mark.parametrize("profile", PROFILES)
def test_memory_is_what_the_device_holds(profile, device):
    schema = schema_of(profile)
    cache = init_cache(schema)
    real = {name: cache.arrays[name].addressable_data(0).on_device_size_in_bytes() for name in ARRAYS}
    assert cache.memory_bytes() == real == schema.bytes_by_component
    assert sum(real.values()) == schema.memory_bytes


def test_memory_follows_the_arrays_and_not_the_schema():
    cache = dataclasses.replace(init_cache(schema_of()), window=jnp.zeros((2, 3), jnp.bfloat16))
    assert cache.memory_bytes()["window"] == 12


def test_arrays_share_no_buffer():
    # As many blocks as rows that make pools of equal shape: equal constants must not become one buffer.
    cache = init_cache(schema_of("bf16", blocks=32))
    pointers = [cache.arrays[name].unsafe_buffer_pointer() for name in ARRAYS]
    assert len(set(pointers)) == len(ARRAYS)


def test_leaves_are_the_arrays_and_the_schema_is_static():
    cache = init_cache(schema_of())
    leaves, structure = jax.tree.flatten(cache)
    assert {id(leaf) for leaf in leaves} == {id(cache.arrays[name]) for name in ARRAYS}
    assert len(leaves) == len(ARRAYS)
    assert structure == jax.tree.structure(init_cache(schema_of()))
    assert structure != jax.tree.structure(init_cache(schema_of(blocks=6)))
    assert isinstance(jax.tree.unflatten(structure, leaves), Cache)


def test_cache_is_frozen():
    cache = init_cache(schema_of())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.window = cache.window


def test_donated_cache_is_updated_in_place_without_a_retrace(device):
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache):
        traces.append(cache.schema)
        return dataclasses.replace(cache, block_table=cache.block_table + 1)

    cache = init_cache(schema_of())
    before = {name: cache.arrays[name].unsafe_buffer_pointer() for name in ARRAYS}
    for _ in range(3):
        given, cache = cache, step(cache)
        assert given.window.is_deleted()
    assert {name: cache.arrays[name].unsafe_buffer_pointer() for name in ARRAYS} == before
    assert traces == [schema_of()]
    assert np.all(np.asarray(cache.block_table) == 2)
    # A schema that is equal and not the same object is no reason to compile again.
    step(init_cache(schema_of()))
    assert len(traces) == 1


def test_cache_goes_where_it_is_told(device):
    mesh = jax.sharding.Mesh(np.array([device]), ("blocks",))
    for chosen in (device, jax.sharding.NamedSharding(mesh, jax.P())):
        cache = init_cache(schema_of(), device=chosen)
        for array in cache.arrays.values():
            assert array.devices() == {device}
        assert np.all(np.asarray(cache.block_table) == -1)


def test_making_a_cache_takes_no_second_copy_of_it():
    schema = schema_of(slots=64)
    compiled = jax.jit(lambda: init_cache(schema)).lower().compile()
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes >= schema.memory_bytes
    assert memory.temp_size_in_bytes < schema.memory_bytes // 100
