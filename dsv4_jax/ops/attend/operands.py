"""What attention is given besides queries, and what it hands out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax

from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import PlanLayout

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


class Displaced(NamedTuple):
    """Window rows that a step displaced from the ring and that its tokens still see, one page of them.

    There are ``displaced_rows``, `size` being the window's: the row of request r at position p is
    ``(size - 1) * (r + 1) + query_start[r] + p - start``, `start` being the position of r's first token of the step.

    Attributes:
      rows: [1, 1, *page(rows)] of the window's format.
      positions: int32 [rows], the position each row holds, -1 for none.
    """

    rows: jax.Array
    positions: jax.Array


def displaced_rows(layout: PlanLayout, size: int) -> int:
    """How many rows ``Displaced`` has in a step of this layout, `size` being the window's."""
    return (size - 1) * layout.requests + layout.tokens


@dataclasses.dataclass(frozen=True)
class WindowRows:
    """Where sliding-window rows are stored.

    Attributes:
      window: [layers, slots, *page(ring)] of ``format``.
      positions: int32 [layers, slots, ring], the position each ring row holds.
      layer: int32 scalar, the layer's row of ``window``; out of range: no row is seen.
      format: how rows are stored.
      size: a token at position t sees positions t - size + 1 to t.
      displaced: rows that the step displaced and that its tokens still need; None: it displaced nothing.
    """

    window: jax.Array
    positions: jax.Array
    layer: jax.Array | int
    format: VectorFormat
    size: int
    displaced: Displaced | None


@dataclasses.dataclass(frozen=True)
class EntryRows:
    """Where compressed entries are stored, and which of them a token looks at.

    Attributes:
      pool: [layers, blocks, *page(128 / ratio)] of ``format``.
      block_table: int32 [slots, max_blocks].
      layer: int32 scalar, the layer's row of ``pool``; out of range: no entry is seen.
      ratio: tokens per entry. A token at position t sees entries below (t + 1) // ratio.
      format: how entries are stored.
      count: how many entries a token looks at, at most.
      indices: int32 [tokens, count], each token's entries in any order; below 0 or not visible: none; twice: counts
        twice. None: every visible entry below ``count``.
    """

    pool: jax.Array
    block_table: jax.Array
    layer: jax.Array | int
    ratio: int
    format: VectorFormat
    count: int
    indices: jax.Array | None


class Attended(NamedTuple):
    """The result of attention.

    Attributes:
      output: [tokens, heads, 512]; zeros for padding and where nothing is seen.
      lse: float32 [tokens, heads], natural logarithm of the sum over exp(scaled logits), without the sink; -inf where
        nothing is seen.
    """

    output: Float[Array, "tokens heads 512"]
    lse: Float32[Array, "tokens heads"]
