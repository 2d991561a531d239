"""``BlockFp8`` weights on a GPU: a Pallas kernel that multiplies few rows by the codes as they are stored.

A program takes a block of a weight's rows, a part of its columns, and all rows of x: it reads codes, expands them in
registers to bfloat16, which is exact, has the tensor cores multiply, and multiplies the sums of each 128 columns by
their scale. So a weight is read once, and nothing is expanded in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.kernel_codes import E4M3, Blocks, kernel_output
from dsv4_jax.deepseek_v4.quantized import FP8_BLOCK, BlockFp8

_BLOCKS = Blocks(rows=64, columns=128, warps=4, stages=4)
_TOKENS = 64  # more would keep more in registers than there are
_PROGRAMS = 512  # four or so for each multiprocessor
_WORDS = FP8_BLOCK // E4M3.in_word


def multiplies_block_fp8(x: jax.Array, weights: Sequence[Any]) -> bool:
    """Whether ``block_fp8_products`` is for these: x of at most 64 tokens in bfloat16, and all weights ``BlockFp8`` of
    whole blocks.
    """
    tokens, groups, columns = x.shape
    return (
        x.dtype == jnp.bfloat16
        and 0 < tokens <= _TOKENS
        and columns % FP8_BLOCK == 0
        and all(isinstance(weight, BlockFp8) and weight.shape[0] % (groups * _BLOCKS.rows) == 0 for weight in weights)
    )


@functools.partial(jax.jit, static_argnames=("blocks", "splits", "interpret"))
def block_fp8_products(
    x: jax.Array,
    weights: Sequence[BlockFp8],
    *,
    blocks: Blocks | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """The product of x with each weight, fp32 [T, groups * out]; ``multiplies_block_fp8`` says for which.

    A code's product with x is exact and added up in fp32 before the scale is multiplied: weights are never rounded.
    Codes for NaN are taken for 480, scales for NaN make NaN. Temporary memory: fp32
    [parts, T, out] of each weight, whose columns are summed in so many parts.

    Args:
      x: bfloat16 [T, groups, in].
      weights: [groups * out, in] each, every group's by that group of x.
      blocks: for measuring others.
      splits: in how many parts columns are summed, as ``blocks``.
      interpret: compute what the kernel computes without compiling it, on any device.

    Raises:
      ValueError: rows or columns are not whole blocks.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    tokens, groups, columns = x.shape
    blocks = blocks or _BLOCKS
    tile = max(8, 1 << (tokens - 1).bit_length())
    programs = sum(weight.shape[0] // blocks.rows for weight in weights)
    splits = splits or _splits(programs, tile, columns, blocks)
    if columns % (splits * blocks.columns) or any(weight.shape[0] % (groups * blocks.rows) for weight in weights):
        raise ValueError(
            f"{blocks} and {splits} parts do not divide weights {[weight.shape for weight in weights]} of {groups} "
            "groups; choose blocks and parts that rows and columns are multiples of."
        )
    pairs = x.reshape(tokens, groups, -1, E4M3.in_word)
    operands = [
        jax.lax.bitcast_convert_type(pairs, jnp.uint32),  # of the columns of a word of codes
        *(array for weight in weights for array in (E4M3.words(weight.codes), weight.scales)),
    ]
    sums = pl.pallas_call(
        functools.partial(_multiply, blocks=blocks, interpret=interpret),
        grid=(programs, splits),
        out_shape=[
            kernel_output((splits, tile, weight.shape[0]), jnp.float32, (x, weight.codes, weight.scales))
            for weight in weights  # of which one may be split over devices, and another not
        ],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="block_fp8_products",
    )(*operands)
    return tuple(parts.sum(axis=0)[:tokens] for parts in sums)


def _splits(programs: int, tile: int, columns: int, blocks: Blocks) -> int:
    """In how many parts columns are summed: programs enough for the device, and at most half as many bytes of sums as
    of codes.
    """
    most, splits = min(_PROGRAMS // programs, columns // (8 * tile)), 1
    while 2 * splits <= most and columns % (2 * splits * blocks.columns) == 0:
        splits *= 2
    return splits


def _multiply(x: Any, *refs: Any, blocks: Blocks, interpret: bool) -> None:
    """A program: x as pairs [T, groups, in / 2], every weight's codes and scales, and its sums [parts, tile, out]."""
    from jax.experimental import pallas as pl

    made = refs[len(refs) * 2 // 3 :]
    block, part = pl.program_id(0), pl.program_id(1)
    parts, tile, _ = made[0].shape
    tokens = jnp.minimum(jnp.arange(tile), x.shape[0] - 1)  # the last one also fills the tile
    begin = 0
    for codes, scales, sums in zip(refs[0 : 2 * len(made) : 2], refs[1 : 2 * len(made) : 2], made, strict=True):
        first = (block - begin) * blocks.rows
        begin += codes.shape[0] // blocks.rows

        @pl.when((first >= 0) & (block < begin))
        def _(codes: Any = codes, scales: Any = scales, sums: Any = sums, first: jax.Array = first) -> None:
            group = first // (codes.shape[0] // x.shape[1])
            turns = codes.shape[1] // (_WORDS * parts)
            product = _product(
                codes, scales, first, part * turns, turns, lambda words: x[tokens, group, words],
                rows=tile, blocks=blocks, interpret=interpret,
            )  # fmt: skip
            sums[part, :, pl.ds(first, blocks.rows)] = product.T


def _product(
    codes: Any,
    scales: Any,
    first: jax.Array,
    begin: jax.Array,
    turns: int,
    read_x: Callable[[Any], jax.Array],
    *,
    rows: int,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:
    """A weight's outputs from the first one on, of some of its blocks of columns: fp32 [blocks.rows, rows]."""
    from jax.experimental import pallas as pl

    outputs, at_once = pl.ds(first, blocks.rows), blocks.columns // FP8_BLOCK

    def turn(index: jax.Array, total: jax.Array) -> jax.Array:
        for block in range(at_once):
            column = begin + index * at_once + block
            words = pl.ds(column * _WORDS, _WORDS)
            read, pairs = codes[outputs, words], read_x(words)
            product = jnp.zeros_like(total)
            for place in range(E4M3.in_word):
                product += jax.lax.dot_general(
                    E4M3.values(read, place, interpret=interpret),
                    jax.lax.bitcast_convert_type((pairs >> 16 * place).astype(jnp.uint16), jnp.bfloat16),
                    (((1,), (1,)), ((), ())),
                    preferred_element_type=jnp.float32,
                )
            total += product * _scale_value(scales[first // FP8_BLOCK, column])
        return total

    return jax.lax.fori_loop(0, turns // at_once, turn, jnp.zeros((blocks.rows, rows), jnp.float32))


def _scale_value(scale: jax.Array) -> jax.Array:
    """A UE8M0 byte or a float32 as float32; 2^-127 is taken for zero."""
    if scale.dtype != jnp.uint8:
        return scale
    value = jax.lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(scale == 255, jnp.float32(jnp.nan), value)
