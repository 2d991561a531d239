"""``Transfers``: what is to happen to slots between steps, in order: resets, blocks installed, copies, wipes.

``TransferList`` writes it down on the host, ``apply_transfers`` runs it on the device, where ``ffi/layout/transfer.h``
reads it.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from dsv4_jax.layout.schema import CacheSchema

FIELDS = ("kind", "slot", "source", "offset", "count")
"""The numbers of an operation, in order. ``source`` is a copy's source, or the first place of installed blocks;
``slot`` is a block where a block is copied;
``offset`` and ``count`` say where these lie among all block ids."""

_SMALLEST = 8
_LARGEST = 2**31 - 1


class TransferKind(enum.IntEnum):
    """What an operation does."""

    NONE = 0
    RESET = 1
    INSTALL = 2
    COPY = 3
    COPY_BLOCK = 4
    SHARE = 5
    WIPE = 6
    WIPE_BLOCKS = 7


class SlotArray(enum.StrEnum):
    """What one of the cache's arrays is, and so which operations concern it.

    TABLE, the block table: resets, installed and shared blocks. WRITE_TABLE, the same, but shared ones are none.
    POSITIONS, the positions of window rows: resets and copies. TAIL, rows or states that wait to be compressed, and
    STATE, all else that a slot has: copies. BLOCKS, a page for each block: copied blocks. Wipes concern all of them.
    """

    TABLE = "table"
    WRITE_TABLE = "write_table"
    POSITIONS = "positions"
    STATE = "state"
    TAIL = "tail"
    BLOCKS = "blocks"


TABLE_ROLES = (SlotArray.TABLE, SlotArray.WRITE_TABLE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Transfers:
    """Operations on slots and blocks, in order. A pytree; made by ``TransferList.pack``, run by ``apply_transfers``.

    Both arrays are padded to powers of two, so that a program that takes them is compiled for few shapes.

    Attributes:
      operations: int32 [n, 5], ``FIELDS`` of each; kind NONE is padding.
      blocks: int32 [k], the block ids that operations install, share or wipe, one after the other.
    """

    operations: Any
    blocks: Any

    def copies(self, schema: CacheSchema) -> tuple[int, int]:
        """How many copies of slots, snapshots and blocks these are in a cache of this schema, and their bytes.

        On the host. Resets, installed and shared blocks, and wipes, copy nothing.
        """
        kinds, slots, sources = (
            np.asarray(self.operations)[:, FIELDS.index(name)] for name in ("kind", "slot", "source")
        )
        states, blocks = kinds == TransferKind.COPY, int((kinds == TransferKind.COPY_BLOCK).sum())
        snapshots = int((states & (np.maximum(slots, sources) >= schema.slots)).sum())
        twins, tables = int(states.sum()) - snapshots, schema.table_bytes
        moved = twins * (schema.bytes_per_slot - tables) + snapshots * (schema.bytes_per_snapshot - tables)
        return twins + snapshots + blocks, moved + blocks * schema.bytes_per_block


class TransferList:
    """Operations on the slots and blocks of a cache, in the order in which they will happen.

    Slots, places and block ids are those of ``CacheManager``. Nothing is known of the cache here: what is out of its
    range does nothing on the device.
    """

    def __init__(self) -> None:
        self._operations: list[tuple[int, int, int, int, int]] = []
        self._blocks: list[NDArray[np.int32]] = []
        self._listed = 0

    def __len__(self) -> int:
        return len(self._operations)

    def reset(self, slot: int) -> None:
        """Makes a slot as new: no blocks in its table rows, no window position. Its rows and tails are then not read.

        Raises:
          TypeError, ValueError: not an integer, or not from 0 to 2**31 - 1; so for all methods.
        """
        self._operations.append((TransferKind.RESET, _index("slot", slot), 0, 0, 0))

    def install(self, slot: int, blocks: ArrayLike, first: int = 0) -> None:
        """Puts blocks of its own into a slot's rows of both tables, at the places from ``first`` on.

        Args:
          slot: whose row.
          blocks: integers [count], block ids; any count.
          first: the place of the first, so the block of tokens 128 first … 128 first + 127.
        """
        self._put(TransferKind.INSTALL, slot, blocks, first)

    def share(self, slot: int, blocks: ArrayLike, first: int = 0) -> None:
        """The same for blocks that the slot's request reads and that nothing of it is stored in."""
        self._put(TransferKind.SHARE, slot, blocks, first)

    def _put(self, kind: TransferKind, slot: int, blocks: ArrayLike, first: int) -> None:
        slot, first, ids = _index("slot", slot), _index("first", first), _block_ids(blocks)
        self._operations.append((kind, slot, first, *self._list(ids)))

    def copy(self, source: int, target: int) -> None:
        """Copies what a slot holds of its own, window rows with their positions and all tails; not its table rows."""
        self._operations.append((TransferKind.COPY, _index("target", target), _index("source", source), 0, 0))

    def copy_block(self, source: int, target: int) -> None:
        """Copies a block, in all pools that have a page for it."""
        operation = TransferKind.COPY_BLOCK, _index("target", target), _index("source", source), 0, 0
        self._operations.append(operation)

    def wipe(self, slot: int) -> None:
        """Makes all that a slot, or a snapshot, has of its own what ``init_cache`` made it, its table rows too."""
        self._operations.append((TransferKind.WIPE, _index("slot", slot), 0, 0, 0))

    def wipe_blocks(self, blocks: ArrayLike) -> None:
        """Does so with blocks, integers [count], in all pools that have a page for them."""
        self._operations.append((TransferKind.WIPE_BLOCKS, 0, 0, *self._list(_block_ids(blocks))))

    def _list(self, ids: NDArray[np.int32]) -> tuple[int, int]:
        """Adds block ids that an operation has; where they begin, and how many they are."""
        offset = self._listed
        self._blocks.append(ids)
        self._listed += ids.size
        return offset, ids.size

    def pack(self) -> Transfers:
        """The operations so far, as NumPy arrays for ``apply_transfers``."""
        operations = np.zeros((_padded(len(self._operations)), len(FIELDS)), np.int32)
        if self._operations:
            operations[: len(self._operations)] = self._operations
        blocks = np.full(_padded(self._listed), -1, np.int32)
        blocks[: self._listed] = np.concatenate([*self._blocks, blocks[:0]])
        return Transfers(operations, blocks)


def side_by_side(parts: Sequence[Transfers]) -> Transfers:
    """The transfers of several shards, each padded to what the longest takes, on the first axis, for ``shard_map``."""
    operations, blocks = (max(getattr(part, name).shape[0] for part in parts) for name in ("operations", "blocks"))
    padded = [
        Transfers(
            np.pad(part.operations, ((0, operations - len(part.operations)), (0, 0))),
            np.pad(part.blocks, (0, blocks - len(part.blocks)), constant_values=-1),
        )
        for part in parts
    ]
    return Transfers(*(np.concatenate([getattr(part, name) for part in padded]) for name in ("operations", "blocks")))


def _block_ids(blocks: ArrayLike) -> NDArray[np.int32]:
    ids = np.asarray(blocks)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"blocks must be integers [count], got {ids.dtype} {list(ids.shape)}")
    if ids.size and not (ids.min() >= 0 and ids.max() <= _LARGEST):
        raise ValueError(f"block ids are from 0 to {_LARGEST}, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def _padded(count: int) -> int:
    return max(_SMALLEST, 1 << (count - 1).bit_length()) if count else _SMALLEST


def _index(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        index = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if not 0 <= index <= _LARGEST:
        raise ValueError(f"{name} must be from 0 to {_LARGEST}, got {index}")
    return index
