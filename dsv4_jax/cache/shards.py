"""A cache of several shards: steps over all of them at once, and one of them by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv4_jax.cache.pools import Cache, ShardingError, slots_axis
from dsv4_jax.layout.plan import StepPlan


def over_shards(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...] = "data",
    in_specs: Sequence[Any] = (),
    out_specs: Sequence[Any] | None = None,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """A jitted function on a cache of several shards, from one on a single shard, in ``jax.shard_map``.

    There is no communication but what the function asks for, and the cache is donated and updated in place.

    Args:
      function: (cache, work, further arguments) -> cache, or a tuple of the cache and results. ``work`` is a step's
        plan or transfers: outside ``ShardedPlan.step_plan`` or ``ShardedManager.take_transfers`` of all shards, inside
        those of one.
      mesh: of ``init_cache(schema, mesh=mesh, axis=axis)``. On its other axes the cache is replicated; a model splits
        its query heads there.
      axis: along which the shards lie.
      in_specs: the ``PartitionSpec`` of each further argument, or a tree of them.
      out_specs: of each result behind the cache; None if there is only the cache.
      check_vma: as for ``jax.shard_map``.

    Returns:
      The function on the whole cache, of the same arguments.
    """
    explicit = AxisType.Explicit in mesh.axis_types

    def whole(cache: Cache, work: Any, *arguments: Any) -> Any:
        specs = cache.partition_specs(axis)
        last = isinstance(work, StepPlan)
        of_work = jax.tree.map(lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1) * last, axis), work)
        if explicit:  # with such axes only what lies as its spec says is taken; NumPy's arrays lie nowhere yet
            placed = jax.tree.map(
                lambda spec: NamedSharding(mesh, spec),
                (of_work, *in_specs),
                is_leaf=lambda spec: isinstance(spec, PartitionSpec),
            )
            given = zip((work, *arguments), placed, strict=True)
            work, *rest = (jax.sharding.reshard(one, where) for one, where in given)
            arguments = tuple(rest)
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(specs, of_work, *in_specs),
            out_specs=specs if out_specs is None else (specs, *out_specs),
            check_vma=check_vma,
        )
        return mapped(cache, work, *arguments)

    return jax.jit(functools.wraps(function)(whole), donate_argnums=0)


def shard_of(cache: Cache, shard: int) -> Cache:
    """One shard of a cache, as a cache of its own: the same buffers, on the shard's device.

    To read it; ``change_shard`` is for what changes it. Where the cache is replicated over another axis, this is the
    first copy of this process.

    Raises:
      ShardingError: there is no such shard, or it is on no device of this process.
    """
    arrays = {name: [part.data for part in _parts(name, array, cache, shard)] for name, array in cache.arrays.items()}
    if not all(arrays.values()):
        raise ShardingError(f"shard {shard} is on no device of this process")
    # The only piece of an array is that array, mesh and all; by itself it lies on a device. No byte is copied.
    alone = SingleDeviceSharding(next(iter(arrays["window"][0].devices())))
    one = {name: jax.device_put(parts[0], alone) for name, parts in arrays.items()}
    return dataclasses.replace(cache, shards=1, partitioned=False).with_arrays(one)


def change_shard(cache: Cache, shard: int, change: Callable[[Cache], Cache]) -> Cache:
    """The cache after one of its shards was changed by itself, on its device.

    Args:
      cache: of several shards, given up: ``change`` may donate what it is given.
      shard: which one.
      change: from what ``shard_of`` gives to what is to be in its place.

    Raises:
      ShardingError: as ``shard_of``.
    """
    part = shard_of(cache, shard)
    mine, pieces = {}, {}
    for name, array in cache.arrays.items():  # now, since an array of which a piece was donated counts as deleted
        mine[name] = {one.device for one in _parts(name, array, cache, shard)}
        pieces[name] = [(one.device, one.data) for one in array.addressable_shards]
    made = change(part).arrays
    arrays = {}
    for name, array in cache.arrays.items():
        changed = [
            jax.device_put(made[name], device) if device in mine[name] else data for device, data in pieces[name]
        ]
        arrays[name] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, changed)
    return cache.with_arrays(arrays)


def _parts(name: str, array: jax.Array, cache: Cache, shard: int) -> list[Any]:
    """What of an array holds the shard, on the devices of this process."""
    if not 0 <= shard < cache.shards:
        raise ShardingError(f"the cache has shards 0 to {cache.shards - 1}, got {shard}")
    axis = slots_axis(name)
    first = shard * cache.schema.arrays[name].shape[axis]
    return [part for part in array.addressable_shards if (part.index[axis].start or 0) == first]
