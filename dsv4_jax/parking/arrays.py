"""What a request has in the cache's arrays, read into host memory, and written to another place or another cache.

Bytes are moved as they are. Blocks go in chunks, so that neither direction takes more than a chunk on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from numpy.typing import NDArray

from dsv4_jax.cache.pools import Cache, check_one_shard
from dsv4_jax.host.parking import Places
from dsv4_jax.layout.schema import TABLES, CacheSchema

Rows = dict[str, Any]
"""By the arrays' names, each [layers, ...] of a slot, or [layers, blocks, ...] of blocks."""

CHUNK_BLOCKS = 64


def slot_arrays(schema: CacheSchema, slot: int) -> tuple[str, ...]:
    """Names of the arrays in which this slot, or snapshot behind the slots, has a row, but for the tables."""
    arrays = {name: array for name, array in schema.arrays.items() if name not in schema.block_pools}
    return tuple(name for name, array in arrays.items() if name not in TABLES and slot < array.shape[1])


def read(cache: Cache, places: Places) -> tuple[Rows, tuple[Rows, ...]]:
    """What lies at these places, in host memory, a slot's rows and chunks of blocks.

    The copies are on their way when it returns: in the order of dispatch, so before whatever is done to the cache next.
    """
    check_one_shard(cache)
    host = _whole(cache).with_memory_kind("pinned_host")
    arrays = {name: cache.arrays[name] for name in slot_arrays(cache.schema, places.slot)}
    pools = {name: cache.arrays[name] for name in cache.schema.block_pools}
    slot = jax.device_put(_read_slot(arrays, np.int32(places.slot)), host)
    chunks = (_read_blocks(pools, _padded(chunk, 0)) for chunk in _chunks(places.blocks))
    return slot, tuple(jax.device_put(chunk, host) for chunk in chunks)


def write(cache: Cache, places: Places, slot: Rows, blocks: Sequence[Rows]) -> Cache:
    """The cache with what ``read`` gave at other places; the cache given is donated.

    Blocks that are shared there are left as they are.
    """
    check_one_shard(cache)
    device = _whole(cache)
    # Named by the schema: what the rows lack, which a prefix has no use for, stays as it is.
    arrays = {name: cache.arrays[name] for name in slot}
    row = np.full(cache.schema.max_blocks, -1, np.int32)
    row[: places.blocks.size] = places.blocks
    tables = {name: cache.arrays[name] for name in TABLES}
    tables, arrays = _write_slot(tables, arrays, np.int32(places.slot), row, jax.device_put(slot, device))
    pools = {name: cache.arrays[name] for name in cache.schema.block_pools}
    wanted = np.where(np.arange(places.blocks.size) < places.shared, cache.schema.blocks, places.blocks)
    for ids, chunk in zip(_chunks(wanted), blocks, strict=True):
        if (ids < cache.schema.blocks).any():
            pools = _write_blocks(pools, _padded(ids, cache.schema.blocks), jax.device_put(chunk, device))
    return cache.with_arrays({**tables, **arrays, **pools})


def _whole(cache: Cache) -> Sharding:
    """Where the cache lies, for an array of any rank."""
    sharding = cache.window.sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _chunks(ids: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    for first in range(0, ids.size, CHUNK_BLOCKS):
        yield ids[first : first + CHUNK_BLOCKS]


def padded_size(count: int) -> int:
    """How many blocks a chunk of so many is padded to: a power of two, so that programs are compiled for few shapes."""
    return 1 << (count - 1).bit_length()


def _padded(ids: NDArray[np.integer], padding: int) -> NDArray[np.int32]:
    padded = np.full(padded_size(ids.size), padding, np.int32)
    padded[: ids.size] = ids
    return padded


@jax.jit
def _read_slot(arrays: Rows, slot: Any) -> Rows:
    return {name: lax.dynamic_index_in_dim(array, slot, 1, keepdims=False) for name, array in arrays.items()}


@jax.jit
def _read_blocks(pools: Rows, ids: Any) -> Rows:
    return {name: jnp.take(pool, ids, axis=1, mode="clip") for name, pool in pools.items()}


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _write_slot(tables: Rows, arrays: Rows, slot: Any, row: Any, rows: Rows) -> tuple[Rows, Rows]:
    written = {name: lax.dynamic_update_index_in_dim(array, rows[name], slot, 1) for name, array in arrays.items()}
    installed = {name: lax.dynamic_update_index_in_dim(table, row, slot, 0) for name, table in tables.items()}
    return installed, written


@functools.partial(jax.jit, donate_argnums=0)
def _write_blocks(pools: Rows, ids: Any, chunk: Rows) -> Rows:
    """One block after another, each in place; ids out of range are padding, whose block is written over itself."""

    def one(index: Any, pools: Rows) -> Rows:
        block = ids[index]
        written = {}
        for name, pool in pools.items():
            new = lax.dynamic_index_in_dim(chunk[name], index, 1)
            old = lax.dynamic_index_in_dim(pool, block, 1)
            written[name] = lax.dynamic_update_slice_in_dim(pool, jnp.where(block < pool.shape[1], new, old), block, 1)
        return written

    return lax.fori_loop(0, ids.size, one, pools)
