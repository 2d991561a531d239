"""The shapes and bytes of what one layer caches, a slot and a block of it: ``LayerCacheSchema``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, LayerKind, entries_per_block

EMPTY_SCORE = -1e9
"""The score of a tail row that holds nothing: beside a real score it weighs 0, and being finite it makes no NaN."""

STATE_ROWS = 3
"""Rows of a running tail's state: max, denominator, sum."""

Arrays = Mapping[str, jax.ShapeDtypeStruct]


def is_running(tail_shape: Sequence[int]) -> bool:
    """Whether a tail is a running one, [layers, slots, 3 states, width], rather than one of rows."""
    return len(tail_shape) == 4


def empty_tail(tail_shape: Sequence[int]) -> jax.Array:
    """What a slot of such a tail holds before its first token, fp32, to be broadcast over all of a slot.

    Rows: kv 0 and score -1e9, [2, 1, 1]. Running: max -1e9, denominator and sum 0 of each state, [3 states, 1].
    """
    if is_running(tail_shape):
        return jnp.tile(jnp.array([[EMPTY_SCORE], [0], [0]], jnp.float32), (tail_shape[2] // STATE_ROWS, 1))
    return jnp.array([[[0]], [[EMPTY_SCORE]]], jnp.float32)


def array_bytes(arrays: Arrays) -> dict[str, int]:
    """Bytes of each array."""
    return {name: math.prod(array.shape) * array.dtype.itemsize for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class LayerCacheSchema:
    """What one layer caches.

    Attributes:
      kind: the layer's kind.
      formats: how vectors are stored.
      window: tokens of the sliding window.
      lookahead: how many of a request's latest tokens can be taken back.
    """

    kind: LayerKind
    formats: CacheFormats
    window: int
    lookahead: int = 0

    @property
    def ring(self) -> int:
        """Rows of the sliding window's ring buffer: ``window + lookahead``."""
        return self.window + self.lookahead

    @property
    def block_rows(self) -> int:
        """Entries (and keys) of a block: 32 (CSA), 1 (HCA), 0 (SWA)."""
        return entries_per_block(self.kind.ratio)

    @property
    def tail(self) -> TailGeometry | None:
        """The rings of the tail's rows; None for SWA, and for HCA with a running tail."""
        if self.kind.compression is None or self._running:
            return None
        return TailGeometry.of_lookahead(self.kind.compression, self.lookahead)

    @property
    def tail_rows(self) -> int:
        """Uncompressed rows kept per slot, kv and score each: 12 (CSA), 128 (HCA; running: 0), 0 (SWA); more with
        ``lookahead``.

        A row is as wide as an entry. CSA's compressor makes two halves of each token: the overlap halves of the open
        window and of the one before it (2 x 4 rows), and the current halves of the open window (4 rows). That is an
        open window of 4 rows of twice the width and a previous window of 4 rows of the width.
        """
        return self.tail.rows if self.tail else 0

    @property
    def _running(self) -> bool:
        return self.kind is LayerKind.HCA and self.formats.hca_tail == "running"

    @property
    def slot_arrays(self) -> Arrays:
        """The arrays of one slot by component.

        ``window`` page of ``ring`` rows; ``window_positions`` int32 [ring]; ``tail`` fp32 [2 (kv, score), tail_rows,
        512] (CSA, HCA), running fp32 [3 (max, denominator, sum) of 1 + lookahead states, 512]; ``key_tail`` fp32
        [2, tail_rows, 128] (CSA).
        """
        window = self.formats.window_format
        arrays = {
            "window": jax.ShapeDtypeStruct(window.page_shape(self.ring), window.dtype),
            "window_positions": jax.ShapeDtypeStruct((self.ring,), jnp.int32),
        }
        compression = self.kind.compression
        if compression:
            states = STATE_ROWS * (1 + self.lookahead)
            shape = (states, HEAD_DIM) if self._running else (2, self.tail_rows, HEAD_DIM)
            arrays["tail"] = jax.ShapeDtypeStruct(shape, jnp.float32)
            if compression.indexed:
                arrays["key_tail"] = jax.ShapeDtypeStruct((2, self.tail_rows, KEY_DIM), jnp.float32)
        return arrays

    @property
    def block_arrays(self) -> Arrays:
        """The arrays of one block by component: ``entries`` (CSA, HCA) and ``keys`` (CSA), pages of block_rows."""
        chosen = {}
        if self.kind.compression:
            chosen["entries"] = self.formats.entry_format
            if self.kind.compression.indexed:
                chosen["keys"] = self.formats.key_format
        return {
            name: jax.ShapeDtypeStruct(vector_format.page_shape(self.block_rows), vector_format.dtype)
            for name, vector_format in chosen.items()
        }

    @property
    def slot_bytes(self) -> dict[str, int]:
        """Bytes of one slot by component, whatever the length of its context."""
        return array_bytes(self.slot_arrays)

    @property
    def block_bytes(self) -> dict[str, int]:
        """Bytes of one block by component, page padding included; none for SWA."""
        return array_bytes(self.block_arrays)
