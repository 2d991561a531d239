"""What every part of the model uses: RMSNorm, a matrix product with a weight, SwiGLU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.weights import ExpertWeights, Matrix, expand


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | float = 1.0) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis, in fp32; x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight).astype(x.dtype)


def linear(x: jax.Array, weight: Matrix, *, dtype: Any = None) -> jax.Array:
    """Multiply x [..., in] by a weight [out, in]: [..., out] in ``dtype``, that of x by default.

    The weight is rounded to x's dtype, and products are added up in fp32.
    """
    numbers = expand(weight, x.dtype)
    return jnp.einsum("...i,oi->...o", x, numbers, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def swiglu(weights: ExpertWeights, x: jax.Array, limit: float) -> jax.Array:
    """One expert, [..., hidden] to the same: ``down(silu(min(gate x, limit)) * clip(up x, -limit, limit))``."""
    gate = jnp.minimum(linear(x, weights.gate, dtype=jnp.float32), limit)
    up = jnp.clip(linear(x, weights.up, dtype=jnp.float32), -limit, limit)
    return linear((jax.nn.silu(gate) * up).astype(x.dtype), weights.down)
