"""``inspect``: one pass over a cache on the device, which looks for what cannot be, and sums up every page.

Pools are read where they lie, some pages at a time and as the integers that they are stored as, so that the largest
needs little beside it. (On a CPU, bf16 pools are copied.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv4_jax.arithmetic.nans import is_nan, rows_with_nan
from dsv4_jax.arithmetic.pages import bf16_as_bits, in_range
from dsv4_jax.arithmetic.scalars import bits_of
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.contents import Contents
from dsv4_jax.layout.layer_schema import STATE_ROWS, is_running
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import BLOCK_TOKENS, LayerKind

NOTHING = -1
"""No row, ring row or place is wrong."""

Look = Callable[[jax.Array, Any], jax.Array]
"""What is seen in pages [n, *page], whose readable rows are bool [n, rows], or None if nobody asks for rows: [n]."""

_SLAB_BYTES = 1 << 22
"""What is read of a pool at a time."""


class Expected(NamedTuple):
    """What a cache is compared with.

    Attributes:
      lengths: int32 [slots + snapshots], as in ``Contents``.
      table: int32 [slots, max_blocks], the same.
      shared: int32 [slots], the same.
      readable: int32 [blocks], the same.
      same_blocks: bool [blocks], whose bytes must be what they were.
      same_snapshots: bool [snapshots], likewise.
    """

    lengths: Any
    table: Any
    shared: Any
    readable: Any
    same_blocks: Any
    same_snapshots: Any


class Found(NamedTuple):
    """What is wrong, the first of each page or slot; ``NOTHING`` where all is right.

    Attributes:
      table: int32 [slots], the first place whose block is not the ledger's.
      write_table: int32 [slots], the first place by which a slot's request would store where it must not, or nowhere.
      positions: int32 [layers, slots + snapshots], the first row of the ring that holds a wrong position.
      nans: int32 [layers, pages] of each array, by name: the first row that can be read and holds a NaN.
      changed: bool [layers, pages] of the arrays that ``sums`` are of: whether bytes changed that nobody may write.
      sums: uint32 [layers, pages], of each array of which there are blocks or snapshots, by name.
    """

    table: jax.Array
    write_table: jax.Array
    positions: jax.Array
    nans: dict[str, jax.Array]
    changed: dict[str, jax.Array]
    sums: dict[str, jax.Array]


def expected_of(contents: Contents, closed_before: Contents | None) -> Expected:
    """What a cache of these contents is compared with, where the one of ``closed_before`` was summed up."""
    same_blocks = closed_blocks(contents)
    same_snapshots = contents.lengths[contents.requests.size :] > 0
    if closed_before is None:
        same_blocks, same_snapshots = same_blocks & False, same_snapshots & False
    else:
        same_blocks = same_blocks & closed_blocks(closed_before) & (contents.opened == closed_before.opened)
        held_before = closed_before.lengths[contents.requests.size :] > 0
        same_snapshots = same_snapshots & held_before & (contents.taken == closed_before.taken)
    lengths, shared, readable = (
        numbers.astype(np.int32) for numbers in (contents.lengths, contents.shared, contents.readable)
    )
    return Expected(lengths, contents.table, shared, readable, same_blocks, same_snapshots)


def closed_blocks(contents: Contents) -> np.ndarray:
    """Bool [blocks]: those full of tokens that somebody may read, which nobody writes as long as that is so."""
    return contents.readable == BLOCK_TOKENS


def no_sums(cache: Cache) -> dict[str, jax.Array]:
    """What ``inspect`` takes for sums where there are none yet."""
    arrays = cache.arrays
    return {name: jnp.zeros(arrays[name].shape[:2], jnp.uint32) for name in _summed_up(cache.schema)}


@jax.jit
def inspect(cache: Cache, expected: Expected, sums: dict[str, jax.Array]) -> Found:
    """Looks at all of a cache.

    Args:
      cache: of one shard.
      expected: what it is compared with.
      sums: those found before, of what is to be the ``same``.
    """
    schema = cache.schema
    readable, rows_found = _readable_rows(schema, expected), _rows_with_nan(schema)
    summed_up = _summed_up(schema)
    nans: dict[str, jax.Array] = {}
    totals: dict[str, jax.Array] = {}
    for name in (*rows_found, "window_positions"):
        looks: dict[str, Look] = {"sums": lambda pages, _: _sum(pages)} if name in summed_up else {}
        if name in rows_found:
            looks["nans"] = functools.partial(_first_nan, rows_found[name])
        if looks:
            seen = _of_pages(cache.arrays[name], readable.get(name), looks)
            nans |= {name: seen["nans"]} if "nans" in seen else {}
            totals |= {name: seen["sums"]} if "sums" in seen else {}
    same_slots = jnp.concatenate([jnp.zeros(schema.slots, bool), expected.same_snapshots])
    changed = {
        name: (expected.same_blocks if name in schema.block_pools else same_slots) & (total != sums[name])
        for name, total in totals.items()
    }
    return Found(
        _wrong_places(cache.block_table, expected),
        _wrong_to_write(cache.write_table, expected),
        _wrong_positions(cache.window_positions, expected.lengths, schema),
        nans,
        changed,
        totals,
    )


def _summed_up(schema: CacheSchema) -> tuple[str, ...]:
    """The arrays that have pages of blocks, or of snapshots."""
    pages = schema.slots + schema.snapshots
    of_slots = ("window", "window_positions", *schema.tails) if schema.snapshots else ()
    return *schema.block_pools, *(name for name in of_slots if schema.arrays[name].shape[1] == pages)


def _of_pages(pool: jax.Array, readable: jax.Array | None, looks: dict[str, Look]) -> dict[str, jax.Array]:
    """What functions of pages [n, *page], and of their readable rows [n, rows], say of all: [layers, pages] each."""
    layers, pages = pool.shape[:2]
    size = min(max(_SLAB_BYTES // (math.prod(pool.shape[2:]) * pool.dtype.itemsize), 1), pages)
    if not layers:
        return {name: jnp.zeros((layers, pages), jnp.int32) for name in looks}
    slabs, bits = -(-pages // size), bf16_as_bits(pool)  # at worst copied, on a GPU not even that

    def one(seen: dict[str, jax.Array], index: jax.Array) -> tuple[dict[str, jax.Array], None]:
        layer, first = index // slabs, jnp.minimum(index % slabs * size, pages - size)
        at: list[Any] = [layer, first, *[0] * (pool.ndim - 2)]
        slab = lax.bitcast_convert_type(lax.dynamic_slice(bits, at, (1, size, *pool.shape[2:]))[0], pool.dtype)
        rows = None if readable is None else lax.dynamic_slice_in_dim(readable, first, size)
        return {
            name: lax.dynamic_update_slice(seen[name], look(slab, rows)[None], (layer, first))
            for name, look in looks.items()
        }, None

    dtypes = {"nans": jnp.int32, "sums": jnp.uint32}
    nothing = {name: jnp.zeros((layers, pages), dtypes[name]) for name in looks}
    return lax.scan(one, nothing, jnp.arange(layers * slabs, dtype=jnp.int32))[0]


def _sum(pages: jax.Array) -> jax.Array:
    """Uint32 [n]: the sum of each page's integers, each times an odd number of its place, so that no single one's
    change is missed.
    """
    words = bits_of(pages).reshape(len(pages), -1).astype(jnp.uint32)
    weights = (2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + 1) * np.uint32(0x9E37_79B1)
    return (words * weights).sum(axis=1, dtype=jnp.uint32)


def _first(wrong: jax.Array) -> jax.Array:
    """The first place along the last axis that is true, int32; ``NOTHING`` for none."""
    return jnp.where(wrong.any(axis=-1), wrong.argmax(axis=-1), NOTHING).astype(jnp.int32)


def _first_nan(rows_found: Callable[[jax.Array], jax.Array], pages: jax.Array, readable: jax.Array) -> jax.Array:
    return _first(rows_found(pages) & readable)


def _any_nan(axes: tuple[int, ...], pages: jax.Array) -> jax.Array:
    return is_nan(pages).any(axis=axes)


def _rows_with_nan(schema: CacheSchema) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """For each array with rows of numbers, by name: which rows of pages [n, *page] hold a NaN, bool [n, rows]."""
    formats = schema.formats
    found: dict[str, Callable[[jax.Array], jax.Array]] = {
        "window": functools.partial(rows_with_nan, rows=schema.ring, vector_format=formats.window_format)
    }
    for name in schema.block_pools:
        vector_format = formats.key_format if name.endswith("keys") else formats.entry_format
        rows = BLOCK_TOKENS // _ratio(schema, name)
        found[name] = functools.partial(rows_with_nan, rows=rows, vector_format=vector_format)
    for name in schema.tails:
        # A running tail's rows lie behind each other, those of another twice, as kv and as score.
        axes = (2,) if is_running(schema.arrays[name].shape) else (1, 3)
        found[name] = functools.partial(_any_nan, axes)
    return found


def _readable_rows(schema: CacheSchema, expected: Expected) -> dict[str, jax.Array]:
    """For each of these arrays, by name: bool [pages, rows], which rows the next step may read."""
    lengths = expected.lengths
    readable = {"window": _in_window(lengths, schema)[1]}
    for name in schema.block_pools:
        ratio = _ratio(schema, name)
        readable[name] = jnp.arange(BLOCK_TOKENS // ratio)[None] < expected.readable[:, None] // ratio
    for name in schema.tails:
        shape = schema.arrays[name].shape
        held = lengths[: shape[1]]
        if is_running(shape):
            state = (held - 1) % (shape[2] // STATE_ROWS)
            latest = jnp.arange(shape[2])[None] // STATE_ROWS == state[:, None]
            readable[name] = latest & (held % LayerKind.HCA.ratio > 0)[:, None]
        else:
            tail = next(kind for kind in schema.kinds if name.startswith(kind.value))
            geometry = schema.layer(schema.spec.layer_kinds.index(tail)).tail
            assert geometry is not None, "only a running tail has no rows"
            readable[name] = geometry.rows_in_use(held, back=False)
    return readable


def _ratio(schema: CacheSchema, pool: str) -> int:
    return next(kind.ratio for kind in schema.kinds if pool.startswith(kind.value))


def _in_window(lengths: jax.Array, schema: CacheSchema) -> tuple[jax.Array, jax.Array]:
    """The latest position that each ring row can hold, int32 [n, ring], and whether the next token sees it."""
    last = lengths[:, None] - 1
    position = last - (last - jnp.arange(schema.ring, dtype=jnp.int32)[None]) % schema.ring
    return position, (position >= 0) & (position > last + 1 - schema.spec.window)


def _wrong_positions(positions: jax.Array, lengths: jax.Array, schema: CacheSchema) -> jax.Array:
    """``Found.positions``: seen ones must be right; another may be anything that its row can hold."""
    position, seen = _in_window(lengths, schema)
    row = jnp.arange(schema.ring, dtype=jnp.int32)
    possible = (positions == -1) | ((positions >= 0) & (positions % schema.ring == row))
    right = jnp.where(seen[None], positions == position[None], possible)
    return _first(~right & (lengths > 0)[None, :, None])


def _wrong_places(table: jax.Array, expected: Expected) -> jax.Array:
    """``Found.table``: all places that the ledger has a block for. Later ones are set before they are used."""
    held = in_range(expected.table, expected.readable.size)
    return _first(held & (table[: expected.table.shape[0]] != expected.table))


def _wrong_to_write(table: jax.Array, expected: Expected) -> jax.Array:
    """``Found.write_table``: likewise, but that blocks which a request began with may be missing, or have to be."""
    slots, places = expected.table.shape
    missing, shared = table[:slots] == -1, jnp.arange(places)[None] < expected.shared[:, None]
    is_rebuilt = shared & (expected.lengths[:slots] == 0)[:, None]
    right = jnp.where(is_rebuilt, missing, (table[:slots] == expected.table) | (shared & missing))
    return _first(in_range(expected.table, expected.readable.size) & ~right)
