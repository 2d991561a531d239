"""transfer: operations on the slots of one of the cache's arrays, between steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.layout.transfers import FIELDS, SlotArray, Transfers
from dsv4_jax.native.call import OperandError, call, check


def transfer(array: jax.Array, transfers: Transfers, *, role: SlotArray) -> jax.Array:
    """Runs the operations that concern an array of that role, one after the other.

    Args:
      array: [layers, slots, ...]; int32 [slots, max_blocks] for role TABLE, int32 [layers, slots, ring] for POSITIONS.
      transfers: the operations; slots and places below 0 or out of range change nothing.
      role: what the array is.

    Returns:
      array, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op, role = "transfer", SlotArray(role)
    if role == SlotArray.STATE:
        if jnp.ndim(array) < 2:
            raise OperandError(f"{op}: array has shape {list(jnp.shape(array))}, expected [layers, slots, ...].")
    else:
        check(op, "array", array, (None,) * (2 if role == SlotArray.TABLE else 3), jnp.int32)
    check(op, "operations", transfers.operations, (None, len(FIELDS)), jnp.int32)
    check(op, "blocks", transfers.blocks, (None,), jnp.int32)
    (array,) = call(op, (array, transfers.operations, transfers.blocks), in_place=1, role=role.value)
    return array
