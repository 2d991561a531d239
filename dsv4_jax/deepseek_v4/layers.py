"""What every part of the model uses: RMSNorm, a matrix product with a weight, SwiGLU."""

from __future__ import annotations

import functools
import math
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
    return _product(x, weight, weight.shape).astype(dtype or x.dtype)


def grouped_linear(x: jax.Array, weight: Matrix) -> jax.Array:
    """Multiply x [..., groups, in] by a weight [groups * out, in], each group by its own rows: [..., groups, out]."""
    groups, columns = x.shape[-2:]
    return _product(x, weight, (groups, weight.shape[0] // groups, columns)).astype(x.dtype)


def _product(x: jax.Array, weight: Matrix, shape: tuple[int, ...]) -> jax.Array:
    """fp32 [..., out] of x [..., in] and a weight that is given the shape [..., out, in]."""

    def expanded(x: jax.Array, weight: Matrix) -> jax.Array:
        numbers = expand(weight, x.dtype).reshape(shape)
        equation = "...i,oi->...o" if len(shape) == 2 else "...gi,goi->...go"
        return jnp.einsum(equation, x, numbers, preferred_element_type=jnp.float32)

    if isinstance(weight, jax.Array) or x.size * shape[-2] > math.prod(shape):
        return expanded(x, weight)
    # One row.
    return jax.lax.platform_dependent(x, weight, cuda=functools.partial(fused_product, shape=shape), default=expanded)


def fused_product(x: jax.Array, weight: Matrix, *, shape: tuple[int, ...]) -> jax.Array:
    """One row's product with a quantized weight, fp32, without rounding the weight.

    A matrix product needs its weight expanded in memory. This is a sum, into which XLA fuses the expansion: one kernel
    for GPUs, which reads the codes and nothing else of that size.
    """
    return (x.astype(jnp.float32)[..., None, :] * expand(weight, jnp.float32).reshape(shape)).sum(axis=-1)


def swiglu(weights: ExpertWeights, x: jax.Array, limit: float) -> jax.Array:
    """One expert, [..., hidden] to the same: ``down(silu(min(gate x, limit)) * clip(up x, -limit, limit))``."""
    gate = jnp.minimum(linear(x, weights.gate, dtype=jnp.float32), limit)
    up = jnp.clip(linear(x, weights.up, dtype=jnp.float32), -limit, limit)
    return linear((jax.nn.silu(gate) * up).astype(x.dtype), weights.down)
