"""Books: what a manager knows of its cache, and what it tells of that. The operations are ``CacheManager``'s."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.arguments import integer
from dsv4_jax.host.batch import BlockNeed
from dsv4_jax.host.blocks import BlockLedger
from dsv4_jax.host.drafts import DraftTable
from dsv4_jax.host.journal import Journal
from dsv4_jax.host.receipts import Receipts
from dsv4_jax.host.requests import RequestTable
from dsv4_jax.host.transfers import TransferQueue
from dsv4_jax.layout.schema import CacheSchema


class Books:
    """The rooms of a manager, each with one thing to know, and the journal through which all of them are written."""

    def __init__(self, schema: CacheSchema) -> None:
        self._schema = schema
        self._need = BlockNeed(schema.spec)
        self._journal = Journal()
        self._request_table = RequestTable(schema.slots)
        self._ledger = BlockLedger(schema.slots, schema.max_blocks, schema.blocks)
        self._drafts = DraftTable(schema)
        self._receipts = Receipts()
        self._transfers = TransferQueue()

    def _state(self) -> tuple[RequestTable, BlockLedger]:
        """What the manager knows; an interrupted operation is finished first, so nothing else may read it."""
        self._journal.finish()
        return self._request_table, self._ledger

    def __getstate__(self) -> dict[str, Any]:
        self._journal.finish()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._receipts.rename(self._request_table.clock, self._request_table.oldest_plan())

    def __copy__(self) -> Self:
        return copy.deepcopy(self)

    @property
    def schema(self) -> CacheSchema:
        """The cache the plans are for."""
        return self._schema

    @property
    def free_slots(self) -> int:
        """How many more requests can be admitted."""
        return self._state()[0].free

    @property
    def free_blocks(self) -> int:
        """How many blocks no request holds."""
        return self._state()[1].free

    @property
    def requests(self) -> NDArray[np.int64]:
        """int64 [admitted requests]: their handles, in order of admission."""
        handles = self._state()[0].handles
        return np.sort(handles[handles >= 0])

    @property
    def transfers_wait(self) -> bool:
        """Whether ``take_transfers`` has something to give; ``prepare_forward`` then refuses."""
        self._journal.finish()
        return bool(self._transfers)

    def length(self, request: int) -> int:
        """Tokens of the request in the cache once every plan made so far has run. Raises UnknownRequest.

        With drafts whose plan has not been committed, the most that it can be.
        """
        table, _ = self._state()
        return int(table.lengths[table.slot(request)])

    def slot(self, request: int) -> int:
        """The request's slot. Raises UnknownRequest."""
        return self._state()[0].slot(request)

    def blocks(self, request: int) -> NDArray[np.int32]:
        """int32 [blocks held]: the request's block ids; the i-th holds the entries of tokens 128 i … 128 i + 127.

        Raises UnknownRequest.
        """
        table, ledger = self._state()
        slot = table.slot(request)
        return ledger.table[slot, : self.blocks_needed(table.lengths[slot])].copy()

    def blocks_needed(self, length: ArrayLike) -> NDArray[np.int64]:
        """Blocks a request of ``length`` tokens holds: as many as its finished entries fill, perhaps in part.

        ceil((length // 4) / 32) in a model with CSA layers, length // 128 with HCA layers only, 0 with neither.

        Args:
          length: integers of any shape, tokens.

        Returns:
          int64 of that shape.
        """
        return self._need.blocks(length)

    def can_admit(self, length: int = 0) -> bool:
        """Whether a slot is free, and blocks for a request of ``length`` tokens are.

        Raises:
          TypeError, ValueError: ``length`` is not an integer, or below 0.
        """
        length = integer("length", length)
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        table, ledger = self._state()
        if not table.free or length > self._schema.max_context:
            return False
        return int(self.blocks_needed(length)) <= ledger.free
