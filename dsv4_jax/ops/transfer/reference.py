"""transfer: operations on the slots or blocks of one array, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.arithmetic.pages import in_range
from dsv4_jax.arithmetic.scalars import bits_of
from dsv4_jax.layout.layer_schema import empty_tail
from dsv4_jax.layout.transfers import TABLE_ROLES, SlotArray, TransferKind, Transfers


def transfer(array: jax.Array, transfers: Transfers, *, role: SlotArray) -> jax.Array:
    """Run the operations that concern an array, in order.

    Args:
      array: [layers, slots, ...]; a table is [slots, max_blocks], a pool of blocks [layers, blocks, ...].
      transfers: the operations; slots and places out of range change nothing.
      role: what the array is.

    Returns:
      The array.
    """
    is_table = role in TABLE_ROLES
    by_layer = array[None] if is_table else bits_of(array)
    empty = jnp.int32(-1 if is_table or role == SlotArray.POSITIONS else 0).astype(by_layer.dtype)
    if role == SlotArray.TAIL:
        empty = bits_of(empty_tail(array.shape))
    slots, blocks = by_layer.shape[1], jnp.asarray(transfers.blocks)

    def one(array: jax.Array, operation: jax.Array) -> tuple[jax.Array, None]:
        kind, slot, source, offset, count = operation
        runs = in_range(slot, slots)
        target = jnp.where(runs, slot, 0)
        old = array[:, target]
        new = old
        if is_table or role == SlotArray.POSITIONS:
            new = jnp.where(kind == TransferKind.RESET, empty, new)
        if is_table:
            place = jnp.arange(array.shape[2], dtype=jnp.int32) - source
            # Compared by subtraction: source + count and offset + count could overflow.
            given = (place >= 0) & (place < count) & (offset >= 0) & (place < blocks.size - offset)
            installed = blocks[jnp.where(given, offset + place, 0)]
            new = jnp.where((kind == TransferKind.INSTALL) & given[None], installed[None], new)
            shared = installed if role == SlotArray.TABLE else jnp.full_like(installed, -1)
            new = jnp.where((kind == TransferKind.SHARE) & given[None], shared[None], new)
        else:
            wanted = TransferKind.COPY_BLOCK if role == SlotArray.BLOCKS else TransferKind.COPY
            copies = (kind == wanted) & in_range(source, slots)
            new = jnp.where(copies, array[:, jnp.where(copies, source, 0)], new)
        if role != SlotArray.BLOCKS:
            new = jnp.where(kind == TransferKind.WIPE, empty, new)
        array = array.at[:, target].set(jnp.where(runs, new, old))
        if role == SlotArray.BLOCKS:
            nth = jnp.arange(blocks.size, dtype=jnp.int32) - offset
            given = (kind == TransferKind.WIPE_BLOCKS) & (offset >= 0) & (nth >= 0) & (nth < count) & (blocks >= 0)
            wiped = jnp.zeros(slots, jnp.bool_).at[jnp.where(given, blocks, slots)].set(True, mode="drop")
            array = jnp.where(wiped.reshape(-1, *[1] * (array.ndim - 2)), empty, array)
        return array, None

    done, _ = jax.lax.scan(one, by_layer, jnp.asarray(transfers.operations))
    if is_table:
        return done[0]
    return jax.lax.bitcast_convert_type(done, array.dtype)
