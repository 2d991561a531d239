"""Rows: what the gathers hand out."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Rows(NamedTuple):
    """Dense rows read out of a pool.

    Attributes:
      values: [queries, count, width], float32 or bfloat16; zeros where invalid.
      positions: int32 [queries, count]; a window row's position, an entry's first token, -1 where invalid.
      valid: bool [queries, count].
    """

    values: jax.Array
    positions: jax.Array
    valid: jax.Array
