"""What ops take and hand out: rows read, rows and compressor inputs to store, and the arrays they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax

from dsv4_jax.spec.rotary import Rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32


class Rows(NamedTuple):
    """Dense rows read out of a pool.

    Attributes:
      values: [queries, count, width], float32 or bfloat16; zeros where invalid.
      positions: int32 [queries, count]; a window row's position, an entry's first token, -1 where invalid.
      valid: bool [queries, count].
    """

    values: Float[Array, "queries count width"]
    positions: Int32[Array, "queries count"]
    valid: Bool[Array, "queries count"]


class RawRows(NamedTuple):
    """Window rows as they come from the projection, with what finishes them: RMSNorm, then RoPE.

    Attributes:
      rows: [tokens, 512] float32 or bfloat16.
      norm_weight: [512] float32 or bfloat16.
      rotary: of the tokens, from ``token_rotary``; float32 [tokens, 32] each.
    """

    rows: Float[Array, "tokens 512"]
    norm_weight: Float[Array, " 512"]
    rotary: Rotary


class CompressorInputs(NamedTuple):
    """What a layer's compressor (or its indexer's) made of a step's tokens, and the weights that finish an entry.

    Attributes:
      kv: [tokens, columns] float32 or bfloat16. CSA: overlap half, then current half (columns 1024, indexer 256);
        HCA: 512.
      gate: as kv, without the position bias; kv and gate may differ in dtype.
      position_bias: [ratio, columns] float32 or bfloat16, added to the gate.
      norm_weight: [width] float32 or bfloat16, of the entries' RMSNorm.
      rotary: of the closing entries, from ``closing_rotary``.
    """

    kv: Float[Array, "tokens columns"]
    gate: Float[Array, "tokens columns"]
    position_bias: Float[Array, "ratio columns"]
    norm_weight: Float[Array, " width"]
    rotary: Rotary


class Window(NamedTuple):
    """The sliding window of a cache: window [layers, slots, *page(ring)], positions int32 [layers, slots, ring]."""

    window: jax.Array
    positions: jax.Array


class Compressed(NamedTuple):
    """A pool and the tail that feeds it.

    Attributes:
      pool: [layers, blocks, *page].
      tail: float32 [layers, slots, 2 (kv, score), rows, width], or running [layers, slots, 3 states, 512].
    """

    pool: jax.Array
    tail: jax.Array
