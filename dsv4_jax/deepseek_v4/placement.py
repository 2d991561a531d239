"""Where a server's model and its cache lie: on one device, or on the devices of a mesh.

The mesh has two axes. Along ``data`` lie shards of the cache, each with requests of its own; along ``tensor`` the
devices that share a shard. Each of these has some of the query heads: their rows of the query projection, their sinks,
and their columns of the output projection, whose products are summed over the axis. Routed experts are split likewise,
a part of every expert's width to each device, if that is whole blocks of 128. All else is whole on every device: the
cache, since there is one key and value head; the indexer, since scores of its heads are added up; the shared expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv4_jax import Cache, CacheSchema, ConfigError, init_cache, over_shards
from dsv4_jax.deepseek_v4.config import DeepseekV4Config
from dsv4_jax.deepseek_v4.quantized import FP8_BLOCK
from dsv4_jax.deepseek_v4.weights import ModelWeights

DATA, TENSOR = "data", "tensor"

# Of a weight that is split over ``tensor``: the axis. Of quantized ones codes and scales are split alike.
_BY_HEADS = {"attention.wq_b": 0, "attention.sinks": 0, "attention.wo_a": 0, "attention.wo_b": 1}
_BY_WIDTH = {"experts.gate": 1, "experts.up": 1, "experts.down": 2}


def tensor_sizes(config: DeepseekV4Config) -> list[int]:
    """Over how many devices a model's query heads can be split: whole groups of the output projection, and whole blocks
    of 128 of their ranks, which have a scale each.
    """
    groups, rank = config.o_groups, config.o_lora_rank
    return [n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or groups // n * rank % FP8_BLOCK == 0)]


def server_mesh(config: DeepseekV4Config, *, data: int = 1, tensor: int = 1) -> Mesh:
    """The first devices of this process, [data, tensor].

    Raises:
      ConfigError: the model's heads cannot be split so, or there are fewer devices.
    """
    if tensor not in (sizes := tensor_sizes(config)):
        raise ConfigError(
            f"{config.spec.num_heads} query heads in {config.o_groups} groups cannot be split over {tensor} devices; "
            f"tensor can be {', '.join(map(str, sizes))}."
        )
    devices, wanted = jax.local_devices(), data * tensor
    if wanted > len(devices):
        mend = (
            f" Start with XLA_FLAGS=--xla_force_host_platform_device_count={wanted} for as many on this host."
            if devices[0].platform == "cpu"
            else ""
        )
        raise ConfigError(f"data={data},tensor={tensor} takes {wanted} devices; JAX has {len(devices)}.{mend}")
    return jax.make_mesh((data, tensor), (DATA, TENSOR), devices=devices[:wanted], axis_types=(AxisType.Auto,) * 2)


def weight_sharding(
    config: DeepseekV4Config, mesh: Mesh | None
) -> Callable[[str, tuple[int, ...]], NamedSharding | None]:
    """Where a weight goes by its path and shape, for ``load_checkpoint``; None for JAX's default device."""
    return lambda path, shape: None if mesh is None else NamedSharding(mesh, _spec(config, mesh, path, len(shape)))


def _spec(config: DeepseekV4Config, mesh: Mesh, path: str, axes: int) -> PartitionSpec:
    devices = mesh.shape[TENSOR]
    if devices == 1:
        return PartitionSpec()
    names = _BY_HEADS | (_BY_WIDTH if config.expert_width % (devices * FP8_BLOCK) == 0 else {})
    split = next((axis for name, axis in names.items() if f".{name}." in f"{path}."), axes)
    return PartitionSpec(*[None] * split, TENSOR) if split < axes else PartitionSpec()


class Placement:
    """Puts what a server has where it belongs, and makes programs that run there.

    Args:
      mesh: from ``server_mesh``; None is JAX's default device.

    Attributes:
      shards: of the cache.
      tensor_axis: the mesh axis over which query heads and experts are split; None if they are not.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        if mesh is not None and set(mesh.shape) != {DATA, TENSOR}:
            raise ValueError(f"a server's mesh has the axes {DATA} and {TENSOR}, got {', '.join(mesh.shape)}")
        self.mesh = mesh
        self.shards: int = 1 if mesh is None else mesh.shape[DATA]
        self.tensor_axis = TENSOR if mesh is not None and mesh.shape[TENSOR] > 1 else None

    def cache(self, schema: CacheSchema) -> Cache:
        """An empty cache, of a schema in each shard."""
        return init_cache(schema) if self.mesh is None else init_cache(schema, mesh=self.mesh, axis=DATA)

    def weights(self, config: DeepseekV4Config, weights: ModelWeights) -> ModelWeights:
        """The weights of a model, each where it belongs; nothing moves that is there already."""
        if self.mesh is None:
            return weights
        sharding = weight_sharding(config, self.mesh)
        placed = jax.tree_util.tree_map_with_path(lambda path, leaf: sharding(_name(path), leaf.shape), weights)
        return jax.device_put(weights, placed)

    def weight_specs(self, config: DeepseekV4Config, weights: ModelWeights) -> Any:
        """A ``PartitionSpec`` for every array of the weights, in their tree; None for those of one device."""
        if self.mesh is None:
            return None
        mesh = self.mesh
        return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(config, mesh, _name(path), leaf.ndim), weights)

    def program(
        self,
        function: Callable[..., Any],
        in_specs: Sequence[Any] = (),
        out_specs: Sequence[Any] | None = None,
    ) -> Callable[..., Any]:
        """A jitted function on the whole cache, which it is to donate, from one of a shard; all as ``over_shards``."""
        if self.mesh is None:
            return jax.jit(function, donate_argnums=0)
        return over_shards(function, self.mesh, axis=DATA, in_specs=in_specs, out_specs=out_specs)


def on_one_device(tree: Any) -> Any:
    """Arrays of a mesh on one device of it; those that are whole there stay, and others are gathered."""

    def gather(array: Any) -> Any:
        if not isinstance(array, jax.Array):
            return array
        alone = SingleDeviceSharding(array.addressable_shards[0].device)
        return jax.device_put(array.addressable_data(0) if array.is_fully_replicated else array, alone)

    return jax.tree.map(gather, tree)


def bytes_of_a_device(tree: Any) -> int:
    """What arrays that all devices have alike parts of take on each."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
