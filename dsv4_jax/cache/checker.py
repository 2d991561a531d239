"""``CacheChecker``: a debug check of a whole cache between steps, against what its manager says that it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from dsv4_jax.cache.errors import CacheDamaged, Fault
from dsv4_jax.cache.inspection import NOTHING, Found, expected_of, inspect, no_sums
from dsv4_jax.cache.pools import Cache, check_one_shard
from dsv4_jax.layout.contents import Contents
from dsv4_jax.layout.schema import TABLES, CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS


class CacheChecker:
    """Checks one cache, as often as it is asked, between any two steps.

    It reads all of the cache once, on the device, and changes nothing. It keeps a 32-bit sum of each page of each block
    and snapshot, to see at the next check whether one changed that nobody may write; those of the latest check that
    found nothing wrong.
    """

    def __init__(self) -> None:
        self._before: tuple[Contents, dict[str, jax.Array]] | None = None

    def check(self, cache: Cache, contents: Contents) -> None:
        """Raises unless the cache holds what its manager says.

        - Block tables: each place of a request names the block that the ledger has for it. (And the ledger agrees with
          itself: no block has two places, or an owner that it does not count.) Write tables: the same, but that blocks
          which the request began with may be missing, and are while its state is being rebuilt.
        - Window positions: those that a request's next token sees are where they belong, and no other row holds a
          position that belongs elsewhere.
        - No row that a request's next token may read, or that is kept for prompts to come, holds a NaN: window rows,
          entries, keys, what is open of tails, snapshots; no channel of them, no code and no scale.
        - Full blocks and snapshots that were the same at the latest check without faults have the same bytes.

        Args:
          cache: as it is once all plans and transfers that the manager made have run.
          contents: from ``CacheManager.contents``.

        Raises:
          CacheDamaged: says where, and whose that is.
          ValueError: the contents are those of another cache.
          ShardingError: the cache is that of several shards; one alone can be checked.
        """
        check_one_shard(cache)
        _check_sizes(cache.schema, contents)
        before, sums = self._before or (None, no_sums(cache))
        found: Found = inspect(cache, expected_of(contents, before), sums)
        seen = jax.device_get(found._replace(sums={}))
        words = _Words(cache, contents)
        faults = (*_ledger_faults(contents), *words.tables(seen), *words.positions(seen.positions))
        faults += tuple(fault for name, rows in seen.nans.items() for fault in words.nans(name, rows))
        faults += tuple(fault for name, pages in seen.changed.items() for fault in words.changed(name, pages))
        if faults:
            raise CacheDamaged(faults)
        self._before = contents, found.sums


def _check_sizes(schema: CacheSchema, contents: Contents) -> None:
    table, lengths, blocks = contents.table.shape, contents.lengths.size, contents.readable.size
    wanted = (schema.slots, schema.max_blocks), schema.slots + schema.snapshots, schema.blocks
    if (table, lengths, blocks) != wanted:
        raise ValueError(
            f"the contents are of another cache: table {list(table)}, {lengths} slots and snapshots, {blocks} blocks; "
            f"this one has {list(wanted[0])}, {wanted[1]} and {wanted[2]}"
        )


def _ledger_faults(contents: Contents) -> Iterator[Fault]:
    """Where the ledger says one thing of a block's owners, and another of the block."""
    slots, places = (contents.table >= 0).nonzero()
    ids = contents.table[slots, places]
    count = np.bincount(ids, minlength=contents.references.size)
    for block in (count != contents.references).nonzero()[0].tolist():
        owners = _handles(contents, slots[ids == block])
        what = f"{contents.references[block]} requests are to have it, {count[block]} do"
        yield Fault("block_table", None, owners, f"block {block} in the manager's ledger", what)
    for at in (contents.places[ids] != places).nonzero()[0].tolist():
        what = f"it is at place {places[at]} of a request, and meant for place {contents.places[ids[at]]}"
        place = f"block {ids[at]} in the manager's ledger"
        yield Fault("block_table", None, _handles(contents, slots[at : at + 1]), place, what)


def _handles(contents: Contents, slots: NDArray[np.integer]) -> tuple[int, ...]:
    handles = contents.requests[slots]
    return tuple(handles[handles >= 0].tolist())


