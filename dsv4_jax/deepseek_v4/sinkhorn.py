"""Sinkhorn's normalization of small positive matrices, which makes them (nearly) doubly stochastic.

On a GPU it is one kernel, by Pallas: as operations of XLA's own every iteration is a kernel, and some forty launches a
layer take longer than all that hyper-connections compute.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.kernel_codes import kernel_output

_TOKENS = 32  # of a program of the kernel, a thread for each
_Numbers = tuple[tuple[jax.Array, ...], ...]


def sinkhorn(matrices: jax.Array, iterations: int, eps: float) -> jax.Array:
    """The normalization of positive matrices, fp32 [T, n, n].

    Columns are divided by their sum plus ``eps`` ``iterations`` times, and between two such rounds rows are.
    """
    return jax.lax.platform_dependent(
        matrices,
        cuda=functools.partial(sinkhorn_by_kernel, iterations=iterations, eps=eps),
        default=functools.partial(sinkhorn_looped, iterations=iterations, eps=eps),
    )


def sinkhorn_looped(matrices: jax.Array, *, iterations: int, eps: float) -> jax.Array:
    """``sinkhorn`` as a loop."""

    def divide(made: jax.Array, axis: int) -> jax.Array:
        return made / (made.sum(axis, keepdims=True) + eps)

    return jax.lax.fori_loop(0, iterations - 1, lambda _, made: divide(divide(made, -1), -2), divide(matrices, -2))


def sinkhorn_by_kernel(matrices: jax.Array, *, iterations: int, eps: float, interpret: bool = False) -> jax.Array:
    """``sinkhorn`` in one kernel; ``interpret`` computes what it computes without compiling it, on any device."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        functools.partial(_normalize, iterations=iterations, eps=eps),
        grid=(-(-matrices.shape[0] // _TOKENS),),
        out_shape=kernel_output(matrices.shape, matrices.dtype, [matrices]),
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=interpret,
        name="sinkhorn",
    )(matrices)


def _normalize(matrices: Any, made: Any, *, iterations: int, eps: float) -> None:
    """A program: the matrices of _TOKENS tokens, each number of a matrix a vector over these."""
    from jax.experimental import pallas as pl

    tokens, n, _ = matrices.shape
    at = jnp.minimum(pl.program_id(0) * _TOKENS + jnp.arange(_TOKENS), tokens - 1)  # the last one fills up

    def divide_rows(x: _Numbers) -> _Numbers:
        return tuple(tuple(number / (sum(row[1:], row[0]) + eps) for number in row) for row in x)

    def divide_columns(x: _Numbers) -> _Numbers:
        return tuple(zip(*divide_rows(tuple(zip(*x, strict=True))), strict=True))

    x = tuple(tuple(matrices[at, row, column] for column in range(n)) for row in range(n))
    x = jax.lax.fori_loop(0, iterations - 1, lambda _, x: divide_columns(divide_rows(x)), divide_columns(x))
    for row in range(n):
        for column in range(n):
            made[at, row, column] = x[row][column]
