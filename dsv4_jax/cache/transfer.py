"""apply_transfers: resets, installed blocks, copied and wiped slots and blocks, on the device and in order."""

from __future__ import annotations

from dsv4_jax import ops
from dsv4_jax.cache.pools import Cache, check_one_shard
from dsv4_jax.layout.transfers import SlotArray, Transfers
from dsv4_jax.ops import Implementation

_ROLES = {
    "block_table": SlotArray.TABLE,
    "write_table": SlotArray.WRITE_TABLE,
    "window_positions": SlotArray.POSITIONS,
}


def apply_transfers(cache: Cache, transfers: Transfers, *, implementation: Implementation = "native") -> Cache:
    """Resets slots, installs or shares blocks in their table rows, copies and wipes slots and blocks, between steps.

    In the order of the list: a slot reset, given blocks and copied over in one call is as if by three. A jitted
    function that donates the cache updates it in place; transfers are padded, so it is compiled for few shapes.

    Args:
      cache: as the last step left it.
      transfers: from ``CacheManager.take_transfers``, or ``TransferList.pack``. What is out of range changes nothing.
      implementation: who runs it.

    Returns:
      The cache, updated in place where it is donated.
    """
    check_one_shard(cache)
    roles = _ROLES | dict.fromkeys(cache.schema.block_pools, SlotArray.BLOCKS)
    roles |= dict.fromkeys(cache.schema.tails, SlotArray.TAIL)
    return cache.with_arrays(
        {
            name: ops.transfer(array, transfers, role=roles.get(name, SlotArray.STATE), implementation=implementation)
            for name, array in cache.arrays.items()
        }
    )
