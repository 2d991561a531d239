"""The shapes and bytes of a cache, before there is one: ``LayerCacheSchema`` of a layer, ``CacheSchema`` of a model.

A layer keeps its sliding window and tail per *slot* (one request's row) and its entries and keys per *block* (128
tokens of context). A model's cache stacks its layers: one array per component, layers in front, so that a step passes
nine arrays whatever the number of layers is. Block ids and slots are shared by all layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dsv4_jax.errors import Picklable
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, KEY_DIM, LayerKind
from dsv4_jax.spec.model import ModelSpec

EMPTY_SCORE = -1e9
"""The score of a tail row that holds nothing: beside a real score it weighs 0, and being finite it makes no NaN."""

LARGEST_INDEX = 2**31 - 1
"""Slots, block ids and positions are int32."""

Arrays = Mapping[str, jax.ShapeDtypeStruct]


class SchemaError(Picklable, ValueError):
    """A cache that cannot be: a size out of range, or more than the memory given for it."""


def is_running(tail_shape: Sequence[int]) -> bool:
    """Whether a tail is a running one, [layers, slots, 3 (max, denominator, sum), width], rather than one of rows."""
    return len(tail_shape) == 4


def empty_tail(tail_shape: Sequence[int]) -> jax.Array:
    """What a slot of such a tail holds before its first token, fp32, to be broadcast over all of a slot.

    Rows: kv 0 and score -1e9, [2, 1, 1]. Running: max -1e9, denominator and sum 0, [3, 1].
    """
    if is_running(tail_shape):
        return jnp.array([[EMPTY_SCORE], [0], [0]], jnp.float32)
    return jnp.array([[[0]], [[EMPTY_SCORE]]], jnp.float32)


def _bytes(arrays: Arrays) -> dict[str, int]:
    return {name: math.prod(array.shape) * array.dtype.itemsize for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class LayerCacheSchema:
    """What one layer caches.

    Attributes:
      kind: the layer's kind.
      formats: how vectors are stored.
      ring: rows of the sliding window's ring buffer.
    """

    kind: LayerKind
    formats: CacheFormats
    ring: int

    @property
    def block_rows(self) -> int:
        """Entries (and keys) of a block: 32 (CSA), 1 (HCA), 0 (SWA)."""
        return BLOCK_TOKENS // self.kind.ratio if self.kind.ratio else 0

    @property
    def tail_rows(self) -> int:
        """Uncompressed rows kept per slot, kv and score each: 12 (CSA), 128 (HCA; running: 0), 0 (SWA).

        A row is as wide as an entry. CSA's compressor makes two halves of each token: the overlap halves of the open
        window and of the one before it (2 x 4 rows), and the current halves of the open window (4 rows). That is an
        open window of 4 rows of twice the width and a previous window of 4 rows of the width.
        """
        hca = 0 if self._running else LayerKind.HCA.ratio
        return {LayerKind.SWA: 0, LayerKind.CSA: 3 * LayerKind.CSA.ratio, LayerKind.HCA: hca}[self.kind]

    @property
    def _running(self) -> bool:
        return self.kind is LayerKind.HCA and self.formats.hca_tail == "running"

    @property
    def slot_arrays(self) -> Arrays:
        """The arrays of one slot by component.

        ``window`` page of ``ring`` rows; ``window_positions`` int32 [ring]; ``tail`` fp32 [2 (kv, score), tail_rows,
        512] (CSA, HCA), running fp32 [3 (max, denominator, sum), 512]; ``key_tail`` fp32 [2, 12, 128] (CSA).
        """
        window = self.formats.window_format
        arrays = {
            "window": jax.ShapeDtypeStruct(window.page_shape(self.ring), window.dtype),
            "window_positions": jax.ShapeDtypeStruct((self.ring,), jnp.int32),
        }
        if self.kind is not LayerKind.SWA:
            shape = (3, HEAD_DIM) if self._running else (2, self.tail_rows, HEAD_DIM)
            arrays["tail"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        if self.kind is LayerKind.CSA:
            arrays["key_tail"] = jax.ShapeDtypeStruct((2, self.tail_rows, KEY_DIM), jnp.float32)
        return arrays

    @property
    def block_arrays(self) -> Arrays:
        """The arrays of one block by component: ``entries`` (CSA, HCA) and ``keys`` (CSA), pages of block_rows."""
        chosen = {}
        if self.kind is not LayerKind.SWA:
            chosen["entries"] = self.formats.entry_format
        if self.kind is LayerKind.CSA:
            chosen["keys"] = self.formats.key_format
        return {
            name: jax.ShapeDtypeStruct(vector_format.page_shape(self.block_rows), vector_format.dtype)
            for name, vector_format in chosen.items()
        }

    @property
    def slot_bytes(self) -> dict[str, int]:
        """Bytes of one slot by component, whatever the length of its context."""
        return _bytes(self.slot_arrays)

    @property
    def block_bytes(self) -> dict[str, int]:
        """Bytes of one block by component, page padding included; none for SWA."""
        return _bytes(self.block_arrays)


@dataclasses.dataclass(frozen=True)
class CacheSchema:
    """What the cache of a whole model looks like; hashable, the static part of a ``Cache``.

    Attributes:
      spec: the model.
      formats: how vectors are stored.
      slots: requests that can be in the cache at the same time.
      blocks: blocks of 128 tokens shared by all slots; 0 is allowed only for a model without CSA and HCA layers.
      max_context: longest context of a request in tokens, at most ``spec.max_position``.
      slack: rows of the window's ring beyond the window itself, so that as many of a request's latest tokens can be
        taken back.

    Raises:
      SchemaError: a number is out of range.
    """

    spec: ModelSpec
    formats: CacheFormats
    slots: int
    blocks: int
    max_context: int
    slack: int = 0

    def __post_init__(self) -> None:
        compressed = self.spec.count(LayerKind.SWA) < len(self.spec.layers)
        for name, smallest, largest, reason in (
            ("slots", 1, LARGEST_INDEX, "slots are int32"),
            ("blocks", int(compressed), LARGEST_INDEX, "block ids are int32, and CSA and HCA layers need blocks"),
            ("max_context", 1, self.spec.max_position, f"max_position of {self.spec.name} is {self.spec.max_position}"),
            ("slack", 0, self.spec.max_position, f"max_position of {self.spec.name} is {self.spec.max_position}"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
                raise SchemaError(f"{name} must be an int from {smallest} to {largest} ({reason}), got {value!r}.")

    def __hash__(self) -> int:
        # Hashed at every call of a jitted function that is given a Cache: the layers would take most of the call.
        return hash((self.slots, self.blocks, self.max_context, self.slack, len(self.spec.layers)))

    @property
    def ring(self) -> int:
        """Rows of a window's ring: ``spec.window + slack``. The row of a position is its remainder by this."""
        return self.spec.window + self.slack

    @property
    def max_blocks(self) -> int:
        """Blocks of a request at ``max_context``, the width of the block table."""
        return math.ceil(self.max_context / BLOCK_TOKENS)

    def layer(self, layer: int) -> LayerCacheSchema:
        """What one layer of the model caches.

        Raises:
          IndexError: ``layer`` is negative or not less than the number of layers.
        """
        if not 0 <= layer < len(self.spec.layers):
            raise IndexError(f"{self.spec.name} has layers 0 to {len(self.spec.layers) - 1}, got {layer}.")
        return self._of_kind(self.spec.layers[layer].kind)

    def _of_kind(self, kind: LayerKind) -> LayerCacheSchema:
        return LayerCacheSchema(kind, self.formats, self.ring)

    @property
    def arrays(self) -> Arrays:
        """Shape and dtype of every array of the cache, by name.

        =================  ==========================================================================
        block_table        int32 [slots, max_blocks], -1 = no block
        window             [layers, slots, *page of ring rows]
        window_positions   int32 [layers, slots, ring], -1 = empty row
        csa_entries        [CSA layers, blocks, *page of 32 rows]
        csa_keys           [CSA layers, blocks, *page of 32 rows]
        hca_entries        [HCA layers, blocks, *page of 1 row]
        csa_tail           fp32 [CSA layers, slots, 2 (kv, score), 12, 512]
        key_tail           fp32 [CSA layers, slots, 2 (kv, score), 12, 128]
        hca_tail           fp32 [HCA layers, slots, 2 (kv, score), 128, 512], or, running,
                           fp32 [HCA layers, slots, 3 (max, denominator, sum), 512]
        =================  ==========================================================================
        """
        swa, csa, hca = (self._of_kind(kind) for kind in (LayerKind.SWA, LayerKind.CSA, LayerKind.HCA))
        layers, csa_layers, hca_layers = len(self.spec.layers), *map(self.spec.count, (csa.kind, hca.kind))
        stacked = {
            "window": (layers, self.slots, swa.slot_arrays["window"]),
            "window_positions": (layers, self.slots, swa.slot_arrays["window_positions"]),
            "csa_entries": (csa_layers, self.blocks, csa.block_arrays["entries"]),
            "csa_keys": (csa_layers, self.blocks, csa.block_arrays["keys"]),
            "hca_entries": (hca_layers, self.blocks, hca.block_arrays["entries"]),
            "csa_tail": (csa_layers, self.slots, csa.slot_arrays["tail"]),
            "key_tail": (csa_layers, self.slots, csa.slot_arrays["key_tail"]),
            "hca_tail": (hca_layers, self.slots, hca.slot_arrays["tail"]),
        }
        arrays = {"block_table": jax.ShapeDtypeStruct((self.slots, self.max_blocks), jnp.int32)}
        for name, (count, rows, array) in stacked.items():
            arrays[name] = jax.ShapeDtypeStruct((count, rows, *array.shape), array.dtype)
        return arrays

    @property
    def bytes_by_component(self) -> dict[str, int]:
        """Bytes of every array of the cache, by name."""
        return _bytes(self.arrays)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(self.bytes_by_component.values())

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block of 128 tokens takes, all layers together."""
        return sum(sum(self.layer(layer).block_bytes.values()) for layer in range(len(self.spec.layers)))

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one request takes whatever its length, all layers and its row of the block table together."""
        layers = range(len(self.spec.layers))
        return sum(sum(self.layer(layer).slot_bytes.values()) for layer in layers) + 4 * self.max_blocks

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of context takes on average, all layers together."""
        return self.bytes_per_block / BLOCK_TOKENS


def compute_block_budget(
    memory_bytes: int,
    spec: ModelSpec,
    formats: CacheFormats,
    *,
    slots: int,
    max_context: int,
    slack: int = 0,
) -> int:
    """The number of blocks with which a cache fills the memory it is given.

    Args:
      memory_bytes: bytes that all arrays of the cache may take together.
      spec: the model.
      formats: how vectors are stored.
      slots: as in ``CacheSchema``; so are the next two.
      max_context: longest context of a request in tokens.
      slack: rows of the window's ring beyond the window itself.

    Returns:
      The largest ``blocks`` whose ``CacheSchema(...).memory_bytes`` is at most ``memory_bytes``: at least 1, or 0 for
      a model without CSA and HCA layers. More than ``slots * max_blocks`` are never in use at the same time.

    Raises:
      SchemaError: the slots alone, or with one block, take more than that; or a number is out of range.
    """
    smallest = CacheSchema(spec, formats, slots, 1, max_context, slack)
    fixed, per_block = slots * smallest.bytes_per_slot, smallest.bytes_per_block
    if memory_bytes < fixed + per_block:
        raise SchemaError(
            f"{memory_bytes:,} bytes do not hold {slots} slots of {smallest.bytes_per_slot:,} bytes and one block of "
            f"{per_block:,} ({fixed + per_block:,} bytes); give more memory, or ask for fewer slots or smaller formats."
        )
    return int(min((memory_bytes - fixed) // per_block, LARGEST_INDEX)) if per_block else 0
