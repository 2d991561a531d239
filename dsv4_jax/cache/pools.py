"""``Cache``: the arrays of a cache as one frozen pytree, and ``init_cache``, which makes an empty one on the device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.layout.schema import CacheSchema, empty_tail


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """All state of all requests, on the device. Donate it to a jitted step and go on with the one that comes back.

    Shapes and dtypes are ``schema.arrays``; P stands for a page, whose shape the component's format defines.

    Attributes:
      block_table: int32 [slots, max_blocks], the block of every 128 tokens of a slot; -1 = none.
      window: [layers, slots, *P], ring buffer of the latest rows; the row of a position is its remainder by the ring.
      window_positions: int32 [layers, slots, ring], the position each row of the ring holds; -1 = none.
      csa_entries: [CSA layers, blocks, *P], 32 entries a block.
      csa_keys: [CSA layers, blocks, *P], 32 indexer keys a block.
      hca_entries: [HCA layers, blocks, *P], one entry a block.
      csa_tail: fp32 [CSA layers, slots, 2 (kv, score), 12, 512], rows waiting to be compressed.
      key_tail: fp32 [CSA layers, slots, 2 (kv, score), 12, 128], the same for the indexer.
      hca_tail: fp32 [HCA layers, slots, 2 (kv, score), 128, 512], the same for HCA; or, with
        ``CacheFormats(hca_tail="running")``, fp32 [HCA layers, slots, 3 (max, denominator, sum), 512].
      schema: what the arrays look like; static under ``jax.jit``.
    """

    block_table: jax.Array
    window: jax.Array
    window_positions: jax.Array
    csa_entries: jax.Array
    csa_keys: jax.Array
    hca_entries: jax.Array
    csa_tail: jax.Array
    key_tail: jax.Array
    hca_tail: jax.Array
    schema: CacheSchema = dataclasses.field(metadata={"static": True})

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of every array by name, read from the arrays themselves."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "schema"}
        return {name: math.prod(array.shape) * array.dtype.itemsize for name, array in arrays.items()}


def init_cache(schema: CacheSchema, *, device: Any = None) -> Cache:
    """Make an empty cache: no blocks, no positions, pools of zeros, tails of kv 0 and score -1e9 or max -1e9.

    The arrays are written on the device by a compiled program, not copied from the host, so that they can be donated.

    Args:
      schema: what to make.
      device: a device, a ``jax.sharding.Sharding`` for every array, or a ``Cache`` of shardings; JAX's default device
        if None.
    """
    if device is None:
        return _create(schema)
    if isinstance(device, jax.Device):
        device = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(_empty, static_argnums=0, out_shardings=device)(schema)


def _empty(schema: CacheSchema) -> Cache:
    values = {"block_table": -1, "window_positions": -1}
    arrays = {name: jnp.full(array.shape, values.get(name, 0), array.dtype) for name, array in schema.arrays.items()}
    for name in ("csa_tail", "key_tail", "hca_tail"):
        shape = schema.arrays[name].shape
        arrays[name] = jnp.broadcast_to(empty_tail(shape), shape)
    return Cache(**arrays, schema=schema)


_create = jax.jit(_empty, static_argnums=0)
