"""The rows of a compressor's tail: where the halves of a token lie, and how long they are kept.

A token's projection has an *overlap* half, pooled by the next window's entry, and a *current* half, pooled by its own
window's; without overlap all of it is current. A tail keeps them in two rings, one behind the other,

    overlap halves   at row  position % overlap_ring                  the open window and the one before it
    current halves   at row  overlap_ring + position % current_ring   the open window

so that closing a window moves nothing: which rows mean something follows from the request's next position. Both rings
are ``depth`` rows deeper than that, so that what an earlier length needs is still there when tokens are taken back.
``ffi/layout/geometry.h`` is the same for the kernels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dsv4_jax.spec.kinds import Compression, compression_of_ratio


@dataclasses.dataclass(frozen=True)
class TailGeometry:
    """The rings of a tail that keeps rows.

    Attributes:
      compression: of the layer.
      depth: by how many tokens a request can go back; with overlap a multiple of the ratio.
    """

    compression: Compression
    depth: int = 0

    @classmethod
    def of_lookahead(cls, compression: Compression, lookahead: int) -> TailGeometry:
        """The rings from which the latest ``lookahead`` tokens can be taken back."""
        unit = compression.ratio if compression.overlap else 1
        return cls(compression, -(-lookahead // unit) * unit)

    @classmethod
    def of_rows(cls, ratio: int, rows: int) -> TailGeometry:
        """The rings that a tail of so many rows consists of.

        Raises:
          ValueError: there is no kind of this ratio, or no depth gives so many rows.
        """
        compression = compression_of_ratio(ratio)
        deeper, rings = rows - cls(compression).rows, 2 if compression.overlap else 1
        unit = compression.ratio if compression.overlap else 1
        if deeper < 0 or deeper % (rings * unit):
            raise ValueError(
                f"{rows} rows are those of no depth: with ratio {ratio} a tail has {cls(compression).rows} rows, and "
                f"{rings * unit} more for every {unit} tokens of depth"
            )
        return cls(compression, deeper // rings)

    @property
    def overlap_ring(self) -> int:
        """Rows for overlap halves, which come first: 8 + depth for CSA, none for HCA."""
        return 2 * self.compression.ratio + self.depth if self.compression.overlap else 0

    @property
    def current_ring(self) -> int:
        """Rows for current halves: ratio + depth."""
        return self.compression.ratio + self.depth

    @property
    def rows(self) -> int:
        """All rows of the tail: 12 for CSA, 128 for HCA, and the depth of each ring."""
        return self.overlap_ring + self.current_ring

    def overlap_row(self, position: jax.Array) -> jax.Array:
        """The tail row of a token's overlap half."""
        return position % max(self.overlap_ring, 1)

    def current_row(self, position: jax.Array) -> jax.Array:
        """The tail row of a token's current half."""
        return self.overlap_ring + position % self.current_ring

    def earliest_window(self, following: jax.Array) -> jax.Array:
        """The window that is open at the earliest position a request may go back to, once it continues at
        ``following``.
        """
        return jnp.maximum(following - self.depth, 0) // self.compression.ratio

    def overlap_survives(self, position: jax.Array, following: jax.Array) -> jax.Array:
        """Whether a token's overlap half is still needed when its request continues at position ``following``."""
        if not self.compression.overlap:
            return jnp.zeros(jnp.shape(position), bool)
        return position // self.compression.ratio >= self.earliest_window(following) - 1

    def current_survives(self, position: jax.Array, following: jax.Array) -> jax.Array:
        """Whether a token's current half is still needed when its request continues at position ``following``."""
        return position // self.compression.ratio >= self.earliest_window(following)

    def rows_in_use(self, following: jax.Array, *, back: bool = True) -> jax.Array:
        """Which rows hold something still needed when a request continues at ``following``: [R] -> bool [R, rows].

        Args:
          following: [R], the next position of each request.
          back: whether it may go back by ``depth`` tokens before; without, these are what the next entries pool.
        """
        ratio, following = self.compression.ratio, following[:, None]
        earliest = self.earliest_window(following) if back else following // ratio

        def latest(ring: int) -> jax.Array:
            """The latest position before ``following`` in every row of a ring, below 0 for none."""
            last = following - 1
            return last - (last - jnp.arange(ring, dtype=following.dtype)[None, :]) % max(ring, 1)

        overlap, current = latest(self.overlap_ring), latest(self.current_ring)
        overlap = (overlap >= 0) & (overlap // ratio >= earliest - 1)
        return jnp.concatenate([overlap, (current >= 0) & (current // ratio >= earliest)], axis=1)
