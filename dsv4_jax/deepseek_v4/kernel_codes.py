"""What the Pallas kernels that multiply codes share: how they read codes, and how a code becomes a bfloat16.

A kernel reads codes as words of 16 bits, of adjacent columns. A register holds two words, and what is done to one is
done to both: so a product is taken of all words' lowest codes, then of the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Blocks(NamedTuple):
    """What a program of a kernel takes at a time."""

    rows: int  # of each weight: the outputs that a program makes
    columns: int  # of each weight, in one turn of the program's loop
    warps: int
    stages: int  # turns that are read or computed at a time, and one more


def kernel_output(shape: tuple[int, ...], dtype: Any, operands: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """An output of a kernel, which within ``jax.shard_map`` is another on every device where any operand is."""
    any_of_all = jax.eval_shape(lambda arrays: sum(array.astype(jnp.float32).sum() for array in arrays), operands)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=any_of_all.manual_axis_type)


class CodeFormat(NamedTuple):
    """A sign bit, an exponent and a fraction."""

    bits: int  # 16 / bits codes are a word
    fraction: int
    bias: int

    @property
    def in_word(self) -> int:
        """Codes of a word."""
        return 16 // self.bits

    def words(self, codes: jax.Array) -> jax.Array:
        """Codes of 8 bits, or pairs of 4 in uint8 [..., n], as uint16 [..., n / 2], which moves nothing."""
        return jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], -1, 2), jnp.uint16)

    def values(self, words: jax.Array, place: int, *, interpret: bool) -> jax.Array:
        """The value of one code of each word, bfloat16 and exact; place 0 are the lowest bits.

        For use in a kernel. NaN, which E4M3 has and no quantizer makes of numbers, is taken for 480, the number that is
        missing in its place.
        """
        from jax.experimental.pallas import triton

        if interpret:
            code = words >> self.bits * place & (1 << self.bits) - 1
            magnitude, sign = code & (1 << self.bits - 1) - 1, code >> self.bits - 1
            bits = magnitude << 10 - self.fraction | sign << 15
            halves = jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
            return (halves * np.float32(2.0 ** (15 - self.bias))).astype(jnp.bfloat16)
        # The code's sign to bit 15, and its exponent and fraction to where a bfloat16 has the last bits of its exponent
        # and the first ones of its fraction: that is the number but for the exponent's bias, which is 127 there, also
        # for the numbers below the normal ones. Two words at a time, which Pallas has no other way to say.
        mask = ((1 << self.bits - 1) - 1) << 7 - self.fraction
        left, sign_left = 7 - self.fraction - self.bits * place, 16 - self.bits * (place + 1)
        (bits,) = triton.elementwise_inline_asm(
            "{ .reg .b32 magnitude, sign;"
            f"  {'shl' if left > 0 else 'shr'}.b32 magnitude, $1, {abs(left)};"
            f"  shl.b32 sign, $1, {sign_left};"
            f"  and.b32 magnitude, magnitude, {mask << 16 | mask:#x};"
            "  lop3.b32 $0, sign, 0x80008000, magnitude, 0xEA; }",  # sign & mask | magnitude
            args=[words],
            constraints="=r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
        )
        return bits * jnp.bfloat16(2.0 ** (127 - self.bias))


E2M1 = CodeFormat(bits=4, fraction=1, bias=1)
E4M3 = CodeFormat(bits=8, fraction=3, bias=7)
