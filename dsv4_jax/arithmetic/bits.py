"""Arrays as the integers of their bytes: what moves or compares floats that way changes no NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def bits_of(x: jax.Array) -> jax.Array:
    """The same bytes as unsigned integers of as many bits, x's shape."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
