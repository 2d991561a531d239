"""Views: one layer's part of a pool described as plain numbers, for a kernel that knows nothing of this package.

A ``PoolView`` names the array that holds the bytes (the cache's own, not a copy) and says where every number of every
row lies in it. With ``base`` the address of ``view.pool``, number k of a field in row i of page p is at

    base + view.layer_offset + p * view.page_stride + field.offset + i * field.stride + k * (bytes of field.dtype)

(for float4_e2m1fn two numbers share byte k // 2; the even one is the low nibble). A channel's value is the product of
the fields that cover it, the scales multiplied first, in fp32:

    value = (scales * global_scale) * codes

``docs/formats.md`` has the same layouts in words.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax

from dsv4_jax.cache.errors import WrongLayerKind
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.formats import Numbers, VectorFormat
from dsv4_jax.spec.kinds import BLOCK_TOKENS, LayerKind

Component = Literal["entries", "keys", "window"]


@dataclasses.dataclass(frozen=True)
class Field(Numbers):
    """One run of numbers that every row of a page has, and where it lies.

    Attributes:
      offset: bytes from the start of a page to row 0's first number.
      stride: bytes from a row's first number to the next row's.
    """

    offset: int = 0
    stride: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class PoolView:
    """Where one layer's entries, keys or window rows lie, all numbers in bytes unless said otherwise.

    Attributes:
      pool: the stacked pool of all layers, the cache's own array: DLPack hands it on without a copy. Dense, row-major.
      component: ``entries``, ``keys`` or ``window``.
      format: name of the storage format.
      layer_index: the layer's place in the leading axis of ``pool`` (and of ``positions``).
      layer_offset: from the pool's first byte to the layer's page 0.
      pages: pages of the layer: blocks (entries, keys) or slots (window).
      page_stride: from one page to the next.
      rows_per_page: rows of a page: entries of a block, or ring rows of a slot.
      tokens_per_row: tokens that one row stands for: 4 (CSA), 128 (HCA), 1 (window).
      width: channels of a row.
      fields: what a row consists of; bytes of a page in no field are padding.
      constant_scale: fp32 factor of every scale that is stored nowhere (``nvfp4_static``), otherwise 1.
      hadamard: whether rows are stored after a Hadamard transform, so that queries need it too (keys only).
      block_table: int32 [slots, max_blocks], -1 = none. Row e of a slot's context (``tokens_per_row`` tokens each) is
        row ``e % rows_per_page`` of page ``block_table[slot, e // rows_per_page]``. None for windows.
      positions: int32 [layers, slots, rows_per_page], windows only: the position that each row holds, -1 = none. The
        page of a window is its slot, the row of a position its remainder by ``rows_per_page``.
    """

    pool: jax.Array
    component: Component
    format: str
    layer_index: int
    layer_offset: int
    pages: int
    page_stride: int
    rows_per_page: int
    tokens_per_row: int
    width: int
    fields: tuple[Field, ...]
    constant_scale: float
    hadamard: bool
    block_table: jax.Array | None
    positions: jax.Array | None


def entries_view(cache: Cache, layer: int) -> PoolView:
    """The compressed entries of a layer, described for a kernel that knows nothing of this package.

    The view holds the cache's own arrays and is valid until the cache is donated to the next step: that step updates
    the arrays in place or deletes them. Drop views and whatever was exported from them (DLPack capsules, NumPy arrays)
    before, or JAX keeps the old bytes alive and copies the pool instead of updating it in place. Inside ``jax.jit`` the
    numbers are plain ints and the arrays are traced: hand them to a kernel as operands.

    Args:
      cache: on one device; byte offsets say nothing about an array that is spread over several.
      layer: index of a CSA or HCA layer in the model.

    Raises:
      WrongLayerKind: the layer is SWA and has no entries.
      IndexError: there is no such layer.
    """
    ratio = _kind(cache, layer).ratio
    if not ratio:
        raise WrongLayerKind(f"layer {layer} is SWA and has no entries; only CSA and HCA layers do.")
    pool = cache.pools[f"{_kind(cache, layer).value}_entries"]
    return _blocks_view(cache, layer, "entries", pool, cache.schema.formats.entry_format)


def keys_view(cache: Cache, layer: int) -> PoolView:
    """The indexer keys of a CSA layer, as ``entries_view`` has the entries.

    Raises:
      WrongLayerKind: the layer is not CSA.
      IndexError: there is no such layer.
    """
    kind = _kind(cache, layer)
    if kind is not LayerKind.CSA:
        raise WrongLayerKind(f"layer {layer} is {kind.name} and has no indexer keys; only CSA layers do.")
    return _blocks_view(cache, layer, "keys", cache.pools["csa_keys"], cache.schema.formats.key_format)


def window_view(cache: Cache, layer: int) -> PoolView:
    """The sliding windows of a layer, a page per slot, as ``entries_view`` has the entries.

    Raises:
      IndexError: there is no such layer.
    """
    _kind(cache, layer)
    schema = cache.schema
    return _view(
        cache.window,
        schema.rows(layer).window,
        schema.formats.window_format,
        component="window",
        rows_per_page=schema.ring,
        tokens_per_row=1,
        hadamard=False,
        block_table=None,
        positions=cache.window_positions,
    )


def row_fields(vector_format: VectorFormat, rows: int) -> tuple[Field, ...]:
    """What a row of a format consists of, in pages of ``rows`` rows."""
    fields = []
    for offset, stride, runs in (
        (0, vector_format.data_bytes, vector_format.data),
        (vector_format.data_bytes * rows, vector_format.scale_bytes, vector_format.scales),
    ):
        for run in runs:
            fields.append(Field(**dataclasses.asdict(run), offset=offset, stride=stride))
            offset += run.bytes
    return tuple(fields)


def _kind(cache: Cache, layer: int) -> LayerKind:
    return cache.schema.layer(layer).kind


def _blocks_view(
    cache: Cache, layer: int, component: Component, pool: jax.Array, vector_format: VectorFormat
) -> PoolView:
    schema = cache.schema
    row = schema.rows(layer).compressed
    assert row is not None, "a layer without blocks has no view of them; callers look at its kind first"
    return _view(
        pool,
        row,
        vector_format,
        component=component,
        rows_per_page=schema.layer(layer).block_rows,
        tokens_per_row=BLOCK_TOKENS // schema.layer(layer).block_rows,
        hadamard=component == "keys" and schema.formats.keys_hadamard,
        block_table=cache.block_table,
        positions=None,
    )


def _view(
    pool: jax.Array, index: int, vector_format: VectorFormat, *, rows_per_page: int, **described: Any
) -> PoolView:
    page_stride = math.prod(pool.shape[2:]) * pool.dtype.itemsize
    return PoolView(
        pool=pool,
        format=vector_format.name,
        layer_index=index,
        layer_offset=index * pool.shape[1] * page_stride,
        pages=pool.shape[1],
        page_stride=page_stride,
        rows_per_page=rows_per_page,
        width=vector_format.width,
        fields=row_fields(vector_format, rows_per_page),
        constant_scale=vector_format.global_scale,
        **described,
    )
