"""What every part of the model uses: RMSNorm, a matrix product with a weight, SwiGLU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.block_fp8_products import block_fp8_products, multiplies_block_fp8
from dsv4_jax.deepseek_v4.weights import ExpertWeights, Matrix, expand


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | float = 1.0) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis, in fp32; x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight).astype(x.dtype)


def linear(x: jax.Array, weight: Matrix, *, dtype: Any = None) -> jax.Array:
    """Multiply x [..., in] by a weight [out, in]: [..., out] in ``dtype``, that of x by default.

    The weight is rounded to x's dtype, if at all: GPUs multiply few rows by the codes of a quantized one. Products are
    added up in fp32.
    """
    (product,) = linears(x, (weight,), dtype=dtype)
    return product


def linears(x: jax.Array, weights: Sequence[Matrix], *, dtype: Any = None) -> tuple[jax.Array, ...]:
    """``linear`` with each of the weights, on a GPU in one kernel where rows are few and all are ``BlockFp8``."""
    return tuple(product.astype(dtype or x.dtype) for product in _products(x, weights))


def grouped_linear(x: jax.Array, weight: Matrix) -> jax.Array:
    """Multiply x [..., groups, in] by a weight [groups * out, in], each group by its own rows: [..., groups, out]."""
    (product,) = _products(x, (weight,), (x.shape[-2],))
    return product.astype(x.dtype)


def _products(x: jax.Array, weights: Sequence[Matrix], groups: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
    """fp32 [..., *groups, out] of x [..., *groups, in] and every weight [groups * out, in]."""
    expanded = functools.partial(expanded_products, groups=groups)
    rows = x.reshape(-1, math.prod(groups), x.shape[-1])
    if multiplies_block_fp8(rows, weights):

        def by_codes(x: jax.Array, weights: Sequence[Matrix]) -> tuple[jax.Array, ...]:
            made = block_fp8_products(x.reshape(rows.shape), weights)
            return tuple(product.reshape(*x.shape[:-1], -1) for product in made)

        return jax.lax.platform_dependent(x, tuple(weights), cuda=by_codes, default=expanded)
    if len(rows) > 1:
        return expanded(x, weights)
    fused = functools.partial(fused_products, groups=groups)
    return tuple(
        expanded(x, (weight,))[0]
        if isinstance(weight, jax.Array)
        else jax.lax.platform_dependent(x, (weight,), cuda=fused, default=expanded)[0]
        for weight in weights
    )


def expanded_products(x: jax.Array, weights: Sequence[Matrix], groups: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
    """fp32 [..., *groups, out] of x [..., *groups, in] and every weight [groups * out, in], rounded to x's dtype."""
    equation = "...gi,goi->...go" if groups else "...i,oi->...o"
    return tuple(
        jnp.einsum(equation, x, numbers.reshape(*groups, -1, x.shape[-1]), preferred_element_type=jnp.float32)
        for numbers in (expand(weight, x.dtype) for weight in weights)
    )


def fused_products(x: jax.Array, weights: Sequence[Matrix], groups: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
    """``expanded_products`` of one row with quantized weights, without rounding them.

    A matrix product needs its weight expanded in memory. This is a sum, into which XLA fuses the expansion: one kernel
    for GPUs, which reads the codes and nothing else of that size.
    """
    wide = x.astype(jnp.float32)[..., None, :]
    return tuple(
        (wide * expand(weight, jnp.float32).reshape(*groups, -1, x.shape[-1])).sum(axis=-1) for weight in weights
    )


def swiglu(
    weights: ExpertWeights,
    x: jax.Array,
    limit: float,
    products: Callable[[jax.Array, Sequence[Matrix]], tuple[jax.Array, ...]] = _products,
) -> jax.Array:
    """One expert, [..., hidden] to the same: ``down(silu(min(gate x, limit)) * clip(up x, -limit, limit))``.

    ``products`` are fp32 [..., out] of x [..., in] and every weight [out, in].
    """
    gate, up = products(x, (weights.gate, weights.up))
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    (made,) = products((jax.nn.silu(gate) * up).astype(x.dtype), (weights.down,))
    return made.astype(x.dtype)
