"""Experts in FP4 on a GPU: two Pallas kernels that multiply the codes as they are stored.

The first makes ``silu(gate x) * up x``, the second multiplies that by ``down``. A program takes a block of an expert's
rows and a tile of the tokens that chose it: it reads codes, expands them in registers to bfloat16, which is exact, and
has the tensor cores multiply. So a tile reads its expert once, however many rows it has, and nothing is expanded in
memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.deepseek_v4.kernel_codes import E2M1, Blocks, kernel_output
from dsv4_jax.deepseek_v4.quantized import FP4_GROUP, PackedFp4
from dsv4_jax.deepseek_v4.weights import ExpertWeights

# 64 rows are what the tensor cores multiply at once. The codes and scales of a turn are 17 KB with gate and up, so the
# four or five programs of a multiprocessor wait for about as many bytes as its share of the memory needs on the way.
_BLOCKS = Blocks(rows=64, columns=256, warps=4, stages=3)
_BLOCKS_OF_WIDE_TILES = _BLOCKS._replace(columns=128)  # of more than 32 rows, whose x is the most of what is read


def multiplies_packed(weights: ExpertWeights, x: jax.Array) -> bool:
    """Whether ``packed_experts`` is for these: weights that are all ``PackedFp4``, of whole blocks, and bfloat16 x."""
    packed = all(isinstance(weight, PackedFp4) for weight in weights)
    return packed and x.dtype == jnp.bfloat16 and not any(size % _BLOCKS.columns for size in weights.gate.shape[1:])


def packed_experts(
    weights: ExpertWeights,
    x: jax.Array,
    expert_of_tile: jax.Array,
    token_of_row: jax.Array,
    *,
    limit: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The experts' outputs for all rows of all tiles, bfloat16 [tiles, tile rows, hidden].

    What ``swiglu`` rounds is rounded to bfloat16: the product of gate and up, and the output. Sums are fp32, in another
    order than there. Temporary memory: bfloat16 [tiles, tile rows, width].

    Args:
      weights: of all experts, stacked; ``multiplies_packed`` says which.
      x: bfloat16 [T, hidden].
      expert_of_tile: int32 [tiles]; the number of experts for a tile of nobody, which costs next to nothing and whose
        output is never written.
      token_of_row: int32 [tiles, tile rows], below T in every row; tile rows are a power of two, 8 at least.
      limit: of the SwiGLU.
      blocks: for measuring others.
      interpret: compute what the kernels compute without compiling them, on any device.
    """
    _, width, hidden = weights.gate.shape
    rows = token_of_row.shape
    blocks = blocks or (_BLOCKS if rows[1] <= 32 else _BLOCKS_OF_WIDE_TILES)
    call = functools.partial(_call, expert_of_tile, blocks=blocks, interpret=interpret)
    gated = call(
        functools.partial(_gate_and_up, limit=limit),
        (token_of_row, x.reshape(len(x), -1, E2M1.in_word).swapaxes(1, 2)),  # one place of every word side by side
        (weights.gate, weights.up),
        (*rows, E2M1.in_word, width // E2M1.in_word),
    )
    return call(_down, (gated,), (weights.down,), (*rows, hidden))


def _call(
    expert_of_tile: jax.Array,
    kernel: Callable[..., None],
    rows: tuple[jax.Array, ...],
    weights: tuple[Any, ...],
    shape: tuple[int, ...],
    *,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:
    """A kernel with a program for every block of the weights' rows and every tile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    outputs = weights[0].shape[1]
    codes_and_scales = [array for weight in weights for array in (E2M1.words(weight.codes), weight.scales)]
    operands = [expert_of_tile, *rows, *codes_and_scales]
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, interpret=interpret),
        grid=(outputs // blocks.rows, len(expert_of_tile)),
        out_shape=kernel_output(shape, jnp.bfloat16, operands),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
    )(*operands)


def _gate_and_up(
    experts: Any, tokens: Any, x: Any, gate: Any, gate_scales: Any, up: Any, up_scales: Any, gated: Any,
    *, limit: float, blocks: Blocks, interpret: bool,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    first, tile = pl.program_id(0) * blocks.rows, pl.program_id(1)
    expert = experts[tile]

    @pl.when(expert < gate.shape[0])
    def _() -> None:
        ours = tokens[tile, :]
        by_gate, by_up = _products(
            ((gate, gate_scales), (up, up_scales)), expert, first, lambda code, words: x[ours, code, words],
            rows=len(ours), blocks=blocks, interpret=interpret,
        )  # fmt: skip
        by_gate, by_up = jnp.minimum(by_gate, limit), jnp.clip(by_up, -limit, limit)
        made = (by_gate / (1 + jnp.exp(-by_gate)) * by_up).astype(jnp.bfloat16)
        columns = first + jnp.arange(blocks.rows)
        gated[tile, :, columns % E2M1.in_word, columns // E2M1.in_word] = made  # as x is laid out


def _down(
    experts: Any, gated: Any, down: Any, scales: Any, made: Any, *, blocks: Blocks, interpret: bool
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    first, tile = pl.program_id(0) * blocks.rows, pl.program_id(1)
    expert = experts[tile]

    @pl.when(expert < down.shape[0])
    def _() -> None:
        (product,) = _products(
            ((down, scales),), expert, first, lambda code, words: gated[tile, :, code, words],
            rows=gated.shape[1], blocks=blocks, interpret=interpret,
        )  # fmt: skip
        made[tile, :, pl.ds(first, blocks.rows)] = product.astype(jnp.bfloat16).T


def _products(
    weights: tuple[tuple[Any, Any], ...],
    expert: jax.Array,
    first: jax.Array,
    read_x: Callable[[int, Any], jax.Array],
    *,
    rows: int,
    blocks: Blocks,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """An expert's outputs from the first one on: fp32 [blocks.rows, rows] for each weight, [codes, scales]."""
    from jax.experimental import pallas as pl

    outputs = pl.ds(first, blocks.rows)
    words, groups = blocks.columns // E2M1.in_word, blocks.columns // FP4_GROUP

    def turn(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        taken = pl.ds(index * words, words)
        x = [read_x(code, taken) for code in range(E2M1.in_word)]
        read = [
            (codes[expert, outputs, taken], _scale_values(scales[expert, outputs, pl.ds(index * groups, groups)]))
            for codes, scales in weights
        ]
        made = []
        for (codes, scales), total in zip(read, sums, strict=True):
            for code in range(E2M1.in_word):
                numbers = E2M1.values(codes, code, interpret=interpret) * scales
                total += jax.lax.dot_general(
                    numbers, x[code], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
            made.append(total)
        return tuple(made)

    zeros = jnp.zeros((blocks.rows, rows), jnp.float32)
    return jax.lax.fori_loop(0, weights[0][0].shape[2] // words, turn, (zeros,) * len(weights))


def _scale_values(scales: jax.Array) -> jax.Array:
    """UE8M0 bytes [n, groups] as bfloat16 for every word, [n, words]; 2^-127 is taken for zero."""
    bits = scales.astype(jnp.uint16)
    bits = jnp.where(bits == 255, jnp.uint16(0x7FC0), bits << 7)
    values = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    rows, groups = values.shape
    return jnp.broadcast_to(values[:, :, None], (rows, groups, FP4_GROUP // E2M1.in_word)).reshape(rows, -1)
