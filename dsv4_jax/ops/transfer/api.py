"""transfer: operations on the slots or blocks of one of the cache's arrays, between steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.layout.transfers import FIELDS, TABLE_ROLES, SlotArray, Transfers
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.checks import Implementation, OperandError, check, check_implementation, untransformed
from dsv4_jax.ops.transfer import reference

_TRANSFER = signature("transfer", "array operations blocks", "array", "role")


def transfer(
    array: jax.Array, transfers: Transfers, *, role: SlotArray, implementation: Implementation = "native"
) -> jax.Array:
    """Runs the operations that concern an array of that role, one after the other.

    Args:
      array: [layers, slots, ...]; int32 [slots, max_blocks] for the tables, int32 [layers, slots, ring] for POSITIONS,
        [layers, blocks, ...] for BLOCKS, float32 [layers, slots, 2, rows, width] or, running, [layers, slots, 3 states,
        width] for TAIL.
      transfers: the operations; slots, places and blocks below 0 or out of range change nothing.
      role: what the array is.
      implementation: who runs it.

    Returns:
      array, updated in place.

    Raises:
      OperandError: an operand does not fit.
    """
    op, role = "transfer", SlotArray(role)
    check_implementation(implementation)
    if role in (SlotArray.STATE, SlotArray.BLOCKS):
        if jnp.ndim(array) < 2:
            raise OperandError(f"{op}: array has shape {list(jnp.shape(array))}, expected [layers, slots, ...].")
    elif role == SlotArray.TAIL:
        check(op, "array", array, (None,) * (4 if jnp.ndim(array) == 4 else 5), jnp.float32)
    else:
        check(op, "array", array, (None,) * (2 if role in TABLE_ROLES else 3), jnp.int32)
    check(op, "operations", transfers.operations, (None, len(FIELDS)), jnp.int32)
    check(op, "blocks", transfers.blocks, (None,), jnp.int32)
    array, transfers = untransformed(op, (array, transfers))
    if implementation == "reference":
        return reference.transfer(array, transfers, role=role)
    operands = {"array": array, "operations": transfers.operations, "blocks": transfers.blocks}
    (array,) = call(_TRANSFER, operands, role=role.value)
    return array
