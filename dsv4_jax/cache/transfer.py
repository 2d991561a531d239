"""apply_transfers: resets, installed blocks and copied slots, on the device and in order."""

from __future__ import annotations

from dsv4_jax import ops
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.transfers import SlotArray, Transfers
from dsv4_jax.ops import Implementation

_ROLES = {"block_table": SlotArray.TABLE, "window_positions": SlotArray.POSITIONS}


def apply_transfers(cache: Cache, transfers: Transfers, *, implementation: Implementation = "native") -> Cache:
    """Resets slots, installs blocks into their table rows and copies their state to other slots, between two steps.

    In the order of the list: a slot reset, given blocks and copied over in one call is as if by three. A jitted
    function that donates the cache updates it in place; transfers are padded, so it is compiled for few shapes.

    Args:
      cache: as the last step left it.
      transfers: from ``TransferList.pack``. A slot or place out of range changes nothing.
      implementation: who runs it.

    Returns:
      The cache, updated in place where it is donated.
    """
    names = ("block_table", "window", "window_positions", *(name for name in cache.schema.arrays if "tail" in name))
    done = {
        name: ops.transfer(
            cache.arrays[name], transfers, role=_ROLES.get(name, SlotArray.STATE), implementation=implementation
        )
        for name in names
    }
    return cache.with_arrays(done)
