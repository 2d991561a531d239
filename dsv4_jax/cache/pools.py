"""``Cache``: the arrays of a cache as one frozen pytree, and ``init_cache``, which makes an empty one on the device."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.tree_util import GetAttrKey

from dsv4_jax.json_text import is_count, parse_json
from dsv4_jax.layout.layer_schema import empty_tail
from dsv4_jax.layout.schema import TABLES, CacheSchema, SchemaError


class ShardingError(ValueError):
    """A cache that lies on several devices in a way that no step can use."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """All state of all requests, on the device. Donate it to a jitted step and go on with the one that comes back.

    A pytree; ``schema`` and ``shards`` are static. Shapes and dtypes are ``schema.arrays``, with slots and blocks of
    all shards side by side in a cache of several; P stands for a page, whose shape the component's format defines.
    Behind the slots of an array lie the schema's ``snapshots``, but for ``hca_tail``.

    Attributes:
      block_table: int32 [slots, max_blocks], the block of every 128 tokens of a slot; -1 = none.
      write_table: int32 [slots, max_blocks], the same, but -1 for blocks that the request only reads: what it shares of
        its prompt while it computes what is missing of the rest. Entries and keys are stored by this one.
      window: [layers, slots, *P], ring buffer of the latest rows; the row of a position is its remainder by the ring.
      window_positions: int32 [layers, slots, ring], the position each row of the ring holds; -1 = none.
      pools: what the kinds of the model's layers have of their own, by name (rows of tails are those of ``lookahead``
        0):
        ``csa_entries`` [CSA layers, blocks, *P], 32 entries a block;
        ``csa_keys`` [CSA layers, blocks, *P], 32 indexer keys a block;
        ``hca_entries`` [HCA layers, blocks, *P], one entry a block;
        ``csa_tail`` fp32 [CSA layers, slots, 2 (kv, score), 12, 512], rows waiting to be compressed;
        ``csa_key_tail`` fp32 [CSA layers, slots, 2 (kv, score), 12, 128], the same for the indexer;
        ``hca_tail`` fp32 [HCA layers, slots, 2 (kv, score), 128, 512], the same for HCA; or, with
        ``CacheFormats(hca_tail="running")``, fp32 [HCA layers, slots, 3 (max, denominator, sum), 512], which is
        more with a lookahead, see ``CacheSchema.arrays``.
      schema: what the arrays of one shard look like.
      shards: how many shards lie side by side: 1, or what ``init_cache(schema, mesh=…)`` made. Inside ``jax.shard_map``
        the arrays are those of one shard and this keeps its value.
      partitioned: whether the arrays are spread over several devices, as JAX last saw them on the device; set by JAX.
    """

    block_table: jax.Array
    write_table: jax.Array
    window: jax.Array
    window_positions: jax.Array
    pools: dict[str, jax.Array]
    schema: CacheSchema
    shards: int = 1
    partitioned: bool = False

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Every array by name, as in ``schema.arrays``."""
        shared = {name: getattr(self, name) for name in _SHARED}
        return shared | {name: self.pools[name] for name in self.schema.pools}

    def with_arrays(self, arrays: Mapping[str, jax.Array]) -> Cache:
        """The cache with some arrays exchanged, by the names of ``arrays``.

        Raises:
          KeyError: there is no array of that name.
        """
        if unknown := arrays.keys() - {*_SHARED, *self.pools}:
            raise KeyError(f"a cache has the arrays {', '.join(self.schema.arrays)}; got {', '.join(sorted(unknown))}")
        shared: dict[str, Any] = {name: array for name, array in arrays.items() if name in _SHARED}
        pools = {name: array for name, array in arrays.items() if name not in _SHARED}
        return dataclasses.replace(self, **shared, pools=self.pools | pools)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of every array by name, of all shards together, read from the arrays themselves."""
        return {name: math.prod(array.shape) * array.dtype.itemsize for name, array in self.arrays.items()}

    def partition_specs(self, axis: str | tuple[str, ...]) -> Cache:
        """A ``Cache`` of ``PartitionSpec``: its part of the ``in_specs`` and ``out_specs`` of ``jax.shard_map``.

        Args:
          axis: the mesh axis (or axes) along which the shards lie.
        """
        specs: dict[str, Any] = {name: PartitionSpec(*[None] * slots_axis(name), axis) for name in _SHARED}
        pools: dict[str, Any] = dict.fromkeys(self.pools, PartitionSpec(None, axis))
        return Cache(**specs, pools=pools, schema=self.schema, shards=self.shards, partitioned=_is_partitioned(self))


def check_one_shard(cache: Cache) -> None:
    """Raises unless the arrays are those of one shard on one device (or whole on each of several); while tracing, too.

    Outside ``jax.shard_map`` XLA would gather a partitioned cache on every device for each op, lose its donation and
    say nothing.

    Raises:
      ShardingError: the cache is partitioned, or its arrays are those of all shards.
      ValueError: an array has a shape or dtype other than the schema's.
    """
    mend = (
        "Make it with init_cache(schema, mesh=mesh, axis='data') and run the step by over_shards(step, mesh), or "
        "inside jax.shard_map with cache.partition_specs('data') for the cache in in_specs and out_specs"
    )
    expected, shards = cache.schema.arrays, cache.shards
    for name, array in cache.arrays.items():
        shape, want = tuple(array.shape), expected[name]
        if shape == want.shape and array.dtype == want.dtype:
            continue
        axis = slots_axis(name)
        if shards > 1 and shape == (*want.shape[:axis], shards * want.shape[axis], *want.shape[axis + 1 :]):
            raise ShardingError(f"A step works on one shard, this cache has {shards} side by side. {mend}.")
        raise ValueError(
            f"The cache's {name} is {array.dtype.name}{list(shape)}, its schema says "
            f"{want.dtype.name}{list(want.shape)}; init_cache(schema) makes one that fits."
        )
    if shards == 1 and _is_partitioned(cache):
        raise ShardingError(f"This cache is partitioned over several devices, so that XLA would gather it. {mend}.")


def init_cache(
    schema: CacheSchema,
    *,
    device: jax.Device | Sharding | None = None,  # pyright: ignore[reportInvalidTypeForm]
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> Cache:
    """Make an empty cache: no blocks, no positions, pools of zeros, tails of kv 0 and score -1e9 or max -1e9.

    The arrays are written on the device by a compiled program, not copied from the host, so that they can be donated.

    Args:
      schema: what to make; of one shard, where there are several.
      device: a device, or a ``jax.sharding.Sharding`` that keeps every array whole; JAX's default device if None. The
        arrays are committed to it: a step whose other arguments are committed elsewhere is an error of JAX.
      mesh: the devices of a cache of several shards, for use inside ``jax.shard_map``; with ``axis`` and without
        ``device``.
      axis: name (or names) of the mesh axis along which shards lie side by side, on the slots' or blocks' axis of every
        array. There are as many shards as the axis is long.

    Raises:
      ShardingError: ``device`` is a sharding that splits arrays.
      ValueError: mesh and axis are not given together, or beside a device, or the mesh has no such axis.
    """
    if (mesh is None) != (axis is None) or (mesh is not None and device is not None):
        raise ValueError(
            f"init_cache takes a device, or a mesh and an axis of it; got device={device}, mesh={mesh}, axis={axis}."
        )
    if mesh is not None and axis is not None:
        return _create_shards(schema, mesh, axis)
    if device is None:
        device = _default_device()
    if isinstance(device, jax.Device):
        device = SingleDeviceSharding(device)
    if not isinstance(device, Sharding):
        raise ValueError(f"device must be a jax.Device or a jax.sharding.Sharding, got {device!r}.")
    if not device.is_fully_replicated:
        raise ShardingError(
            f"{device} splits arrays, and XLA would gather them for every op. For a cache of one shard per device use "
            f"init_cache(schema, mesh=mesh, axis='data'), and run the step inside jax.shard_map."
        )
    return _creator(device)(schema)


def _default_device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """Named, so that the cache is committed to it: what a resumed request brings is, and to JAX the mixture of both is
    another type of argument, for which it compiles every program that takes the cache again.
    """
    config: Any = jax.config
    chosen = config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.local_devices(backend=chosen)[0]


@functools.cache
def _creator(device: Sharding) -> Callable[[CacheSchema], Cache]:
    return jax.jit(_empty, static_argnums=(0, 1), out_shardings=device)


def _create_shards(schema: CacheSchema, mesh: Mesh, axis: str | tuple[str, ...]) -> Cache:
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    if unknown := [name for name in names if name not in mesh.shape]:
        raise ValueError(f"the mesh has the axes {', '.join(mesh.shape)}; got {', '.join(unknown)}.")
    shards = math.prod(mesh.shape[name] for name in names)
    like = jax.eval_shape(functools.partial(_empty, schema, shards))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        like.partition_specs(axis),
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )
    return jax.jit(_empty, static_argnums=(0, 1), out_shardings=shardings)(schema, shards)


_SHARED = (*TABLES, "window", "window_positions")


def slots_axis(name: str) -> int:
    """The axis of an array along which slots (or blocks) lie: layers come before it, but for the tables."""
    return 0 if name in TABLES else 1


def _empty(schema: CacheSchema, shards: int = 1) -> Cache:
    arrays = {}
    for name, array in schema.arrays.items():
        axis = slots_axis(name)
        shape = (*array.shape[:axis], shards * array.shape[axis], *array.shape[axis + 1 :])
        if name in schema.tails:
            arrays[name] = jnp.broadcast_to(empty_tail(shape), shape)
        else:
            arrays[name] = jnp.full(shape, -1 if name in (*TABLES, "window_positions") else 0, array.dtype)
    shared: dict[str, Any] = {name: arrays.pop(name) for name in _SHARED}
    return Cache(**shared, pools=arrays, schema=schema, shards=shards)


# The pytree. JAX takes a cache apart and puts it together at every dispatch, so this is kept short: no shape is looked
# at. Whether the arrays are partitioned can only be seen here, where they are concrete; it then stays with the tree
# while a step is traced.

_Static = tuple[CacheSchema, int, bool]


def _is_partitioned(cache: Cache) -> bool:
    for array in (cache.window, *list(cache.pools.values())[:1]):
        sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
        if sharding is None:
            return cache.partitioned
        if not sharding.is_fully_replicated:
            return True
    return False


def _flatten(cache: Cache) -> tuple[tuple[Any, ...], _Static]:
    children = (cache.block_table, cache.write_table, cache.window, cache.window_positions, cache.pools)
    return children, (cache.schema, cache.shards, _is_partitioned(cache))


def _flatten_with_keys(cache: Cache) -> tuple[tuple[Any, ...], _Static]:
    children, static = _flatten(cache)
    keys = (GetAttrKey(name) for name in (*_SHARED, "pools"))
    return tuple(zip(keys, children, strict=True)), static


def _unflatten(static: _Static, children: Iterable[Any]) -> Cache:
    cache = object.__new__(Cache)
    fields = cache.__dict__
    fields["block_table"], fields["write_table"], fields["window"], fields["window_positions"], fields["pools"] = (
        children
    )
    fields["schema"], fields["shards"], fields["partitioned"] = static
    return cache


def _static_to_bytes(static: _Static) -> bytes:
    schema, shards, partitioned = static
    return json.dumps([schema.to_json(), shards, partitioned]).encode()


def _static_from_bytes(data: bytes | bytearray) -> _Static:
    try:
        schema, shards, partitioned = parse_json(data)
        if type(schema) is not str or not is_count(shards) or type(partitioned) is not bool:
            raise ValueError("it needs a schema, a number of shards, and whether arrays are partitioned")
    except (TypeError, ValueError) as error:
        raise SchemaError(f"this is no Cache of an exported program; export it again: {error}.") from error
    return CacheSchema.from_json(schema), shards, partitioned


jax.tree_util.register_pytree_with_keys(Cache, _flatten_with_keys, _unflatten, _flatten)
jax.export.register_pytree_node_serialization(
    Cache,
    serialized_name="dsv4_jax.Cache",
    serialize_auxdata=_static_to_bytes,
    deserialize_auxdata=_static_from_bytes,
)