@dataclasses.dataclass(frozen=True)
class _Words:
    """What was found on the device, in words."""

    cache: Cache
    contents: Contents

    def tables(self, found: Found) -> Iterator[Fault]:
        """Of ``Found.table`` and ``Found.write_table``."""
        for name, wrong in zip(TABLES, (found.table, found.write_table), strict=True):
            for slot in (np.asarray(wrong) != NOTHING).nonzero()[0].tolist():
                yield self._of_table(name, slot, int(wrong[slot]))

    def _of_table(self, name: str, slot: int, place: int) -> Fault:
        names, meant = int(self.cache.arrays[name][slot, place]), int(self.contents.table[slot, place])
        what = f"it names block {names}, the manager says {meant}"
        if names == meant:
            what = f"it names block {names}, which the request may only read while its state is rebuilt"
        elif not 0 <= names < self.contents.readable.size:
            what += f"; there are {self.contents.readable.size} blocks"
        elif others := self._owners(names):
            what += f"; {names} is that of request {', '.join(map(str, others))}"
        where = f"place {place} of slot {slot}, tokens {_span(BLOCK_TOKENS * place, BLOCK_TOKENS)}"
        return Fault(name, None, _handles(self.contents, np.array([slot])), where, what)

    def positions(self, wrong: NDArray[np.int32]) -> Iterator[Fault]:
        """Of ``Found.positions``."""
        for layer, slot in np.argwhere(wrong != NOTHING).tolist():
            row, ring = int(wrong[layer, slot]), self.cache.schema.ring
            position = self._position(slot, row)
            holds = int(self.cache.window_positions[layer, slot, row])
            seen = position >= 0 and position > self.contents.lengths[slot] - self.cache.schema.spec.window
            belongs = f"{position}" if seen else f"none, or one whose remainder by {ring} is {row}"
            what = f"it says position {holds}, where there should be {belongs}"
            yield self._of_slot("window_positions", layer, slot, f"row {row} of the ring", what)

    def nans(self, name: str, rows: NDArray[np.int32]) -> Iterator[Fault]:
        """Of one array's ``Found.nans``."""
        for row_of_layer, page in np.argwhere(rows != NOTHING).tolist():
            row, what = int(rows[row_of_layer, page]), "it holds a NaN, and can be read"
            layer = self._layer(name, row_of_layer)
            if name in self.cache.schema.block_pools:
                ratio = BLOCK_TOKENS // self.cache.schema.layer(layer).block_rows
                place = int(self.contents.places[page])
                tokens = f", tokens {_span(BLOCK_TOKENS * place + ratio * row, ratio)}"
                yield self._of_block(name, layer, page, f"row {row}{tokens}", what)
            elif name == "window":
                yield self._of_slot(name, layer, page, f"row {row}, position {self._position(page, row)}", what)
            else:
                yield self._of_slot(name, layer, page, f"row {row}", what)

    def changed(self, name: str, pages: NDArray[np.bool_]) -> Iterator[Fault]:
        """Of one array's ``Found.changed``."""
        what = "its bytes changed since the last check, and nobody may write it"
        for row_of_layer, page in np.argwhere(pages).tolist():
            layer = self._layer(name, row_of_layer)
            if name in self.cache.schema.block_pools:
                yield self._of_block(name, layer, page, "", what)
            else:
                yield self._of_slot(name, layer, page, "", what)

    def _of_slot(self, name: str, layer: int, slot: int, place: str, what: str) -> Fault:
        slots = self.contents.requests.size
        where = f"slot {slot}" if slot < slots else f"snapshot {slot - slots}"
        owners = _handles(self.contents, np.array([slot])) if slot < slots else ()
        return Fault(name, layer, owners, f"{place} of {where}" if place else where, what)

    def _of_block(self, name: str, layer: int, block: int, place: str, what: str) -> Fault:
        where = f"block {block}, place {self.contents.places[block]} of a request"
        return Fault(name, layer, self._owners(block), f"{place} of {where}" if place else where, what)

    def _owners(self, block: int) -> tuple[int, ...]:
        return _handles(self.contents, (self.contents.table == block).any(axis=1).nonzero()[0])

    def _position(self, slot: int, row: int) -> int:
        """The latest position of a slot that its ring's row can hold."""
        last = int(self.contents.lengths[slot]) - 1
        return last - (last - row) % self.cache.schema.ring

    def _layer(self, name: str, row: int) -> int:
        """The model's layer that has this row of an array."""
        schema: Any = self.cache.schema
        for layer, kind in enumerate(schema.spec.layer_kinds):
            rows = schema.rows(layer)
            if row == (rows.window if name.startswith("window") else rows.compressed) and (
                name.startswith(("window", f"{kind.value}_"))
            ):
                return layer
        raise AssertionError(f"{name} has a row {row} of no layer")


def _span(first: int, count: int) -> str:
    return f"{first} to {first + count - 1}"
